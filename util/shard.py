"""--shard=true, for models that outgrow one GPU: PyTorch's fully_shard (FSDP2).

Each process keeps a slice of every weight, gradient and optimizer state; the weights of a layer are
gathered when it runs and dropped again. A checkpoint holds whole tensors either way, so a run saved
sharded resumes unsharded, and back. Every process builds the model whole once, in main memory.
"""

import torch

from util.configurator import SettingsError


def shard_model(score, device, world):
    """Slice the weights of score.model over all processes; the slices live on `device`. Training
    and evaluation call `score` alone, around which the weights outside of the layers are whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.split(":")[0], (world,))
    for block in score.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(score, mesh=mesh)  # the embeddings, the last norm and the head


def whole(tensor):
    """The tensor of which this may be a slice. Every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def slice_like(tensor, like):
    """A whole tensor, the same on all processes, -> this process's slice where `like` is one."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gathered(value, keep):
    """A nest with its slices made whole, on the CPU, where `keep`. Every process must call it."""
    if isinstance(value, dict):
        return {k: gathered(v, keep) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [gathered(v, keep) for v in value]
    if hasattr(value, "full_tensor"):  # one at a time: the whole model need not fit the device
        value = value.full_tensor()
        return value.cpu() if keep else None
    return value


def is_plain(x):
    """Whether x is a float32 tensor in rows and columns: what the weights and their moments are."""
    return isinstance(x, torch.Tensor) and (x.dtype, x.layout) == (torch.float32, torch.strided)


def load_whole(model, optimizers, state):
    """Load the whole tensors of a checkpoint's state into a model and optimizers, sliced or not.

    Of the optimizers only the moments: the rest follows from the settings. SettingsError where they
    do not fit the weights: a fused step would not notice, and run over the memory.
    """
    own, what = model.state_dict(), "weights"
    try:
        model.load_state_dict({k: slice_like(v, own[k]) for k, v in state["model"].items()})
        what = "optimizer state"
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            params, slices = [p for g in optimizer.param_groups for p in g["params"]], {}
            for i, tensors in saved["state"].items():
                p = dict(enumerate(params))[i]
                shapes = {"momentum": p.shape} if "momentum" in optimizer.defaults else {
                    "step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                if {k: v.shape for k, v in tensors.items()} != shapes or not all(
                    map(is_plain, tensors.values())
                ) or tensors.get("step", 0) < 0:
                    raise ValueError
                slices[i] = {k: slice_like(v, p) if v.ndim else v for k, v in tensors.items()}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"param_groups": groups, "state": slices})
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise SettingsError(f"this checkpoint's config does not fit its {what}: use another, or "
                            "start again from scratch") from None
