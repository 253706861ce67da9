"""What a run leaves beside its checkpoints: log.csv, settings.py and, if asked for, wandb's record.

    step,seconds,bound,gpt,joint,val_bound,val_bound_error,val_gpt,...,lr,tokens_per_second
    250,61.3,2.563,1.921,2.104,2.5412,0.021,1.9034,...,0.0028,4102

One row per step that was reported or evaluated; a cell is empty where nothing was measured. The
terms of the loss, in nats per token, are means over the training steps since the last row that has
them, or since a resume; with val_ they are of validation text, with standard errors. There `joint`
is of blocks masked completely, in training of all that the noise masks; and under "cascade"
weighting or clipped noise the training `bound` is none. `seconds` are of training, all restarts
together. A resumed run drops torn rows and rows past its checkpoint.
"""

import os
from pathlib import Path

from util.configurator import SettingsError, first_line, optional, public, writing

TERMS = ("bound", "gpt", "joint")
VAL = tuple(f"val_{name}{error}" for name in TERMS for error in ("", "_error"))
COLUMNS = ("step", "seconds", *TERMS, *VAL, "lr", "tokens_per_second")


def write_settings(path, settings):
    """A config file of a run's settings, without how it was started: the next start decides."""
    lines = ["# the settings of this run: python train.py FOLDER/settings.py starts it again"]
    for key, value in public(settings).items():
        if key not in ("init_from", "overwrite"):
            text = repr(value)  # of inf and nan that is no Python
            lines.append(f"{key} = " + (f"float('{text}')" if text in ("inf", "nan") else text))
    path.write_text("\n".join(lines) + "\n")


def start_wandb(folder, settings):
    """A wandb run that keeps its files in folder/wandb; a resumed run goes on in the same one."""
    wandb = optional("wandb", "--wandb=true")
    (folder / "wandb").mkdir(exist_ok=True)
    known, again = folder / "wandb" / "id", {}
    if settings["init_from"] == "resume" and known.exists():
        again = {"id": known.read_text(), "resume": "allow"}
    try:
        run = wandb.init(project="cascade", name=folder.resolve().name, dir=folder,
                   config=public(settings), **again)
    except wandb.Error as e:
        raise SettingsError(f"wandb does not start ({first_line(e)}): WANDB_MODE=offline keeps its "
                            "record here, and without --wandb=true there is log.csv") from None
    known.write_text(run.id)
    return run


class Log:
    """The log of a run whose checkpoint has `step` steps. A fresh run's takes the name log.csv, and
    the place of what stood there, with the first checkpoint: `publish`."""

    def __init__(self, settings, step):
        self.path, self.row, self.wandb = Path(settings["out_dir"]) / "log.csv", {}, None
        self.deaf = None  # the error of a standard output that takes no more: closed, or full
        with writing(self.path):
            write_settings(self.path.with_name("settings.py.tmp"), settings)
            old = self.path.read_bytes() if step and self.path.exists() else b""
            self.file = open(f"{self.path}.tmp", "wb")
            self.start = self.end = self.file.write((",".join(COLUMNS) + "\n").encode())
            for row in old.splitlines(keepends=True):
                cells = row.decode(errors="replace").strip().split(",")
                whole = row.endswith(b"\n") and len(cells) == len(COLUMNS) and cells[0].isdecimal()
                if whole and int(cells[0]) <= step:
                    self.start, self.end = self.end, self.end + self.file.write(row)
                    self.row = dict(zip(COLUMNS, cells, strict=True))
            self.sync()
            if step:
                self.publish()
            if settings["wandb"]:
                self.wandb = start_wandb(self.path.parent, settings)

    def publish(self):
        """Replace the log and the settings of the run that stood here before, if they still do."""
        if self.file.name.endswith(".tmp"):
            self.file.close()
            for path in (self.path.with_name("settings.py"), self.path):
                os.replace(f"{path}.tmp", path)
            self.file = open(self.path, "r+b")

    def write(self, step, **values):
        """Numbers of `step`, by column: added to its row where that is the last, else a new row."""
        if step != int(self.row.get("step", -1)):
            self.row, self.start = {"step": step}, self.end
        self.row |= {name: f"{value:.8g}" for name, value in values.items()}
        line = (",".join(str(self.row.get(c, "")) for c in COLUMNS) + "\n").encode()
        with writing(self.path):
            self.file.seek(self.start)
            self.file.write(line)
            self.file.truncate()
            self.file.flush()
        self.end = self.start + len(line)
        if self.wandb:
            self.wandb.log(values, step=step)

    def validated(self, step, val):
        """The validation terms, {name: (mean, standard error)}."""
        self.write(step, **{f"val_{name}": mean for name, (mean, _) in val.items()},
                   **{f"val_{name}_error": error for name, (_, error) in val.items()})

    def report(self, step, max_steps, terms, val, lr, rate, mfu, seconds, progress):
        """One aligned line and a row: the training terms, in brackets the last validation's."""
        self.write(step, seconds=seconds, lr=lr, tokens_per_second=rate, **terms)
        speed = f"{rate:5.0f} tok/s" if rate < 1e4 else f"{rate / 1e3:4.0f}k tok/s"
        speed += f" | mfu {mfu:3.0%}" if mfu else ""
        left = seconds / 60 / max(progress, 1e-9) * (1 - progress)
        shown = [f"{name} {terms[name]:.3f} ({f'{val[name][0]:.3f}' if val else '  -  '})"
                 for name in terms]
        try:
            print(f"step {step:6d}" + (f"/{max_steps}" if max_steps else ""), *shown,
                  f"lr {lr:.1e}", speed, f"eta {left:.1f}m", sep=" | ", flush=True)
        except OSError as e:  # the run is to be saved, not to die in the middle of a step
            self.deaf = e

    def sync(self):
        """To the disk itself, before a checkpoint that relies on these rows."""
        with writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


class Silent:
    """The log of every process but the main one."""

    deaf = None

    def __getattr__(self, name):
        return lambda *args, **kwargs: None
