"""Optimizers: Muon for the matrices of the layers, AdamW for the rest, and the learning rate.

Muon: momentum, then the nearest semi-orthogonal matrix. The method is Keller Jordan's
(https://kellerjordan.github.io/posts/muon); the rule and the constants are those of
`torch.optim.Muon` with adjust_lr_fn="match_rms_adamw", with which the tests compare it. It differs
where that one is slow: matrices of one shape are iterated together, those of attention head by
head, and in float32 where the processor has no bf16 units. Several processes share the matrices
out and exchange the results.
"""

import torch
import torch.distributed as dist

from util.shard import slice_like, whole


def make_optimizers(model, s):
    """[AdamW] or [AdamW, Muon], by the setting `optimizer`. Muon takes the matrices of the layers,
    those of attention head by head; weight decay goes to matrices alone."""
    muon = {}  # head_dim -> matrices
    groups = {True: [], False: []}  # AdamW's matrices and tables; its vectors
    D = model.config.head_dim
    heads = {"q": D, "k": D, "v": D, "o": -D}  # o reads the heads by its columns
    for name, p in model.named_parameters():
        if not p.requires_grad:  # frozen: not even the weight decay may touch it
            continue
        matrix = p.ndim == 2 and name.startswith(("blocks.", "local.")) and "embed" not in name
        matrix &= "draft_" not in name  # factors of a change of low rank are AdamW's
        if s.optimizer == "muon" and matrix:
            muon.setdefault(heads.get(name.split(".")[-2], 0), []).append(p)
        else:
            groups[p.ndim == 2].append(p)
    adamw = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": s.weight_decay},
         {"params": groups[False], "weight_decay": 0.0}],
        lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True,
    )
    if not muon:
        return [adamw]
    groups = [{"params": params, "head_dim": d} for d, params in muon.items()]
    return [adamw, Muon(groups, s.muon_lr, s.weight_decay, dtype=getattr(torch, s.dtype))]


def lr_factor(step, progress, s):
    """Fraction of the peak: linear warm-up by steps, then linear fall by `progress` in [0, 1]."""
    rise = min(1.0, (step + 1) / max(1, s.warmup_steps))
    return rise * (s.final_lr + (1 - s.final_lr) * (1 - progress))


def orthogonalize(g, steps=5, dtype=torch.float32):
    """(n, r, c) -> the same shape: U V^T of each g = U S V^T, singular values within about 30 %.

    Newton-Schulz: X <- P X with P = a + b A + c A^2 and A = X X^T, on X = g / |g|, the short side
    first. Wide matrices collect Q = ... P P instead, with A <- P A P, and meet X once: fewer FLOPs,
    but A squares the precision that it takes: not in bf16, nor on a GPU, which may take TF32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.shape[2] > 1.5 * x.shape[1] and dtype == torch.float32 and not x.is_cuda:
        A, Q = x @ x.mT, None
        for step in range(steps):
            P = torch.baddbmm(A, A, A, beta=b, alpha=c)
            P.diagonal(dim1=1, dim2=2).add_(a)
            Q = P if Q is None else P @ Q
            A = P @ A @ P if step + 1 < steps else None
        x = Q @ x
        return x.mT if tall else x
    for _ in range(steps):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_heads(g, head_dim, dtype):
    """orthogonalize of each head of g (n, r, c) by itself: `head_dim` rows, or, negative, columns;
    0: of whole matrices. Long thin pieces take a fraction of the FLOPs."""
    if head_dim < 0:
        return orthogonalize_heads(g.mT, -head_dim, dtype).mT
    rows = head_dim or g.shape[1]
    return orthogonalize(g.reshape(-1, rows, g.shape[2]), dtype=dtype).reshape(g.shape)


def shared_orthogonalize(matrices, head_dim, dtype):
    """orthogonalize_heads of a list of n (r, c), alike on all processes or sliced by them, stacked.

    Process i computes matrices [i m, (i + 1) m) with m = ceil(n / processes); the last may have
    fewer. Slices are made whole one by one, and no process keeps more of them than its share.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    share = -(-len(matrices) // world)
    mine = []
    for i, g in enumerate(matrices):
        g = whole(g)  # by all processes together, whosever it is
        if i // share == rank:
            mine.append(g)
    if world == 1:
        return orthogonalize_heads(torch.stack(mine), head_dim, dtype)
    result = g.new_zeros(world, share, *g.shape, dtype=dtype)
    if mine:
        result[rank, : len(mine)] = orthogonalize_heads(torch.stack(mine), head_dim, dtype)
    dist.all_gather(list(result.unbind()), result[rank].clone())
    return result.flatten(0, 1)[: len(matrices)]


class Muon(torch.optim.Optimizer):
    """Parameters: 2-D matrices. lr is in AdamW's units: an update has RMS about 0.2 lr.

    A parameter group's `head_dim` makes it the matrices of attention: orthogonalize_heads.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, dtype=torch.float32):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "head_dim": 0}
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                self._step(group, shape, params)

    def _step(self, group, shape, params):
        """One update of all matrices of one shape (r, c)."""
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        beta = group["momentum"]
        grads = [p.grad for p in params]
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - beta)
        nesterov = torch._foreach_lerp(grads, buffers, beta)
        update = shared_orthogonalize(nesterov, group["head_dim"], self.dtype).to(params[0].dtype)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * 0.2 * max(shape) ** 0.5
        update = [slice_like(u, p) for u, p in zip(update, params, strict=True)]
        torch._foreach_add_(params, update, alpha=-scale)
