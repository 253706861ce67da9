"""Checkpoints: one file of tensors and plain values, which carries all that rebuilds its model.

    {"format": 1, "config": {...}, "settings": {...}, "meta": {...}, "model": {name: tensor},
     "optimizers": [...], "step": int, "seconds": float, "val": {term: (mean, standard error)},
     "final": the same on more windows, "best": float, "best_step": int,
     "torch": "2.13.0", "digest": sha256 of everything else}

`meta` is the dataset's meta.json, to decode text and to know the data again. The file may be a
stranger's: it cannot run code (weights_only=True), and `check_state` is the one door.
"""

import math
import os
import re
import sys
import warnings
import zipfile
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path

import torch

from model import CascadeConfig, CascadeLM
from util import hf
from util.configurator import SettingsError, first_line, public, writing
from util.dataset import identity
from util.shard import is_plain, load_whole

FORMAT = 1
FIELDS = {"config": dict, "settings": dict, "meta": dict, "model": dict, "optimizers": list,
          "step": int, "seconds": float, "val": dict, "final": dict, "best": float,
          "best_step": int}


def digest(value, h=None):
    """sha256 over a nest of dicts, lists, plain values and tensors (dtype, shape and bytes)."""
    h = h or sha256()
    if isinstance(value, torch.Tensor):
        h.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        h.update(f"dict {len(value)}".encode())
        for key in sorted(value, key=str):
            digest(key, h)
            digest(value[key], h)
    elif isinstance(value, (list, tuple)):
        h.update(f"list {len(value)}".encode())
        for item in value:
            digest(item, h)
    else:
        h.update(f"{type(value).__name__} {value!r}".encode())
    return h.hexdigest()


def leaves(value):
    """Every part of a nest: containers, keys, tensors, plain values."""
    yield value
    if isinstance(value, (dict, list, tuple)):
        for part in (*value, *(value.values() if isinstance(value, dict) else ())):
            yield from leaves(part)


def all_finite(value):
    """Whether every floating-point tensor in a nest of dicts and lists is finite throughout."""
    return all(bool(x.isfinite().all()) for x in leaves(value)
               if isinstance(x, torch.Tensor) and x.is_floating_point())


def save_checkpoint(path, state, *copies, before=lambda: None):
    """Write `state` so that `path`, and each of its `copies`, always hold a complete checkpoint,
    the old one or the new: temporary files, flush to disk, `before()`, and the renames. Raises
    SettingsError where the disk refuses; the old files then still stand."""
    state = {**state, "format": FORMAT, "torch": str(torch.__version__)}
    state["digest"] = digest(state)
    paths = [Path(p) for p in (*copies, path)]  # `path` last: what a run resumes from
    temporary = [p.with_name(p.name + ".tmp") for p in paths]
    try:
        with writing(path, RuntimeError):  # that is what torch's zip writer makes of a full disk
            for name in temporary:
                with open(name, "wb") as f:
                    torch.save(state, f)
                    f.flush()
                    os.fsync(f.fileno())
            before()
            for name, p in zip(temporary, paths, strict=True):
                os.replace(name, p)
    except SettingsError:
        for name in temporary:
            name.unlink(missing_ok=True)
        raise


def find_checkpoint(where):
    """The file meant by an out_dir or a path: out_dir/best.pt, else out_dir/last.pt."""
    for path in (Path(where), Path(where, "best.pt"), Path(where, "last.pt")):
        if os.path.isfile(path):
            return path
    raise SettingsError(f"no checkpoint in {where}: python train.py --out_dir={where} makes one")


