"""Checkpoints: last.pt and best.pt of a run, each one file of tensors and plain values.

    config      fields of model.CascadeConfig       model, optimizers   their state dicts
    settings    of train.py                         step, seconds       of training so far
    meta        of the data (util/data.py)          log                 the lines of log.csv
    figures     of the last validation              final               those at the end
    best        the least validation loss           best_step           and its step

They hold no code: torch.load(weights_only=True) reads them.
"""

import io
import os
from dataclasses import fields
from pathlib import Path

import torch

from model import CascadeConfig, CascadeLM
from util.data import writing
from util.settings import UserError, require

FORMAT = 2
# a resumed run may be given another budget (which moves the learning rate), other reports, another
# machine, and a dataset that has moved; not other mathematics
RESUME_MAY_CHANGE = set(
    "out_dir init_from overwrite dataset max_steps max_minutes micro_batch log_every "
    "eval_every final_windows sample_tokens wandb device dtype compile".split())
# of another run's settings: those that its weights determine, and those that are its method
FIXED_BY_WEIGHTS = set("n_layer n_head n_kv_head n_embd n_hidden tie_embeddings qk_norm".split())
METHOD = set("soft noise corruption weighting m_min clip_low clip_high".split())


def save(path, state):
    """Write `state` so that `path` always holds a complete checkpoint, the old one or the new."""
    buffer = io.BytesIO()  # torch.save itself makes a RuntimeError of a full disk
    torch.save({"format": FORMAT, **state}, buffer)
    with writing(path):
        with open(f"{path}.tmp", "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)


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
    """Copy the weights of all modules whose weights all match in name and shape, such as `layers`
    or `local`. Returns the names of the others, which keep their fresh initialisation."""
    fresh = {name.partition(".")[0] for name, own in model.state_dict().items()
             if name not in weights or weights[name].shape != own.shape}
    known = {name: w for name, w in weights.items() if name.partition(".")[0] not in fresh}
    model.load_state_dict(known, strict=False)
    return sorted(fresh)


# ---- where a run starts --------------------------------------------------------------------------


def model_settings(settings):
    """Those settings, {name: value}, that are fields of CascadeConfig."""
    return {f.name: settings[f.name] for f in fields(CascadeConfig) if f.name in settings}


def starting_point(s, given, defaults):
    """The checkpoint that train.py's settings s start from, or None. Settings that are not `given`
    are set to what it has; UserError for what is given and contradicts it."""
    last, resume = Path(s.out_dir, "last.pt"), s.init_from == "resume"
    require(resume or s.overwrite or not last.exists(), f"{s.out_dir} holds a run: go on by "
            "--init_from=resume, replace it by --overwrite=true, or set another --out_dir")
    if s.init_from == "scratch":
        return None
    require(not resume or last.exists(), f"there is no {last}: leave --init_from=resume out")
    if s.init_from.startswith("hf:"):
        from util import hf  # which imports this file

        path, start = s.init_from, hf.read_folder(s.init_from.removeprefix("hf:"), s.seq_len)
    else:
        path = last if resume else find(s.init_from)
        start = load(path)
    theirs = defaults | start["settings"]
    if resume:
        copied = defaults.keys() - {"out_dir", "init_from", "overwrite"}
        must_match = defaults.keys() - RESUME_MAY_CHANGE
    else:
        theirs |= start["config"]
        copied, must_match = model_settings(defaults).keys() | METHOD, FIXED_BY_WEIGHTS
        if theirs["draft_weight"] == 0:  # a GPT: how it would draft means nothing
            copied = FIXED_BY_WEIGHTS | {"seq_len"}
    for name in copied:
        if name not in given:
            setattr(s, name, theirs[name])
        require(name not in must_match or getattr(s, name) == theirs[name],
                f"{path} has {name}={theirs[name]}: leave {name}, or a config that sets it, out")
    return start
