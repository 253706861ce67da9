"""The whole diffusion of CASCADE: how tokens are masked, and what the loss weighs.

A sequence is cut into blocks of S tokens. Blocks are predicted left to right; inside a block
some tokens are replaced by [MASK] and the network predicts them from the rest of the block and
all blocks before it. For one block, with a uniform count k and a uniform set M of k masked places:

    -log p(x^b | x^{<b})  <=  E_{k ~ U{1..S}} E_{|M| = k} [ S/k * sum_{i in M} -log p(x_i | ...) ]

Divided by S, per token: the mean cross-entropy over the masked places, averaged uniformly over k.
With every token masked independently at rate m ~ U(0, 1] and the weight 1/m it is the same
number: both average over the same orders of revealing the block (the tests enumerate both).

Four laws for the noise (weights are per masked token, for the per-token loss):

    law        draws                                            weight         masked in a batch
    balanced   every k in 1..S equally often, exactly k masked  1 / k          constant
    tilted     k with P(k) ~ 1 / sqrt(k), exactly k masked      1 / (k S P(k)) nearly constant
    uniform    m ~ U[m_min, 1], each token masked at rate m     1 / (m S)      some blocks empty
    clipped    m ~ U[low, high], else as uniform                1 / (m S)      not the bound

`balanced` measures: it is constant over any batch whose blocks are a multiple of S, and evaluation
uses nothing else. `tilted` trains: a block with few masks says little about its mean, so it is
drawn more often and counts less. The loss is the same in expectation; what it gained is in the
README.
`uniform` leaves out rates below m_min, a share m_min of the average.

Two copies of a block (copies=2) are antithetic: where the first draws u, the second draws 1 - u,
and it masks from the other end of the same random order. Under `balanced` k and S + 1 - k places
are masked, so that every token is asked for, one of them twice.

Everything here is a pure function of its arguments and of an explicit CPU generator, so that
noise can depend on (seed, step) alone and never on the device or the number of processes.
"""

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F

COUNTED = ("balanced", "tilted")  # laws that draw how many tokens are masked, and not a rate
NOISE_LAWS = (*COUNTED, "uniform", "clipped")
WEIGHTINGS = ("elbo", "cascade")


class Noisy(NamedTuple):
    """What corruption returns; `B` sequences of `N` tokens in `nb` blocks (`T` target blocks each).

    xt      (B, N) int64    tokens, `mask_id` where masked
    mask    (B, N) bool     positions that carry loss: masked, and in a target block
    weight  (B, N) float32  weight of each position's cross-entropy, 0 where mask is False;
                            sum(weight * nll) / number of target blocks is the loss in nats/token
    m       (B, T) float64  mask rate of each target block (k / S of a counted law)
    block   (B, T) int64    index of each target block

    With copies=2 the first four have a dimension of 2 in front, and there are 2 B T target blocks.
    """

    xt: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor
    m: torch.Tensor
    block: torch.Tensor


def check_blocks(seq_len, block_size):
    """Number of blocks nb = N / S. Raises ValueError unless S divides N."""
    if block_size < 1 or seq_len < 1 or seq_len % block_size:
        raise ValueError(
            f"a sequence of {seq_len} tokens cannot be cut into blocks of {block_size}: "
            "seq_len must be a positive multiple of block_size"
        )
    return seq_len // block_size


def check_rates(low, high):
    """Raises ValueError unless 0 < low <= high <= 1: a rate of 0 would leave a block no loss."""
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"mask rates must satisfy 0 < low <= high <= 1, not [{low}, {high}]")


def strata(groups, n, generator):
    """(groups, n) float64 in [0, 1): per group one uniform draw from each of n equal strata.

    The strata are permuted. Left in order they would tie a block's noise level to its place in
    the sequence, as BD3-LM's low-discrepancy draw does; permuted, each entry alone is U[0, 1).
    """
    order = torch.rand(groups, n, generator=generator, dtype=torch.float64).argsort(dim=1)
    jitter = torch.rand(groups, n, generator=generator, dtype=torch.float64)
    return (order + jitter) / n


def block_strata(batch, nb, block_size, generator):
    """(batch, nb) float64, one u ~ U[0, 1) for each block, stratified.

    Strata span the smallest group of sequences whose blocks are a multiple of S, so within each
    whole group the counts floor(u S) + 1 of `balanced` take every value equally often. Sequences
    left over are stratified among themselves.
    """
    group = block_size // gcd(block_size, nb)
    whole, rest = divmod(batch, group)
    u = strata(whole, group * nb, generator).reshape(whole * group, nb)
    if rest:
        u = torch.cat([u, strata(1, rest * nb, generator).reshape(rest, nb)])
    return u


def count_probabilities(law, block_size):
    """(S,) float64: P(k) for k = 1..S under a counted law."""
    k = torch.arange(1, block_size + 1, dtype=torch.float64)
    p = k.rsqrt() if law == "tilted" else torch.ones_like(k)
    return p / p.sum()


