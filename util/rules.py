"""Unmasking rules: in which order a block of context="block" is written.

A rule (log_p, masked, count, limit, score) -> bool (..., S) says which masked tokens to reveal now.

    log_p  (..., S, V)  the model's own, before temperature and truncation
    masked (..., S)     bool
    count  (...)        how many, for a block in K passes; adaptive rules go by `limit` instead
    limit               of an adaptive rule; LIMITS has the defaults
    score  (..., S)     random numbers in [0, 1), for the rule random
"""

import torch
import torch.nn.functional as F

LIMITS = {"threshold": 0.9, "entropy": 0.1}  # of the adaptive rules: a probability; nats


def random(log_p, masked, count, limit, score):
    """In a random order. A token a pass gives the distribution that was trained."""
    return smallest(score, masked, count)


def left_to_right(log_p, masked, count, limit, score):
    """From the left. A token a pass is the chain rule inside a block."""
    return masked & (masked.cumsum(dim=-1) <= count.unsqueeze(-1))


def confidence(log_p, masked, count, limit, score):
    """Where the network is surest of its likeliest token."""
    return smallest(leftmost(-log_p.amax(dim=-1).exp()), masked, count)


def threshold(log_p, masked, count, limit, score):
    """All whose likeliest token has a probability of `limit` or more; at least the best one."""
    p = log_p.amax(dim=-1).exp()
    best = smallest(leftmost(-p), masked, torch.ones_like(count))
    return best | (masked & (p >= limit))


def entropy(log_p, masked, count, limit, score):
    """By rising entropy, as many as keep (sum of entropies) - (the largest) <= limit, which bounds
    the nats lost by drawing them as if independent (EB, arXiv 2505.24857)."""
    h = leftmost(-(log_p.exp() * log_p).sum(dim=-1))
    h, place = h.masked_fill(~masked, torch.inf).sort(dim=-1)
    before = F.pad(h[..., :-1].cumsum(dim=-1), (1, 0))  # the sum of the smaller ones
    return masked & torch.zeros_like(masked).scatter(-1, place, before <= limit)


RULES = {f.__name__: f for f in (random, left_to_right, confidence, threshold, entropy)}


def leftmost(key):
    """The keys, plus a millionth for each place, so that keys which differ by rounding alone are
    taken from the left: at the start of a text all masks look alike."""
    return key + 1e-6 * torch.arange(key.shape[-1], device=key.device)


def smallest(key, masked, count):
    """The `count` masked tokens of each block with the smallest keys."""
    rank = key.masked_fill(~masked, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return masked & (rank < count.unsqueeze(-1))