def check_state(state, size):
    """ValueError, or what a wrong type raises, unless `state`, of a file of `size` bytes, is what
    save_checkpoint writes of a run. The cheap comes first: nothing grows beyond the file's size."""
    def must(good, otherwise):
        if not good:
            raise ValueError(otherwise)

    room = 2 * size  # tied weights stand twice
    for x in leaves(state):
        room -= x.nbytes if isinstance(x, torch.Tensor) else len(x) if isinstance(x, str) else 1
        must(room >= 0, "it unfolds to more than its size")
    must(isinstance(state, dict) and state.get("format") == FORMAT,
         "not a CASCADE checkpoint of this version")
    must(digest({k: v for k, v in state.items() if k != "digest"}) == state.get("digest"),
         "its digest does not match its contents")
    for name, kind in FIELDS.items():
        must(isinstance(state.get(name), kind) and type(state[name]) is not bool,
             f"its {name} is missing or no {kind.__name__}")
    figures = [*state["val"].values(), *state["final"].values(), (state["seconds"], 0.0)]
    must(all(math.isfinite(mean) and math.isfinite(error) for mean, error in figures)
         and 0 <= state["best_step"] <= state["step"] < 2**53 and not math.isnan(state["best"])
         and public(state["settings"]) == state["settings"], "its figures make no sense")
    c, model = CascadeConfig(**state["config"]), state["model"]
    for f in fields(c):
        value = getattr(c, f.name)
        must(type(value) is f.type and (f.type is not float or 0 < value < math.inf),
             f"its config's {f.name} makes no sense")
    must(all(map(is_plain, model.values())), "its weights are no float32 tensors")
    local = c.local_hidden * (4 + c.local_window) // 4 if c.local_window else 0
    layers = c.n_layer * max(c.n_head * c.head_dim, c.n_hidden)
    rows = max(layers, c.vocab_size, local, layers * c.draft_rank // c.n_embd,
               c.n_layer * c.draft_rank)
    must(rows * c.n_embd <= sum(x.numel() for x in model.values()) and c.seq_len <= 2**20
         and c.seq_len * c.head_dim <= 2**28, "its config is larger than its tensors")
    must(state["meta"].get("vocab_size") == c.vocab_size, "its vocabulary is not its config's")
    must(all_finite([model, state["optimizers"]]), "not all of its numbers are finite")


