"""Checkpoints: one file of tensors and plain values, which carries all that rebuilds its model.

    {"format": 1, "config": {...}, "settings": {...}, "meta": {...}, "model": {name: tensor},
     "optimizers": [...], "step": int, "seconds": float, "bound": [mean, standard error],
     "final": the same on more windows, "best": float, "best_step": int,
     "torch": "2.13.0", "digest": sha256 of everything else}

`meta` is the dataset's meta.json, so text is decoded without the dataset. The file is loaded with
weights_only=True, so a foreign one cannot run code, and its digest is verified.
"""

import hashlib
import os
import pickle
import sys
from pathlib import Path

import torch

from model import CascadeConfig, CascadeLM
from util.configurator import SettingsError
from util.log import held

FORMAT = 1


def digest(value, h=None):
    """sha256 over a nest of dicts, lists, plain values and tensors (dtype, shape and bytes)."""
    top, h = h is None, h or hashlib.sha256()
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
    return h.hexdigest() if top else None


def all_finite(value):
    """Whether every floating-point tensor in a nest of dicts and lists is finite throughout."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    parts = value.values() if isinstance(value, dict) else value
    return not isinstance(value, (dict, list, tuple)) or all(map(all_finite, parts))


def save_checkpoint(path, state):
    """Write `state` so that `path` always holds a complete checkpoint, the old one or the new.

    Temporary file, flush to disk, rename. Raises SettingsError when the disk refuses; the old
    file then still stands.
    """
    path = Path(path)
    state = {**state, "format": FORMAT, "torch": str(torch.__version__)}
    state["digest"] = digest(state)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into RuntimeError
        temporary.unlink(missing_ok=True)
        raise SettingsError(
            f"cannot write {path} ({e}): free some space or choose another --out_dir; "
            "an earlier checkpoint there is untouched"
        ) from None


def find_checkpoint(where):
    """The file meant by an out_dir or a path: out_dir/best.pt, else out_dir/last.pt."""
    where = Path(where)
    if where.is_file():
        return where
    for name in ("best.pt", "last.pt"):
        if (where / name).is_file():
            return where / name
    raise SettingsError(f"no checkpoint in {where}: python train.py --out_dir={where} makes one")


def load_checkpoint(path, device="cpu"):
    """The state that save_checkpoint wrote. SettingsError, one line, if it is anything else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("not a CASCADE checkpoint of this version")
        if digest({k: v for k, v in state.items() if k != "digest"}) != state["digest"]:
            raise ValueError("its digest does not match its contents")
    except FileNotFoundError:
        raise SettingsError(f"no checkpoint {path}") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError,
            AttributeError, pickle.UnpicklingError) as e:
        # torch's own advice for a refused pickle is to load it unsafely: not to be repeated
        unsafe = isinstance(e, pickle.UnpicklingError) or not str(e).strip()
        reason = type(e).__name__ if unsafe else str(e).strip().splitlines()[0][:120]
        raise SettingsError(
            f"{path} is damaged or no checkpoint ({reason}): use another, or train again"
        ) from None
    return state


def load_model(where, device="cpu"):
    """(model in evaluation mode, state) of an out_dir or a checkpoint file."""
    path = find_checkpoint(where)
    state = load_checkpoint(path, device)
    try:
        model = CascadeLM(CascadeConfig(**state["config"]))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError):
        raise SettingsError(f"{path}: its tensors do not fit its own config") from None
    return model.to(device).eval(), state


# ---- starting and resuming a run ---------------------------------------------------------------

# what may differ between a run and its resumption: the schedule's end, reports, and what moves
# numbers by rounding alone
HARMLESS = {
    "out_dir", "init_from", "overwrite", "max_steps", "max_minutes", "log_every", "eval_every",
    "eval_windows", "final_windows", "sample_tokens", "device", "dtype", "attention", "compile",
    "micro_batch", "shard", "wandb",
}


def lock(path):
    """Claim the folder `path` for one run until the file returned is closed or the process ends.

    The kernel drops the lock with the process, however that dies; the file `lock` stays, and does
    not matter. SettingsError if another run, on this machine, holds it.
    """
    file = open(path / "lock", "a+")
    try:
        import fcntl
    except ImportError:
        print(f"note: no file locks here; let no second run write to {path}", file=sys.stderr)
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "not known"
        file.close()
        raise SettingsError(
            f"another run (process {holder}) is writing to {path}: wait for it, stop it, or choose "
            "another --out_dir"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def check_out_dir(s):
    """Make and lock out_dir; refuse to replace what was not said to be. Returns the lock."""
    path = Path(s.out_dir)
    name = held(path)
    if s.init_from == "scratch" and name and not s.overwrite:
        resume = "--init_from=resume continues it, " if name == "last.pt" else ""
        raise SettingsError(
            f"{path} holds a run already ({name}): {resume}--overwrite=true replaces it, "
            "--out_dir=DIR keeps both"
        )
    if s.init_from == "resume" and name != "last.pt":
        raise SettingsError(f"{path} holds no last.pt to resume from: leave --init_from=resume out")
    try:
        path.mkdir(parents=True, exist_ok=True)
        claim = lock(path)
        (path / "last.pt.tmp").touch()
        for half in ("last.pt.tmp", "best.pt.tmp"):  # of a run that was killed inside a save
            (path / half).unlink(missing_ok=True)
        if s.init_from == "scratch":  # a best.pt of the run being replaced would outlive it
            (path / "best.pt").unlink(missing_ok=True)
    except OSError as e:
        raise SettingsError(f"cannot write to {path} ({e.strerror}): set --out_dir") from e
    return claim


def check_same(s, saved, config, saved_config):
    """Resuming: settings that change the numbers must be those of the checkpoint."""
    saved = {"neighbours": 0, "copies": 1, **saved}  # what was, before there was a choice
    changed = [
        f"{k}: {saved.get(k)!r} -> {v!r}"
        for k, v in vars(s).items()
        if k not in HARMLESS and saved.get(k) != v
    ]
    if config != saved_config and not changed:
        changed = ["the vocabulary of the dataset"]
    if changed:
        raise SettingsError(f"cannot resume with other settings ({'; '.join(changed)})")
