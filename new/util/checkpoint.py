"""Checkpoints: last.pt and best.pt of a run, each one file of tensors and plain values.

    config      fields of model.CascadeConfig       model, optimizers   their state dicts
    settings    of train.py                         step, seconds       of training so far
    meta        of the data (util/data.py)          log                 the lines of log.csv
    figures     of the last validation              final               those at the end
    best        the least validation loss           best_step           and its step

They hold no code: torch.load(weights_only=True) reads them.
"""

import os
from pathlib import Path

import torch

from model import CascadeConfig, CascadeLM
from util.data import writing
from util.settings import UserError, require

FORMAT = 2


def save(path, state):
    """Write `state` so that `path` always holds a complete checkpoint, the old one or the new."""
    temporary = Path(f"{path}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as f:
                try:
                    torch.save({"format": FORMAT, **state}, f)
                except RuntimeError as e:  # that is what torch makes of a full disk
                    raise OSError(str(e).partition("\n")[0]) from None
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
    except UserError:
        temporary.unlink(missing_ok=True)
        raise


def find(where):
    """The file that a run's folder or a path means: best.pt of a folder, else its last.pt."""
    for path in (Path(where), Path(where, "best.pt"), Path(where, "last.pt")):
        if path.is_file():
            return path
    raise UserError(f"no checkpoint in {where}: train one with python train.py --out_dir={where}")


def load(path):
    """The state that save wrote, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        require(state.get("format") == FORMAT, f"its format is {state.get('format')}")
    except Exception as e:  # a damaged file raises whatever its readers make of it
        reason = str(e) if isinstance(e, UserError) else type(e).__name__
        raise UserError(f"{path} is damaged or no checkpoint of this version ({reason}): use "
                        "another, or train again with --overwrite=true") from None
    return state


def load_model(where, device="cpu"):
    """(model in evaluation mode, state) of a run's folder or a checkpoint file."""
    state = load(find(where))
    model = CascadeLM(CascadeConfig(**state["config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state


def take_weights(model, weights):
    """Copy the weights whose names and shapes match; the others keep their fresh initialisation.
    Returns the modules that have some of these."""
    own = model.state_dict()
    match = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(match, strict=False)
    return sorted({name.partition(".")[0] for name in own.keys() - match.keys()})