def load_checkpoint(path):
    """The state that save_checkpoint wrote, on the CPU; SettingsError if it is anything else."""
    try:
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > size:
                raise ValueError("it is compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what is about to be refused
            state = torch.load(path, map_location="cpu", weights_only=True)
        check_state(state, size)
    except Exception as e:  # there is no telling what a foreign file makes its readers raise
        # torch's own advice for a refused pickle is to load it unsafely: not to be repeated
        told = isinstance(e, (ValueError, OSError, RuntimeError, zipfile.BadZipFile))
        raise SettingsError(f"{path} is damaged or no checkpoint ("
                            f"{first_line(e) if told else type(e).__name__}): use another, or "
                            "train again") from None
    return state


def load_model(where, device="cpu"):
    """(model in evaluation mode, state) of an out_dir or a checkpoint file."""
    state = load_checkpoint(find_checkpoint(where))
    model = CascadeLM(CascadeConfig(**state["config"]))
    load_whole(model, [], {**state, "optimizers": []})
    return model.to(device).eval(), state


# ---- starting and resuming a run ---------------------------------------------------------------

# what weights leave no choice of; the other fields of CascadeConfig are free, or of what drafts
FIXED = tuple(name for name in hf.SHAPE if name != "vocab_size")


def load_source(s):
    """What the setting init_from brings: (fields of CascadeConfig, weights, meta) of another run,
    its folder or checkpoint; without meta of a Hugging Face folder; the fields alone of a run to be
    resumed; nothing from scratch."""
    if s.init_from.startswith("hf:"):
        return *hf.read_folder(s.init_from[3:], s.seq_len), None
    resume, last = s.init_from == "resume", Path(s.out_dir, "last.pt")
    if s.init_from == "scratch" or (resume and not last.is_file()):  # check_out_dir will say so
        return {}, None, None
    state = load_checkpoint(last if resume else find_checkpoint(s.init_from))
    config, settings = state["config"], state["settings"]
    fields = {k: settings[k] if type(settings.get(k)) is type(v) else v for k, v in config.items()}
    if resume:
        return fields, None, None
    if config["objective"] == "ar":  # it may become a cascade, and says nothing of its blocks
        fields = {k: fields[k] for k in (*FIXED, "seq_len")}
    return fields, state["model"], state["meta"]


def take_over(model, fields, weights, where):
    """Load a source's weights into a fresh model. Of the local head and of what draft_rank adds
    each is taken whole, or stays fresh where its shapes are others. Returns a line that says what
    was taken; SettingsError for weights of another shape."""
    c, own, parts = model.config, model.state_dict(), []
    source = replace(c, **{k: v for k, v in fields.items() if k in FIXED})
    if other := [k for k in FIXED if getattr(c, k) != getattr(source, k)]:
        had = ", ".join(f"{k} {getattr(source, k)}" for k in other)
        raise SettingsError(f"--init_from={where} has {had}: leave --{' and --'.join(other)} out")
    for part, what in ((r"local\.(?!accept)", "local head"), (r"local\.accept", "acceptance"),
                       ("draft_", "draft_rank")):
        mine, theirs = ({k: x[k].shape for k in x if re.search(part, k)} for x in (own, weights))
        if mine != theirs:
            parts.append(f"{'new' if mine else 'without its'} {what}")
            weights = {k: v for k, v in weights.items() if k not in theirs} | {
                k: own[k] for k in mine}
    load_whole(model, [], {"model": weights, "optimizers": []})
    return f"start      the weights of {where}; {', '.join(parts) or 'nothing is new'}"


WRITTEN = ("last.pt", "best.pt", "log.csv", "settings.py")  # by a run; each as NAME.tmp first

# what may differ between a run and its resumption: how it starts, ends (the learning rate follows
# the new end) and reports, where its data lies, and what moves numbers by their rounding alone
HARMLESS = {"out_dir", "init_from", "overwrite", "any_data", "dataset", "max_steps", "max_minutes",
            "log_every", "eval_every", "eval_windows", "final_windows", "sample_tokens", "device",
            "attention", "compile", "micro_batch", "shard", "wandb", "teacher"}


def lock(path):
    """Claim the folder `path` for one run until the file returned is closed or the process ends,
    however it dies; the file `lock` stays, and does not matter. SettingsError if another run, on
    this machine, has claimed it."""
    file = open(path / "lock", "a+")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        print(f"note: no file locks here; let no second run write to {path}", file=sys.stderr)
    except BlockingIOError:
        file.seek(0)
        with file:
            raise SettingsError(f"another run (process {file.read()}) is writing to {path}: wait "
                                "for it, stop it, or choose another --out_dir") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def check_out_dir(s):
    """Make and lock out_dir; refuse to replace what was not said to be. Returns the lock. Nothing
    that stands there is touched: a run replaces it with its first checkpoint."""
    path = Path(s.out_dir)
    held = [name for name in WRITTEN if os.path.lexists(path / name)]
    if s.init_from != "resume" and held and not s.overwrite:
        resume = "--init_from=resume continues it, " if held[0] == "last.pt" else ""
        raise SettingsError(f"{path} holds a run already ({held[0]}): {resume}--overwrite=true "
                            "replaces it, --out_dir=DIR keeps both")
    if s.init_from == "resume" and "last.pt" not in held:
        raise SettingsError(f"{path} holds no last.pt to resume from: leave --init_from=resume out")
    halves = [path / f"{name}.tmp" for name in WRITTEN]  # of a run that was killed inside a save
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        for name in (*halves, *(path / n for n in (*WRITTEN, "lock", "wandb", "wandb/id"))):
            right = name.is_dir() if name.name == "wandb" else name.is_file()
            if name.is_symlink() or (name.exists() and not right):
                raise SettingsError(f"{name} is a link or no file: remove it, or set --out_dir")
        claim = lock(path)
        for half in halves:
            half.unlink(missing_ok=True)
    return claim


def check_same(s, config, meta, state):
    """Resuming: settings and data that change the numbers must be those of the checkpoint. Returns
    what of the data is another, if that was insisted on."""
    saved, before, now = state["settings"], identity(state["meta"]), identity(meta)
    changed = [f"{k}: {saved.get(k)!r} -> {v!r}" for k, v in public(vars(s)).items()
               if k not in HARMLESS and saved.get(k) != v]
    if changed:
        raise SettingsError(f"cannot resume with other settings ({'; '.join(changed)})")
    other = [part for part in now if before.get(part) != now[part]]
    if config != asdict(CascadeConfig(**state["config"])) or (other and not s.any_data):
        raise SettingsError(f"cannot resume on other data (changed: {', '.join(other)} of "
                            f"{s.dataset}): give back what it was, or insist with --any_data=true "
                            "if only the text is another")
    return other
