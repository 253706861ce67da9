"""How tokens are masked and what the loss weighs: the diffusion of CASCADE.

A sequence is cut into blocks of S tokens. Blocks are predicted left to right; inside a block k
tokens are replaced by [MASK], and the network predicts them from the rest of the block and from
all earlier blocks. With a uniform count k and a uniform set M of k positions, for one block,

    -log p(x^b | x^{<b})  <=  E_{k ~ U{1..S}} E_{|M| = k} [ S/k * sum_{i in M} -log p(x_i | ...) ]

Divided by S, per token: the mean cross-entropy over the masked positions, averaged uniformly over
k. Masking every token independently at a rate m ~ U(0, 1] with the weight 1/m gives the same
number: both average over the same orders in which a block is revealed.

    schedule   draws                                           weight of a masked token (per token)
    balanced   every k in 1..S equally often, exactly k masked 1 / k
    tilted     k with P(k) ~ 1 / sqrt(k), exactly k masked     1 / (k S P(k))
    uniform    m ~ U[m_min, 1], each token masked at rate m    1 / (m S)
    clipped    m ~ U[clip_low, clip_high], else as uniform     1 / (m S), no bound: for training

Without full_share `balanced` masks equally many tokens in every batch of whole strata; it is
what evaluation uses, always. `uniform` is the noise of BD3-LM and LLaDA; it leaves out rates below
m_min, which are a share m_min of the average.

All of it is a pure function of its arguments and of a CPU generator. So the noise of a step depends
on (seed, step) and never on the device or on the number of processes.
"""

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

WEIGHTINGS = ("elbo", "cascade")


class Rates(NamedTuple):
    """The mask rates that `uniform` and `clipped` draw from; and full_share, the share of blocks
    that `balanced` and `tilted` mask completely besides those that their own k does."""

    m_min: float = 1e-3
    clip_low: float = 0.3
    clip_high: float = 0.8
    full_share: float = 0.0

    def check(self, schedule):
        """Raises ValueError unless rates lie in (0, 1], since 0 would leave a block no loss, and
        full_share suits the schedule."""
        if not (0 < self.m_min <= 1 and 0 < self.clip_low <= self.clip_high <= 1):
            raise ValueError(f"mask rates must satisfy 0 < low <= high <= 1, not {self[:3]}")
        if not 0 <= self.full_share < 1:
            raise ValueError(f"full_share must lie in [0, 1), not {self.full_share}")
        if self.full_share and schedule not in ("balanced", "tilted"):
            raise ValueError(f"{schedule} noise has no share of full blocks: set --full_share=0")


RATES = Rates()


class Noisy(NamedTuple):
    """B corrupted sequences of N tokens in nb blocks; copies=2: all but `block` are (2, B, ...).

    xt      (B, N) int64    tokens, `mask_id` where masked
    mask    (B, N) bool     the positions that carry loss
    weight  (B, N) float32  weight of each position's cross-entropy, 0 where mask is False:
                            sum(weight * nll) / (number of target blocks) is in nats per token
    m       (B, T) float64  mask rate of each target block, k / S where k is what is drawn
    block   (B, T) int64    index of each target block: T = nb, or 1 with `corrupt_target_block`
    """

    xt: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor
    m: torch.Tensor
    block: torch.Tensor


# ---- noise schedules: (u, score, rates) -> (mask (..., S) bool, weight (..., S), m (...)) --------
# u (...) uniform on [0, 1) and stratified, one for each block; score (..., S) uniform, one a token


def balanced(u, score, rates):
    return exactly(u, score, torch.ones(score.shape[-1], dtype=torch.float64), rates)


def tilted(u, score, rates):  # a block with few masks says little about its mean
    return exactly(u, score, torch.arange(1, score.shape[-1] + 1).double().rsqrt(), rates)


def uniform(u, score, rates):
    return at_rate(rates.m_min + (1 - rates.m_min) * u, score)


def clipped(u, score, rates):
    return at_rate(rates.clip_low + (rates.clip_high - rates.clip_low) * u, score)


SCHEDULES = {f.__name__: f for f in (balanced, tilted, uniform, clipped)}


def exactly(u, score, p, rates):
    """Mask the k positions with the smallest scores, k the quantile at u of P(k) ~ p[k - 1]."""
    S, p = score.shape[-1], p / p.sum() * (1 - rates.full_share)
    p[-1] += rates.full_share
    k = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=S - 1) + 1
    mask = score.argsort(dim=-1).argsort(dim=-1) < k.unsqueeze(-1)
    return mask, mask / (k * S * p[k - 1]).unsqueeze(-1), k.double() / S


