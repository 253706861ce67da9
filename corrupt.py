"""How tokens are masked, and what the loss weighs.

A sequence is cut into blocks of S tokens, which are predicted left to right. Inside a block k
tokens are replaced by [MASK], and the network predicts them from the rest of the block and from all
earlier blocks. With k uniform on 1..S, and k masked positions of the block drawn uniformly,

    -log p(block | earlier blocks)  <=  E[ S/k * sum_{i masked} -log p(x_i | what is visible) ]

This is the bound. Masks at a rate m ~ U(0, 1], with 1/m for S/k, give the same number. The weights
below are these over S, so that a block's sum is in nats per token.

    noise      draws                                             weight of each masked token
    balanced   every k in 1..S equally often, exactly k masked   1 / k
    uniform    m ~ U[m_min, 1], each token masked at rate m      1 / (m S); the bound for m_min -> 0
    clipped    m ~ U[clip_low, clip_high], else as uniform       1 / (m S); for training, no bound
    full       k = S: every block is masked completely           1 / S

`uniform` is the noise of MDLM and LLaDA, `clipped` that of BD3-LM (arXiv 2503.09573); `full` trains
drafts. CASCADE's Phase 1 note is the text that this project began with: one target block in a
sequence, and another weighting. All is a pure function of its arguments and a CPU generator: drawn
for the global batch, and then sliced, noise depends neither on the device nor on the processes.
"""

from math import gcd
from typing import NamedTuple

import torch

from util.settings import require


class Rates(NamedTuple):
    """Mask rates: `uniform` draws from [m_min, 1], `clipped` from [clip_low, clip_high]."""

    m_min: float = 1e-3
    clip_low: float = 0.3
    clip_high: float = 0.8


class Noisy(NamedTuple):
    """B corrupted sequences with T target blocks each: all nb, or 1 with `corrupt_target_block`.

    xt      (B, N) int64    tokens, `mask_id` where masked
    mask    (B, N) bool     the masked positions that the loss is over
    weight  (B, N) float32  weight of each position's NLL, 0 where mask is False
    block   (B, T) int64    index of each target block
    m       (B, T) float64  its mask rate; k / S where k is what is drawn
    """

    xt: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor
    block: torch.Tensor
    m: torch.Tensor


def masked_diffusion_loss(nll, weight, num_blocks):
    """sum_i weight_i * nll_i / num_blocks: the loss in nats per token, of masked tokens (M,).
    num_blocks: target blocks in the global batch, so that how it is shared out changes nothing."""
    require(nll.shape == weight.shape, f"{tuple(nll.shape)} NLLs, {tuple(weight.shape)} weights")
    return (nll * weight).sum() / num_blocks


# ---- schedules of the noise ----------------------------------------------------------------------
# (u, score, rates) -> (m, k, weight), each (...), of a block: its mask rate; how many of its tokens
# are masked; the weight of each. u (...) and score (..., S) are random numbers in [0, 1): of the
# block, stratified over the batch, and of its tokens.


def balanced(u, score, rates):
    S = score.shape[-1]
    k = 1 + (u * S).floor().clamp(max=S - 1)
    return k / S, k, 1 / k


def uniform(u, score, rates):
    return at_rate(rates.m_min + (1 - rates.m_min) * u, score)


def clipped(u, score, rates):
    return at_rate(rates.clip_low + (rates.clip_high - rates.clip_low) * u, score)


def full(u, score, rates):
    k = torch.full_like(u, score.shape[-1])
    return torch.ones_like(u), k, 1 / k


def at_rate(m, score):
    k = (score < m.unsqueeze(-1)).double().sum(dim=-1)  # where it is 0, there rightly is no loss
    return m, k, 1 / (m * score.shape[-1])


SCHEDULES = {f.__name__: f for f in (balanced, uniform, clipped, full)}
WEIGHTINGS = ("elbo", "cascade")
RATES = Rates()


def block_strata(batch, nb, S, generator):
    """(batch, nb) float64: u of each block, one from each of n equal parts of [0, 1).

    n is the number of blocks of a group: the fewest sequences that have a multiple of S blocks (for
    S = 8, 4 sequences of 6), for then `balanced` gives every k equally often. Those left over are a
    group of their own. The parts are permuted: no block's noise is tied to its place."""
    group = S // gcd(S, nb)
    u = []
    for first in range(0, batch, group):
        n = min(group, batch - first) * nb
        part = torch.randperm(n, generator=generator)
        u.append((part + torch.rand(n, generator=generator, dtype=torch.float64)) / n)
    return torch.cat(u).view(batch, nb)