def mean_rate(law, block_size, m_min=1e-3, clip=(0.3, 0.8)):
    """Share of the tokens that a law masks, in expectation."""
    if law in COUNTED:
        k = torch.arange(1, block_size + 1)
        return (count_probabilities(law, block_size) @ k.double()).item() / block_size
    low, high = clip if law == "clipped" else (m_min, 1.0)
    return (low + high) / 2


def counts(u, law, block_size):
    """int64 counts k in 1..S, the quantiles at u in [0, 1] of P(k)."""
    if law == "balanced":
        below = (u * block_size).long()
    else:
        below = torch.searchsorted(count_probabilities(law, block_size).cumsum(0), u, right=True)
    return below.clamp_(max=block_size - 1) + 1  # u may be 1, or rounded up to the end


def bernoulli_nonempty(m, block_size, generator):
    """(..., S) bool: each True at rate m[...], given that at least one is.

    Exact, without redraws: the first True place i has the truncated geometric law
    P(i) = m (1-m)^i / (1 - (1-m)^S), drawn by its inverse; after it the places are independent.
    """
    m = m.unsqueeze(-1)
    u = torch.rand(m.shape, generator=generator, dtype=torch.float64)
    some = -torch.expm1(block_size * torch.log1p(-m))  # 1 - (1-m)^S without cancellation
    first = (torch.log1p(-u * some) / torch.log1p(-m)).long().clamp_(0, block_size - 1)
    place = torch.arange(block_size)
    free = torch.rand(*m.shape[:-1], block_size, generator=generator, dtype=torch.float64) < m
    return (place == first) | ((place > first) & free)


def _block_weights(mask, m, law, weighting):
    """(..., S) float32 weights from the masked places (..., S) and rates (...) of blocks."""
    S, k = mask.shape[-1], mask.sum(dim=-1).clamp(min=1)  # an empty block has no place for a weight
    if weighting == "cascade":
        scale = 1.0 / (m * k)
    else:
        scale = 1.0 / k if law in COUNTED else 1.0 / (m * S)
    if law == "tilted":
        scale = scale / (S * count_probabilities(law, S)[k - 1])
    return (mask * scale.unsqueeze(-1)).float()


def _check(x0, block_size, law, weighting, m_min, clip):
    """Guards both corruptions share; returns (nb, low, high)."""
    if law not in NOISE_LAWS:
        raise ValueError(f"unknown noise law {law!r}: one of {', '.join(NOISE_LAWS)}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}: one of {', '.join(WEIGHTINGS)}")
    low, high = clip if law == "clipped" else (m_min, 1.0)
    check_rates(low, high)
    return check_blocks(x0.shape[1], block_size), low, high


def corrupt_all_blocks(
    x0, block_size, mask_id, generator, law="balanced", m_min=1e-3, clip=(0.3, 0.8),
    weighting="elbo", copies=1,
):
    """Mask every block of every sequence: the noisy stream of two-stream training.

    x0: (B, N) int64 clean tokens on the CPU. Returns `Noisy` with T = nb target blocks. copies=2
    makes an antithetic pair of noisy streams, for one clean stream to serve both.
    m is one value per block and example. Under `uniform` and `clipped` a block may stay unmasked
    and then rightly adds nothing to the loss: masking one by force would bias the bound.
    Raises ValueError for an unknown law or weighting, rates outside (0, 1] or N % S != 0.
    """
    nb, low, high = _check(x0, block_size, law, weighting, m_min, clip)
    if copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, not {copies}")
    B, S = x0.shape[0], block_size
    if law in COUNTED:  # place: a random order of the tokens of a block, the first k are masked
        u = block_strata(B, nb, S, generator)
        place = torch.rand(B, nb, S, generator=generator).argsort(dim=-1).argsort(dim=-1)
        last = S - 1
    else:  # place: uniform in [0, 1), those below m are masked
        u = strata(1, B * nb, generator).reshape(B, nb)
        place, last = torch.rand(B, nb, S, generator=generator, dtype=torch.float64), 1
    if copies == 2:
        u, place = torch.stack([u, 1 - u]), torch.stack([place, last - place])
    if law in COUNTED:
        k = counts(u, law, S)
        m, mask = k.double() / S, place < k.unsqueeze(-1)
    else:
        m = low + (high - low) * u
        mask = place < m.unsqueeze(-1)
    weight = _block_weights(mask, m, law, weighting).flatten(-2)
    mask = mask.flatten(-2)
    block = torch.arange(nb).expand(B, nb)
    return Noisy(x0.expand_as(mask).masked_fill(mask, mask_id), mask, weight, m, block)