def at_rate(m, score):
    """Mask each token with probability m, which is one number a block."""
    mask = score < m.unsqueeze(-1)
    return mask, mask / (m * score.shape[-1]).unsqueeze(-1), m


def weighted(mask, weight, m, weighting):
    """float32 weights: the bound's ("elbo"), or "cascade", the weight of CASCADE's Phase 1 note.

    "cascade" is (1/m) * mean over the masked, with the 1/m outside of the mean. It is NOT the
    bound: the mean already divides by about m S, so blocks that are nearly clean count 1/m times
    too much, and the expectation grows like log(1 / m_min).
    """
    if weighting == "cascade":
        weight = mask / (m * mask.sum(dim=-1).clamp(min=1)).unsqueeze(-1)
    return weight.float()


# ---- drawing -------------------------------------------------------------------------------------


def strata(groups, n, generator):
    """(groups, n) float64 in [0, 1): in each group one uniform draw from each of n equal strata.

    The strata are permuted, so that each entry by itself is uniform. In order they would tie the
    noise level of a block to its position in the sequence.
    """
    order = torch.rand(groups, n, generator=generator, dtype=torch.float64).argsort(dim=1)
    return (order + torch.rand(groups, n, generator=generator, dtype=torch.float64)) / n


def block_strata(batch, nb, block_size, generator):
    """(batch, nb) float64: u of each block, stratified over the smallest number of sequences whose
    blocks are a multiple of S: there `balanced` gives every k equally often. Sequences left over
    are stratified among themselves."""
    group = block_size // gcd(block_size, nb)
    whole, rest = divmod(batch, group)
    u = strata(whole, group * nb, generator).reshape(whole * group, nb)
    if rest:
        u = torch.cat([u, strata(1, rest * nb, generator).reshape(rest, nb)])
    return u


def nonempty(score, m, generator):
    """`score` (..., S) redrawn so that each is below m (...), given that at least one is.

    Exact, without rejection: the first such position i has the truncated geometric distribution
    P(i) = m (1-m)^i / (1 - (1-m)^S), drawn by its inverse; the positions after it are free.
    """
    S, m = score.shape[-1], m.unsqueeze(-1)
    u = torch.rand(m.shape, generator=generator, dtype=torch.float64)
    some = -torch.expm1(S * torch.log1p(-m))  # 1 - (1-m)^S without cancellation
    first = (torch.log1p(-u * some) / torch.log1p(-m)).long().clamp_(0, S - 1)
    position = torch.arange(S)
    return torch.where(position < first, 2.0, score).masked_fill(position == first, -1.0)


def corrupt_all_blocks(
    x0, block_size, mask_id, generator, schedule="balanced", rates=RATES, weighting="elbo",
    copies=1,
):
    """Mask every block of every sequence: the noisy stream of two-stream training.

    x0 (B, N) int64 clean tokens on the CPU -> `Noisy` with T = nb. copies=2 makes an antithetic
    pair: where one draws u, the other draws 1 - u and masks from the other end of the same random
    order; under `balanced` and `uniform` every token is masked in one of them. Under `uniform` and
    `clipped` a block may stay unmasked and rightly adds nothing: a forced mask would be a bias.
    Raises ValueError for an unknown name, rates outside of (0, 1], other copies, or N % S.
    """
    nb = check(x0, block_size, schedule, weighting, rates)
    if copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, not {copies}")
    B = x0.shape[0]
    u = block_strata(B, nb, block_size, generator)
    score = torch.rand(B, nb, block_size, generator=generator, dtype=torch.float64)
    if copies == 2:
        u, score = torch.stack([u, 1 - u]), torch.stack([score, 1 - score])
    mask, weight, m = SCHEDULES[schedule](u, score, rates)
    weight, mask = weighted(mask, weight, m, weighting).flatten(-2), mask.flatten(-2)
    xt = x0.expand_as(mask).masked_fill(mask, mask_id)
    return Noisy(xt, mask, weight, m, torch.arange(nb).expand(B, nb))