def draw_masks(batch, nb, S, generator, noise, rates, weighting, nonempty=False):
    """mask (B, nb, S) bool, weight (B, nb, S) and m (B, nb), float64, of nb blocks a sequence.

    nonempty: as if drawn until k is not 0. A mask at rate m is not empty with probability
    1 - (1-m)^S: the bound's weight becomes (1 - (1-m)^S) / (m S).

    weighting: "elbo", the bound's, as above; or "cascade", of CASCADE's Phase 1 note, which is
    (1/m) * mean over the masked. It is NOT the bound: the mean divides by k, about m S, and 1/m
    stands outside of it. So nearly clean blocks count 1/m times too much, and the expectation grows
    like log(1 / m_min)."""
    require(noise in SCHEDULES, f"noise must be one of {', '.join(SCHEDULES)}, not {noise!r}")
    require(weighting in WEIGHTINGS, f"weighting must be elbo or cascade, not {weighting!r}")
    require(0 < rates.m_min <= 1 and 0 < rates.clip_low <= rates.clip_high <= 1,
            f"mask rates must satisfy 0 < low <= high <= 1, not {tuple(rates)}")
    u = block_strata(batch, nb, S, generator)
    score = torch.rand(batch, nb, S, generator=generator, dtype=torch.float64)
    m, k, weight = SCHEDULES[noise](u, score, rates)
    if nonempty and noise in ("uniform", "clipped"):  # the others always mask some
        log_p = torch.distributions.Binomial(S, m.unsqueeze(-1)).log_prob(torch.arange(1, S + 1))
        again = 1 + torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator)
        k = torch.where(k == 0, again.view(k.shape).double(), k)
        weight = weight * (1 - (1 - m) ** S)
    if weighting == "cascade":
        weight = 1 / (m * k.clamp(min=1))
    mask = score.argsort(dim=-1) < k.unsqueeze(-1)  # k places of a random order
    return mask, torch.where(mask, weight.unsqueeze(-1), 0.0), m


def corrupt_all_blocks(x0, block_size, mask_id, generator, noise="balanced", rates=RATES,
                       weighting="elbo"):
    """Mask every block of every sequence: x0 (B, N) int64 on the CPU -> `Noisy` with T = nb. Raises
    ValueError for an unknown name, rates outside of (0, 1], and S that does not divide N."""
    B, nb = len(x0), count_blocks(x0.shape[1], block_size)
    mask, weight, m = draw_masks(B, nb, block_size, generator, noise, rates, weighting)
    mask, weight = mask.flatten(1), weight.flatten(1).float()  # (B, N)
    return Noisy(x0.masked_fill(mask, mask_id), mask, weight, torch.arange(nb).expand(B, nb), m)


def corrupt_target_block(x0, block_size, mask_id, generator, noise="uniform", rates=RATES,
                         weighting="elbo"):
    """One target block b per example, drawn uniformly: the form of CASCADE's Phase 1 note. Tokens
    of block b are masked at a rate m, at least one of them; blocks < b stay clean; blocks > b are
    masked completely. The loss is over the masked positions of block b alone.

    x0 (B, N) int64 on the CPU -> `Noisy` with T = 1. Raises as corrupt_all_blocks."""
    B, nb, S = len(x0), count_blocks(x0.shape[1], block_size), block_size
    target = torch.randint(nb, (B, 1), generator=generator)
    mask, weight, m = draw_masks(B, 1, S, generator, noise, rates, weighting, nonempty=True)
    block = torch.arange(nb).repeat_interleave(S)  # (N,), of each position
    mask = (block == target) & mask[:, 0].repeat(1, nb)  # (B, N)
    weight = torch.where(mask, weight[:, 0].repeat(1, nb), 0.0).float()
    return Noisy(x0.masked_fill(mask | (block > target), mask_id), mask, weight, target, m)


def count_blocks(seq_len, block_size):  # nb = N // S
    require(block_size > 0 and seq_len > 0 and seq_len % block_size == 0,
            f"seq_len {seq_len} is not a positive multiple of block_size {block_size}")
    return seq_len // block_size