def corrupt_target_block(
    x0, block_size, mask_id, generator, law="uniform", m_min=1e-3, clip=(0.3, 0.8),
    weighting="cascade", block=None,
):
    """One target block per example, everything after it hidden, in one pass over N tokens.

    For each example: a target block b (uniform, or given as `block`, (B,) int64) and a rate m;
    the tokens of block b are masked at rate m, at least one; all tokens of blocks > b are masked;
    blocks < b stay clean. The loss mask holds the masked positions of block b alone.
    x0: (B, N) int64 on the CPU. Returns `Noisy` with T = 1.

    "At least one" is drawn as the law of the mask given that it is not empty. That event has
    probability 1 - (1-m)^S, so the bound's weight is (1 - (1-m)^S) / (m S): forcing a token and
    keeping 1 / (m S) would bias it.

    weighting="cascade" is (1/m) * mean over the masked, the 1/m outside the mean. It is NOT the
    bound: the mean already divides by about m S, so easy, nearly clean blocks count 1/m times
    too much, and its expectation grows like log(1 / m_min). weighting="elbo" is the bound.
    """
    nb, low, high = _check(x0, block_size, law, weighting, m_min, clip)
    B = x0.shape[0]
    if block is None:
        block = torch.randint(nb, (B,), generator=generator)
    elif block.shape != (B,) or bool(((block < 0) | (block >= nb)).any()):
        raise ValueError(f"block must hold {B} indices in 0..{nb - 1}")
    if law in COUNTED:
        k = counts(block_strata(B, 1, block_size, generator)[:, 0], law, block_size)
        m = k.double() / block_size
        score = torch.rand(B, block_size, generator=generator)
        inside = score.argsort(dim=-1).argsort(dim=-1) < k.unsqueeze(-1)
    else:
        m = low + (high - low) * strata(1, B, generator)[0]
        inside = bernoulli_nonempty(m, block_size, generator)
    scale = _block_weights(inside, m, law, weighting)
    if law not in COUNTED and weighting == "elbo":
        scale *= -torch.expm1(block_size * torch.log1p(-m)).float().unsqueeze(-1)

    column = torch.arange(nb)
    is_target = (column == block[:, None]).unsqueeze(-1)  # (B, nb, 1)
    mask = (is_target & inside[:, None, :]).reshape(x0.shape)
    weight = (is_target * scale[:, None, :]).reshape(x0.shape)
    later = (column > block[:, None]).repeat_interleave(block_size, dim=1)
    if not bool(mask.any(dim=1).all()):
        raise AssertionError("an example has an empty loss mask")
    return Noisy(x0.masked_fill(mask | later, mask_id), mask, weight, m[:, None], block[:, None])


def masked_diffusion_loss(logits, targets, weight, num_blocks):
    """Loss in nats per token: sum_i weight_i * -log softmax(logits_i)[targets_i] / num_blocks.

    logits (..., V), targets (...) int64, weight (...): all positions, or only the gathered masked
    ones, which is the same number. `num_blocks` counts the target blocks of the whole global
    batch, so that splitting a batch over processes or accumulation steps changes nothing.
    """
    nll = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), reduction="none"
    )
    return (nll * weight.flatten()).sum() / num_blocks


class _PiecewiseLoss(torch.autograd.Function):
    """sum_i weight_i * -log softmax(h_i W^T)[target_i], `rows` positions at a time.

    The gradient is formed beside the loss, while a piece's logits are there: per position it is
    weight (p - onehot) W towards h, and the same against h towards W.
    """

    @staticmethod
    def forward(ctx, h, head, targets, weight, rows):
        total = weight.new_zeros(())
        dh, dhead = torch.empty_like(h), torch.zeros_like(head, dtype=torch.float32)
        pieces = (x.split(rows) for x in (h, targets.unsqueeze(1), weight, dh))
        for x, target, w, dx in zip(*pieces, strict=True):
            logp = F.linear(x, head).float()
            logp -= logp.logsumexp(dim=1, keepdim=True)
            total -= w @ logp.gather(1, target)[:, 0]
            grad = logp.exp_().scatter_add_(1, target, -torch.ones_like(w)[:, None])
            grad = grad.mul_(w[:, None]).to(head.dtype)
            dx.copy_(grad @ head)
            dhead += grad.T @ x
        ctx.save_for_backward(dh, dhead.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, g):
        dh, dhead = ctx.saved_tensors
        return dh * g, dhead * g, None, None, None


def head_loss(h, head, targets, weight, num_blocks, piece=2**25):
    """masked_diffusion_loss of the logits h @ head.T without ever holding all of them.

    h (M, C), head (V, C), targets (M,) int64, weight (M,) float32. `piece`: logits held at once,
    134 MB of float32 by default; whatever fits in one piece takes the direct way.
    """
    if targets.numel() * len(head) <= piece:
        return masked_diffusion_loss(F.linear(h, head), targets, weight, num_blocks)
    dtype = torch.get_autocast_dtype(h.device.type)
    if torch.is_autocast_enabled(h.device.type):
        h, head = h.to(dtype), head.to(dtype)
    rows = max(1, piece // len(head))
    return _PiecewiseLoss.apply(h, head, targets, weight, rows) / num_blocks
