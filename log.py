"""What a run leaves beside its checkpoints: log.csv, settings.py and, if asked for, wandb's record.

    step,seconds,loss,val,val_error,lr,tokens_per_second
    250,61.3,2.563,2.5412,0.021,0.0028,4102

One row per step that was reported or evaluated; a cell is empty where nothing was measured. `loss`
is the mean training loss since the row before, `val` the validation bound (objective "ar": the
exact NLL) with its standard error, all in nats per token; `seconds` are of training, all restarts
together. A resumed run cuts the rows after its checkpoint and goes on, so no step stands twice.
"""

import os
from pathlib import Path

from configurator import SettingsError, public

COLUMNS = ("step", "seconds", "loss", "val", "val_error", "lr", "tokens_per_second")
SETTINGS_HEAD = "# the settings of this run: python train.py FOLDER/settings.py starts it again"


def held(folder):
    """The first file in `folder` that a fresh run would replace and should not unasked, or None.

    Any checkpoint, a log with rows, and files of those names that are none of ours.
    """
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            return name
    for name, ours in (("log.csv", ",".join(COLUMNS) + "\n"), ("settings.py", SETTINGS_HEAD)):
        if (folder / name).exists():
            text = (folder / name).read_text(errors="replace")
            if text and (text != ours if name == "log.csv" else not text.startswith(ours)):
                return name
    return None


def write_settings(path, settings):
    """A config file of a run's settings, for `python train.py out/nano/settings.py` to run again.

    Left out is how it was started (init_from, overwrite): the next start decides that anew.
    """
    lines = [SETTINGS_HEAD]
    for key, value in public(settings).items():
        if key not in ("init_from", "overwrite"):
            text = repr(value)  # of inf and nan that is no Python
            lines.append(f"{key} = " + (f"float('{text}')" if text in ("inf", "nan") else text))
    path.write_text("\n".join(lines) + "\n")


def start_wandb(folder, settings):
    """A wandb run that keeps its files in folder/wandb; a resumed run goes on in the same one."""
    try:
        from wandb import Error, init
    except ImportError:
        raise SettingsError("--wandb=true needs wandb: pip install wandb") from None
    (folder / "wandb").mkdir(exist_ok=True)
    known = folder / "wandb" / "id"
    resumed = settings["init_from"] == "resume" and known.exists()
    try:
        run = init(
            project="cascade", name=folder.resolve().name, dir=folder, config=public(settings),
            id=known.read_text() if resumed else None, resume="allow" if resumed else None,
        )
    except Error as e:
        raise SettingsError(
            f"wandb does not start ({str(e).splitlines()[0]}): WANDB_MODE=offline keeps its record "
            "here, and without --wandb=true there is log.csv"
        ) from None
    known.write_text(run.id)
    return run


class Log:
    """The log of a run whose checkpoint has `step` steps. For the main process alone."""

    def __init__(self, settings, step):
        self.path, self.row, self.wandb = Path(settings["out_dir"]) / "log.csv", {}, None
        try:
            write_settings(self.path.with_name("settings.py"), settings)
            self.file = open(self.path, "r+b" if step and self.path.exists() else "w+b")
            self.cut(step)
            if settings["wandb"]:
                self.wandb = start_wandb(self.path.parent, settings)
        except OSError as e:
            raise self.refusal(e) from None

    def refusal(self, e):
        return SettingsError(
            f"cannot write {self.path} ({e.strerror}): free some space or choose another --out_dir"
        )

    def cut(self, step):
        """Keep the header and the whole rows up to `step`: what a kill tore or outran goes."""
        header = ",".join(COLUMNS) + "\n"
        if self.file.readline().decode(errors="replace") != header:
            if self.path.stat().st_size:
                raise SettingsError(f"{self.path} has other columns than {header.strip()}: move it")
            self.file.write(header.encode())
        self.start = self.end = len(header)
        while (line := self.file.readline()).endswith(b"\n"):
            row = dict(zip(COLUMNS, line.decode().strip().split(","), strict=True))
            if int(row["step"]) > step:
                break
            self.row = {**row, "step": int(row["step"])}
            self.start, self.end = self.end, self.end + len(line)
        self.file.truncate(self.end)
        self.file.flush()

    def write(self, step, **values):
        """Numbers of `step`, by column: added to its row where that is the last, else a new row."""
        if step != self.row.get("step"):
            self.row, self.start = {"step": step}, self.end
        self.row |= {name: f"{value:.8g}" for name, value in values.items()}
        line = (",".join(str(self.row.get(c, "")) for c in COLUMNS) + "\n").encode()
        try:
            self.file.seek(self.start)
            self.file.write(line)
            self.file.truncate()
            self.file.flush()
        except OSError as e:
            raise self.refusal(e) from None
        self.end = self.start + len(line)
        if self.wandb:
            self.wandb.log(values, step=step)

    def sync(self):
        """To the disk itself, before a checkpoint that relies on these rows."""
        try:
            os.fsync(self.file.fileno())
        except OSError as e:
            raise self.refusal(e) from None

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()