def corrupt_target_block(
    x0, block_size, mask_id, generator, schedule="uniform", rates=RATES, weighting="cascade",
    block=None,
):
    """One target block per example, with everything after it hidden, for one pass over N tokens.

    For each example a target block b (uniform, or given as `block`, (B,) int64) and a rate m: the
    tokens of block b are masked at rate m, at least one of them; all tokens of blocks > b are
    masked; blocks < b stay clean. The loss mask holds the masked positions of block b alone.
    x0 (B, N) int64 on the CPU -> `Noisy` with T = 1. Raises as corrupt_all_blocks.

    "At least one" is the distribution of the mask given that it is not empty. That has probability
    1 - (1-m)^S, so the bound's weight is (1 - (1-m)^S) / (m S).
    """
    nb, S, B = check(x0, block_size, schedule, weighting, rates), block_size, x0.shape[0]
    if block is None:
        block = torch.randint(nb, (B,), generator=generator)
    elif block.shape != (B,) or bool(((block < 0) | (block >= nb)).any()):
        raise ValueError(f"block must hold {B} indices in 0..{nb - 1}")
    u = block_strata(B, 1, S, generator)[:, 0]
    score = torch.rand(B, S, generator=generator, dtype=torch.float64)
    mask, weight, m = SCHEDULES[schedule](u, score, rates)
    if schedule in ("uniform", "clipped"):
        mask, weight, m = SCHEDULES[schedule](u, nonempty(score, m, generator), rates)
        weight *= -torch.expm1(S * torch.log1p(-m)).unsqueeze(-1)
    weight = weighted(mask, weight, m, weighting)

    here = (torch.arange(nb) == block[:, None]).unsqueeze(-1)  # (B, nb, 1)
    mask = (here & mask[:, None]).reshape(x0.shape)
    weight = (here * weight[:, None]).reshape(x0.shape)
    if not bool(mask.any(dim=1).all()):
        raise AssertionError("an example has an empty loss mask")
    later = (torch.arange(nb) > block[:, None]).repeat_interleave(S, dim=1)
    return Noisy(x0.masked_fill(mask | later, mask_id), mask, weight, m[:, None], block[:, None])


def check(x0, block_size, schedule, weighting, rates):
    """What both corruptions refuse; returns nb."""
    for what, name, names in (("noise", schedule, SCHEDULES), ("weighting", weighting, WEIGHTINGS)):
        if name not in names:
            raise ValueError(f"{what} must be one of {', '.join(names)}, not {name!r}")
    rates.check(schedule)
    return check_blocks(x0.shape[1], block_size)


def check_blocks(seq_len, block_size):
    """The number of blocks nb = N / S. Raises ValueError unless S divides N."""
    if block_size < 1 or seq_len < 1 or seq_len % block_size:
        raise ValueError(
            f"a sequence of {seq_len} tokens cannot be cut into blocks of {block_size}: "
            "seq_len must be a positive multiple of block_size"
        )
    return seq_len // block_size


# ---- the loss ------------------------------------------------------------------------------------


def masked_diffusion_loss(logits, targets, weight, num_blocks):
    """Loss in nats per token: sum_i weight_i * -log softmax(logits_i)[targets_i] / num_blocks.

    logits (..., V), targets (...) int64, weight (...): of all positions, or of the masked ones
    alone, which is the same number. `num_blocks` counts the target blocks of the global batch, so
    that sharing a batch among processes or accumulation steps changes nothing.
    """
    nll = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return (nll * weight.flatten()).sum() / num_blocks


def head_nll(h, head, targets, teacher=None, most=2**25):
    """(M,) float32: -log softmax(h head^T)[targets], without ever holding all of the logits.

    h (M, C), head (V, C), targets (M,) int64. With teacher = (t (M, C'), its head (V, C')) the
    cross-entropy against softmax(t head'^T) instead, which is not differentiated: the KL divergence
    but for a constant. `most`: logits held at once, 134 MB by default. Where there are more, each
    piece is computed again for its gradient.
    """

    def nll(h, targets, *rows):
        if rows:
            with torch.no_grad():
                targets = F.linear(*rows, teacher[1]).float().softmax(dim=-1)
        return F.cross_entropy(F.linear(h, head).float(), targets, reduction="none")

    inputs = (h, targets) if teacher is None else (h, targets, teacher[0])
    rows = max(1, most // len(head))
    if len(h) <= rows:
        return nll(*inputs)
    pieces = zip(*(x.split(rows) for x in inputs), strict=True)
    return torch.cat([checkpoint(nll, *x, use_reentrant=False) for x in pieces])


@torch.no_grad()
def head_overlap(a, b, head, most=2**25):
    """(M,) float32 in [0, 1]: sum_x min(p(x), q(x)) of p = softmax(a head^T) and q of b, (M, C)
    each: the probability that speculative sampling of p accepts a draft from q."""
    rows, found = max(1, most // len(head)), []
    for pair in zip(a.split(rows), b.split(rows), strict=True):
        found.append(torch.minimum(*(F.linear(x, head).float().softmax(-1) for x in pair)).sum(-1))
    return torch.cat(found)
