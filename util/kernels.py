"""Derivatives written by hand, each worth 10 % of a training step where it runs.

`attention_by_parts` keeps no scores and no joined keys for its gradient: memory is linear in the
length of the sequence. The norms are for a CPU, which runs the plain formulas as chains of a dozen
operations; a compiler fuses those better, and then the plain formulas run.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# ---- attention -----------------------------------------------------------------------------------


class View(NamedTuple):
    """Tokens start..stop-1 of one stream, cut into rows of `size` tokens."""

    stream: int
    start: int
    stop: int
    size: int

    def of(self, x):
        """x (streams, B, N, ...) -> (B * rows, size, ...), sharing x's memory."""
        x = x[self.stream, :, self.start : self.stop]
        return x if self.size == x.shape[1] else x.view(-1, self.size, *x.shape[2:])


class Part(NamedTuple):
    """Queries that all see the same keys, but for a small mask (queries, keys) or a causal one."""

    queries: View
    keys: tuple  # of Views, one behind the other
    mask: torch.Tensor | None
    causal: bool
    first: bool  # of its queries: later parts are joined to it


def attention_by_parts(q, k, v, parts):
    """softmax(q k^T / sqrt(D)) v over the union of the `parts`, whose keys are disjoint.

    q (streams, B, N, H, D), k and v (the same, or one stream more) -> the shape of q.
    """
    return _ByParts.apply(q, k, v, parts)


def joined(views, x):
    pieces = [view.of(x) for view in views]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def probabilities(q, k, lse, mask, causal):
    """exp(score - lse), float32; lse None: (lse, None) of the scores themselves."""
    s = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    if causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(hidden, -math.inf)
    s = s if mask is None else s + mask
    lse = s.logsumexp(dim=-1) if lse is None else lse
    return (s - lse.unsqueeze(-1)).exp(), lse


def forward_part(q, k, v, mask, causal):
    """(softmax(scores) v, the logarithms of the softmax's denominators), (B, n, H, ...) each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        y, lse = FLASH(q, k, v, 0.0, causal, attn_mask=mask)
    else:
        p, lse = probabilities(q, k, None, mask, causal)
        y = (p @ v.float()).to(q.dtype)
    return y.transpose(1, 2), lse.transpose(1, 2)


def backward_part(g, q, k, v, y, lse, mask, causal):
    """What a part adds to the gradients of its q, k and v, (B, n, H, D) each.

    g, y, lse: the gradient, output and denominators of the *whole* attention, under which
    exp(score - lse) are the whole's probabilities: so parts simply add up.
    """
    ins = (x.transpose(1, 2) for x in (g, q, k, v, y, lse))
    if q.device.type == "cpu":
        grads = FLASH_BACKWARD(*ins, 0.0, causal, attn_mask=mask)
    else:
        grads = plain_backward(*ins, mask, causal)
    return [x.transpose(1, 2) for x in grads]


def plain_backward(g, q, k, v, y, lse, mask, causal):
    """The same by its formulas, (B, H, n, D): ds = p (g v^T - sum(g y)), dq = ds k / sqrt(D)."""
    p, _ = probabilities(q, k, lse, mask, causal)
    g = g.float()
    ds = p * (g @ v.float().mT - (g * y).sum(dim=-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return ds @ k.float(), ds.mT @ q.float(), p.mT @ g


class _ByParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, parts):
        y = torch.empty_like(q)
        lse = torch.empty(q.shape[:-1], device=q.device,
                          dtype=torch.promote_types(q.dtype, torch.float32))
        for queries, keys, mask, causal, first in parts:
            new, new_lse = forward_part(
                queries.of(q), joined(keys, k), joined(keys, v), mask, causal
            )
            y_here, lse_here = queries.of(y), queries.of(lse)
            if first:
                y_here.copy_(new)
                lse_here.copy_(new_lse)
                continue
            both = torch.logaddexp(lse_here, new_lse)  # two softmaxes, joined by denominators
            y_here.mul_((lse_here - both).exp_().unsqueeze(-1))
            y_here.addcmul_(new, (new_lse - both).exp_().unsqueeze(-1).to(new.dtype))
            lse_here.copy_(both)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.parts = parts
        return y

    @staticmethod
    def backward(ctx, g):
        q, k, v, y, lse = ctx.saved_tensors
        g = g.contiguous()
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for queries, keys, mask, causal, _ in ctx.parts:
            gq, gk, gv = backward_part(
                queries.of(g), queries.of(q), joined(keys, k), joined(keys, v), queries.of(y),
                queries.of(lse), mask, causal,
            )
            queries.of(dq).add_(gq)
            for into, grad in ((dk, gk), (dv, gv)):
                for view, piece in zip(keys, grad.split([x.size for x in keys], 1), strict=True):
                    view.of(into).add_(piece)
        return dq, dk, dv, None


# ---- norms ---------------------------------------------------------------------------------------


def by_hand(x):
    """A CPU, a gradient to come, and no compiler that would fuse the plain formula."""
    cpu = x.device.type == "cpu" and torch.is_grad_enabled()
    return cpu and not torch.compiler.is_compiling()


def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) over the last dimension of x, float32: (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def norm_backward(g, x, weight, scale):
    """Gradients of x and weight, where y = x * scale * weight with scale = 1 / rms, all float32:
    dweight = sum g x scale,  dx = g weight scale - x mean(g x weight) scale^3."""
    gx = g * x
    mean = (gx @ weight).div_(-x.shape[-1]).unsqueeze(-1).mul_(scale**3)
    dweight = gx.flatten(0, -2).mT.mv(scale.flatten())
    return (g * weight).mul_(scale).addcmul_(x, mean), dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        x32 = x.float()
        scale = inverse_rms(x32, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        dx, dweight = norm_backward(g.float(), x.float(), weight.float(), scale)
        return dx.to(x.dtype), dweight, None, None


def rms_norm(x, weight, eps, dtype):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in `dtype`."""
    if by_hand(x):
        return _RMSNorm.apply(x, weight, eps, dtype)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)


def turn(x, cos, sin):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the two halves of the last dimension, with
    tables of its full length: (cos, cos) and (-sin, sin)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([x2, x1], dim=-1), sin)


class _NormRotate(torch.autograd.Function):
    """The gradient of a turn turns back, so no slices are differentiated."""

    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        x32 = x.float()
        scale = inverse_rms(x32, eps)
        ctx.save_for_backward(x, weight, scale, cos, sin)
        return turn((x32 * scale).mul_(weight), cos, sin)

    @staticmethod
    def backward(ctx, g):
        x, weight, scale, cos, sin = ctx.saved_tensors
        dx, dweight = norm_backward(turn(g, cos, -sin), x.float(), weight.float(), scale)
        return dx.to(x.dtype), dweight, None, None, None


def norm_rotate(x, weight, eps, cos, sin):
    """rms_norm (none where weight is None), then the rotary embedding; float32.

    x (..., N, H, D); cos, sin (..., N, 1, D) as `turn` takes them, float32 so that angles keep
    their precision.
    """
    if weight is not None and by_hand(x):
        return _NormRotate.apply(x, weight, eps, cos, sin)
    x = x.float() if weight is None else F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return turn(x, cos, sin)
