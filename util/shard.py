"""--shard=true, for models that outgrow one GPU: PyTorch's fully_shard (FSDP2).

Each process keeps a slice of every weight, gradient and optimizer state; the weights of a layer are
gathered when it runs and dropped again. A checkpoint holds whole tensors either way, so a run saved
sharded resumes unsharded, and back. Every process builds the model whole once, in main memory.
"""


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


def load_whole(model, optimizers, state):
    """Load the whole tensors of a checkpoint's state into a model and optimizers, sliced or not."""
    like = model.state_dict()
    model.load_state_dict({k: slice_like(v, like[k]) for k, v in state["model"].items()})
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        slices = {
            i: {k: slice_like(v, params[i]) if v.ndim else v for k, v in tensors.items()}
            for i, tensors in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": slices})
