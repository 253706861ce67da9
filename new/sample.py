"""Decoding. So far the rules that choose what a denoising pass reveals."""

import torch
import torch.nn.functional as F

# ---- unmasking rules -----------------------------------------------------------------------------
# (log_p, masked, count, limit, score) -> bool (..., S): which masked tokens of a block to reveal
# now. log_p (..., S, V): the model's own, before temperature and truncation. masked (..., S).
# count (...): how many, so that the block takes the passes that it was given. limit: a number that
# lets an adaptive rule choose by itself how many. score (..., S) in [0, 1): random numbers.


def random(log_p, masked, count, limit, score):
    """In a random order: with a pass for each token the distribution that was trained."""
    return smallest(score, masked, count)


def left_to_right(log_p, masked, count, limit, score):
    """From the left: with a pass for each token the chain rule inside a block."""
    return masked & (masked.cumsum(dim=-1) <= count.unsqueeze(-1))


def confidence(log_p, masked, count, limit, score):
    """Those whose likeliest token is the most probable."""
    return smallest(-certainty(log_p), masked, count)


def threshold(log_p, masked, count, limit, score):
    """All whose likeliest token has a probability of `limit` or more; at least the best one."""
    best = smallest(-certainty(log_p), masked, torch.ones_like(count))
    return best | (masked & (certainty(log_p) >= limit))


def entropy(log_p, masked, count, limit, score):
    """By rising entropy, as many as keep (sum of entropies) - (the largest) <= limit, which bounds
    the nats lost by drawing them as if independent (EB, arXiv 2505.24857)."""
    h = -(log_p.exp() * log_p).sum(dim=-1) + from_the_left(masked)
    h, place = h.masked_fill(~masked, torch.inf).sort(dim=-1)
    before = F.pad(h[..., :-1].cumsum(dim=-1), (1, 0))  # the sum of the smaller ones
    return masked & torch.zeros_like(masked).scatter(-1, place, before <= limit)


RULES = {f.__name__: f for f in (random, left_to_right, confidence, threshold, entropy)}


def from_the_left(masked):
    """A millionth for each place: where tokens are alike but for rounding, as in a first block of
    masks alone, the left one comes first."""
    return 1e-6 * torch.arange(masked.shape[-1], device=masked.device)


def certainty(log_p):
    p = log_p.amax(dim=-1).exp()
    return p - from_the_left(p)


def smallest(key, masked, count):
    """The `count` masked tokens of each block with the smallest keys."""
    rank = key.masked_fill(~masked, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return masked & (rank < count.unsqueeze(-1))
