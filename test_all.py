"""Every claim of this repository as a test.

    python test_all.py               all of them, about three minutes on two cores
    python test_all.py noise cache   those with one of these words in their name
    python test_all.py faults        kills, full disks, lost processes: runs only when named

One line each: PASS, FAIL or SKIP, the name, the seconds, what was measured and what is allowed.
The last line is `N passed, N failed` (and `, N skipped`); the exit code is 1 if any failed.
"""

import contextlib
import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import checkpoint
import configurator
import corrupt
import dataset
import eval as evaluation
import judge as judges
import log
import machine
import model as cascade
import muon
import plot
import reference
import sample
import train
from dataset import CharTokenizer, DataError

try:
    import resource
except ImportError:
    resource = None  # not on Windows

HERE = Path(__file__).resolve().parent


class Skip(Exception):
    """A check that cannot run here; the message says why."""


def within(measured, allowed, what="max|diff|"):
    """The test's line; AssertionError when measured > allowed, or is not a number."""
    line = f"{what} = {measured:.2g}, allowed {allowed:.2g}"
    assert measured <= allowed, line
    return line


def diff(a, b):
    """Largest absolute difference of two tensors of one shape, in float64."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a.detach().double() - b.detach().double()).abs().max().item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(seed=0, std=0.3, attention="chunk", **shape):
    """A small random model whose every weight matters: initialisation leaves some at zero."""
    shape = {
        "vocab_size": 11, "seq_len": 15, "block_size": 3, "n_layer": 2, "n_head": 4, "n_embd": 32,
        "n_hidden": 40, **shape,
    }
    net = cascade.CascadeLM(cascade.CascadeConfig(**shape), attention)
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * std)
    return net


def tokens_for(net, batch=3, seed=1):
    return torch.randint(
        net.config.vocab_size, (batch, net.config.seq_len), generator=generator(seed)
    )


def noisy_for(net, x0, seed=2):
    """(Noisy, flat indices of the masked positions) under `balanced` noise."""
    c = net.config
    noisy = corrupt.corrupt_all_blocks(x0, c.block_size, c.mask_id, generator(seed))
    return noisy, noisy.mask.flatten().nonzero()[:, 0]


# the shapes that parity is tested on: odd block size, S = 1, S = N, grouped heads, tied head
SHAPES = (
    {"block_size": 3, "n_kv_head": 1, "qk_norm": True, "neighbours": 4},
    {"block_size": 1, "tie_embeddings": True, "qk_norm": False, "neighbours": 2},
    {"block_size": 15, "n_kv_head": 2, "qk_norm": False, "neighbours": 3},
    {"block_size": 5, "n_kv_head": 2, "tie_embeddings": True, "qk_norm": True},
)


# ---- the oracle and the masks --------------------------------------------------------------------


def test_reference_script():
    """python reference.py proves itself."""
    run = subprocess.run(
        [sys.executable, "reference.py"], cwd=HERE, capture_output=True, text=True, check=False
    )
    lines = run.stdout.strip().splitlines()
    passed = sum(line.startswith("PASS") for line in lines)
    assert run.returncode == 0 and passed == 4, run.stdout + run.stderr
    assert lines[-1] == "All CASCADE block-attention and cache tests passed", lines[-1]
    return f"{passed} PASS lines, exit code 0"


def test_block_causal_mask():
    """The mask against its definition, entry by entry, and its count."""
    entries = 0
    for N, S in ((12, 3), (8, 1), (6, 6), (15, 5)):
        mask = cascade.build_block_causal_mask(N, S)
        for i, j in itertools.product(range(N), repeat=2):
            assert bool(mask[i, j]) == (j // S <= i // S), (N, S, i, j)
        assert int(mask.sum()) == N * (N + S) // 2, (N, S, int(mask.sum()))
        entries += N * N
    return f"{entries} entries as defined, N(N+S)/2 of them visible"


def test_two_stream_mask():
    """The two-stream mask against the oracle's rule, and its N (N + S) visible entries."""
    for N, S in ((12, 3), (8, 1), (6, 6), (15, 5)):
        mask, rule = cascade.build_two_stream_mask(N, S), reference.two_stream_rule(N, S)
        for i, j in itertools.product(range(2 * N), repeat=2):
            assert bool(mask[i, j]) == bool(rule(i, j)), (N, S, i, j)
        assert int(mask.sum()) == N * (N + S), (N, S, int(mask.sum()))
    flex = cascade.flex_block_mask(12, 3, 1, False, "cpu").mask_mod
    i, j = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    assert bool((flex(0, 0, i, j) == cascade.build_two_stream_mask(12, 3)).all())
    flex = cascade.flex_block_mask(12, 3, 1, True, "cpu").mask_mod
    noisy = cascade.build_two_stream_mask(12, 3)[12:]
    assert bool((flex(0, 0, i[:12], j[:12]) == noisy).all())
    return "as defined, N(N+S) visible; FlexAttention's rule is the same"


def test_block_boundaries():
    """Off by one is caught at the first, a middle and the last block: block b is bS..(b+1)S-1."""
    N, S = 20, 4
    mask = cascade.build_block_causal_mask(N, S)
    for b in (0, 2, 4):
        first, last = b * S, (b + 1) * S - 1
        assert mask[first, last] and mask[last, first]
        assert not mask[first, min(last + 1, N - 1)] or last == N - 1
        assert mask[first].sum() == mask[last].sum() == (b + 1) * S
        x0 = torch.zeros(1, N, dtype=torch.long)
        noisy = corrupt.corrupt_target_block(
            x0, S, 9, generator(), law="clipped", clip=(1.0, 1.0), block=torch.tensor([b])
        )
        places = noisy.mask[0].nonzero()[:, 0].tolist()
        assert places == list(range(first, last + 1)), places
        assert (noisy.xt[0, :first] == 0).all() and (noisy.xt[0, first:] == 9).all()
    return "blocks 0, 2 and 4 of 5: masks and corruption start at bS and end at (b+1)S-1"


# ---- the corruption ------------------------------------------------------------------------------


def test_target_block_corruption():
    """Clean before b, loss mask = masked positions of b alone, everything after b masked."""
    B, N, S, mask_id = 4000, 24, 4, 50
    x0 = torch.randint(mask_id, (B, N), generator=generator(3))
    for law in corrupt.NOISE_LAWS:
        noisy = corrupt.corrupt_target_block(x0, S, mask_id, generator(4), law=law)
        at = torch.arange(N) // S
        b = noisy.block
        inside = at == b
        assert ((noisy.xt == mask_id) == (noisy.mask | (at > b))).all()
        assert not (noisy.mask & ~inside).any() and noisy.mask.any(dim=1).all()
        assert (noisy.xt == torch.where(noisy.xt == mask_id, mask_id, x0)).all()
        assert ((noisy.weight > 0) == noisy.mask).all()
        share = torch.bincount(b[:, 0], minlength=N // S) / B
        assert (share - S / N).abs().max() < 0.03, share
    # given that it is not empty, each position is masked at rate m / (1 - (1-m)^S)
    m = 0.1
    noisy = corrupt.corrupt_target_block(
        x0, S, mask_id, generator(5), law="clipped", clip=(m, m), block=torch.zeros(B).long()
    )
    rate = noisy.mask[:, :S].double().mean(dim=0)
    expected = m / (1 - (1 - m) ** S)
    error = math.sqrt(expected * (1 - expected) / B)
    return within((rate - expected).abs().max().item() / error, 4, "non-empty rate, std errors off")


def balanced_counts(batch, nb, S, seed):
    return corrupt.counts(corrupt.block_strata(batch, nb, S, generator(seed)), "balanced", S)


def test_noise_balanced_counts():
    """Every k equally often in each group of sequences, and uniform at every place."""
    for B, nb, S in ((6, 4, 4), (8, 2, 16), (12, 3, 9), (10, 6, 4)):
        k = balanced_counts(B, nb, S, seed=B)
        group = S // math.gcd(S, nb)
        for rows in k[: B // group * group].split(group):
            counts = torch.bincount(rows.flatten(), minlength=S + 1)[1:]
            assert (counts == counts[0]).all(), (B, nb, S, counts)
        assert k.min() >= 1 and k.max() <= S
    # 4000 batches of 5 sequences (a group of 4 and one left over), 3 blocks, S = 4: per place
    draws = torch.stack([balanced_counts(5, 3, 4, i) for i in range(4000)])
    share = torch.stack([(draws == k).double().mean(dim=0) for k in (1, 2, 3, 4)])
    error = math.sqrt(0.25 * 0.75 / 4000)
    return within((share - 0.25).abs().max().item() / error, 4.5, "share of k, std errors off")


def test_noise_places_are_uniform():
    """`uniform` rates: mean 1/2 and variance 1/12 at every block's place, and tied to none."""
    draws = torch.stack(
        [
            corrupt.corrupt_all_blocks(
                torch.zeros(4, 12, dtype=torch.long), 2, 9, generator(i), law="uniform"
            ).m
            for i in range(3000)
        ]
    )  # (3000, 4, 6)
    error = math.sqrt(1 / 12 / 3000)
    worst = (draws.mean(dim=0) - 0.5005).abs().max().item() / error
    spread = (draws.var(dim=0) * 12 - 1).abs().max().item()
    assert spread < 0.1, spread
    # stratified: the mean over a batch varies far less than for independent draws
    batch = draws.mean(dim=(1, 2)).std().item()
    assert batch < 0.2 * math.sqrt(1 / 12 / 24), batch
    return within(worst, 4.5, "mean rate by place, std errors off")


def test_noise_masks():
    """balanced masks exactly k anywhere; Bernoulli laws mask at rate m; weights as tabled."""
    x0 = torch.randint(9, (600, 16), generator=generator(1))
    S = 4
    laws = (("balanced", None), ("tilted", None), ("uniform", None), ("clipped", (0.4, 0.6)))
    for law, clip in laws:
        n = corrupt.corrupt_all_blocks(x0, S, 9, generator(2), law=law, clip=clip or (0.3, 0.8))
        assert ((n.xt == 9) == n.mask).all() and (n.xt[~n.mask] == x0[~n.mask]).all()
        k = n.mask.view(600, 4, S).sum(dim=-1)
        weight = n.weight.view(600, 4, S)
        share = corrupt.mean_rate(law, S, clip=clip or (0.3, 0.8))
        assert abs(n.mask.double().mean().item() - share) < 0.01, (law, share)
        if law == "balanced":
            assert (k == (n.m * S).round()).all()
            assert (weight.sum(dim=-1) - 1).abs().max() < 1e-6
            place = n.mask.view(-1, S).double().mean(dim=0)
            assert (place - 0.625).abs().max() < 0.04, place
        elif law == "tilted":
            share = torch.bincount(k.flatten(), minlength=S + 1)[1:] / k.numel()
            wanted = torch.tensor([1, 2**-0.5, 3**-0.5, 0.5], dtype=torch.float64)
            wanted /= wanted.sum()
            assert (share - wanted).abs().max() < 0.01, share
            each = 1 / (S * k * wanted[k - 1])
            assert diff(weight, each[..., None] * n.mask.view(600, 4, S)) < 1e-6
            assert (weight.sum(dim=-1)[k == 4] == weight.sum(dim=-1).max()).all()
            other = corrupt.corrupt_all_blocks(x0, S, 9, generator(2), law, weighting="cascade")
            assert diff(other.weight.view(600, 4, S) * n.m[..., None], weight) < 1e-6
        else:
            expected = (1 / (n.m * S)).float()[..., None] * n.mask.view(600, 4, S)
            assert diff(weight, expected) < 1e-5 * expected.max()
            assert abs((k / S - n.m).mean().item()) < 0.03
        if law == "clipped":
            assert 0.4 <= n.m.min() and n.m.max() <= 0.6
    return "masks, counts and weights as tabled for four laws"


def test_noise_pairs():
    """Two copies: k and S + 1 - k masked, every token in one and one token of a block in both; each
    copy's counts uniform on 1..S, each set of k places as likely as any other."""
    S, mask_id = 4, 99
    x0 = torch.arange(32).expand(3000, 32)
    pair = corrupt.corrupt_all_blocks(x0, S, mask_id, generator(5), copies=2)
    assert ((pair.xt == mask_id) == pair.mask).all() and (pair.xt[~pair.mask] < 32).all()
    blocks = pair.mask.view(2, -1, S)
    k = blocks.sum(dim=-1)
    assert (k.sum(dim=0) == S + 1).all() and (blocks.sum(dim=0).clamp(max=1) == 1).all()
    assert torch.equal(pair.m.flatten(1).float(), k / S) and pair.block.shape == (3000, 8)
    assert (pair.weight.view(2, -1, S) == blocks / k.unsqueeze(-1)).all()
    code = (blocks * 2 ** torch.arange(S)).sum(dim=-1)  # which set of places
    worst = 0.0
    for copy in range(2):
        assert torch.equal(k[copy].bincount()[1:], torch.full((S,), 6000)), k[copy].bincount()
        for size in range(1, S + 1):
            seen = code[copy][k[copy] == size].unique(return_counts=True)[1]
            assert len(seen) == math.comb(S, size)
            expected = 6000 / len(seen)
            worst = max(worst, (((seen - expected) ** 2) / expected).sum().item())
    return within(worst, 25, "chi2 of at most 5 degrees of freedom")


def test_noise_guards():
    """Impossible rates, blocks and names are refused with one line."""
    x0 = torch.zeros(2, 8, dtype=torch.long)
    bad = [
        {"block_size": 3}, {"block_size": 0}, {"law": "gaussian"}, {"weighting": "mean"},
        {"law": "uniform", "m_min": 0.0}, {"law": "uniform", "m_min": 1.5},
        {"law": "clipped", "clip": (0.8, 0.3)}, {"law": "clipped", "clip": (0.3, 1.2)},
    ]
    for make, extra in (
        (corrupt.corrupt_all_blocks, [{"copies": 3}]),
        (corrupt.corrupt_target_block, [{"block": torch.tensor([0, 2])}]),
    ):
        for wrong in bad + extra:
            arguments = {"block_size": 4, **wrong}
            with raises(ValueError):
                make(x0, mask_id=9, generator=generator(), **arguments)
    return f"{2 * len(bad) + 2} wrong calls refused"


# ---- attention and the network against the slow truth --------------------------------------------


def test_attention_equals_oracle():
    """One head, no rotary embedding, fp32: all paths against the float64 loop on the same input."""
    worst = 0.0
    for N, S in ((24, 4), (15, 3), (8, 1), (6, 6)):
        q, k, v = torch.randn(3, 2, 1, 1, N, 8, generator=generator(N)).unbind()
        truth = reference.block_causal_attention(q[0], k[0], v[0], S)
        worst = max(worst, diff(cascade.block_causal_attention(q[0], k[0], v[0], S), truth))
        q2, k2, v2 = (torch.cat([x[0], x[1]], dim=2) for x in (q, k, v))
        truth = reference.reference_attention(
            q2[0, 0], k2[0, 0], v2[0, 0], reference.two_stream_rule(N, S)
        )
        truth = truth.view(2, 1, 1, N, 8)
        for chunk in (1, 8, 64):
            both = cascade.chunked_two_stream_attention(q, k, v, S, chunk)
            noisy = cascade.chunked_two_stream_attention(q[1:], k, v, S, chunk)
            worst = max(worst, diff(both, truth), diff(noisy, truth[1:]))
        for queries, only in ((q, False), (q[1:], True)):
            mask = cascade.flex_block_mask(N, S, 1, only, "cpu")
            with torch.no_grad():
                y = cascade.flex_two_stream_attention(queries, k, v, mask)
            worst = max(worst, diff(y, truth[2 - len(queries) :]))
    return within(worst, 1e-6)


def test_attention_of_copies():
    """Noisy copies that share a clean stream: each as if it were alone with it, on every path."""
    worst = 0.0
    for N, S, copies in ((24, 4, 2), (15, 3, 3), (8, 1, 2), (6, 6, 2)):
        q, k, v = torch.randn(3, 1 + copies, 1, 1, N, 8, generator=generator(N)).unbind()
        truth = torch.empty_like(q, dtype=torch.float64)
        for copy in range(1, 1 + copies):
            q2, k2, v2 = (torch.cat([x[0, 0, 0], x[copy, 0, 0]]) for x in (q, k, v))
            y = reference.reference_attention(q2, k2, v2, reference.two_stream_rule(N, S))
            truth[0, 0, 0], truth[copy, 0, 0] = y.view(2, N, 8)
        for chunk in (1, 8, 64):
            every = cascade.chunked_two_stream_attention(q, k, v, S, chunk)
            noisy = cascade.chunked_two_stream_attention(q[1:], k, v, S, chunk)
            worst = max(worst, diff(every, truth), diff(noisy, truth[1:]))
        for queries, only in ((q, False), (q[1:], True)):
            mask = cascade.flex_block_mask(N, S, copies, only, "cpu")
            with torch.no_grad():
                y = cascade.flex_two_stream_attention(queries, k, v, mask)
            worst = max(worst, diff(y, truth[int(only) :]))
    return within(worst, 1e-6)


def test_attention_of_many_chunks():
    """Chunks past the first few join their keys anew for the gradient: the same gradients, and what
    is kept for them grows linearly with N."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 1, 2, 40, 8, generator=generator()))
    g = torch.randn(2, 1, 2, 40, 8, generator=generator(1))
    found = [
        torch.autograd.grad(cascade.chunked_two_stream_attention(q, k, v, 2, chunk), (q, k, v), g)
        for chunk in (2, 64)
    ]
    worst = max(diff(a, b) for a, b in zip(*found, strict=True))

    def kept(N):
        seen = {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x  # held, so that no address comes twice
            return x

        ins = (torch.zeros(2, 1, 1, N, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            cascade.chunked_two_stream_attention(*ins, 4, 8)
        return sum(x.untyped_storage().nbytes() for x in seen.values())

    growth = (kept(1024) - kept(512)) / (kept(512) - kept(256))
    assert growth < 2.5, growth  # of a quadratic part alone it would be 4
    return within(worst, 2e-5, f"from N=256 to 512 to 1,024 kept x {growth:.2f}; grad max|diff|")


def test_attention_half_precision():
    """bf16 and fp16 paths against the oracle on the same rounded input."""
    N, S, worst = 64, 8, {}
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (0.2 * torch.randn(3, 2, 1, 1, N, 32, generator=generator(7))).to(dtype).unbind()
        rule = reference.two_stream_rule(N, S)
        q2, k2, v2 = (torch.cat([x[0], x[1]], dim=2)[0, 0].double() for x in (q, k, v))
        truth = reference.reference_attention(q2, k2, v2, rule).view(2, 1, 1, N, 32)
        got = cascade.chunked_two_stream_attention(q, k, v, S)
        worst[dtype] = diff(got, truth)
        one = cascade.block_causal_attention(q[0], k[0], v[0], S)
        worst[dtype] = max(worst[dtype], diff(one, truth[0]))
    return within(max(worst.values()), 1e-3, f"fp16 {worst[torch.float16]:.1g}, bf16 max|diff|")


def test_model_equals_slow_model():
    """Logits of one and of two streams, loss and every gradient: heads, rotary, groups, ties."""
    worst = {"logits": 0.0, "loss": 0.0, "grad": 0.0}
    for shape in SHAPES:
        net = tiny_model(**shape)
        x0 = tokens_for(net)
        noisy, index = noisy_for(net, x0)
        state = {k: v.detach().clone().requires_grad_() for k, v in net.state_dict().items()}
        truth = reference.reference_logits(state, net.config, noisy.xt)
        worst["logits"] = max(worst["logits"], diff(net(noisy.xt), truth))
        truth = reference.reference_two_stream_logits(state, net.config, x0, noisy.xt)
        logits = net.masked_logits(x0, noisy.xt, index)
        worst["logits"] = max(worst["logits"], diff(logits, truth.flatten(0, 1)[index]))

        blocks = x0.numel() // net.config.block_size
        loss = train.Loss(net)(blocks, x0, noisy.xt, noisy.weight, index)
        slow = reference.reference_two_stream_loss(state, net.config, x0, noisy.xt, noisy.weight)
        worst["loss"] = max(worst["loss"], diff(loss, slow))
        loss.backward()
        slow.backward()
        for name, p in net.named_parameters():
            worst["grad"] = max(worst["grad"], diff(p.grad, state[name].grad))
    assert worst["loss"] < 2e-6 and worst["grad"] < 2e-5, worst
    return within(worst["logits"], 2e-6, f"grad {worst['grad']:.1g}; logits max|diff|")


def test_model_ar_equals_slow_model():
    """objective "ar": the same network under a causal mask; its first token comes from [MASK]."""
    net = tiny_model(objective="ar", block_size=1, neighbours=2)
    x0 = tokens_for(net)
    shifted = torch.cat([torch.full_like(x0[:, :1], 11), x0[:, :-1]], dim=1)
    truth = reference.reference_logits(net.state_dict(), net.config, shifted)
    nll = F.cross_entropy(truth.mT, x0)
    loss = train.Loss(net)(x0.numel(), x0)
    assert abs(loss.item() - nll.item()) < 1e-6, (loss.item(), nll.item())
    return within(diff(net.ar_logits(x0), truth), 2e-6)


def test_no_leak():
    """Changing block j moves no logit before j; changing the clean copy of b moves no noisy b."""
    net = tiny_model(seq_len=15, block_size=3, neighbours=4)
    x0 = tokens_for(net)
    xt = noisy_for(net, x0)[0].xt
    every = torch.arange(x0.numel())
    logits, both = net(x0), net.masked_logits(x0, xt, every).view(3, 15, -1)
    for b in range(5):
        block = slice(3 * b, 3 * b + 3)
        other = x0.clone()
        other[:, block] = (other[:, block] + 1) % 11
        moved = net(other)
        assert (moved[:, : 3 * b] == logits[:, : 3 * b]).all(), f"block {b} leaks backwards"
        assert (moved[:, block] != logits[:, block]).any(), "the check could not fail"
        moved = net.masked_logits(other, xt, every).view(3, 15, -1)
        upto = 3 * b + 3
        assert (moved[:, :upto] == both[:, :upto]).all(), f"noisy block {b} sees its clean copy"
        assert b == 4 or (moved[:, upto:] != both[:, upto:]).any(), "the check could not fail"
        noised = xt.clone()
        noised[:, block] = (noised[:, block] + 1) % 11
        moved = net.masked_logits(x0, noised, every).view(3, 15, -1)
        same = torch.ones(15, dtype=torch.bool)
        same[block] = False
        assert (moved[:, same] == both[:, same]).all(), f"noisy block {b} reaches another block"
    return "5 blocks, clean and noisy, bitwise"


def test_all_blocks_equal_target_blocks():
    """One two-stream pass equals `corrupt_target_block` block by block: logits, loss, gradients."""
    net = tiny_model(seq_len=12, block_size=4, neighbours=3)
    x0 = tokens_for(net)
    noisy, index = noisy_for(net, x0)
    loss = train.Loss(net)(9, x0, noisy.xt, noisy.weight, index)
    loss.backward()
    want = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    logits = net.masked_logits(x0, noisy.xt, torch.arange(x0.numel())).view(3, 12, -1)
    worst, total = 0.0, 0.0
    for b in range(3):
        at = torch.arange(12) // 4
        xt = torch.where(at < b, x0, noisy.xt).masked_fill(at > b, net.config.mask_id)
        one = net(xt)
        worst = max(worst, diff(one[:, at == b], logits[:, at == b]))
        part = corrupt.masked_diffusion_loss(one, x0, noisy.weight * (at == b), 9)
        part.backward()
        total += part.item()
    grad = max(diff(p.grad, want[name]) for name, p in net.named_parameters())
    assert abs(total - loss.item()) < 1e-6 and grad < 1e-5, (total - loss.item(), grad)
    return within(worst, 2e-6, f"grad {grad:.1g}; logits max|diff|")


def test_pairs_equal_two_passes():
    """One pass over a clean stream and two noisy copies equals two: logits, loss, gradients."""
    net = tiny_model(seq_len=12, block_size=4, neighbours=3)
    x0 = tokens_for(net)
    pair = corrupt.corrupt_all_blocks(
        x0, 4, net.config.mask_id, generator(2), "tilted", copies=2
    )
    index = pair.mask.flatten().nonzero()[:, 0]
    loss = train.Loss(net)(18, x0, pair.xt, pair.weight, index)
    loss.backward()
    want = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    every = torch.arange(x0.numel())
    both = net.masked_logits(x0, pair.xt, torch.arange(2 * x0.numel())).view(2, x0.numel(), -1)
    worst, total = 0.0, 0.0
    for copy in range(2):
        worst = max(worst, diff(net.masked_logits(x0, pair.xt[copy], every), both[copy]))
        alone = pair.mask[copy].flatten().nonzero()[:, 0]
        part = train.Loss(net)(18, x0, pair.xt[copy], pair.weight[copy], alone)
        part.backward()
        total += part.item()
    grad = max(diff(p.grad, want[name]) for name, p in net.named_parameters())
    assert abs(total - loss.item()) < 1e-6 and grad < 1e-5, (total - loss.item(), grad)
    return within(worst, 2e-6, f"grad {grad:.1g}; logits max|diff|")


def test_rotary():
    """Position 0 is the identity, only differences of positions matter, the cache goes on at bS."""
    config = cascade.CascadeConfig(n_embd=32, n_head=2, seq_len=64, block_size=4)
    cos, sin = cascade.rotary_tables(config)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator()).unbind()
    at = [cascade.rotate(q, cos[i], sin[i]) for i in range(64)]
    kt = [cascade.rotate(k, cos[i], sin[i]) for i in range(64)]
    assert (at[0] == q).all()
    scores = torch.tensor([[(at[i] * kt[j]).sum() for j in range(64)] for i in range(64)])
    worst = max(diff(scores.diagonal(d), scores.diagonal(d)[:1].expand(64 - d)) for d in range(60))
    assert (scores.diagonal(1)[0] - scores.diagonal(5)[0]).abs() > 1e-2, "the check could not fail"
    cache = cascade.BlockCache(config, 1, 64)
    cache.length = 12
    assert cache.positions(4).tolist() == [[12, 13, 14, 15]]
    return within(worst, 2e-5, "scores at one distance, max|diff|")


def test_layers_equal_formulas():
    """RMSNorm and SwiGLU against their formulas in float64."""
    x = torch.randn(5, 32, generator=generator())
    norm = cascade.RMSNorm(32, 1e-5)
    torch.nn.init.normal_(norm.weight, generator=generator(1))
    y = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    worst = diff(norm(x), y)
    mlp = tiny_model().blocks[0].mlp
    g, u, d = (w.weight.double() for w in (mlp.gate, mlp.up, mlp.down))
    a = x.double() @ g.T
    y = (a / (1 + (-a).exp()) * (x.double() @ u.T)) @ d.T
    return within(max(worst, diff(mlp(x), y)), 5e-6)


def test_compiles_whole():
    """Traced for torch.compile the layers make two graphs, the last layer's its own: no breaks, and
    nothing anew for another layer or batch."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    net, counter = tiny_model(attention="flex", n_layer=4), CompileCounter()
    for block in net.blocks:
        block.forward = torch.compile(block.forward, backend=counter, dynamic=False)
    x0 = tokens_for(net, 2)
    index = torch.arange(0, x0.numel(), 2)
    with torch.no_grad():
        for _ in range(2):
            net.masked_hidden(x0, x0, index)
    assert counter.frame_count == 2, f"{counter.frame_count} graphs"
    return f"{counter.frame_count} graphs of 4 layers"


def test_initialisation():
    """The table: the untrained model predicts the uniform distribution, whatever the width."""
    torch.manual_seed(0)
    for tie in (False, True):
        net = cascade.CascadeLM(
            cascade.CascadeConfig(tie_embeddings=tie, n_embd=96, n_head=4, neighbours=3)
        )
        x0 = torch.randint(65, (4, 256))
        noisy, index = noisy_for(net, x0)
        loss = train.Loss(net)(4 * 16, x0, noisy.xt, noisy.weight, index).item()
        assert abs(loss - math.log(65)) < 0.1, loss
        stds = {n: p.std().item() for n, p in net.named_parameters() if p.ndim == 2}
        for name, std in stds.items():
            leaf = name.split(".")[-2]
            want = {"embed": 0.02, "o": 0, "down": 0, "head": 0, "mix": 0.02 / math.sqrt(144)}
            want = 1.0 if name == "near.embed.weight" else want.get(leaf, 0.5 / math.sqrt(96))
            assert abs(std - want) < 0.05 * want + 1e-9, (name, std, want)
    return f"first loss {loss:.3f}, log V = {math.log(65):.3f}"


def test_train_flops():
    """The FLOP count behind MFU against torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    worst = 0.0
    for copies, shape in (
        (1, {"block_size": 8}), (2, {"block_size": 8, "neighbours": 3}),
        (1, {"objective": "ar", "block_size": 1, "neighbours": 2}),
    ):
        net = tiny_model(seq_len=64, n_layer=3, n_kv_head=2, attention="chunk", **shape)
        x0 = tokens_for(net, batch=4)
        with FlopCounterMode(display=False) as counter:
            if net.config.objective == "ar":
                train.Loss(net)(1, x0).backward()
                masked = 0
            else:
                noisy = corrupt.corrupt_all_blocks(x0, 8, 11, generator(2), copies=copies)
                index = noisy.mask.flatten().nonzero()[:, 0]
                train.Loss(net)(1, x0, noisy.xt, noisy.weight, index).backward()
                masked = len(index)
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if "attention" not in str(op))
        mine = net.train_flops(4, masked, copies)
        c = net.config
        streams = 2 * (1 + copies) + copies  # of three layers, the last without its clean one
        entries = 4 * 64 * (64 + c.block_size) / 2 * streams if masked else 4 * 64 * 65 // 2 * 3
        worst = max(worst, abs(mine - 12 * entries * c.n_embd - products) / products)
    return within(worst, 1e-9, "matrix products, relative difference")


def raises(kind):
    """A context in which `kind` must be raised with one line, which it then has as `.error`."""

    @contextlib.contextmanager
    def check():
        caught = SimpleNamespace()
        try:
            yield caught
        except kind as e:
            assert str(e) and "\n" not in str(e), f"not one line: {e}"
            caught.error = str(e)
            return
        raise AssertionError(f"no {kind.__name__} was raised")

    return check()


# ---- the bound -----------------------------------------------------------------------------------


def every_mask(S):
    """(2^S - 1, S) bool: all non-empty sets of masked places."""
    rows = [r for r in itertools.product((False, True), repeat=S) if any(r)]
    return torch.tensor(rows)


def exact_bound(net, x0):
    """(count form, rate form) in nats per token of sequences x0 (B, N), by enumeration.

    Both weigh the summed cross-entropy of a mask set of size k in one block:
    counts: P(k) P(M | k) S/k = 1/S / C(S,k) * S/k; rates: the integral over m of
    m^(k-1) (1-m)^(S-k) = (k-1)! (S-k)! / S!.
    """
    c = net.config
    S, nb = c.block_size, c.seq_len // c.block_size
    counts = rates = 0.0
    for mask in every_mask(S):
        k = int(mask.sum())
        everywhere = mask.repeat(nb).expand_as(x0)
        xt = x0.masked_fill(everywhere, c.mask_id)
        index = everywhere.flatten().nonzero()[:, 0]
        with torch.no_grad():
            logits = net.masked_logits(x0, xt, index)
        nll = F.cross_entropy(logits, x0.flatten()[index], reduction="sum").item() / x0.numel()
        counts += nll / math.comb(S, k) / k
        rates += nll * math.factorial(k - 1) * math.factorial(S - k) / math.factorial(S)
    return counts, rates


def test_bound_noise_laws_agree():
    """balanced, tilted and uniform noise, all blocks, pairs or one target block, estimate the same
    exact bound."""
    net = tiny_model(seq_len=12, block_size=4, vocab_size=5, n_embd=16, n_head=2, std=0.5)
    x0 = tokens_for(net, batch=2)
    counts, rates = exact_bound(net, x0)
    assert abs(counts - rates) < 1e-6, (counts, rates)
    many, draws = x0.repeat(500, 1), {}
    for make, law, copies in (
        (corrupt.corrupt_all_blocks, "balanced", 1),
        (corrupt.corrupt_all_blocks, "tilted", 1),
        (corrupt.corrupt_all_blocks, "uniform", 1),
        (corrupt.corrupt_all_blocks, "tilted", 2),
        (corrupt.corrupt_all_blocks, "uniform", 2),
        (corrupt.corrupt_target_block, "balanced", 1),
        (corrupt.corrupt_target_block, "tilted", 1),
        (corrupt.corrupt_target_block, "uniform", 1),
    ):
        losses, every = [], make is corrupt.corrupt_all_blocks
        for seed in range(12):
            extra = {"copies": copies} if every else {}
            noisy = make(many, 4, 5, generator(seed), law, 1e-6, weighting="elbo", **extra)
            with torch.no_grad():
                if every:
                    index = noisy.mask.flatten().nonzero()[:, 0]
                    logits = net.masked_logits(many, noisy.xt, index)
                    targets = many.expand_as(noisy.xt).flatten()[index]
                    weight, blocks = noisy.weight.flatten()[index], copies * many.numel() // 4
                else:
                    logits, weight, targets, blocks = net(noisy.xt), noisy.weight, many, len(many)
                losses.append(corrupt.masked_diffusion_loss(logits, targets, weight, blocks).item())
        mean, error = np.mean(losses), np.std(losses, ddof=1) / math.sqrt(len(losses))
        draws[make.__name__, law, copies] = abs(mean - counts) / error
        assert error < 0.02, (make, law, copies, mean, error)
    worst = max(draws.values())
    return within(worst, 4.5, f"exact {counts:.4f} nats/token in both forms; std errors off")


def test_bound_at_block_size_1():
    """S = 1, balanced: exactly a token-by-token loop of next-token conditionals."""
    net = tiny_model(seq_len=10, block_size=1)
    x0 = tokens_for(net, batch=2)
    noisy, index = noisy_for(net, x0)
    assert noisy.mask.all() and (noisy.weight == 1).all()
    loss = train.Loss(net)(20, x0, noisy.xt, noisy.weight, index).item()
    total = 0.0
    for row in x0:
        for i in range(10):  # the last position is [MASK], all before it are clean
            window = torch.cat([row[:i], torch.tensor([11])])[None]
            total -= net(window)[0, -1].log_softmax(-1)[row[i]].item()
    return within(abs(loss - total / 20), 2e-6)


def test_loss_in_pieces():
    """The head's loss a few positions at a time: value and both gradients as if all at once."""
    g, worst = generator(), 0.0
    h, head = torch.randn(50, 16, generator=g), torch.randn(40, 16, generator=g)
    targets = torch.randint(40, (50,), generator=g)
    weight = torch.rand(50, generator=g)
    found = {}
    for piece in (2**25, 40 * 50 - 1, 40 * 7, 1):  # all at once; 49 rows and 1; 7 a time; 1
        ins = [h.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = corrupt.head_loss(*ins, targets, weight, 13, piece)
        found[piece] = [loss.detach(), *torch.autograd.grad(3 * loss, ins)]
    for got in list(found.values())[1:]:
        worst = max(worst, *(diff(a, b) for a, b in zip(got, found[2**25], strict=True)))
    return within(worst, 5e-6)


def test_weighting_cascade():
    """weighting="cascade" is not the bound: it grows like log(1 / m_min); "elbo" does not."""
    B, S = 100_000, 16
    x0, ones = torch.zeros(B, S, dtype=torch.long), torch.zeros(B, S, 3)
    found = {}
    for m_min in (1e-1, 1e-2, 1e-3):
        for weighting in corrupt.WEIGHTINGS:
            noisy = corrupt.corrupt_target_block(
                x0, S, 3, generator(1), m_min=m_min, weighting=weighting
            )
            # all logits equal: every cross-entropy is log 3, so the loss is the mean weight
            loss = corrupt.masked_diffusion_loss(ones, x0, noisy.weight, B).item() / math.log(3)
            found[weighting, m_min] = loss
        expected = math.log(1 / m_min) / (1 - m_min)
        got = found["cascade", m_min]
        assert abs(got / expected - 1) < 0.02, (m_min, got, expected)
        elbo = found["elbo", m_min]
        assert abs(elbo - 1) < 0.02, (m_min, elbo)
    # and per example it is (1/m) * mean over the loss mask
    noisy = corrupt.corrupt_target_block(x0[:99], S, 3, generator(2), weighting="cascade")
    nll = torch.rand(99, S, generator=generator(3))
    by_hand = [
        nll[i][noisy.mask[i]].mean().double() / noisy.m[i, 0] for i in range(99)
    ]
    assert diff((noisy.weight * nll).sum(dim=1), torch.stack(by_hand)) < 1e-3
    growth = ", ".join(f"{found['cascade', m]:.2f}" for m in (1e-1, 1e-2, 1e-3))
    return f"times the loss: {growth} at m_min 0.1, 0.01, 0.001 = log(1/m_min)/(1-m_min); elbo 1.00"


def test_evaluation():
    """The validation bound: the exact one within its error, the same at any batch size."""
    with data_folder() as folder:
        split = dataset.load_dataset(folder).split("val")
        net = tiny_model(seq_len=12, block_size=3, vocab_size=7)
        few = [train.evaluate(net, split, 40, batch=size) for size in (40, 7, 1)]
        assert all(abs(a - few[0][0]) < 1e-5 for a, _ in few), few
        assert few[0] == train.evaluate(net, split, 40, batch=40), "not repeatable"
        windows = len(split) // 12
        mean, error = train.evaluate(net, split, windows, batch=64)
        starts = np.linspace(0, len(split) - 12, windows).astype(np.int64)
        exact, _ = exact_bound(net, torch.from_numpy(split.window(starts, 12)))
        ar = tiny_model(seq_len=12, objective="ar", block_size=1, vocab_size=7)
        x0 = torch.from_numpy(split.window(starts, 12))
        nll = F.cross_entropy(ar.ar_logits(x0).mT, x0).item()
        assert abs(train.evaluate(ar, split, windows)[0] - nll) < 1e-5
        ratio = few[0][1] / error / math.sqrt(windows / 40)
        assert 0.6 < ratio < 1.6, f"the error does not shrink as 1/sqrt(n): {ratio}"
    return within(abs(mean - exact) / error, 4, f"exact {exact:.3f}, std errors off")


# ---- training ------------------------------------------------------------------------------------


@contextlib.contextmanager
def data_folder(tokens=4000):
    """A small prepared dataset of 7 characters, in a folder of its own."""
    with tempfile.TemporaryDirectory() as root:
        text = "".join("abcdef\n"[i] for i in (torch.arange(tokens) ** 2 // 3 % 7).tolist())
        tokenizer = dataset.CharTokenizer("\nabcdef")
        folder = Path(root) / "tiny"
        with dataset.DatasetWriter(folder, tokenizer, source="a test") as writer:
            cut = tokens * 3 // 4
            for split, part in (("train", text[:cut]), ("val", text[cut:])):
                writer.add(split, np.asarray(tokenizer.encode(part), np.uint8), len(part))
            writer.finish()
        yield folder


TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "seq_len": 16, "block_size": 4, "batch_size": 8,
    "max_minutes": 0, "log_every": 100, "eval_every": 1000, "final_windows": 8,
    "eval_windows": 8, "sample_tokens": 0, "device": "cpu", "dtype": "float32",
}


def train_tiny(folder, **settings):
    """A finished `train.Run` of a tiny model in this process, quietly, and what it printed."""
    s = {**TINY, "dataset": f"{folder}", "out_dir": f"{folder}/out", "overwrite": True, **settings}
    processes = machine.Processes()
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.closing(processes):
        run = train.Run(SimpleNamespace(**{**train.DEFAULTS, **s}), processes)
        train.finish(run, train.train_loop(run))
    return run, out.getvalue()


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_memorisation():
    """200 steps on one batch (4, 64), 128 tokens of vocabulary, S = 8: from log 128 to near 0."""
    torch.manual_seed(0)
    s = SimpleNamespace(**{**train.DEFAULTS, "dtype": "float32", "warmup_steps": 10})
    net = cascade.CascadeLM(
        cascade.CascadeConfig(
            vocab_size=128, seq_len=64, block_size=8, n_layer=2, n_head=4, n_embd=128
        )
    )
    optimizers = train.make_optimizers(net, s)
    x0 = torch.randint(128, (4, 64), generator=generator())
    losses = []
    for step in range(200):
        for optimizer, peak in zip(optimizers, (3e-3, 1e-2), strict=True):
            optimizer.param_groups[0]["lr"] = peak * train.lr_factor(step, step / 200, s)
        noisy, index = noisy_for(net, x0, seed=step)
        loss = train.Loss(net)(32, x0, noisy.xt, noisy.weight, index)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    smooth = np.convolve(losses, np.ones(25) / 25, mode="valid")[::25]
    assert abs(losses[0] - math.log(128)) < 0.05, losses[0]
    assert all(b < a for a, b in itertools.pairwise(smooth)), smooth
    return within(np.mean(losses[-10:]), 0.5, f"from {losses[0]:.2f}; last ten losses' mean")


def test_muon():
    """Against torch.optim.Muon, whose products are in bf16; and the singular values it promises."""
    g = torch.randn(3, 24, 40, generator=generator())
    spectrum = torch.linalg.svdvals(muon.orthogonalize(g))
    assert 0.5 < spectrum.min() and spectrum.max() < 1.4, spectrum
    for wide in (g, g[:, :, :30]):  # by way of the small product A, and without
        x = wide.double() / wide.double().norm(dim=(1, 2), keepdim=True)
        for _ in range(5):
            A = x @ x.mT
            x = 3.4445 * x - 4.7750 * A @ x + 2.0315 * A @ A @ x
        assert diff(muon.orthogonalize(wide), x) < 1e-5
    each = torch.cat([muon.orthogonalize(piece) for piece in g.split(8, dim=1)], dim=1)
    assert diff(muon.orthogonalize_heads(g, 8, torch.float32), each) < 1e-5
    assert diff(muon.orthogonalize_heads(g.mT, -8, torch.float32), each.mT) < 1e-5
    net = tiny_model(n_kv_head=2)
    s = SimpleNamespace(**{**train.DEFAULTS, "dtype": "float32"})
    heads = {id(p): group["head_dim"] for group in train.make_optimizers(net, s)[1].param_groups
             for p in group["params"]}
    a, wanted = net.blocks[0].attn, {"q": 8, "k": 8, "v": 8, "o": -8}
    assert all(heads[id(getattr(a, name).weight)] == D for name, D in wanted.items()), heads
    assert heads[id(net.blocks[1].mlp.up.weight)] == 0
    tall = muon.orthogonalize(g.mT.contiguous())
    assert diff(tall, muon.orthogonalize(g).mT) < 1e-5
    if not hasattr(torch.optim, "Muon"):
        raise Skip(f"torch {torch.__version__} has no torch.optim.Muon to compare with")
    start = torch.randn(24, 40, generator=generator(1))
    theirs, mine = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95}
    a = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    b = muon.Muon([mine], **options)
    for i in range(20):
        theirs.grad = torch.randn(24, 40, generator=generator(i))
        mine.grad = theirs.grad.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    return within(((mine - theirs).norm() / moved).item(), 0.02, "relative difference of 20 steps")


def test_seeds_and_micro_batches():
    """The same seed gives the same weights bitwise, another seed others; accumulation is exact."""
    with data_folder() as folder:

        def trained(**settings):
            return weights(train_tiny(folder, max_steps=12, **settings)[0])

        runs = [trained(seed=seed) for seed in (1, 1, 2)]
        assert (runs[0] == runs[1]).all() and (runs[0] != runs[2]).any()
        parts = [trained(seed=1, micro_batch=size) for size in (4, 2)]
        ar = [trained(objective="ar", block_size=1, micro_batch=size) for size in (0, 2)]
    assert diff(*ar) < 1e-4, diff(*ar)
    return within(max(diff(p, runs[0]) for p in parts), 1e-4, "micro-batches, weights max|diff|")


def test_static_shapes():
    """`static_shapes` promises the compiler as many masked tokens in every micro-batch, or not; and
    with exact counts the first loss is log V whatever the batch, so its normaliser is right."""
    with data_folder() as folder:
        for static, settings in (
            (True, {"noise": "balanced", "copies": 1}),
            (True, {"noise": "balanced", "copies": 2, "batch_size": 3, "micro_batch": 1}),
            (False, {"noise": "balanced", "copies": 1, "block_size": 8, "batch_size": 3}),
            (False, {"noise": "tilted", "copies": 2}),
            (False, {"noise": "uniform", "copies": 1}),
        ):
            run, _ = train_tiny(folder, max_steps=1, **{"log_every": 1, **settings})
            first = float(read_log(f"{folder}/out/log.csv")[0]["loss"])
            off = abs(first - math.log(run.config.vocab_size))
            assert off < (1e-4 if settings["noise"] == "balanced" else 1), (settings, first)
            sizes = {len(batch[-1]) for step in range(40) for batch in run.make_batches(step)}
            assert run.static_shapes() == static == (len(sizes) == 1), (settings, sizes)
    return "five cases over 40 steps"


def test_resume_is_bitwise():
    """Stopped at step 10 of 20 and resumed: the weights of the run that was never stopped."""
    with data_folder() as folder:
        whole, _ = train_tiny(folder, max_steps=20, out_dir=f"{folder}/a", eval_every=5)

        class Halted(train.Run):
            def train_step(self, progress):
                if self.step == 10:
                    os.kill(os.getpid(), 2)  # SIGINT: the loop finishes this step and saves
                return super().train_step(progress)

        original, train.Run = train.Run, Halted
        try:
            part, said = train_tiny(folder, max_steps=20, out_dir=f"{folder}/b", eval_every=5)
        finally:
            train.Run = original
        assert part.step == 11 and "--init_from=resume" in said, (part.step, said)
        rest, _ = train_tiny(
            folder, max_steps=20, out_dir=f"{folder}/b", eval_every=5, init_from="resume"
        )
        assert rest.step == 20
        with raises(configurator.SettingsError):
            train_tiny(folder, out_dir=f"{folder}/b", init_from="resume", seed=5, max_steps=20)
        with raises(configurator.SettingsError):
            train_tiny(folder, out_dir=f"{folder}/b", overwrite=False, max_steps=20)
        assert (weights(whole) == weights(rest)).all(), diff(weights(whole), weights(rest))
        assert whole.final == rest.final
    return "0 bits of difference after stopping at step 11 of 20"


def test_two_processes():
    """50 steps on 1 process, with 4 micro-batches, and on 2 by torchrun: one loss, one bound."""
    with data_folder() as folder:
        s = {"max_steps": 50, "log_every": 1, "eval_every": 10, "seed": 3, "final_windows": 50}
        train_tiny(folder, **s, out_dir=f"{folder}/one")
        train_tiny(folder, **s, out_dir=f"{folder}/parts", micro_batch=2)
        settings = {**TINY, **s, "dataset": folder, "out_dir": f"{folder}/two"}
        code, said, err = command(
            "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py",
            *(f"--{k}={v}" for k, v in settings.items()),
        )
        assert code == 0 and said.count("| loss") == 50, err[-500:]
        runs = ("one", "parts", "two")
        states = [checkpoint.load_checkpoint(f"{folder}/{n}/last.pt") for n in runs]
        worst = max(diff(a, other["model"][k]) for other in states[1:]
                    for k, a in states[0]["model"].items())
        finals = [x["final"][0] for x in states]
        assert max(finals) - min(finals) < 1e-5, finals
        logs = [read_log(f"{folder}/{n}/log.csv") for n in runs]
        assert [len(x) for x in logs] == [50, 50, 50]
        for rows in zip(*logs, strict=True):
            for column in ("loss", "val", "val_error"):
                cells = [float(row[column] or 0) for row in rows]
                assert max(cells) - min(cells) < 2e-5, (column, rows)
        assert float(logs[0][0]["loss"]) - float(logs[0][-1]["loss"]) > 0.1, "nothing was learnt"
    return within(worst, 1e-4, "losses and bounds < 2e-05 apart; weights after 50 steps, max|diff|")


def test_bfloat16_autocast():
    """Under bf16 autocast logits and loss are float32 and near those of float32; Muon too."""
    net = tiny_model(std=0.1)
    x0 = tokens_for(net)
    noisy, index = noisy_for(net, x0)
    exact = train.Loss(net)(15, x0, noisy.xt, noisy.weight, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x0).dtype == torch.float32
        loss = train.Loss(net)(15, x0, noisy.xt, noisy.weight, index)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == p.dtype for p in net.parameters())
    with data_folder() as folder:
        run, _ = train_tiny(folder, max_steps=5, dtype="bfloat16")
        assert torch.isfinite(weights(run)).all()
    return within(abs(loss.item() - exact.item()) / exact.item(), 0.01, "relative difference")


def test_training_goes_by_the_clock():
    """max_minutes ends the run on time with the learning rate at its end."""
    with data_folder() as folder:
        began = time.perf_counter()
        run, said = train_tiny(folder, max_minutes=0.05, warmup_steps=2, log_every=5)
        seconds = time.perf_counter() - began
        assert 3.0 <= run.seconds < 4.0, run.seconds
        last = [line for line in said.splitlines() if line.startswith("step ")][-1]
        lr = float(last.split("lr ")[1].split()[0])
        assert lr < 0.05 * train.learning_rate, last
        assert "eta 0.0m" in last and run.step > 20, last
    return f"3.0 s asked, {run.seconds:.2f} s used, {seconds:.1f} s in all, {run.step} steps"


# ---- settings, checkpoints, commands -------------------------------------------------------------


def test_configurator():
    """Typed overrides; wrong names, types and files are refused with the nearest name."""
    defaults = {"steps": 100, "rate": 1e-3, "name": "a", "flag": True}
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder, "good.py"), Path(folder, "bad.py")
        good.write_text("steps = 8 * 4  # arithmetic\nrate = 1\n_private = [1]\nimport math\n")
        cases = [
            (["--steps=1e3"], "steps", 1000), (["--steps=0"], "steps", 0),
            (["--rate=1"], "rate", 1.0), (["--rate=-2.5e-4"], "rate", -2.5e-4),
            (["--flag=false"], "flag", False), (["--flag=0"], "flag", False),
            (["--flag=True"], "flag", True), (["--name=a=b"], "name", "a=b"),
            (["--name="], "name", ""), (["--name=1e3"], "name", "1e3"),
            ([str(good)], "steps", 32), ([str(good)], "rate", 1.0),
            ([str(good), "--steps=7"], "steps", 7), (["--steps=7", str(good)], "steps", 32),
            (["--steps=12345678901234567"], "steps", 12345678901234567),
        ]
        for argv, key, value in cases:
            got = configurator.override(defaults, argv)[key]
            assert got == value and type(got) is type(value), (argv, got)
        refused = [
            ["--stesp=1"], ["--steps=1.5"], ["--steps=x"], ["--rate=fast"], ["--flag=yes"],
            ["--steps"], ["nowhere.py"], ["--steps=nan"], ["--steps=inf"], ["-steps=1"],
        ]
        for text in ("stesp = 3", "steps = 'x'", "steps = 1.5", "flag = 2", "1 +", "1 / 0"):
            bad.write_text(text)
            with raises(configurator.SettingsError):
                configurator.override(defaults, [str(bad)])
        for argv in refused:
            with raises(configurator.SettingsError):
                configurator.override(defaults, argv)
        try:
            configurator.override(defaults, ["--stesp=1"])
        except configurator.SettingsError as e:
            assert "did you mean steps?" in str(e)
    assert configurator.override(defaults, []) == defaults
    return f"{len(cases)} good, {len(refused) + 6} refused"


def test_checkpoint_round_trip():
    """A checkpoint rebuilds its own model, with settings far from the defaults."""
    net = tiny_model(
        n_kv_head=2, tie_embeddings=True, qk_norm=False, rope_base=500.0, norm_eps=1e-4
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.pt")
        state = {"config": asdict(net.config), "model": net.state_dict(), "bound": [1.5, math.inf]}
        checkpoint.save_checkpoint(path, state)
        other, loaded = checkpoint.load_model(folder)
        x0 = tokens_for(net)
        assert other.config == net.config and (other(x0) == net.eval()(x0)).all()
        assert loaded["bound"] == [1.5, math.inf] and not list(Path(folder).glob("*.tmp"))
    return "config equal, logits bitwise equal"


def test_checkpoint_damage():
    """Truncated, bit-flipped, foreign, malicious and ill-shaped files: one line, no code run."""
    net = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        path, proof = Path(folder, "last.pt"), Path(folder, "proof")
        state = {"config": asdict(net.config), "model": net.state_dict()}
        checkpoint.save_checkpoint(path, state)
        good = path.read_bytes()
        checkpoint.load_model(folder)  # so that what follows is refused for its damage

        class Evil:
            def __reduce__(self):
                return (os.system, (f"touch {proof}",))

        flips = harmless = 0
        for place in range(0, len(good), len(good) // 200):
            damaged = bytearray(good)
            damaged[place] ^= 16
            path.write_bytes(damaged)
            try:
                other, _ = checkpoint.load_model(folder)
            except configurator.SettingsError as e:
                assert "\n" not in str(e)
                flips += 1
                continue
            harmless += 1  # a byte of padding in the archive: nothing that was stored has changed
            assert checkpoint.digest(other.state_dict()) == checkpoint.digest(state["model"])
        assert flips > harmless, (flips, harmless)
        torch.save({"format": 1, "x": Evil()}, path)
        foreign = [good[: len(good) // 2], good[:50], b"", b"not a checkpoint", path.read_bytes()]
        for content in foreign:
            path.write_bytes(content)
            with raises(configurator.SettingsError):
                checkpoint.load_model(folder)
        assert not proof.exists(), "a checkpoint ran code"
        wrong = {**state, "config": {**state["config"], "n_embd": 64}}
        checkpoint.save_checkpoint(path, wrong)
        with raises(configurator.SettingsError):
            checkpoint.load_model(folder)
        path.unlink()
        with raises(configurator.SettingsError):
            checkpoint.load_model(folder)
    return (f"{flips} of {flips + harmless} bit flips (the others hit padding) and "
            f"{len(foreign) + 2} other files refused")


def test_config_guards():
    """Impossible shapes are refused when the config is made."""
    bad = [
        {"seq_len": 10, "block_size": 3}, {"n_embd": 30, "n_head": 4}, {"n_embd": 12, "n_head": 4},
        {"n_head": 6, "n_kv_head": 4}, {"objective": "gpt"}, {"objective": "ar", "block_size": 4},
        {"n_layer": 0}, {"vocab_size": 0}, {"block_size": 0}, {"n_embd": -6}, {"neighbours": -1},
    ]
    for shape in bad:
        with raises(ValueError):
            cascade.CascadeConfig(**shape)
    net = tiny_model()
    for tokens in (torch.zeros(1, 4), torch.zeros(1, 18)):
        with raises(ValueError):
            net(tokens.long())
    return f"{len(bad) + 2} refused"


def command(*argv, env=None, timeout=170):
    """Run one of the scripts as a user does: (exit code, stdout, stderr)."""
    run = subprocess.run(
        [sys.executable, *argv], cwd=HERE, capture_output=True, text=True, check=False,
        timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    return run.returncode, run.stdout, run.stderr


def test_commands_of_the_readme():
    """The README's commands, made tiny: prepare by itself, train, resume, sample."""
    with tempfile.TemporaryDirectory() as folder:
        # a fresh clone: the raw text is there, the prepared files are not
        root = Path(folder, "data")
        out = f"--out_dir={folder}/out"
        env = {"CASCADE_DATA": str(root)}
        code, said, err = command("train.py", "config/smoke.py", out, env=env)
        assert code == 0, err
        assert "is not prepared yet" in said and (root / "shakespeare" / "meta.json").exists(), said
        for part in ("validation bound <= ", "+-", "bits/byte", "sample, unedited",
                     f"checkpoint: {folder}/out/last.pt", f"python sample.py {out}", "| val <= "):
            assert part in said, f"{part!r} is missing in: {said}"
        steps = train.DEFAULTS | configurator.override(train.DEFAULTS, ["config/smoke.py"])
        code, said, err = command(
            "train.py", "config/smoke.py", out, "--init_from=resume",
            f"--max_steps={steps['max_steps'] + 5}", env=env,
        )
        assert code == 0 and f"after {steps['max_steps'] + 5} steps" in said, err + said
        code, said, err = command(
            "sample.py", out, "--prompt=KING.", "--steps=2", "--max_new_tokens=30", env=env
        )
        assert code == 0 and said.startswith("KING.") and len(said) == 5 + 30 + 1, (said, err)
    return "train (which prepares the data), resume, sample"


def test_bad_input():
    """A user's mistake ends in one line with the remedy, exit code 1 or 2, no traceback."""
    with data_folder() as folder:
        train_tiny(folder, max_steps=1)
        base = [f"--{k}={v}" for k, v in {**TINY, "max_steps": 1}.items()]
        new = [*base, f"--out_dir={folder}/new", f"--dataset={folder}"]
        cases = [
            (train, ["--lerning_rate=1"], "did you mean learning_rate"),
            (train, ["--seed=abc"], "seed must be int"),
            (train, ["config/nowhere.py"], "no config file"),
            (train, [*new, "--dataset=nowhere"], "no dataset"),
            (train, [*new, "--seq_len=18"], "multiple of block_size"),
            (train, [*new, "--n_head=3"], "not divisible"),
            (train, [*new, "--n_head=16"], "even head dimension"),
            (train, [*new, "--noise=white"], "--noise must be one of"),
            (train, [*new, "--max_steps=0"], "set --max_steps or --max_minutes"),
            (train, [*new, "--batch_size=7", "--micro_batch=2"], "must be a multiple"),
            (train, [*new, "--batch_size=0"], "at least 1"),
            (train, [*new, "--seed=99999999999999999999"], "between 0 and 2^63 - 1"),
            (train, [*new, "--seed=-1"], "between 0 and 2^63 - 1"),
            (train, [*new, "--micro_batch=-1"], "must be 0 or more"),
            (train, [*new, "--muon_lr=-1"], "must be 0 or more"),
            (train, [*new, "--device=tpu"], "not on this machine"),
            (train, [*new, "--optimizer=sgd"], "muon or adamw"),
            (train, [*new, "--attention=flex"], "needs CUDA"),
            (train, [*new, "--dtype=float8"], "--dtype must be"),
            (train, [*new, "--seq_len=4000"], "fewer than a sequence"),
            (train, [*new, "--m_min=0"], "mask rates"),
            (train, [*new, "--init_from=resume"], "no last.pt to resume"),
            (train, [*new, f"--out_dir={folder}/out"], "holds a run already"),
            (train, [*new, f"--out_dir={folder}/meta.json"], "cannot write"),
            (train, [*new, "--learning_rate=1e30", "--optimizer=adamw", "--max_steps=9",
                     "--warmup_steps=0", "--grad_clip=0"], "not finite"),
            (sample, [f"--out_dir={folder}/nowhere"], "no checkpoint"),
            (sample, [f"--out_dir={folder}/out", "--prompt=xyz"], "'xyz'"),
        ]
        for script, argv, expected in cases:
            code, said = call_main(script, argv)
            assert code in (1, 2), (argv, code, said)
            assert said.startswith("error: ") and said.count("\n") == 1, (argv, said)
            assert expected in said, (argv, said)
        # a truncated file, a token outside the vocabulary
        binary = folder / "train.bin"
        good = binary.read_bytes()
        for content, expected in ((good[:-5], "train.bin"), (b"", "train.bin"),
                                  (good[:-1] + b"\x07", "train.bin")):
            binary.write_bytes(content)
            code, said = call_main(train, new)
            assert code in (1, 2) and expected in said and said.count("\n") == 1, said
        code, _, err = command("train.py", "--lerning_rate=1")
        assert code == 2 and err.count("\n") == 1, err
    return f"{len(cases) + 4} mistakes, one line each"


def call_main(script, argv):
    """(exit code, stderr) of a script's main in this process; its errors leave by sys.exit."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = script.main(argv)
        except SystemExit as e:
            code = e.code
    return code, err.getvalue()


# ---- decoding: helpers ---------------------------------------------------------------------------

GQA = {"seq_len": 32, "block_size": 4, "n_kv_head": 2, "qk_norm": True, "neighbours": 5}
MHA = {"seq_len": 32, "block_size": 4, "n_kv_head": 4, "qk_norm": False, "tie_embeddings": True}
AR = {"seq_len": 32, "block_size": 1, "n_kv_head": 2, "objective": "ar", "neighbours": 2}
LIGHT, LIGHT_AR = {**GQA, "n_layer": 1}, {**AR, "n_layer": 1}  # where depth adds nothing
ON_TIME = ("random", "confidence", "left_to_right")  # rules that promise K passes a block
RULES = (*ON_TIME, "threshold", "entropy")


def refuses(call, *words):
    """`call()` must raise a ValueError of one line that contains all of `words`."""
    try:
        call()
    except ValueError as e:
        assert "\n" not in str(e) and all(word in str(e) for word in words), (words, str(e))
        return
    raise AssertionError(f"no ValueError with {words}")


def random_prompts(net, *lengths):
    g = generator(3)
    return [torch.randint(net.config.vocab_size, (n,), generator=g).tolist() for n in lengths]


def passes(net, prompts, max_new_tokens, **options):
    """Run generate_stream -> (one record per forward pass, the last Step).

    A record: what `decode` was given and gave back (tokens, logits), `storage`, the cache and where
    its tensors lie, the Step that followed, `before`, the block (B, S) as it was, and `index`, the
    pass's place in its block.
    """
    log, decode, S, count = [], net.decode, net.config.block_size, {}

    def spy(tokens, cache, commit):
        logits = decode(tokens, cache, commit)
        storage = cache, cache.k.data_ptr(), cache.v.data_ptr()
        log.append(SimpleNamespace(tokens=tokens, logits=logits, storage=storage))
        return logits

    net.decode = spy
    try:
        for step in sample.generate_stream(net, prompts, max_new_tokens, **options):
            assert step.nfe == len(log), f"nfe {step.nfe} after {len(log)} passes"
            if log:
                log[-1].step = step
    finally:
        del net.decode
    for record in log:
        masks = torch.full_like(record.step.block, net.config.mask_id)
        record.before = masks if net.config.objective == "ar" else record.tokens[:, -S:]
        block = int(record.step.start[0])
        record.index = count[block] = count.get(block, -1) + 1
    return log, step


@torch.no_grad()
def uncached(net, text, base, start, block):
    """Logits (S, V) of one row's block from one full pass over its context text[base:start]."""
    before = text[base:start]
    if net.config.objective == "ar":
        return net(torch.cat([torch.tensor([net.config.mask_id]), before])[None])[0, -1:]
    return net(torch.cat([before, block])[None])[0, -net.config.block_size :]


def against_uncached(net, prompts, max_new_tokens, **options):
    """(largest difference between any pass's logits and a full recomputation, slides).

    The contexts are found anew by the documented rule: when the longest is full, every row keeps
    the later half of the context.
    """
    c = net.config
    log, last = passes(net, prompts, max_new_tokens, **options)
    base, worst, slides = [0] * len(prompts), 0.0, 0
    half = c.seq_len // c.block_size // 2 * c.block_size
    for record in log:
        starts = record.step.start.tolist()
        longest = max(s - b for s, b in zip(starts, base, strict=True))
        if record.index == 0 and longest + c.block_size > c.seq_len:
            base, slides = [s - min(s, half) for s in starts], slides + 1
        for r, (b, s) in enumerate(zip(base, starts, strict=True)):
            want = uncached(net, last.text[r], b, s, record.before[r])
            worst = max(worst, diff(record.logits[r], want))
    return worst, slides


# ---- the cache -----------------------------------------------------------------------------------


def test_cache_equals_uncached():
    """BlockCache by hand: ragged rows, noisy blocks with fixed tokens, every block to the end."""
    worst, blocks = 0.0, 0
    for shape in (GQA, MHA, {**GQA, "n_kv_head": 1, "block_size": 8}):
        net = tiny_model(**shape)
        c, S = net.config, net.config.block_size
        lengths = torch.tensor([2 * S, 0, S, 2 * S])  # finished tokens of each row
        clean = torch.randint(c.vocab_size, (4, c.seq_len), generator=generator(1))
        hidden = torch.rand(clean.shape, generator=generator(2)) < 0.6
        noisy = clean.masked_fill(hidden, c.mask_id)
        store = cascade.BlockCache(c, 4, c.seq_len, 2 * S - lengths)
        pending = torch.zeros(4, 2 * S, dtype=torch.long)
        for row, tokens, n in zip(pending, clean, lengths, strict=True):
            row[2 * S - n :] = tokens[:n]
        for b in range(c.seq_len // S - 2):
            place = (lengths + b * S)[:, None] + torch.arange(S)
            block = noisy.gather(1, place)
            assert torch.equal(store.positions(pending.shape[1] + S)[:, -S:], place)
            logits = net.decode(torch.cat([pending, block], dim=1), store, pending.shape[1])
            for r, start in enumerate(place[:, 0].tolist()):
                worst = max(worst, diff(logits[r], uncached(net, clean[r], 0, start, block[r])))
                blocks += 1
            pending = clean.gather(1, place)
    return within(worst, 1e-5, f"{blocks} blocks, max|diff|")


def test_cache_of_another_block_size():
    """Decoding with smaller or larger blocks than the trained ones: what a token sees, neighbours
    too, ends with its block as it is now."""
    worst = 0.0
    for S in (2, 8):
        net = tiny_model(**GQA)
        net.config = replace(net.config, block_size=S)
        tokens = tokens_for(net)
        logits = net(tokens)
        for b in range(32 // S):
            other = tokens.clone()
            other[:, b * S :] = (other[:, b * S :] + 1) % 11
            assert (net(other)[:, : b * S] == logits[:, : b * S]).all(), (S, b)
        worst = max(worst, against_uncached(net, random_prompts(net, 0, 5, 9), 40, seed=2)[0])
    return within(worst, 1e-5)


def test_static_pass():
    """What CUDA graphs record, shapes and host numbers fixed, equals the pass it stands for."""
    worst = 0.0
    for shape in (GQA, MHA, {**MHA, "block_size": 1, "objective": "ar"}):
        net = tiny_model(**shape)
        c, S = net.config, net.config.block_size
        clean = torch.randint(c.vocab_size, (3, c.seq_len), generator=generator(1))
        start = torch.tensor([0, 4, 8])
        plain, static = (cascade.BlockCache(c, 3, c.seq_len, start) for _ in range(2))
        for store in (plain, static):
            net.decode(clean[:, :12], store, 12)
        static.graphs = lambda tokens, net=net, store=static: net.static_pass(
            tokens, store, torch.tensor(store.length)
        )
        tail = torch.full((3, S if c.objective == "diffusion" else 0), c.mask_id)
        for a in range(12, c.seq_len - S, S):
            for tokens, commit in ((tail, 0), (torch.cat([clean[:, a : a + S], tail], 1), S)):
                if tokens.shape[1]:
                    logits = [net.decode(tokens, store, commit) for store in (plain, static)]
                    worst = max(worst, diff(*logits))
        assert plain.length == static.length == c.seq_len - S
    return within(worst, 1e-5, "logits, max|diff|")


def test_cache_fused_commit():
    """Committing a block in the next block's first pass equals a pass of its own for it."""
    worst = 0.0
    for shape in (GQA, MHA):
        net = tiny_model(**shape)
        c = net.config
        clean = torch.randint(c.vocab_size, (3, 16), generator=generator(1))
        noisy, start = torch.full((3, 4), c.mask_id), torch.tensor([0, 4, 8])
        fused, separate = (cascade.BlockCache(c, 3, c.seq_len, start) for _ in range(2))
        for done in (clean[:, :8], clean[:, 8:12], clean[:, 12:]):  # two blocks at once, then one
            one = net.decode(torch.cat([done, noisy], dim=1), fused, done.shape[1])
            net.decode(done, separate, done.shape[1])
            worst = max(worst, diff(one, net.decode(noisy, separate, 0)))
        assert fused.length == separate.length == 16
        for a, b in ((fused.k, separate.k), (fused.v, separate.v)):
            for r, first in enumerate(start.tolist()):
                worst = max(worst, diff(a[:, r, :, first:16], b[:, r, :, first:16]))
    return within(worst, 1e-5)


def test_cache_noisy_block_leaves_no_trace():
    """A pass over a noisy block changes nothing later, bit for bit; committing one is refused."""
    net = tiny_model(**GQA)
    c = net.config
    clean = torch.randint(c.vocab_size, (2, 12), generator=generator(1))
    noisy = clean[:, 4:8].masked_fill(torch.tensor([True, False, True, False]), c.mask_id)
    junk, after = torch.full((2, 4), c.mask_id), []
    for drafts in (0, 1, 3):
        store = cascade.BlockCache(c, 2, c.seq_len)
        net.decode(clean[:, :4], store, 4)
        for _ in range(drafts):
            net.decode(junk, store, 0)
        logits = net.decode(noisy, store, 0)
        later = net.decode(torch.cat([clean[:, 4:8], junk], dim=1), store, 4)
        after.append((logits, later, store.k[:, :, :, :8], store.v[:, :, :, :8]))
    for other in after[1:]:
        assert all(torch.equal(a, b) for a, b in zip(after[0], other, strict=True))
    store = cascade.BlockCache(c, 2, c.seq_len)
    refuses(lambda: net.decode(noisy, store, 4), "masked")
    refuses(lambda: net.decode(torch.cat([clean[:, :4], noisy, noisy], 1), store, 8), "masked")
    refuses(lambda: net.decode(clean[:, :6], store, 6), "commit 6")
    refuses(lambda: net.decode(clean[:, :6], store, 4), "blocks of 4")
    refuses(lambda: net.decode(clean.repeat(1, 3), store, 36), "32 tokens, not 36")
    assert store.length == 0
    return "0, 1 and 3 drafts: bit for bit the same; 5 wrong commits refused"


def test_cache_half_precision():
    """Weights, or autocast, in bfloat16 and float16: finite, and near the uncached logits."""
    worst = {torch.bfloat16: 0.0, torch.float16: 0.0}
    for dtype in worst:
        for net, how in (
            (tiny_model(**GQA).to(dtype), contextlib.nullcontext()),
            (tiny_model(**GQA), torch.autocast("cpu", dtype)),
        ):
            with how:  # two finished blocks beside an empty row: hidden twice over
                log, last = passes(net, random_prompts(net, 9, 2), 8, rule="random", steps=2)
                for record in log:
                    for r, start in enumerate(record.step.start.tolist()):
                        want = uncached(net, last.text[r], 0, start, record.before[r])
                        assert bool(record.logits.isfinite().all()), dtype
                        worst[dtype] = max(worst[dtype], diff(record.logits[r], want))
    return f"{within(worst[torch.bfloat16], 0.1)}; float16 {within(worst[torch.float16], 0.02)}"


def test_cache_storage():
    """One allocation for a whole generation, of the size the docstring states; one per slide."""
    for shape, new, caches in ((GQA, 20, 1), (GQA, 60, 4), (AR, 20, 1), (AR, 60, 4)):
        net = tiny_model(**shape)
        c = net.config
        log, _ = passes(net, random_prompts(net, 5, 9), new, steps=1)
        seen = {record.storage for record in log}
        assert len(seen) == caches, f"{len(seen)} allocations, not {caches}"
        store = log[0].storage[0]
        size = store.k.nbytes + store.v.nbytes
        stated = 2 * c.n_layer * c.n_kv_head * c.head_dim * 4 * c.seq_len * 2
        assert size == stated, f"{size} bytes, stated {stated}"
    return f"{size} bytes as stated; 1 allocation, and 1 for each of 3 slides"


class NewStorage(TorchDispatchMode):
    """Records (operation, bytes) of every tensor made inside; views and in-place results not."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, got = tree_leaves((args, kwargs)), tree_leaves(out)
        given = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        for t in got:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.made.append((str(func), t.untyped_storage().nbytes()))
        return out


def test_no_growth_per_pass():
    """At position 1,920 a pass makes the very tensors it makes at position 96: none is larger."""
    count, largest = 0, 0
    for shape in (LIGHT, LIGHT_AR):
        net = tiny_model(**{**shape, "vocab_size": 60, "seq_len": 2048})
        made = []
        for at in (96, 1920):
            prompts = random_prompts(net, at, at - 24)  # ragged: the padding is hidden by a mask
            rows = sample.generate(net, prompts, 20, temperature=0.0)
            unused = min(set(range(60)) - set(rows[0][at:]) - set(rows[1][at - 24 :]))
            stream = sample.generate_stream(net, prompts, 20, temperature=0.0, stop_token=unused)
            for _ in range(3):  # the start, the pass that reads the prompt, and one more
                next(stream)
            with NewStorage() as storage:
                for _ in range(14):
                    next(stream)
            made.append(storage.made)
        near, far = made
        assert [op for op, _ in near] == [op for op, _ in far], "other operations"
        grown = {(op, x, y) for (op, x), (_, y) in zip(near, far, strict=True) if y > x}
        assert not grown, f"grows with the position: {grown}"
        count, largest = count + len(far), max(largest, *(size for _, size in far))
    return f"0 of {count} tensors larger, the largest {largest} bytes; allowed 0"


# ---- generation against full recomputation -------------------------------------------------------


def test_generation_equals_recomputation():
    """Each pass of generate_stream against one full uncached pass: ragged prompts that end inside
    blocks, batches, grouped heads, contexts that fill and slide, N = S, N = 2S, and the AR twin."""
    worst, slid = 0.0, []
    cases = (  # shape, lengths of the prompts, new tokens
        (GQA, (0, 3, 4, 5, 11), 13),
        (MHA, (28, 1), 4),
        (GQA, (7, 26), 50),
        ({**GQA, "seq_len": 4}, (0, 0), 14),
        ({**GQA, "seq_len": 8}, (3, 0, 4), 21),
        (AR, (0, 3, 11), 9),
        (AR, (31, 2), 30),
        ({**AR, "seq_len": 1}, (0, 0), 4),
    )
    for shape, lengths, new in cases:
        net = tiny_model(**shape)
        prompts, steps = random_prompts(net, *lengths), min(3, shape["block_size"])
        one, slides = against_uncached(net, prompts, new, rule="random", steps=steps)
        worst, slid = max(worst, one), [*slid, slides]
    assert [n > 0 for n in slid] == [False, True, True, True, True, False, True, True], slid
    return within(worst, 1e-5, f"{sum(slid)} slides, max|diff|")


def test_rows_do_not_mix():
    """Each row of a ragged batch against the same prompt alone: logits of every pass, tokens."""
    worst, count = 0.0, 0
    for shape, rule in ((GQA, "left_to_right"), (GQA, "confidence"), (MHA, "confidence"),
                        (AR, "left_to_right")):
        net = tiny_model(**shape)
        # no empty prompt here: with nothing to see, the places of its first block are equally
        # certain but for rounding, and `confidence` may begin with any
        prompts = random_prompts(net, 1, 3, 4, 9, 14)
        options = {"rule": rule, "temperature": 0.0, "steps": min(2, shape["block_size"])}
        together, last = passes(net, prompts, 13, **options)
        seen = {}
        for record in together:
            for r, start in enumerate(record.step.start.tolist()):
                seen[r, start, record.index] = record.logits[r]
        for r, prompt in enumerate(prompts):
            alone, step = passes(net, [prompt], 13, **options)
            assert step.rows()[0] == last.rows()[r], f"{rule}: row {r} has other tokens"
            for record in alone:  # a row whose first block is done early waits, nothing more
                same = seen[r, int(record.step.start), record.index]
                worst, count = max(worst, diff(record.logits[0], same)), count + 1
    return within(worst, 1e-5, f"{count} passes, max|diff|")


# ---- the distribution that is drawn from ---------------------------------------------------------


def choices(rule, masked, left, certainty, entropy, tau, gamma):
    """[(probability, places revealed now)] by the rule's definition; `masked` is ascending."""
    quota = math.ceil(len(masked) / left)
    if rule == "random":  # a uniform order: every next set of this size is equally likely
        sets = list(itertools.combinations(masked, quota))
        return [(1 / len(sets), chosen) for chosen in sets]
    if rule == "left_to_right":
        return [(1.0, masked[:quota])]
    if rule == "confidence":
        return [(1.0, sorted(masked, key=lambda i: -certainty[i])[:quota])]
    if rule == "threshold":
        most = max(masked, key=lambda i: certainty[i])
        return [(1.0, [i for i in masked if certainty[i] >= tau or i == most])]
    ranked, size = sorted(masked, key=lambda i: entropy[i]), 1
    while size < len(ranked) and sum(entropy[i] for i in ranked[:size]) <= gamma:
        size += 1  # a prefix's largest entropy is its last: the others must sum to gamma at most
    return [(1.0, ranked[:size])]


@torch.no_grad()
def block_distribution(net, prompt, rule, steps, tau=0.9, gamma=0.5):
    """{tokens: probability} of the first block written after `prompt`, by enumeration, float64.

    With `random` and one place a pass it is the average over all S! reveal orders of the chain
    rule along the order. One uncached pass scores all (V + 1)^S states of the block.
    """
    S, V = net.config.block_size, net.config.vocab_size
    cut = len(prompt) // S * S
    states = list(itertools.product(range(V + 1), repeat=S))
    tokens = torch.tensor([[*prompt[:cut], *state] for state in states])
    p = net(tokens)[:, -S:].double().softmax(-1)
    table = dict(zip(states, zip(p.tolist(), -(p * p.log()).sum(-1), strict=True), strict=True))

    @functools.cache
    def finish(state, left):
        masked = [i for i in range(S) if state[i] == V]
        if not masked:
            return {state: 1.0}
        p, entropy = table[state]
        certainty, out = [max(row) for row in p], {}
        for weight, now in choices(rule, masked, left, certainty, entropy, tau, gamma):
            for drawn in itertools.product(range(V), repeat=len(now)):
                after, mass = list(state), weight
                for i, token in zip(now, drawn, strict=True):
                    after[i], mass = token, mass * p[i][token]
                for end, rest in finish(tuple(after), left - 1).items():
                    out[end] = out.get(end, 0.0) + mass * rest
        return out

    given = len(prompt) - cut
    blocks = finish((*prompt[cut:], *[V] * (S - given)), steps)
    return {tokens[given:]: mass for tokens, mass in blocks.items()}


def chi_square(counts, wanted):
    """(statistic, its 0.9999 quantile) of observed counts against probabilities, both dicts."""
    n = sum(counts.values())
    assert set(counts) <= set(wanted), "an outcome of probability 0"
    assert abs(sum(wanted.values()) - 1) < 1e-9 and min(wanted.values()) * n >= 5
    statistic = sum((counts.get(x, 0) - n * p) ** 2 / (n * p) for x, p in wanted.items())
    free = len(wanted) - 1
    # Wilson and Hilferty: (chi2 / free)^(1/3) is nearly normal; 3.719 is the normal's quantile
    return statistic, free * (1 - 2 / (9 * free) + 3.719 * math.sqrt(2 / (9 * free))) ** 3


def drawn(net, prompt, new, seeds, **options):
    """Counts of the `new` tokens after `prompt` in 2,000 samples of each seed."""
    counts = {}
    for seed in range(seeds):
        stream = sample.generate_stream(net, [prompt] * 2000, new, seed=seed, **options)
        *_, last = stream
        for tokens in last.text[:, len(prompt) : len(prompt) + new].tolist():
            counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1
    return counts


def test_sampler_draws_the_distribution():
    """20,000 blocks against enumeration: `random` at K = S is what was trained, `left_to_right`
    the chain rule, K = 1 the product of the marginals; and 10,000 for each other rule."""
    net = tiny_model(std=0.5, vocab_size=3, seq_len=6, n_layer=1, n_head=2, n_embd=16, n_hidden=16)
    prompt, exact, ratios = [2, 0, 1], {}, {}
    cases = (  # rule, K, prompt, seeds, knobs
        ("random", 3, prompt, 10, {}), ("left_to_right", 3, prompt, 10, {}),
        ("random", 1, prompt, 10, {}), ("random", 2, prompt, 5, {}),
        ("left_to_right", 2, prompt, 5, {}), ("confidence", 3, prompt, 5, {}),
        ("threshold", 3, prompt, 5, {"tau": 0.5}), ("entropy", 3, prompt, 5, {"gamma": 0.9}),
        ("random", 3, [1], 5, {}),  # a token of the block is fixed
    )
    for rule, steps, start, seeds, knobs in cases:
        wanted = block_distribution(net, start, rule, steps, **knobs)
        counts = drawn(net, start, 3 - len(start) % 3, seeds, rule=rule, steps=steps, **knobs)
        statistic, bound = chi_square(counts, wanted)
        name = f"{rule} K={steps}"
        assert statistic <= bound, f"{name}: chi2 = {statistic:.0f}, allowed {bound:.0f}"
        ratios[f"{name} after {len(start)}"] = statistic / bound
        if seeds == 10 or rule == "confidence":
            exact[name] = wanted
    # the test must be able to tell these apart: chi2 had one been drawn in place of another
    power = math.inf
    for a, b in itertools.permutations(exact.values(), 2):
        bound = chi_square({x: 1000 for x in a}, a)[1]
        power = min(power, 20_000 * sum((b[x] - a[x]) ** 2 / a[x] for x in a) / bound)
    assert power > 10, f"the distributions are too alike to test: {power:.1f} times the bound"
    worst = max(ratios, key=ratios.get)
    return (f"chi2 / allowed = {ratios[worst]:.2f} at worst of {len(ratios)} ({worst}), allowed 1; "
            f"a wrong rule has {power:.0f} or more")


def test_ar_sampler_draws_the_distribution():
    """The AR twin, token by token through the cache: 10,000 triples against the chain rule."""
    net = tiny_model(vocab_size=3, seq_len=6, block_size=1, objective="ar", n_layer=1, n_head=2,
                     n_embd=16, n_hidden=16, seed=1)
    wanted = {}
    for x in itertools.product(range(3), repeat=3):
        logp = net.ar_logits(torch.tensor([[2, 0, *x]]))[0, 2:].double().log_softmax(-1)
        wanted[x] = logp[range(3), x].sum().exp().item()
    statistic, bound = chi_square(drawn(net, [2, 0], 3, 5), wanted)
    return within(statistic, bound, "chi2")


def test_truncation():
    """Temperature, top-k and top-p on a hand-made distribution: exactly the right set, the token
    that crosses p kept, renormalised, in float64; and `draw` draws from it."""
    p = torch.tensor([0.10, 0.40, 0.05, 0.30, 0.15], dtype=torch.float64)
    truncated, ranked, worst = sample.truncated_probabilities, [1, 3, 4, 0, 2], 0.0
    cases = (  # top_k, top_p, tokens kept
        (0, 1.0, 5), (1, 1.0, 1), (3, 1.0, 3), (5, 1.0, 5), (9, 1.0, 5),
        (0, 0.05, 1), (0, 0.39, 1), (0, 0.41, 2), (0, 0.69, 2), (0, 0.71, 3), (0, 0.96, 5),
        (2, 0.50, 1), (2, 0.60, 2), (3, 0.80, 2), (3, 0.83, 3),  # top_p is of what top_k left
    )
    for top_k, top_p, kept in cases:
        got, want = truncated(p.log().float(), 1.0, top_k, top_p), torch.zeros_like(p)
        want[ranked[:kept]] = p[ranked[:kept]] / p[ranked[:kept]].sum()
        assert got.nonzero()[:, 0].tolist() == sorted(ranked[:kept]), (top_k, top_p, got)
        worst = max(worst, diff(got, want))
    for t in (0.5, 2.0):
        want = p ** (1 / t) / (p ** (1 / t)).sum()
        worst = max(worst, diff(truncated(p.log().float(), t), want))
    # at temperature 2 the best two hold 0.55 of the whole, so top-p must come after it
    assert int((truncated(p.log(), 2.0, 0, 0.6) > 0).sum()) == 3
    assert truncated(p.log(), 0).tolist() == truncated(p.log(), 1e-4).tolist() == [0, 1, 0, 0, 0]
    # float32 cannot tell 1 - 1.5e-8 from 1, and a low-precision draw acts as a lower temperature
    rare = truncated(torch.tensor([0.0, -18.0]))
    assert rare.dtype == torch.float64 and rare[0] < 1 and abs(rare.sum() - 1) < 1e-15, rare
    got = truncated(p.log(), 1.0, 3)
    tokens = sample.draw(got.expand(20_000, 5), generator()).tolist()
    counts = {t: tokens.count(t) for t in set(tokens)}
    statistic, bound = chi_square(counts, {t: got[t].item() for t in ranked[:3]})
    assert statistic <= bound, f"chi2 = {statistic:.1f}, allowed {bound:.1f}"
    return within(worst, 1e-7, f"{len(cases)} sets right, max|diff|")


def test_greedy():
    """Temperature 0 reveals the argmax of each place, whatever the seed; so do 1e-4, top-k 1 and a
    tiny top-p; top-k 2 never leaves the best two; a seed repeats itself, another does not."""
    count = 0
    for shape, rule in ((LIGHT, "confidence"), (LIGHT, "threshold"), (LIGHT, "entropy"),
                        (GQA, "left_to_right"), (AR, "left_to_right")):
        net, options = tiny_model(**shape), {"rule": rule, "tau": 0.4, "gamma": 1.0}
        prompts = random_prompts(net, 5, 0)
        log, last = passes(net, prompts, 10, temperature=0.0, seed=1, **options)
        for record in log:
            now = record.step.revealed
            assert torch.equal(record.step.block[now], record.logits.argmax(-1)[now]), rule
            count += int(now.sum())
        for same in ({"temperature": 0.0, "seed": 2}, {"temperature": 1e-4}, {"top_k": 1},
                     {"top_p": 1e-6}, {"temperature": 7.0, "top_k": 1}):
            rows = sample.generate(net, prompts, 10, **options, **same)
            assert rows == last.rows(), f"{rule}: {same} is not greedy"
        log, _ = passes(net, prompts, 10, temperature=3.0, top_k=2, **options)
        for record in log:
            two = record.logits.topk(2).indices == record.step.block[..., None]
            assert bool(two.any(-1)[record.step.revealed].all()), f"{rule}: outside the top 2"
    again = [sample.generate(net, prompts, 10, seed=5) for _ in range(2)]
    assert again[0] == again[1] != sample.generate(net, prompts, 10, seed=6)
    return f"{count} tokens, each the argmax; 5 ways to be greedy agree"


# ---- the rules -----------------------------------------------------------------------------------


def test_rules_by_definition():
    """Each rule on random views, ties among them, against its definition in plain Python."""
    g, rows, checked = generator(), 100, 0
    certainty = torch.rand(rows, 6, generator=g, dtype=torch.float64)
    certainty[::3] = (certainty[::3] * 4).round() / 4  # ties
    entropy = 2 * torch.rand(rows, 6, generator=g, dtype=torch.float64)
    order = torch.rand(rows, 6, generator=g, dtype=torch.float64)
    masked = torch.rand(rows, 6, generator=g) < torch.rand(rows, 1, generator=g)
    for left, (tau, gamma) in itertools.product((1, 2, 4, 6), ((0.5, 0), (0.75, 0.7), (1, 50))):
        view = sample.View(masked, certainty, entropy, order, -(-masked.sum(1) // left), tau, gamma)
        for rule in RULES:
            got = sample.RULES[rule](view)
            for r in range(rows):
                places, want = masked[r].nonzero()[:, 0].tolist(), []
                if places and rule == "random":
                    want = sorted(places, key=lambda i: order[r, i])[: view.quota[r]]
                elif places:
                    seen = certainty[r].tolist(), entropy[r].tolist()
                    want = choices(rule, places, left, *seen, tau, gamma)[0][1]
                assert got[r].nonzero()[:, 0].tolist() == sorted(want), (rule, r, left, tau)
                checked += 1
    return f"{checked} decisions as defined"


def test_rules_see_the_model_alone():
    """What a rule is shown is the model's own distribution, whatever the temperature and top-k,
    and a fresh uniform order for each block."""
    net, views = tiny_model(**GQA), []
    sample.RULES["spy"] = lambda v: (views.append(v), sample.confidence(v))[1]
    try:
        log, _ = passes(net, [[], []], 16, rule="spy", temperature=5.0, top_k=2, top_p=0.7, steps=3)
    finally:
        del sample.RULES["spy"]
    worst = 0.0
    for record, v in zip(log, views, strict=True):
        p = record.logits.double().softmax(-1)
        worst = max(worst, diff(v.certainty, p.amax(-1)), diff(v.entropy, -(p * p.log()).sum(-1)))
        assert torch.equal(v.masked, record.before == net.config.mask_id)
    orders = {tuple(v.order.flatten().tolist()) for v in views}
    assert len(orders) == 4, f"{len(orders)} orders in 4 blocks"
    return within(worst, 1e-12)


def test_every_rule_and_step_count():
    """All five rules, K = 1..S, ragged prompts: what a pass may touch, and how many there are."""
    runs = total = 0
    for S, new in ((4, 10), (2, 5), (1, 3)):
        net = tiny_model(**{**LIGHT, "block_size": S})
        mask_id, prompts = net.config.mask_id, random_prompts(net, 0, 6, 5, 8)
        blocks = -(-(max(len(p) % S for p in prompts) + new) // S)
        for rule, steps in itertools.product(RULES, range(1, S + 1)):
            log, last = passes(net, prompts, new, rule=rule, steps=steps, tau=0.3, gamma=1.5)
            for record in log:
                after, now = record.step.block, record.step.revealed
                masked = record.before == mask_id
                assert bool((now <= masked).all()), "a token was drawn twice"
                assert torch.equal(after[~now], record.before[~now]), "a token changed"
                assert bool((after[now] < mask_id).all()), "a mask was drawn"
                assert bool((now.any(1) >= masked.any(1)).all()), "a pass revealed nothing"
                if rule in ON_TIME:
                    quota = -(-masked.sum(1) // (steps - record.index))
                    assert torch.equal(now.sum(1), quota), f"{rule}, K = {steps}: not on time"
            assert sum(record.index == 0 for record in log) == blocks
            assert max(record.index for record in log) < S
            # the empty prompt has a whole block to write, so even the first takes K passes
            assert rule not in ON_TIME or len(log) == steps * blocks, (rule, steps, len(log))
            for prompt, row in zip(prompts, last.rows(), strict=True):
                assert row[: len(prompt)] == prompt, "the prompt changed"
                assert len(row) == len(prompt) + new and max(row) < mask_id, row
            runs, total = runs + 1, total + len(log)
    return f"{runs} runs, {total} passes, K a block as promised"


def test_pass_counts():
    """NFE where the rule decides: all at once, one at a time; of a short first block; of AR."""
    net, S = tiny_model(**LIGHT), 4
    cases = (  # prompt, new tokens, promised passes, options
        ([], 12, 3, {"rule": "threshold", "tau": 1e-9}),
        ([], 12, 3 * S, {"rule": "threshold", "tau": 1.0}),
        ([], 12, 3, {"rule": "entropy", "gamma": 1e9}),
        ([], 12, 3 * S, {"rule": "entropy", "gamma": 0.0}),
        ([1, 2], 2, 2, {"rule": "random", "steps": 4}),  # two masks cannot take four passes
        ([1, 2], 2, 1, {"rule": "random", "steps": 1}),
        ([1, 2], 0, 0, {}),
        ([], 60, 15 * 2, {"rule": "confidence", "steps": 2}),  # reading the context again is free
        ([], 12, 3 * S, {}),
    )
    for prompt, new, promised, options in cases:
        count = len(passes(net, [prompt], new, **options)[0])
        assert count == promised, f"{options}: {count} passes, promised {promised}"
    count = len(passes(tiny_model(**LIGHT_AR), [[1, 2]], 50)[0])
    assert count == 50, f"AR: {count} passes for 50 tokens"
    return f"{len(cases) + 1} counts as promised"


# ---- lengths, ends, bad input --------------------------------------------------------------------


def test_lengths():
    """max_new_tokens of any size gives exactly that many, each a prefix of the longer one; 0 gives
    the prompts back; an empty prompt starts from nothing."""
    for shape in (LIGHT, {**LIGHT, "seq_len": 8}, LIGHT_AR):
        net = tiny_model(**shape)
        prompts = random_prompts(net, 3, 0, 4)
        longest = sample.generate(net, prompts, 18, rule="random")
        for new in range(11):
            rows = sample.generate(net, prompts, new, rule="random")
            assert rows == [w[: len(p) + new] for p, w in zip(prompts, longest, strict=True)], new
        settled = [s.settled.tolist() for s in sample.generate_stream(net, prompts, 9)]
        assert settled[0] == [3, 0, 4] and settled[-1] == [12, 9, 13], settled
        assert settled == sorted(settled), "text that was final was taken back"
    return "0..10 tokens, each a prefix of 18"


def test_stop_token():
    """A row ends before its first stop token, not at one in its prompt, and alone; when all have
    ended nothing more is computed."""
    early = 0
    for shape in (LIGHT, LIGHT_AR):
        net = tiny_model(**shape)
        prompts, S = [[1, 2, 3, 4, 5], [], [6, 7], [8]], net.config.block_size
        free = sample.generate(net, prompts, 40, rule="random", seed=2)
        for stop in range(0, net.config.vocab_size, 2):
            log, last = passes(net, prompts, 40, rule="random", seed=2, stop_token=stop)
            ends, written = [], 0
            for prompt, row, got in zip(prompts, free, last.rows(), strict=True):
                new = row[len(prompt) :]
                ends.append(new.index(stop) if stop in new else 40)
                assert got == prompt + new[: ends[-1]], (stop, got)
                written = max(written, len(prompt) % S + min(ends[-1] + 1, 40))
            assert len(set(ends)) > 1, "rows that end together test nothing"
            assert len(log) <= -(-written // S) * S, f"{len(log)} passes for {written} tokens"
            early += sum(end < 40 for end in ends)
    return f"{early} rows cut at the right place"


def test_generate_refuses():
    """Wrong arguments of the library raise ValueError in one line that names them."""
    net = tiny_model(**LIGHT)
    for name in ("temperature", "top_p", "tau", "gamma"):
        refuses(lambda n=name: sample.generate(net, [[1]], 4, **{n: math.nan}), name, "nan")
        refuses(lambda n=name: sample.generate(net, [[1]], 4, **{n: -0.1}), name, "-0.1")
    calls = (
        ([[1] * 29], 4, "29", "28"), ([[1], [1] * 40], 4, "40"), ([[11]], 4, "0..10"),
        ([[-1]], 4, "0..10"), ([], 4, "prompt"), ([[1]], -1, "max_new_tokens"),
    )
    for prompts, new, *words in calls:
        refuses(lambda p=prompts, n=new: sample.generate(net, p, n), *words)
    assert len(sample.generate(net, [[1] * 28], 6)[0]) == 34  # the longest that fits
    return f"{8 + len(calls)} refused, each in one line"


CHARS = "\n !,.abcdefghijklmnopqrstuvwxyz\xe9"


@contextlib.contextmanager
def checkpoint_folder(chars=CHARS, **shape):
    """(a folder with a random tiny model's best.pt, that model, its tokenizer)."""
    net = tiny_model(1, **{**LIGHT, "vocab_size": len(chars), **shape})
    tokenizer = CharTokenizer(chars)
    state = {
        "config": asdict(net.config), "settings": {}, "meta": tokenizer.meta(),
        "model": net.state_dict(), "optimizers": [], "step": 0, "seconds": 0.0,
        "bound": [1.0, 0.1], "best": 1.0,
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_checkpoint(Path(folder) / "best.pt", state)
        yield Path(folder), net, tokenizer


class Terminal(io.StringIO):
    """Standard output that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def sample_command(*arguments, stdin=b"", out=None):
    """`python sample.py ...` in this process: (exit code, standard output, standard error)."""
    out, err, before = out or io.StringIO(), io.StringIO(), (sys.argv, sys.stdin)
    sys.argv, sys.stdin = ["sample.py", *map(str, arguments)], io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(HERE / "sample.py"), run_name="__main__")
    except SystemExit as e:
        return e.code, out.getvalue() if isinstance(out, io.StringIO) else "", err.getvalue()
    finally:
        sys.argv, sys.stdin = before


class Trap:
    """What a malicious checkpoint does: unpickled, it makes the folder `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_sample_command_refuses():
    """Every wrong command line: one line on stderr that says what, exit code 2, nothing printed."""
    count = 0
    with checkpoint_folder() as (folder, _, _):
        content = (folder / "best.pt").read_bytes()
        half = len(content) // 2
        (folder / "cut.pt").write_bytes(content[:half])
        (folder / "flipped.pt").write_bytes(
            content[:half] + bytes([content[half] ^ 255]) + content[half + 1 :]
        )
        (folder / "noise.pt").write_bytes(bytes(range(256)) * 20)
        (folder / "empty.pt").write_bytes(b"")
        torch.save({"model": {"w": torch.ones(2)}, "iter_num": 3}, folder / "foreign.pt")
        torch.save(Trap(folder / "sprung"), folder / "trap.pt")
        checkpoint.save_checkpoint(folder / "kind.pt", {"config": {"n_layer": 1, "bias": True}})
        (folder / "bytes.txt").write_bytes(b"abc\xff\xfe")
        (folder / "nothing").mkdir()
        table = (
            ("--steps=5", "1..4"), ("--steps=-1", "1..4"), ("--rule=best", "best", "left_to_right"),
            ("--tau=0", "tau"), ("--tau=1.5", "tau"), ("--gamma=-1", "gamma"),
            ("--gamma=nan", "gamma"), ("--top_p=0", "top_p"), ("--top_p=1.5", "top_p"),
            ("--top_k=-2", "top_k"), ("--temperature=-1", "temperature"),
            ("--num_samples=0", "num_samples"), ("--max_new_tokens=-5", "max_new_tokens"),
            ("--prompt=" + "a" * 40, "40", "28"), ("--prompt=no Caps", "'C'"),
            ("--prompt=\N{SNOWMAN}%", "%", "\N{SNOWMAN}"), ("--stop=ab", "ab"), ("--stop=Z", "Z"),
            (f"--prompt=FILE:{folder}/missing", "missing", "No such file"),
            (f"--prompt=FILE:{folder}", "directory"), ("--delay=-1", "negative"),
            (f"--prompt=FILE:{folder}/bytes.txt", "UTF-8"), ("--prompt=-", "UTF-8"),
            ("--seed=1e30", "error"), ("--block_size=8", "blocks of 4", "--any_block_size=true"),
            ("--block_size=5 --any_block_size=true", "multiple"),
            ("--setps=3", "did you mean steps"), ("--steps=many", "int"), ("steps", "--key=value"),
            (f"--out_dir={folder}/nothing", "no checkpoint"), ("--out_dir=/no/such", "/no/such"),
            *((f"--out_dir={folder}/{name}.pt", name) for name in
              ("noise", "empty", "cut", "flipped", "foreign", "trap", "kind")),
        )
        for argument, *words in table:
            more = [argument] if argument.startswith("--prompt") else argument.split()
            code, out, err = sample_command(
                f"--out_dir={folder}", "--max_new_tokens=4", *more, stdin=b"\xff\xfe"
            )
            assert code == 2 and not out, (argument, code, out, err)
            assert err.startswith("error: ") and err.count("\n") == 1 and err[-1] == "\n", err
            assert all(word in err for word in words) and "\x1b" not in err, (argument, err)
            count += 1
        assert not (folder / "sprung").exists(), "a checkpoint ran code"
        code, out, err = sample_command(f"--out_dir={folder}", "--rule=best", out=Terminal())
        screen = Screen(80, 24)
        screen.feed(out)
        assert code == 2 and screen.clean() and not screen.text()[0], (code, out)
    return f"{count + 1} refused with exit code 2, one line each"


def test_sample_command():
    """What the command accepts, in a pipe: the library's text, unadorned."""
    runs = 0

    def same(folder, net, tokenizer, prompt, new, *arguments, samples=1, stdin=b"", **options):
        nonlocal runs
        code, out, err = sample_command(
            f"--out_dir={folder}", f"--max_new_tokens={new}", f"--num_samples={samples}",
            *arguments, stdin=stdin,
        )
        assert (code, err) == (0, ""), (arguments, code, err)
        options = {"temperature": sample.DEFAULTS["temperature"], **options}
        rows = sample.generate(net, [tokenizer.encode(prompt)] * samples, new, **options)
        texts = [tokenizer.decode(row) for row in rows]
        if samples > 1:
            texts = [f"--- sample {i + 1} of {samples}\n{t}" for i, t in enumerate(texts)]
        assert out == "".join(t + "\n" for t in texts), (arguments, out)
        runs += 1
        return rows

    with checkpoint_folder() as it:
        folder, net, tokenizer = it
        (folder / "prompt.txt").write_text("caf\xe9 a\n", encoding="utf-8")
        same(*it, "", 9)
        same(*it, "ab", 0, "--prompt=ab")
        same(*it, "caf\xe9 a\n", 6, f"--prompt=FILE:{folder}/prompt.txt", "--steps=2", steps=2)
        same(*it, "hello\n", 20, "--prompt=-", "--rule=entropy", "--gamma=1", stdin=b"hello\n",
             rule="entropy", gamma=1.0)
        same(*it, "a", 12, "--prompt=a", "--rule=threshold", "--tau=0.3", "--temperature=0.5",
             "--top_k=7", "--top_p=0.9", "--seed=4", samples=3, rule="threshold", tau=0.3,
             temperature=0.5, top_k=7, top_p=0.9, seed=4)
        stop = same(*it, "a", 20, "--prompt=a", samples=2)[0][9]
        end = f"--stop={tokenizer.decode([stop])}"
        same(*it, "a", 20, "--prompt=a", end, samples=2, stop_token=stop)
        net.config.block_size = 8
        same(*it, "abc", 20, "--prompt=abc", "--block_size=8", "--any_block_size=true")
        reader, writer = os.pipe()  # a reader that left early, as in `| head`
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            _, _, err = sample_command(f"--out_dir={folder}", "--max_new_tokens=4", out=out)
            assert not err, err
    with checkpoint_folder(**LIGHT_AR) as it:
        same(it[0] / "best.pt", *it[1:], "abc", 40, "--prompt=abc")
    return f"{runs} runs print the library's text; a closed pipe is no error"


# ---- the terminal --------------------------------------------------------------------------------


class Screen:
    """What a person would see: just enough of a terminal, strict about what it does not know.

    lines holds cells (character, style), also of what was scrolled away: the screen is its last
    `height` lines. A wide character is one cell and an empty one.
    """

    def __init__(self, width, height):
        self.width, self.height, self.cursor, self.style = width, height, True, ""
        self.lines, self.y, self.x, self.saved = [[]], 0, 0, None

    def feed(self, text):
        for code, char in re.findall(r"(\x1b\[[?0-9;]*[A-Za-z])|([\s\S])", text):
            self.code(code) if code else self.put(char)

    def put(self, char):
        size = 0 if char in "\r\n" else sample.columns(char)
        assert char in "\r\n" or char.isprintable(), f"control character {char!r}"
        if char == "\n" or self.x + size > self.width:
            self.x, self.y = self.x if char == "\n" else 0, self.y + 1
            if self.y == len(self.lines):
                self.lines.append([])
        if char == "\r":
            self.x = 0
        if size:
            line = self.lines[self.y]
            line += [(" ", "")] * (self.x + size - len(line))
            line[self.x : self.x + size] = [(char, self.style), ("", "")][:size]
            self.x += size

    def code(self, code):
        top = max(0, len(self.lines) - self.height)
        if code[-1] == "m":
            self.style = "" if code in ("\x1b[0m", "\x1b[m") else code
        elif code[-1] == "A":
            self.y = max(top, self.y - int(code[2:-1] or 1))
        elif code == "\x1b[H":
            self.y, self.x = top, 0
        elif code == "\x1b[J":
            del self.lines[self.y][self.x :], self.lines[self.y + 1 :]
        elif code in ("\x1b[?25l", "\x1b[?25h"):
            self.cursor = code[-1] == "h"
        elif code == "\x1b[?1049h":  # the alternate screen
            self.saved, self.lines, self.y, self.x = (self.lines, self.y, self.x), [[]], 0, 0
        elif code == "\x1b[?1049l":
            (self.lines, self.y, self.x), self.saved = self.saved, None
        else:
            assert code in ("\x1b[?2026h", "\x1b[?2026l"), f"unknown escape code {code!r}"

    def text(self):
        return ["".join(char for char, _ in line).rstrip() for line in self.lines]

    def clean(self):
        """Whether the terminal is as it was found."""
        return self.cursor and not self.saved and not self.style


@contextlib.contextmanager
def window(columns, lines):
    """A terminal window of this size, as shutil.get_terminal_size sees it."""
    before = shutil.get_terminal_size
    shutil.get_terminal_size = lambda *_: os.terminal_size((columns, lines))
    try:
        yield
    finally:
        shutil.get_terminal_size = before


def test_display():
    """Every frame on small terminals: the end of the text and its block and nothing else, masks dim
    and new tokens bright, no line more than fits, what stood above untouched; and nothing is left
    behind when it ends, not even where Ctrl-C's echo fell."""
    chars = CHARS + "\N{CJK UNIFIED IDEOGRAPH-6F22}\N{CJK UNIFIED IDEOGRAPH-5B57}\t\x1b\x9b"
    net, tokenizer = tiny_model(**{**LIGHT, "vocab_size": len(chars)}), CharTokenizer(chars)
    mask_id, frames, marks = net.config.mask_id, 0, {sample.DIM: 0, sample.BRIGHT: 0}
    for columns, lines, samples, new in ((20, 6, 1, 150), (7, 5, 1, 99), (2, 4, 1, 20),
                                         (80, 24, 1, 60), (80, 24, 2, 60), (9, 6, 9, 20)):
        prompts = random_prompts(net, *[samples + 2] * samples)
        # of several samples the first ends early
        stop = sample.generate(net, prompts, new, steps=2)[0][12] if samples > 1 else None
        screen, out = Screen(columns, lines), Terminal()
        screen.feed("$\r\n")
        with window(columns, lines), sample.Display(tokenizer, mask_id, out) as display:
            for step in sample.generate_stream(net, prompts, new, steps=2, stop_token=stop):
                display.show(step)
                screen.feed(out.getvalue().replace("\n", "\r\n"))  # as a terminal's driver does
                out.seek(out.truncate(0))
                frames += 1
                shown, whole = screen.text(), ""
                assert not screen.cursor and not screen.style and len(shown) <= lines + 1, shown
                assert screen.saved or shown[0] == "$", shown
                for r, row in enumerate(step.rows()):  # its text, and behind it what is undecided
                    block = step.block[r, max(0, len(row) - int(step.start[r])) :].tolist()
                    block = [] if step.done[r] else block
                    block = ["\N{LIGHT SHADE}" if t == mask_id else chars[t] for t in block]
                    whole += sample.printable(tokenizer.decode(row) + "".join(block))
                # blanks at the ends of lines cannot be seen, so all are left out
                below = re.sub(r"\s", "", "".join(shown[0 if screen.saved else 1 :]))
                whole = re.sub(r"\s", "", whole)
                if samples == 1:
                    assert whole.endswith(below) and bool(below) == bool(whole), (whole, below)
                    full = len(row) > 2 * columns * lines
                    assert not full or len(shown) >= lines - 1, "room is left for earlier text"
                if columns == 80:
                    assert whole == below, (whole, below)
                if columns == 80 and step.nfe and not step.done.any():
                    fresh = tokenizer.decode(step.block[step.revealed].tolist())
                    want = {sample.DIM: int((step.block == mask_id).sum()),
                            sample.BRIGHT: len(fresh) - fresh.count("\n")}
                    for style, count in want.items():
                        got = sum(style in one for line in screen.lines for _, one in line)
                        assert got == count, f"{got} cells of {style!r}, not {count}"
                        marks[style] += count
            screen.feed("^C")  # the driver's echo, wherever the cursor stands
        screen.feed(out.getvalue())
        assert screen.clean() and screen.text() == ["$", ""], screen.text()
    for width in range(2, 9):  # a wide character may leave a column free, never take one too many
        text = sample.printable(chars[1:] * 3)
        wrapped = sample.wrap([(sample.PLAIN, text)], width)
        assert "".join(char for line in wrapped for _, char in line) == text
        used = {sum(sample.columns(char) for _, char in line) for line in wrapped[:-1]}
        assert used <= {width - 1, width}, (width, used)
    assert min(marks.values()) > 20, f"too few to tell: {marks}"
    return f"{frames} frames, {marks[sample.DIM]} dim and {marks[sample.BRIGHT]} bright cells"


def on_a_terminal(columns, lines, *arguments):
    """sample.py as a process on a pseudo terminal of its own: (its id, the terminal's other end,
    a function that resizes the window). Skip where there is no such thing."""
    try:
        import fcntl
        import pty
        import termios
    except ImportError:
        raise Skip("no pseudo terminals here") from None

    def resize(columns, lines):
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    pid, end = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # else inherited as ignored in the background
        env = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        for name in ("COLUMNS", "LINES"):
            env.pop(name, None)
        command = [sys.executable, str(HERE / "sample.py"), *map(str, arguments)]
        os.execve(sys.executable, command, env)
    resize(columns, lines)
    return pid, end, resize


def read_terminal(end, frames=math.inf, limit=60.0):
    """What the process writes, to its end or for so many frames."""
    data, stop = b"", time.monotonic() + limit
    while time.monotonic() < stop and data.count(b"\x1b[?2026l") < frames:
        if select.select([end], [], [], 0.1)[0]:
            try:
                piece = os.read(end, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not piece:
                break
            data += piece
    return data.decode()


def test_sample_on_a_terminal():
    """The command on a real pseudo terminal: to its end, and interrupted after a resize."""
    report = r"(\d+) tokens in (\d+) passes = \d.\d\d a pass, \d+ tokens/s"
    with checkpoint_folder(CHARS + "\x07\x1b") as (folder, net, tokenizer):
        options = [f"--out_dir={folder}", "--prompt=hello", "--max_new_tokens=120", "--steps=2",
                   "--temperature=1"]
        text = tokenizer.decode(sample.generate(net, [tokenizer.encode("hello")], 120, steps=2)[0])
        assert "\x1b" in text and "\x07" in text, "the model must write what would harm a terminal"
        text = sample.printable(text)

        pid, end, _ = on_a_terminal(60, 12, *options)
        screen, wanted = Screen(60, 12), Screen(60, 12)
        screen.feed(read_terminal(end))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        os.close(end)
        wanted.feed(text.replace("\n", "\r\n") + "\r\n")
        *shown, last, below = screen.text()
        assert screen.clean() and shown == wanted.text()[:-1] and not below, (shown, wanted.text())
        assert re.fullmatch(report, last)[2] == "62", last

        pid, end, resize = on_a_terminal(60, 12, *options, "--delay=0.02")
        seen = read_terminal(end, frames=12)
        resize(17, 6)
        seen += read_terminal(end, frames=8)
        os.write(end, b"\x03")
        seen += read_terminal(end)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(end)
        assert code == 130, f"exit code {code}"
        for on, off in (("\x1b[?25l", "\x1b[?25h"), ("\x1b[?1049h", "\x1b[?1049l")):
            assert seen.count(on) == seen.count(off) and seen.rfind(on) <= seen.rfind(off), on
        after = seen[max(seen.rfind("\x1b[?25h"), seen.rfind("\x1b[?1049l")) :]
        after = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", after).replace("\r\n", "\n")
        printed, _, last = after.removesuffix("\n").rpartition("\n")
        assert 8 < len(printed) < 120 and text.startswith(printed), (text, printed)
        assert int(re.fullmatch(report, last)[1]) == len(printed) - 5, last
    return f"125 characters to the end; {len(printed)} at Ctrl-C, exit code {code}"


def test_sample_in_a_pipe():
    """The command as a process: standard input to standard output without an escape code."""
    with checkpoint_folder() as (folder, net, tokenizer):
        run = subprocess.run(
            [sys.executable, str(HERE / "sample.py"), "--out_dir=.", "--prompt=-",
             "--max_new_tokens=50", "--temperature=1"],
            input="caf\xe9\n".encode(), capture_output=True, check=False, cwd=folder,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
        assert (run.returncode, run.stderr) == (0, b""), run.stderr
        text = tokenizer.decode(sample.generate(net, [tokenizer.encode("caf\xe9\n")], 50)[0])
        assert run.stdout.decode() == text + "\n" and b"\x1b" not in run.stdout
    return f"{len(text)} characters, none of them an escape"


# ---- data ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def data_root():
    """A temporary folder that is the data folder meanwhile."""
    before = os.environ.get("CASCADE_DATA")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CASCADE_DATA"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["CASCADE_DATA"]
            if before is not None:
                os.environ["CASCADE_DATA"] = before


def prepare_module(name):
    """data/<name>/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}",
                                                  HERE / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(module, *arguments):
    """Run a prepare script's command line here; None, or the error line it ended with."""
    before, sys.argv = sys.argv, ["prepare.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            dataset.run(module.main)
    except SystemExit as e:
        return str(e.code)
    finally:
        sys.argv = before
    return None


def text_command(*arguments):
    """data/text/prepare.py as a user starts it."""
    return [sys.executable, str(HERE / "data/text/prepare.py"), *map(str, arguments)]


def refused(call, *words):
    """The message of the DataError that `call` must raise: one line with all `words` in it."""
    try:
        call()
    except DataError as e:
        message = str(e)
        assert "\n" not in message and all(w in message for w in words), f"{words}: {message!r}"
        return message
    raise AssertionError(f"accepted, though {words} was expected")


def small_dataset(folder, ids=None, tokenizer=None, shard_tokens=10_000):
    """A dataset of `ids` (default 25,000 random bytes), written in 700-token pieces."""
    tokenizer = tokenizer or dataset.ByteTokenizer()
    if ids is None:
        ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 25_000)
    with dataset.DatasetWriter(folder, tokenizer, "test", overwrite=True,
                               shard_tokens=shard_tokens) as writer:
        for i in range(0, len(ids), 700):
            writer.add("train", ids[i:i + 700], 1)
        writer.add("val", ids[:500], 1)
        writer.finish()
    return ids


def folder_digest(folder):
    """One hash over names and contents of all files of a folder."""
    files = sorted(p for p in Path(folder).iterdir() if p.is_file())
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


def prose(n_bytes, seed=0):
    """n_bytes of lines of made-up words, ASCII."""
    r = random.Random(seed)
    words = ["".join(r.choices("etaoinshrdlu", k=r.randint(1, 9))) for _ in range(500)]
    page = "".join(r.choice(words) + r.choice("     \n") for _ in range(20_000))
    return (page * (n_bytes // len(page) + 1))[:n_bytes].encode()


def test_data_shakespeare():
    """The shipped text: one command, the counts and hashes of its readme.md, decodes back."""
    with data_root() as root:
        start = time.monotonic()
        subprocess.run([sys.executable, str(HERE / "data/shakespeare/prepare.py")], check=True,
                       capture_output=True)
        seconds = time.monotonic() - start
        data = dataset.load_dataset("shakespeare", 1024)
        train, val = data.split("train"), data.split("val")
        readme = (HERE / "data/shakespeare/readme.md").read_text(encoding="utf-8")
        for split in ("train", "val"):
            sha256 = hashlib.sha256((root / f"shakespeare/{split}.bin").read_bytes()).hexdigest()
            assert sha256 in readme and sha256 in json.dumps(data.meta), f"{split}.bin has {sha256}"
        ids = np.concatenate([train.window([0], len(train))[0], val.window([0], len(val))[0]])
        text = data.tokenizer.decode(ids).encode()
        original = prepare_module("shakespeare").SHA256
        assert hashlib.sha256(text).hexdigest() == original, "decoding does not give the text back"
        counts = (len(train), len(val), data.vocab_size, train.bytes_per_token)
        assert counts == (4_551_552, 505_728, 84, 1.0), counts
    return f"{len(train):,} + {len(val):,} tokens, {seconds:.1f}s", "4,551,552 + 505,728"


def test_data_windows():
    """window() equals slices of the flat array, across shard borders, and stays inside."""
    with data_root() as root:
        ids = small_dataset(root / "mine")
        split = dataset.load_dataset("mine").split("train")
        shards = len(split.shards)
        assert shards == 3 and len(split) == len(ids), f"{shards} shards, {len(split)} tokens"
        rng, wrong = np.random.default_rng(1), 0
        for length in (1, 8, 513, 12_000, 25_000):
            starts = rng.integers(0, len(ids) - length + 1, 400 if length < 1000 else 4)
            starts[0], starts[-1] = 0, len(ids) - length
            got = split.window(starts, length)
            assert got.dtype == np.int64 and got.shape == (len(starts), length), got.shape
            wrong += sum(not np.array_equal(row, ids[s:s + length])
                         for row, s in zip(got, starts, strict=True))
        assert wrong == 0, f"{wrong} windows differ"
        for start in (-1, len(ids) - 7):
            try:
                split.window([start], 8)
            except IndexError:
                continue
            raise AssertionError(f"a window at {start} left the split")
    return f"{wrong} wrong windows, {shards} shards", "0"


def test_data_tokenizers():
    """Ids fit the smallest type; text survives; special-looking text; half characters."""
    assert [dataset.smallest_dtype(v).name for v in (2, 256, 257, 65_536, 65_537)] == \
        ["uint8", "uint8", "uint16", "uint16", "uint32"]
    text = "naïve 木 😀\r\n\t<|endoftext|>"
    char, byte = dataset.CharTokenizer("".join(sorted(set(text)))), dataset.ByteTokenizer()
    for tokenizer in (char, byte, dataset.Tokenizer.from_meta(char.meta()),
                      dataset.Tokenizer.from_meta(byte.meta())):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < tokenizer.vocab_size, tokenizer.kind
        assert len([tokenizer.token_text(i) for i in ids]) == len(ids)
    assert byte.eot not in byte.encode(text), "the text <|endoftext|> became a token"
    assert dataset.ByteTokenizer(special=True).encode(text)[-1] == byte.eot
    assert byte.decode([104, 0xE6, 0x9C]) == "h\ufffd", "half a character"
    refused(lambda: char.encode("zebra Q"), "'Qbrz'")
    refused(lambda: byte.encode("\udce9"), "UTF-8")
    with data_root() as root:  # more characters than 16 bits can number
        many = dataset.CharTokenizer("".join(map(chr, range(0x10000, 0x21000))))
        ids = small_dataset(root / "many", tokenizer=many)
        data = dataset.load_dataset("many")
        same = np.array_equal(data.split("train").window([0], len(ids))[0], ids)
        assert data.meta["dtype"] == "uint32" and same, data.meta["dtype"]
    return f"vocabularies of 256 to {many.vocab_size:,}", "ids and text survive"


def test_data_refuses_damage():
    """Every kind of damage to a prepared dataset is refused in one line that names the file."""
    def change(folder, **changes):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def cut(folder, size):
        os.truncate(folder / "train_0001.bin", size)

    damage = [
        (lambda f: (f / "meta.json").unlink(), "no dataset", "data/text/prepare.py"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json", "damaged"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json", "damaged"),
        (lambda f: change(f, splits={"train": {}}), "meta.json", "damaged"),
        (lambda f: change(f, splits={"val": {"tokens": 9, "bytes": 9, "shards": []}}), "9 tokens"),
        (lambda f: change(f, tokenizer="bpe"), "meta.json", "bpe"),
        (lambda f: change(f, vocab_size=65), "meta.json", "vocab_size 65"),
        (lambda f: change(f, dtype="uint8"), "meta.json", "uint8"),
        (lambda f: change(f, dtype="float64"), "meta.json", "damaged"),
        (lambda f: (f / "train_0002.bin").unlink(), "train_0002.bin", "missing"),
        (lambda f: cut(f, 0), "train_0001.bin", "0 bytes"),
        (lambda f: cut(f, 10_000), "train_0001.bin", "10000 bytes"),
        (lambda f: cut(f, 19_999), "train_0001.bin", "19999 bytes"),
        (lambda f: cut(f, 30_000), "train_0001.bin", "30000 bytes"),
        (lambda f: (f / "val.bin").write_bytes(b"\xff\xff" * 500), "val.bin", "65535"),
    ]
    with data_root() as root:
        tokenizer = dataset.CharTokenizer("".join(map(chr, range(300))))
        for harm, *words in damage:
            small_dataset(root / "mine", tokenizer=tokenizer)
            dataset.load_dataset("mine", 500)
            harm(root / "mine")
            refused(lambda: dataset.load_dataset("mine"), *words)
        small_dataset(root / "mine")
        refused(lambda: dataset.load_dataset("mine", 501), "val", "500 tokens", "501")
        refused(lambda: dataset.load_dataset("fineweb_edu"), "python data/fineweb_edu", "400 MB")
    return f"{len(damage) + 2} refused", f"{len(damage) + 2}"


def test_data_cuts():
    """Text cut by safe_cut has the pieces of GPT-2's pattern that the whole text has."""
    import regex  # tiktoken requires it
    from tiktoken_ext.openai_public import r50k_pat_str
    cut_at, split = prepare_module("text").safe_cut, regex.compile(r50k_pat_str).findall
    r, wrong, naive_wrong, trials = random.Random(0), 0, 0, 4000
    for _ in range(trials):
        text = "".join(r.choices("ab'sll19.,木。é  \n\n\t\r\u00a0\u3000\u2003", k=40))
        data = text.encode()
        at, whole = cut_at(data), split(text)
        if any(data[i] in b" \n\t\r" and data[i - 1] in b"ab'sll19.," for i in range(1, len(data))):
            wrong += split(data[:at].decode()) + split(data[at:].decode()) != whole
        middle = len(text) // 2
        naive_wrong += split(text[:middle]) + split(text[middle:]) != whole
    assert wrong == 0 and naive_wrong > trials // 4, f"{wrong} wrong, cut in half {naive_wrong}"
    long = ("木" * 50).encode()
    assert long[cut_at(long):].decode() == "木", "cut inside a character"
    return f"{wrong} of {trials} differ (cut in half: {naive_wrong})", "0"


def test_data_text():
    """Folders, .gz and .xz; documents, separators and bytes counted; twice the same bytes."""
    module = prepare_module("text")
    module.CHUNK = 1000  # many pieces from little text
    texts = {"a.txt": prose(3000, 1), "b/c.txt": "木 é\n".encode() * 300, "empty.txt": b"",
             "d.txt.gz": prose(5000, 2), "e.txt.xz": prose(900, 3), ".hidden": b"\0",
             "f.md": prose(2000, 4)}
    with data_root() as root, tempfile.TemporaryDirectory() as source:
        for name, content in texts.items():
            pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], lambda b: b)
            path = Path(source, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pack(content))
        whole = sum(map(len, texts.values())) - 1
        for tokenizer in ("byte", "char"):
            error = prepare(module, f"--input={source}", f"--name={tokenizer}",
                            f"--tokenizer={tokenizer}")
            assert error is None, error
        data, byte = dataset.load_dataset("byte"), dataset.ByteTokenizer()
        documents = []
        for split in map(data.split, ("train", "val")):
            ids = split.window([0], len(split))[0]
            documents += bytes(ids.astype(np.uint8)).split(bytes([byte.eot]))
        expected = sorted(v for k, v in texts.items() if v and k != ".hidden")
        assert sorted(documents) == expected, "the documents differ from the files"
        n_bytes = sum(data.split(s).bytes for s in ("train", "val"))
        assert n_bytes == whole, f"{n_bytes} bytes of text counted, {whole} given"
        share = data.split("val").bytes / whole
        assert 0.02 < share <= 0.1, f"validation has {share:.3f} of the text"
        assert set(dataset.load_dataset("char").meta["chars"]) == set(b"".join(expected).decode())

        first = folder_digest(root / "byte")
        module.CHUNK = 7777
        assert "already" in (prepare(module, "--input", source, "--name=byte") or "")
        assert prepare(module, "--input", source, "--name=byte", "--overwrite") is None
        assert folder_digest(root / "byte") == first, "the second run wrote other bytes"

        one = Path(source, "b/c.txt")  # one document: its tail, cut between characters
        assert prepare(module, f"--input={one}", "--name=one", "--val=0.3") is None
        data = dataset.load_dataset("one")
        parts = [data.tokenizer.decode(s.window([0], len(s))[0]) for s in data.splits.values()]
        assert "".join(parts).encode() == texts["b/c.txt"], "the split lost text"
        tail = data.split("val").bytes
        assert abs(tail - 0.3 * 2100) < 4, f"tail of {tail} bytes of 2100"

        Path(source, "a.txt").write_bytes(b"one<|endoftext|>two " * 50)
        for option, separators, n_bytes_train in ((["--special"], 45, 315), ([], 0, 900)):
            error = prepare(module, f"--input={source}/a.txt", "--name=special", *option,
                            "--overwrite")
            train = dataset.load_dataset("special").split("train")
            found = int((train.window([0], len(train)) == byte.eot).sum()), train.bytes
            assert error is None and found == (separators, n_bytes_train), (error, found)
    return f"{len(expected)} documents, {n_bytes:,} bytes, val {share:.3f}", f"{whole:,}, <= 0.1"


def test_data_bad_input():
    """A user's mistake ends in one line with the remedy and exit code 1, and leaves nothing."""
    module, cases = prepare_module("text"), 0
    files = {"png": b"\x89PNG\r\n\x1a\n\0\0\0", "latin": b"caf\xe9 au lait", "empty": b"",
             "utf16": "hello".encode("utf-16"), "letter": b"x", "bad.gz": b"no gzip",
             "ok": b"text " * 99, "cut.xz": lzma.compress(prose(9000))[:-30],
             "late": b"a " * 400_000 + b"\xff"}
    wrong = [("--input={png}", "png", "binary", "byte 8"), ("--input={latin}", "0xe9", "byte 3"),
             ("--input={late}", "0xff", "byte 800000"), ("--input={empty}", "empty"),
             ("--input={utf16}", "UTF-16", "iconv"), ("--input={letter}", "more text"),
             ("--input={bad.gz}", "bad.gz", "damaged"), ("--input={cut.xz}", "damaged"),
             ("--input={nowhere}", "nowhere", "not exist"), ("--input={ok} --val=2", "--val"),
             ("--input={ok} --name=../x", "../x"), ("--input={ok} --name=enwik8", "enwik8"),
             ("--input={ok} --tokenizer=bpe", "bpe"), ("--inptu={ok}", "--inptu"),
             ("--bpe_dir={nowhere}", "vocab.bpe"), ("--val=0.1", "--input")]
    with data_root() as root, tempfile.TemporaryDirectory() as source:
        for name, content in files.items():
            Path(source, name).write_bytes(content)
        for options, *words in wrong:
            given = options.replace("{", source + "/").replace("}", "").split()
            line = prepare(module, "--name=mine", *given) or "nothing"
            assert line.startswith("error: ") and "\n" not in line, f"{options}: {line}"
            assert all(w in line for w in words), f"{words} not in: {line}"
            cases += 1
        assert list(root.iterdir()) == [], f"left behind: {list(root.iterdir())}"
        done = subprocess.run(text_command(f"--input={source}/png", "--name=mine"),
                              capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, (done.returncode, done.stderr)
        with dataset.DatasetWriter(root / "mine", dataset.ByteTokenizer(), "test"):
            assert "another process" in prepare(module, f"--input={source}/ok", "--name=mine")
    return f"{cases + 2} refused in one line", f"{cases + 2}"


def test_data_killed():
    """Killed midway, prepare leaves nothing that load_dataset accepts; the next run works."""
    with data_root() as root, tempfile.TemporaryDirectory() as source:
        file = Path(source, "text")
        file.write_bytes(prose(40_000_000))
        command = text_command(f"--input={file}", "--name=mine", "--tokenizer=char")
        kills, half_files = 0, 0
        for delay in (0.1, 0.04, 0.0):
            shutil.rmtree(root / "mine", ignore_errors=True)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while process.poll() is None and not list(root.glob("mine/*.bin*")):
                time.sleep(0.002)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                kills += 1
                half_files += len(list(root.glob("mine/*.bin*")))
                refused(lambda: dataset.load_dataset("mine"), "no dataset")
        assert kills and half_files, f"{kills} kills left {half_files} files: too late to test"
        subprocess.run([*command, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
        data, names = dataset.load_dataset("mine"), sorted(p.name for p in root.glob("mine/*"))
        assert sum(map(len, data.splits.values())) == 40_000_000
        assert names == ["meta.json", "train.bin", "val.bin"], names
    return f"{kills} kills, {half_files} half files, none accepted", "0 accepted"


def test_data_memory():
    """Peak memory does not grow with the input."""
    if not Path("/proc/self/status").exists():
        raise Skip("peak memory is read from /proc")  # ru_maxrss counts the parent's as well
    code = ("import runpy, sys; sys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])")
    with data_root(), tempfile.TemporaryDirectory() as source:
        peaks = []
        for size in (10_000_000, 80_000_000):
            file = Path(source, "text")
            file.write_bytes(prose(size))
            run = subprocess.run(
                [sys.executable, "-c", code, *text_command(f"--input={file}", "--name=mine",
                                                           "--overwrite")[1:]],
                capture_output=True, text=True, check=True)
            peaks.append(int(run.stdout.split()[-1]) * 1024 / 1e6)
    growth = peaks[1] - peaks[0]
    assert growth < 20 and peaks[1] < 1000, f"peaks of {peaks} MB"
    return f"{peaks[0]:.0f} MB at 10 MB, {peaks[1]:.0f} MB at 80 MB", "growth < 20 MB"


def test_data_fineweb():
    """Shards and targets; a run that breaks off and goes on writes what an unbroken one does."""
    module, byte = prepare_module("fineweb_edu"), dataset.ByteTokenizer()
    text = prose(900_000).decode()
    texts = [text[i * 400:][:100 + 7 * (i % 90)] for i in range(2000)]
    targets, options = {"val": 20_000, "train": 500_000}, {"overwrite": True, "resume": True,
                                                           "shard_tokens": 100_000}

    def breaks(after):
        yield from texts[:after]
        raise DataError("the stream ended early")

    with data_root() as root, tempfile.TemporaryDirectory() as source:
        for name in ("whole", "resumed"):
            for after in ([] if name == "whole" else [500, 1100]):
                with contextlib.suppress(DataError), \
                        dataset.DatasetWriter(root / "x", byte, "s", **options) as writer:
                    rest = itertools.islice(breaks(after), writer.state.get("documents", 0), None)
                    module.tokenize(rest, writer, targets)
                refused(lambda: dataset.load_dataset("x"), "no dataset")
            with dataset.DatasetWriter(root / "x", byte, "s", **options) as writer:
                skipped = writer.state.get("documents", 0)
                module.tokenize(itertools.islice(texts, skipped, None), writer, targets)
                writer.finish()
            (root / "x").rename(root / name)
        assert skipped > 500, f"only {skipped} documents were remembered"
        digests = [folder_digest(root / name) for name in ("whole", "resumed")]
        assert digests[0] == digests[1], "the resumed run wrote other bytes"
        data = dataset.load_dataset("whole")
        val, train = data.split("val"), data.split("train")
        sizes = len(val), len(train)
        assert 20_000 <= sizes[0] < 60_000 and 500_000 <= sizes[1] < 540_000, sizes
        ids = np.concatenate([val.window([0], len(val))[0], train.window([0], len(train))[0]])
        documents = byte.decode(ids).split(dataset.EOT_TEXT)
        assert documents == ["", *texts[:len(documents) - 1]], "the documents differ"

        path = Path(source, "a.jsonl.gz")
        path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n"
                                               for t in texts[:9]).encode()))
        assert list(module.read_files([path])) == texts[:9]
        for line in ("{}", "[]", "no json", '{"text": 3}'):
            Path(source, "b.jsonl").write_text(line)
            refused(lambda: list(module.read_files([Path(source, "b.jsonl")])), "b.jsonl")
    return f"{len(train.shards)} shards, resumed after {skipped} documents", "identical bytes"


def test_data_enwik8():
    """enwik8 plain, .gz and .zip are the same bytes; anything else is refused. (Small stand-in.)"""
    module, content = prepare_module("enwik8"), prose(100_000)
    module.SHA256 = hashlib.sha256(content).hexdigest()
    module.SPLITS = {"train": 90_000, "val": 5_000, "test": 5_000}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("enwik8", content)
    with data_root() as root, tempfile.TemporaryDirectory() as source:
        path, digests = Path(source, "input"), set()
        for given in (content, gzip.compress(content), packed.getvalue()):
            path.write_bytes(given)
            error = prepare(module, f"--input={path}")
            assert error is None, error
            digests.add(folder_digest(root / "enwik8"))
        data = dataset.load_dataset("enwik8")
        sizes = {name: len(split) for name, split in data.splits.items()}
        assert len(digests) == 1 and sizes == module.SPLITS, (digests, sizes)
        text = b"".join((root / f"enwik8/{s}.bin").read_bytes() for s in sizes)
        assert text == content and data.tokenizer.eot is None, "other bytes"
        for given in (content[:-1], gzip.compress(content)[:-9], packed.getvalue()[:-9], b""):
            path.write_bytes(given)
            line = prepare(module, f"--input={path}") or "nothing"
            assert line.startswith("error: ") and "\n" not in line, line
    return f"{sizes}", "90/5/5, 4 damaged inputs refused"


def test_data_parallel_map():
    """In order, also from an endless source, of which little is taken ahead."""
    taken = itertools.count()
    results = dataset.parallel_map(lambda i: (time.sleep(0.001 * (i % 3)), i)[1],
                                   (next(taken) for _ in itertools.count()))
    assert list(itertools.islice(results, 50)) == list(range(50)), "out of order"
    results.close()
    ahead, allowed = next(taken) - 50, 2 * (os.cpu_count() or 1) + 1
    assert ahead <= allowed, f"{ahead} items taken ahead, allowed {allowed}"
    return f"{ahead} items ahead", f"<= {allowed}"


def test_data_gpt2_known_answer():
    """GPT-2 tokens: tiny Shakespeare 338,025, split 301,966 / 36,059; our val split 164,984."""
    tokenizer, text = gpt2_or_skip(), prepare_module("shakespeare").read_text()
    tail = text[int(0.9 * len(text)):]
    counts, known = [len(tokenizer.encode(tail))], [164_984]
    ids = tokenizer.encode(tail[:2000] + " <|endoftext|> 木😀")
    assert tokenizer.eot not in ids and tokenizer.decode(ids).endswith(" <|endoftext|> 木😀")
    assert "\ufffd" in {tokenizer.token_text(i) for i in ids}, "half a character displays"
    with contextlib.suppress(DataError):
        data = dataset.load_dataset("shakespeare_char")
        parts = [data.tokenizer.decode(s.window([0], len(s))[0]) for s in data.splits.values()]
        counts += [len(tokenizer.encode(t)) for t in (*parts, "".join(parts))]
        known += [301_966, 36_059, 338_025]
    assert counts == known, f"{counts}, known {known}"
    return f"{counts} tokens", f"{known}"


def gpt2_or_skip():
    """The GPT-2 tokenizer, if its files are on this machine (the tests use no network)."""
    caches = [os.environ.get("TIKTOKEN_CACHE_DIR"), os.environ.get("DATA_GYM_CACHE_DIR"),
              dataset.data_root() / ".tiktoken", Path(tempfile.gettempdir(), "data-gym-cache")]
    for cache in filter(None, caches):
        if all(Path(cache, key).exists() for _, key, _ in dataset.GPT2Tokenizer.files):
            return dataset.GPT2Tokenizer()
    raise Skip("GPT-2's vocabulary is not here: python data/text/prepare.py --bpe_dir=FOLDER")


# ---- the measuring stick -------------------------------------------------------------------------


def small(S=3, nb=4, **shape):
    """A tiny model for eval.py's functions, S tokens a block and nb blocks a window."""
    shape = {"vocab_size": 5, "n_embd": 16, "n_head": 2, "std": 0.5, **shape}
    return tiny_model(seq_len=S * nb, block_size=S, **shape)


@torch.no_grad()
def conditionals(net, x0):
    """table[A] (B, nb, S): log p of every token of a block whose places A are masked, the places as
    a frozenset; one pass of a single stream for each block and set."""
    c, table = net.config, {}
    for mask in every_mask(c.block_size):
        rows = []
        for a in range(0, x0.shape[1], c.block_size):
            block = x0[:, a : a + c.block_size]
            noisy = torch.cat([x0[:, :a], block.masked_fill(mask, c.mask_id)], dim=1)
            logp = net(noisy)[:, a:].double().log_softmax(-1)
            rows.append(logp.gather(-1, block[..., None])[..., 0])
        table[frozenset(mask.nonzero()[:, 0].tolist())] = torch.stack(rows, dim=1)
    return table


def along(table, order):
    """log p (B, nb) of blocks revealed in this order: a product of conditionals, one by one."""
    return sum(table[frozenset(order[j:])][..., place] for j, place in enumerate(order))


def test_eval_exact_equals_all_orders():
    """The subset recursion against a sum over all 24 orders, the chain against the order 0, 1, 2,
    3, the bound against the other enumeration; and the bound is never below the likelihood."""
    net = small(S=4, nb=3)
    x0 = tokens_for(net, batch=4)
    bound, order, chain = evaluation.score_exact(net, x0, batch=3)
    table = conditionals(net, x0)
    orders = torch.stack([along(table, o) for o in itertools.permutations(range(4))])
    truth = -(orders.logsumexp(dim=0) - math.log(24)).mean(dim=1) / 4
    worst = diff(order, truth)
    by_hand = -along(table, range(4)).mean(dim=1) / 4
    worst = max(worst, diff(chain, by_hand), diff(evaluation.score_chain(net, x0), by_hand))
    worst = max(worst, abs(bound.mean().item() - exact_bound(net, x0)[0]))
    gap = (bound - order).min().item()
    assert gap > 1e-3, f"the bound lies {gap} above the likelihood"
    assert diff(order, chain) > 1e-3, "the orders are too alike to test"
    return within(worst, 2e-6, f"24 orders, looseness {gap:.3f} or more, max|diff|")


def test_eval_probabilities_sum_to_1():
    """Over all sequences of a tiny vocabulary: chain, random order, and the AR twin's NLL."""
    net = small(S=3, nb=2, vocab_size=3)
    ar = small(S=1, nb=6, vocab_size=3, objective="ar")
    x0 = torch.tensor(list(itertools.product(range(3), repeat=6)))
    bound, order, chain = evaluation.score_exact(net, x0, batch=243)
    twin = evaluation.score_chain(ar, x0, batch=243)
    sums = [(-6 * nll).exp().sum().item() for nll in (bound, order, chain, twin)]
    assert sums[0] < 0.999, f"a bound's sum must fall short of 1: {sums[0]}"
    return within(max(abs(x - 1) for x in sums[1:]), 1e-5, f"{len(x0)} sequences, |sum - 1|")


def test_eval_noise_error():
    """The estimate against the exact bound: within 3 standard errors, which cover it as often as
    they should, and shrink as 1 / sqrt(draws)."""
    net = small(S=3, nb=4, n_layer=1)
    x0 = torch.randint(5, (35, 12), generator=generator(4))  # groups of 3, and 2 left over
    exact = evaluation.score_exact(net, x0)[0].mean().item()
    errors, off = [], []
    for seed in range(120):
        loss, k = evaluation.score_noise(net, x0, 2, 1000 * seed, batch=35)
        assert (k.min(), k.max()) == (1, 3)
        errors.append(evaluation.noise_error(loss.mean(dim=2), 3))
        off.append((loss.mean().item() - exact) / errors[-1])
    covered = np.mean(np.abs(off) < 2)
    assert 0.85 < covered < 0.99, f"2 errors cover {covered:.1%} of 120 estimates"
    # their squares are unbiased: the mean square error of the estimates is what they say
    said, true = np.mean(np.square(errors)), np.mean(np.square(np.multiply(off, errors)))
    assert 0.7 < true / said < 1.4, f"squared error {true:.2e}, said {said:.2e}"
    many = evaluation.noise_error(
        evaluation.score_noise(net, x0, 32, 7, batch=35)[0].mean(dim=2), 3
    )
    ratio = many / math.sqrt(said) * math.sqrt(32 / 2)
    assert 0.7 < ratio < 1.4, f"not 1 / sqrt(draws): {ratio:.2f}"
    assert math.isnan(evaluation.noise_error(torch.ones(1, 8).double(), 2))
    # one block a window, S = 4: groups of 4 windows hold every k once, so their mean has no error
    k = torch.stack([balanced_counts(40, 1, 4, i)[:, 0] for i in (1, 2)])
    assert evaluation.noise_error(k.double(), 4) < 1e-9 < evaluation.noise_error(k.double(), 1)
    return within(abs(off[0]), 3, f"2 errors cover {covered:.0%}; std errors off")


def test_eval_regression():
    """A mean from some windows with the help of another figure known on all: it lies within two of
    its errors as often as it should, closer than without help, and is exact in the limits."""
    x = torch.randn(300, generator=generator(1), dtype=torch.float64)
    y = 2 + 0.7 * x + 0.3 * torch.randn(300, generator=generator(2), dtype=torch.float64)
    off, bare = [], []
    for seed in range(400):
        some = evaluation.some_of(300, 40, seed)
        assert len(set(some.tolist())) == 40 and (some.diff() > 0).all()
        mean, error = evaluation.by_regression(y[some], x[some], x)
        off.append((mean - y.mean().item()) / error)
        bare.append((y[some].mean() - y.mean()).item() / error)
    covered, spread = np.mean(np.abs(off) < 2), np.std(off)
    assert 0.9 < covered < 0.99 and 0.85 < spread < 1.2, (covered, spread)
    assert np.std(bare) > 2 * spread, "no help"
    mean, error = evaluation.by_regression(y, x, x)
    assert (mean, error) == (y.mean().item(), 0.0)
    some = evaluation.some_of(300, 3, 0)
    mean, error = evaluation.by_regression(x[some], x[some], x)  # the same figure: known exactly
    assert abs(mean - x.mean().item()) < 1e-12 and error < 1e-12
    assert evaluation.some_of(300, 0, 0).tolist() == list(range(300))
    for n in (25, 100, 225):
        wanted = np.std(y[:n].numpy(), ddof=1) / math.sqrt(n)
        assert abs(evaluation.window_error(y[:n]) - wanted) < 1e-12
    return f"2 errors cover {covered:.0%} of 400, spread of deviations {spread:.2f}, allowed 1.2"


def test_eval_chain_is_the_sampler():
    """K = S, left to right: the sampler's own probabilities, read off its cached passes, are the
    chain likelihood of what it wrote; of the AR twin the NLL. At S = 1 the bound is the chain."""
    worst = 0.0
    for shape in ({**GQA}, {**MHA, "block_size": 8}, {**MHA, "block_size": 1}, {**AR}):
        net = tiny_model(**shape)
        log, last = passes(net, [[], [], []], 32, rule="left_to_right", seed=5)
        logp = torch.zeros(3, dtype=torch.float64)
        for record in log:
            each = record.logits.double().log_softmax(-1)
            each = each.gather(-1, record.step.block.clamp(max=10)[..., None])[..., 0]
            logp += (each * record.step.revealed).sum(dim=1)
        x0 = torch.tensor(last.rows())
        worst = max(worst, diff(evaluation.score_chain(net, x0, batch=2), -logp / 32))
        if net.config.block_size == 1 and net.config.objective == "diffusion":
            loss, _ = evaluation.score_noise(net, x0, 2, 0)
            one = diff(loss.mean(dim=2), (-logp / 32).expand(2, 3))
    assert one < 2e-6, f"S = 1: bound and chain differ by {one}"
    return within(worst, 2e-6)


def test_eval_batch_and_order():
    """The batch size and the order of windows change nothing beyond rounding."""
    net, ar = small(), small(S=1, nb=12, objective="ar")
    x0 = torch.randint(5, (14, 12), generator=generator(1))
    order = torch.randperm(14, generator=generator(2))
    worst = 0.0
    for batch in (1, 5, 14):
        loss, k = evaluation.score_noise(net, x0, 2, 3, batch=batch)
        again, same = evaluation.score_noise(net, x0, 2, 3, batch=7)
        assert (k == same).all()
        worst = max(worst, diff(loss, again))
        mask = corrupt.corrupt_all_blocks(x0, 3, 5, generator(3)).mask
        one = evaluation.score(net, x0, mask, batch=batch)
        assert ((one != 0) == mask).all()
        worst = max(worst, diff(evaluation.score(net, x0[order], mask[order]), one[order]))
        for model in (net, ar):
            chain = evaluation.score_chain(model, x0, batch=batch)
            worst = max(worst, diff(evaluation.score_chain(model, x0[order]), chain[order]))
    for a, b in zip(evaluation.score_exact(net, x0, batch=5),
                    evaluation.score_exact(net, x0[order]), strict=True):
        worst = max(worst, diff(b, a[order]))
    return within(worst, 2e-6)


def test_eval_judge():
    """The judge on text longer and shorter than its context, token by token; entropy, repetition
    and bits per byte of known text."""
    net = small(S=1, nb=6, objective="ar")
    context, worst = 6, 0.0
    for n in (4, 6, 7, 16):
        text = torch.randint(5, (20, n), generator=generator(n))
        total = torch.zeros(20, dtype=torch.float64)
        for i in range(n):  # the first window whole; then half a context is kept, half is new
            first = 0 if i < context else (i - context) // 3 * 3 + 3
            start = torch.full((20, 1), 5)
            with torch.no_grad():
                logits = net(torch.cat([start, text[:, first:i]], dim=1))[:, -1]
            total -= logits.double().log_softmax(-1).gather(1, text[:, i : i + 1])[:, 0]
        nll, tokens = judges.autoregressive_judge(net, batch=7)(text)
        assert (tokens == n).all()
        worst = max(worst, diff(nll, total))
    known = torch.tensor([[0, 1, 0, 1, 0, 1], [2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5]])
    assert abs(judges.token_entropy(known) - (math.log(2) + 0 + math.log(6)) / 3) < 1e-12
    assert abs(judges.repetition(known) - (1 / 3 + 2 / 3 + 0) / 3) < 1e-12  # of 3 four-grams
    assert abs(judges.repetition(known[:1], n=2) - 3 / 5) < 1e-12
    assert math.isnan(judges.repetition(known[:, :3]))
    fixed = lambda text: (torch.tensor([6.0, 9.0, 3.0]), torch.tensor([3, 4, 2]))  # noqa: E731
    said = judges.judged(fixed, known, CharTokenizer("abc\xe9fg"))  # \xe9 is two bytes
    assert abs(said["judge_nll"] - 2) < 1e-12
    assert abs(said["judge_bits_per_byte"] - 18 / math.log(2) / 19) < 1e-12
    wanted = np.std([0, 1, -1], ddof=1) / math.sqrt(3) / 3
    assert abs(said["judge_error"] - wanted) < 1e-12
    return within(worst, 1e-5)


def test_eval_hugging_face_judge():
    """A local GPT-2 of random weights and its own vocabulary, against a loop over its tokens."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    except ImportError as e:
        raise Skip(f"needs transformers ({e}): pip install transformers") from None
    text = 1 + torch.randint(3, (2, 12), generator=generator(1))
    mine = CharTokenizer("\nabc")
    # its progress bars on stderr are not this test's
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        words = Tokenizer(models.WordLevel({"<s>": 0, "c": 1, "a": 2, "b": 3}, unk_token="<s>"))
        words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        torch.manual_seed(0)
        net = GPT2LMHeadModel(GPT2Config(
            vocab_size=4, n_positions=8, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5,
            bos_token_id=0, eos_token_id=0,
        )).eval()
        worst = 0.0
        for begin in ("<s>", None):
            PreTrainedTokenizerFast(
                tokenizer_object=words, bos_token=begin
            ).save_pretrained(folder)
            net.save_pretrained(folder)
            nll, tokens = judges.hugging_face_judge(folder, mine, "cpu")(text)
            to = {1: 2, 2: 3, 3: 1}  # ids of a, b, c there
            for row, said, count in zip(text.tolist(), nll.tolist(), tokens.tolist(), strict=True):
                ids = [0] * (begin is not None) + [to[i] for i in row]
                total = 0.0
                for i in range(1, len(ids)):  # windows of 8, each later one 4 on
                    first = 0 if i < 8 else (i - 8) // 4 * 4 + 4
                    with torch.no_grad():
                        logits = net(torch.tensor([ids[first:i]])).logits[0, -1]
                    total -= logits.double().log_softmax(-1)[ids[i]].item()
                assert count == len(ids) - 1
                worst = max(worst, abs(said - total))
        (Path(folder) / "config.json").write_text("{}")
        with raises(configurator.SettingsError):
            judges.hugging_face_judge(folder, mine, "cpu")
    return within(worst, 1e-5)


@contextlib.contextmanager
def evaluated():
    """A folder with data and three runs: S4, its autoregressive twin "ar", a judge "seed2"."""
    with data_folder() as folder:
        for name, settings in (
            ("S4", {}), ("ar", {"objective": "ar", "block_size": 1}),
            ("seed2", {"objective": "ar", "block_size": 1, "seed": 2}),
        ):
            train_tiny(folder, max_steps=4, out_dir=f"{folder}/{name}", **settings)
        yield folder


def eval_json(*argv):
    """The JSON object that `eval.py ... --json=true` prints, and nothing else with it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert evaluation.main([*argv, "--json=true"]) == 0
    assert out.getvalue().count("\n") == 1
    return json.loads(out.getvalue(), parse_constant=lambda word: 1 / 0)


def test_eval_command():
    """The three jobs as a user runs them: printed, as JSON and as CSV, with the same figures."""
    with evaluated() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        S4, table = f"--out_dir={folder}/S4", Path(folder, "new", "table.csv")
        assert evaluation.main([S4, "--draws=2", "--chain_windows=20", f"--csv={table}"]) == 0
        assert evaluation.main([f"--out_dir={folder}/ar", f"--csv={table}"]) == 0
        said = out.getvalue()
        row = eval_json(S4, "--draws=2", "--chain_windows=20", "--batch=3")["rows"][0]
        bits = row["bound"] / math.log(2)
        for part in (f"<= {row['bound']:.4f} +- {row['bound_error']:.4f} nats", f"<= {bits:.4f} b",
                     f"= {row['chain']:.4f} +- {row['chain_error']:.4f} nats", "NLL ",
                     f"(noise alone {row['bound_noise']:.4f})", "62 of 62 windows of 16 tokens",
                     "the tail of 8 is left out", "\n        4  "):
            assert part in said, (part, said)
        chart = [float(x.split()[1]) for x in said.splitlines() if re.match(r" +[1-4]  \d", x)]
        assert np.allclose(chart, row["by_k"], atol=6e-4), (chart, row["by_k"])
        assert abs(np.mean(chart) - row["bound"]) < 0.01  # every k equally often
        head, first, second = (line.split(",") for line in table.read_text().splitlines())
        first, second = dict(zip(head, first, strict=True)), dict(zip(head, second, strict=True))
        assert abs(float(first["bound"]) - row["bound"]) < 1e-5 and second["bound"] == "nan"
        net, _ = checkpoint.load_model(f"{folder}/ar")
        split = dataset.load_dataset(folder).split("val")
        x0 = torch.from_numpy(split.window(np.arange(62) * 16, 16))
        with torch.no_grad():
            nll = F.cross_entropy(net.ar_logits(x0).mT, x0).item()
        assert abs(float(second["chain"]) - nll) < 1e-5, (second, nll)
        full = eval_json(S4, "--chain_windows=0")["rows"][0]
        assert full["chain_noise"] == 0 and full["bound_noise"] is None
        off = abs(row["chain"] - full["chain"]) / row["chain_noise"]
        exact = eval_json(S4, "--exact=true", "--exact_windows=20")["rows"][0]
        assert exact["windows"] == 20 and exact["bound"] > exact["random_order"]
        assert abs(exact["estimate"] - exact["bound"]) < 4 * exact["estimate_noise"]
        argv = [S4, "--samples=true", f"--judge={folder}/seed2", "--num_samples=3",
                "--temperature=0", "--sample_tokens=30",
                "--rows=left_to_right:4,confidence:1,threshold:0.3,entropy:1"]
        rows = eval_json(*argv)["rows"]
        assert evaluation.main(argv) == 0 and f"{rows[2]['judge_nll']:.3f} +- " in out.getvalue()
        assert [r["rule"] for r in rows] == [
            "held-out text", "left_to_right", "confidence", "threshold", "entropy"]
        net, _ = checkpoint.load_model(f"{folder}/S4")
        for r, o in zip(rows[1:], ({}, {"steps": 1}, {"tau": 0.3}, {"gamma": 1.0}), strict=True):
            *_, one = sample.generate_stream(net, [[]], 30, rule=r["rule"], temperature=0, **o)
            assert r["nfe_per_token"] == one.nfe / 30, (r, one.nfe)  # greedy rows are alike
            assert abs(r["entropy"] - judges.token_entropy(torch.tensor(one.rows()))) < 1e-9
        judge = judges.autoregressive_judge(checkpoint.load_model(f"{folder}/seed2")[0])
        text = torch.from_numpy(split.window(np.arange(3) * 33 // 3 * 30, 30))
        assert abs(rows[0]["judge_nll"] - judge(text)[0].sum().item() / 90) < 1e-9
    return within(off, 4, "three jobs; chain of 20 windows against all, std errors off")


def test_eval_refuses():
    """A mistake ends in one line that says what to do, and nothing is overwritten."""
    with evaluated() as folder:
        wide = tiny_model(seq_len=10, block_size=10, vocab_size=7)
        _, state = checkpoint.load_model(f"{folder}/S4")
        keep = {k: v for k, v in state.items() if k not in ("digest", "torch", "format")}
        change = [
            ("S10", {"config": asdict(wide.config), "model": wide.state_dict()}),
            ("long", {"config": {**state["config"], "seq_len": 4000}}),
            ("other", {"meta": {**state["meta"], "chars": "\nabcdeg"}}),
            ("orphan", {"settings": {}}),
        ]
        for name, new in change:
            Path(folder, name).mkdir()
            checkpoint.save_checkpoint(Path(folder, name, "last.pt"), {**keep, **new})
        _, twin = checkpoint.load_model(f"{folder}/ar")
        keep = {k: v for k, v in twin.items() if k not in ("digest", "torch", "format")}
        Path(folder, "foreign").mkdir()
        keep["meta"] = {**twin["meta"], "chars": "\nabcdeg"}
        checkpoint.save_checkpoint(Path(folder, "foreign", "last.pt"), keep)
        Path(folder, "held.csv").write_text("a,b\n1,2\n")
        Path(folder, "no_val").mkdir()
        meta = json.loads(Path(folder, "meta.json").read_text())
        meta["splits"]["val"] = {"tokens": 0, "bytes": 0, "shards": []}
        Path(folder, "no_val", "meta.json").write_text(json.dumps(meta))
        shutil.copy(folder / "train.bin", folder / "no_val")
        judge = ["--samples=true", "--num_samples=2", f"--judge={folder}/seed2"]
        cases = [
            ("S4", ["--exakt=true"], "did you mean exact"),
            ("S10", ["--exact=true", "--exact_windows=1"], "1,023", "chain"),
            ("ar", ["--exact=true"], "exact"),
            ("S4", ["--exact=true", "--samples=true"], "one at a time"),
            ("S4", ["--draws=0"], "--draws must be at least 1"),
            ("S4", ["--batch=0"], "--batch"), ("S4", ["--windows=-1"], "--windows"),
            ("S4", ["--chain_windows=2"], "3 or more"),
            ("S4", ["--split=test"], "no split 'test'"),
            ("S4", ["--dataset=nowhere"], "no dataset"),
            ("S4", [f"--dataset={folder}/no_val"], "val"),
            ("S4", ["--device=tpu"], "not on this machine"),
            ("long", [], "1000 tokens", "window of 4000"),
            ("other", [], "another vocabulary", "char, 7"),
            ("orphan", [], "give --dataset"), ("nowhere", [], "no checkpoint"),
            ("S4", ["--samples=true"], "needs --judge=DIR"),
            ("S4", ["--samples=true", f"--judge={folder}/S4"], "not autoregressive"),
            ("ar", ["--samples=true", f"--judge={folder}/ar"], "the model itself"),
            ("S4", ["--samples=true", f"--judge={folder}/foreign"], "another vocabulary"),
            ("S4", ["--samples=true", "--judge=hf:/no/such"], "transformers", "no such folder"),
            ("S4", [*judge, "--rows=random"], "rule:K"),
            ("S4", [*judge, "--rows=best:2"], "unknown rule 'best'"),
            ("S4", [*judge, "--rows=random:5"], "1..4"),
            ("S4", [*judge, "--sample_tokens=2000"], "1000 tokens"),
            ("S4", [f"--csv={folder}/held.csv", "--windows=3"], "other columns"),
            ("S4", [f"--csv={folder}", "--windows=3"], "cannot be written"),
        ]
        for name, argv, *words in cases:
            code, said = call_main(evaluation, [f"--out_dir={folder}/{name}", *argv])
            assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (argv, said)
            # of two remedies for --judge=hf the one that fits what is installed
            some = any if "hf:" in f"{argv}" else all
            assert some(word in said for word in words), (argv, said)
        assert Path(folder, "held.csv").read_text() == "a,b\n1,2\n"
        code, _, err = command("eval.py", "--out_dir=/no/such")
        assert code == 2 and err.count("\n") == 1, err
    return f"{len(cases) + 1} mistakes, one line each"


def test_plot():
    """plot.py on made-up tables, the same bytes twice; a wrong table is one line."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Skip("needs matplotlib: pip install matplotlib") from None
    with tempfile.TemporaryDirectory() as folder:
        one, two = f"{folder}/one.csv", f"{folder}/two.csv"
        head = "run,objective,block_size,seq_len,bound,bound_error,chain,chain_error\n"
        rows = [f"s{S},diffusion,{S},16,{2 + S / 20},0.01,{2 + S / 30},0.01\n" for S in (1, 4, 16)]
        Path(one).write_text(head + "".join(rows) + "ar,ar,1,16,nan,nan,1.9,0.01\n")
        head = "run,objective,block_size,rule,setting,nfe_per_token,judge_nll,judge_error\n"
        rows = [f"s4,diffusion,4,random,{K},{K / 4},{2 + 1 / K},0.01\n" for K in (1, 2, 4)]
        rows.append("s4,diffusion,4,held-out text,nan,nan,1.8,0.01\n")
        Path(two).write_text(head + "".join(rows))
        argv = [f"--likelihood={one}", f"--samples={two}", f"--out_dir={folder}/new"]
        pictures = []
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()):
                assert plot.main(argv) == 0
            pictures.append([Path(folder, "new", f"{n}.svg").read_text()
                             for n in ("likelihood", "samples")])
        assert pictures[0] == pictures[1], "not repeatable"
        for text, words in zip(pictures[0], (("bound (\u2264)", "autoregressive twin", "(whole)"),
                                             ("held-out text", "S = 4", "1/4")), strict=True):
            assert all(word in text for word in words), words
        Path(folder, "bad.csv").write_text("a,b\n1,2\n")
        Path(folder, "empty.csv").write_text(head)
        for wrong, word in (("missing", "No such file"), ("bad", "no table"), ("empty", "no rows")):
            code, said = call_main(plot, [*argv, f"--samples={folder}/{wrong}.csv"])
            assert code == 2 and word in said and said.count("\n") == 1, (wrong, code, said)
    return "two figures, the same twice; 3 wrong tables refused"


# ---- bench.py ------------------------------------------------------------------------------------

SMALL = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 11, "device": "cpu", "dtype": "float32",
}
SMALL_STEP = {**SMALL, "lengths": "16", "block_sizes": "4", "tokens_per_step": 64, "repeats": 2,
              "product": 64, "copy_mb": 1}


def bench_settings(name, **settings):
    """The resolved settings of one of bench.py's commands, small."""
    argv = [f"--{k}={v}" for k, v in settings.items()]
    return bench.settings_of(name, argv)[0]


def test_bench_plain_loss():
    """The plain two-stream step computes our loss and our gradients: same weights, same noise."""
    worst = {"loss": 0.0, "grad": 0.0}
    for shape in SHAPES:
        net = tiny_model(**shape)
        x0 = tokens_for(net)
        noisy, index = noisy_for(net, x0)
        found = []
        for loss in (train.Loss(net), bench.PlainLoss(net)):
            net.zero_grad()
            value = loss(15, x0, noisy.xt, noisy.weight, index)
            value.backward()
            found.append((value, [p.grad.clone() for p in net.parameters()]))
        (ours, grads), (plain, plain_grads) = found
        worst["loss"] = max(worst["loss"], diff(ours, plain) / ours.item())
        for g, p in zip(grads, plain_grads, strict=True):
            worst["grad"] = max(worst["grad"], diff(g, p) / max(1.0, p.abs().max().item()))
    assert worst["grad"] < 2e-5, worst
    return within(worst["loss"], 2e-6, f"grad {worst['grad']:.0e}; loss, relative difference")


def products_of(run):
    """torch's own count of the matrix products in one forward and backward pass of a Run's loss,
    attention's excepted."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run.loss(1, *run.batches(0)[0]).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "attention" not in str(op))


def test_bench_train():
    """A row of the table: finite figures, ratios that are ratios, FLOPs as torch counts them."""
    s = bench_settings("train", **SMALL_STEP, memory=False)
    N, S, C = 16, 4, 32
    row, profiles = bench.train_row(s, N, S)
    figures = {k: v for k, v in row.items() if not k.endswith("_memory")}
    assert all(math.isfinite(v) and v > 0 for v in figures.values()), row
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and not profiles, row
    assert row["batch"] == 4 and row["ours_memory"] is None, row
    for kind in ("ours", "gpt", "plain"):
        rate = row[f"{kind}_tokens_per_s"] * row[f"{kind}_ms"] / 1e3
        assert abs(rate - 64) < 1e-6, (kind, rate)
    entries = {"ours": 1.5 * N * (N + S), "gpt": N * (N + 1), "plain": 2 * (2 * N) ** 2}
    worst = 0.0
    with bench.random_data(s.vocab_size, N) as folder:
        for kind, visible in entries.items():
            products = products_of(bench.make_run(s, folder, kind, N, S))
            mine = row[f"{kind}_flops"] - 12 * C * 4 * visible
            worst = max(worst, abs(mine - products) / products)
    return within(worst, 1e-9, "matrix products, relative difference")


def test_bench_traffic():
    """Bytes counted are those that the operators read and write: by hand on known operators."""
    a, b, table = torch.zeros(30, 20), torch.zeros(20, 10), torch.zeros(500, 7)
    p = torch.nn.Parameter(torch.zeros(100))
    p.grad = torch.ones(100)
    adamw = torch.optim.AdamW([p], fused=True)
    adamw.step()
    cases = {
        "product": (lambda: a @ b, 4 * (600 + 200 + 300)),
        "view": (lambda: a.t().flatten(0, 0).view(20, 30), 0),
        "in place": (lambda: a.add_(a), 4 * 3 * 600),
        "broadcast": (lambda: torch.zeros(1).expand(600) + 1, 4 * (1 + 1 + 600)),
        "lookup": (lambda: torch.nn.functional.embedding(torch.arange(5), table), 2 * 4 * 35 + 40),
        # reads p, grad, two moments and the step's count; writes the same but grad and count
        "list": (lambda: torch._foreach_add_([a, b], 1.0), 2 * 4 * 800),
    }
    for name, (work, wanted) in cases.items():
        with bench.Traffic() as traffic:
            work()
        assert traffic.bytes == wanted, f"{name}: {traffic.bytes} bytes, by hand {wanted}"
    with bench.Traffic() as traffic:
        adamw.step()
    # reads p, grad and two moments, writes all four; the step's counter is a few bytes
    assert 0 <= traffic.bytes - 4 * 100 * 8 <= 64, traffic.bytes
    return f"{len(cases) + 1} operators, to the byte", "0 bytes off"


def test_bench_memory():
    """A fresh process's peak follows the tensors of the step, known here by their size."""
    if bench.resident("VmHWM") is None:
        raise Skip("peak memory is read from /proc")
    s = bench_settings("train", **{**SMALL_STEP, "vocab_size": 5000, "batch": 8})
    peak = bench.peak_memory(s, None, "plain", 64, 4) / 1e6
    logits = 4 * 8 * 64 * 5000 / 1e6  # float32: 10 MB, and at least once more for its gradient
    assert 2 * logits < peak < 8 * logits, f"{peak:.0f} MB with logits of {logits:.0f} MB"
    return f"{peak:.0f} MB with logits of {logits:.0f} MB", f"{2 * logits:.0f} to {8 * logits:.0f}"


def test_bench_profile():
    """Where the time goes: every part is named, none is negative, and shapes tell the head."""
    s = bench_settings("train", **SMALL_STEP)
    with bench.random_data(s.vocab_size, 16) as folder:
        parts = bench.where_time_goes(s, bench.make_run(s, folder, "ours", 16, 4))
    named = {p for p, _ in bench.PARTS} | {"Muon", "AdamW", "Python, autograd", "waiting for data"}
    assert set(parts) == named and min(parts.values()) >= 0, parts
    above = SimpleNamespace(name="Optimizer.step#Muon.step", cpu_parent=None)
    for name, shape, parent, part in (
        ("aten::mm", [[8, 32], [32, 11]], None, "head and loss"),
        ("aten::mm", [[8, 32], [32, 32]], None, "weight products"),
        ("aten::bmm", [], above, "Muon"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], None, "attention"),
        ("Region triton_tem_fused_flex_attention_0", [], None, "attention"),
        ("Region triton_red_fused__to_copy_mm_rms_norm_1", [], None, "norms, rotary, element-wise"),
        ("aten::copy_", [], None, "copies, casts"),
        ("autograd::engine::evaluate_function: MmBackward0", [], None, "Python, autograd"),
    ):
        event = SimpleNamespace(name=name, input_shapes=shape, cpu_parent=parent)
        found = bench.part_of(event, name, 11)
        assert found == part, f"{name}: {found}, not {part}"
    return f"{len(parts)} parts, {sum(parts.values()):.1f} ms a step"


def test_bench_gpu_list():
    """Each part of the GPU's list, run here in small; a late or failing part says so."""
    s = bench_settings("gpu", **SMALL, seq_len=16, block_size=4, tokens_per_step=64, repeats=1,
                       memory_lengths="8,16,24", batches="2", pairs="4:2", tokens=8, steps=3)
    rows = dict(bench.gpu_parity(s))
    assert len(rows) == 2 and all(f.startswith("PASS") for f in rows.values()), rows
    wrong = bench.attention_errors(
        lambda q, k, v: cascade.chunked_two_stream_attention(q, k, v, 2), torch.bfloat16,
        32, 4, 16, "cpu",
    )
    assert min(wrong) > 0.01, f"another block size passes: {wrong}"
    was = bench.TRAIN
    bench.TRAIN = {**was, "product": 64, "copy_mb": 1, "memory": False}
    try:
        rows |= dict(bench.gpu_train(s))
    finally:
        bench.TRAIN = was
    rows |= dict(bench.gpu_decode(s))
    with data_folder() as folder:
        tiny = [f"--{k}={v}" for k, v in {**TINY, "dataset": folder, "max_steps": 30}.items()]
        rows |= dict(bench.gpu_shakespeare(s, *tiny))
    assert len(rows) == 2 + 6 + 1 + 1 and not any("nan" in f for f in rows.values()), rows
    bound = rows[next(k for k in rows if "3 steps" in k)]
    assert bound.startswith("bound <= ") and "30 steps at this pace" in bound, bound

    was = bench.peak_memory
    try:
        bench.peak_memory = lambda s, run, kind, N, S: 2**20 * 3 + 2**10 * 7 * N
        memory = dict(bench.gpu_memory(s))
    finally:
        bench.peak_memory = was
    assert list(memory.values())[-1] == "7, 7 KiB", memory

    def broken(s):
        """A part that needs too much."""
        raise torch.OutOfMemoryError("too much")

    was = bench.GPU_LIST
    try:
        bench.GPU_LIST = (broken, bench.gpu_parity)
        said = [figure for _, figure in bench.gpu_table(s)]
        assert "out of memory: lower --tokens_per_step=64" in said[0], said
        assert len(said) == 4 and said[1].startswith("PASS"), said
        s.minutes = 0.0
        said = list(bench.gpu_table(s))
        assert [figure[:8] for _, figure in said[:-1]] == ["left out"] * 2, said
    finally:
        bench.GPU_LIST = was
    return f"{len(rows)} rows, {rows['step of ours / gpt']}"


def test_bench_commands():
    """JSON for machines, and every mistake in one line."""
    base = [f"--{k}={v}" for k, v in SMALL_STEP.items()]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bench.main(["train", *base, "--memory=false", "--traffic=false", "--plain=false",
                    "--lengths=16,32", "--block_sizes=4,N", "--repeats=1", "--json=true"])
    rows = json.loads(out.getvalue())["rows"]
    assert [(r["N"], r["S"], r["batch"]) for r in rows] == [(16, 4, 4), (16, 16, 4), (32, 4, 2),
                                                            (32, 32, 2)], rows
    assert all(r["ratio"] > 0 and "plain_ms" not in r for r in rows), rows
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bench.main(["decode", *[f"--{k}={v}" for k, v in SMALL.items()], "--seq_len=16",
                    "--tokens=8", "--batches=2", "--pairs=4:2", "--far=200", "--json=true"])
    row, = json.loads(out.getvalue())["rows"]
    assert row["ratio"] > 0 and row["tokens_per_pass"] == 2, row
    cases = [
        ([], "decode | train | gpu"), (["trian"], "decode | train | gpu"),
        (["train", "--tokens=3"], "unknown setting 'tokens'"),
        (["decode", "--lengths=3"], "unknown setting 'lengths'"),
        (["train", "--lengths=16,x"], "--lengths must be numbers"),
        (["train", "--block_sizes=0"], "--block_sizes must be numbers"),
        (["train", "--lengths=N"], "--lengths must be numbers"),
        (["train", "--lengths=256,10000"], "not a multiple of N = 10000"),
        (["train", "--repeats=0"], "at least 1"), (["train", "--n_head=5"], "not divisible"),
        (["train", "--optimizer=sgd"], "muon or adamw"), (["train", "--device=tpu"], "not on this"),
        (["decode", "--pairs=16"], "--pairs=16:4"), (["decode", "--batches=0"], "--batches must"),
    ]
    with raises(ValueError):  # before anything is measured
        bench.train_shapes(bench_settings("train", **{**SMALL_STEP, "block_sizes": "4,3"}))
    if not torch.cuda.is_available():
        cases.append((["gpu"], "no CUDA device here"))
    for argv, expected in cases:
        code, said = call_main(bench, argv)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (argv, said)
        assert expected in said, (argv, said)
    return f"{len(rows) + 1} rows, {len(cases) + 1} mistakes in one line each"


# ---- long runs -----------------------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")  # its children find these imported already
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.nn.attention.flex_attention"]
)


def train_body(argv, said, env, tamper):
    """In a process of its own: train.py's command line, with what it prints in the file `said`."""
    os.environ.update(env)
    with open(said, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    if tamper:
        tamper()
    sys.exit(train.main(argv))


def start(folder, said, tamper=None, env=None, **settings):
    """A started process that trains as train_tiny does; `tamper` is called in it first."""
    s = {**TINY, "dataset": folder, **settings}
    argv = [f"--{k}={v}" for k, v in s.items()]
    process = FORKS.Process(target=train_body, args=(argv, said, env or {}, tamper), daemon=True)
    process.start()
    return process


def start_two(folder, said, **settings):
    """Two gloo processes of one run, without torchrun; rank i prints to the file `said` + i."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(folder, f"{said}{i}", env={**group, "RANK": f"{i}", "LOCAL_RANK": f"{i}"}, **settings)
        for i in (0, 1)
    ]


def ended(process, said, limit=60.0):
    """(exit code, what it printed) of a process that must end within `limit` seconds."""
    process.join(limit)
    alive = process.is_alive()
    process.kill()
    text = Path(said).read_text() if Path(said).exists() else ""
    assert not alive, f"still running after {limit:.0f} s: {text[-300:]}"
    return process.exitcode, text


def wait_for_steps(process, said, count):
    """Until the process has reported `count` steps, or has ended."""
    while process.is_alive():
        if Path(said).exists() and Path(said).read_text().count("| loss") >= count:
            break
        time.sleep(0.002)


def die_in_save(nth, moment):
    """Have this process kill itself in its nth write of a checkpoint, at one of three moments."""
    count, save, replace = itertools.count(1), torch.save, os.replace

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def half_saved(state, f):
        if next(count) < nth:
            return save(state, f)
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        f.flush()
        die()

    def renamed(old, new):
        if next(count) < nth:
            return replace(old, new)
        if moment == "after":
            replace(old, new)
        die()

    if moment == "half":
        torch.save = half_saved
    else:
        os.replace = renamed


def survive(kills, steps):
    """One run, killed once per item of `kills` and resumed: it must end as if never killed.

    An item is (n, "half" | "before" | "after"): in the nth write of a checkpoint, with half of it
    written, before or after its rename. Or (n, x): n reported steps after the start, and x of a
    step's time later. Returns how many kills left a half-finished file behind.
    """
    settings = {"max_steps": steps, "eval_every": 2, "log_every": 1, "eval_windows": 2}
    torn = 0
    with data_folder() as folder:
        whole, _ = train_tiny(folder, **settings, out_dir=f"{folder}/a")
        a, b, last = Path(folder, "a"), Path(folder, "b"), Path(folder, "b/last.pt")
        for i, (n, moment) in enumerate(kills):
            said, inside, old = f"{folder}/said{i}", isinstance(moment, str), half_files(b)
            process = start(
                folder, said, functools.partial(die_in_save, n, moment) if inside else None,
                **settings, out_dir=b, overwrite=True,
                init_from="resume" if last.exists() else "scratch",
            )
            if not inside:
                wait_for_steps(process, said, n)
                time.sleep(moment * whole.seconds / steps)
                process.kill()
            code, text = ended(process, said)
            assert code == -signal.SIGKILL, (i, code, text[-300:])
            left = bool(half_files(b) - old)
            assert left == (moment in ("half", "before")) or not inside, (i, moment, left)
            torn += left
            # step N + 1 is reported after the save of step N, which is even
            seen = max(map(int, re.findall(r"^step +(\d+)/.*loss", text, re.M)), default=0)
            saved = 0
            for name in filter(lambda p: p.exists(), (last, b / "best.pt")):
                state = checkpoint.load_checkpoint(name)
                saved = max(saved, state["step"])
            assert saved >= (seen - 1) // 2 * 2, f"step {seen} reported, {saved} saved"
        train_tiny(folder, **settings, out_dir=b, overwrite=True,
                   init_from="resume" if last.exists() else "scratch")
        assert not half_files(b), "the half files of killed runs stay"
        states = [checkpoint.load_checkpoint(p / "last.pt") for p in (a, b)]
        for part in ("model", "optimizers", "final", "best", "best_step"):
            first, second = (checkpoint.digest(s[part]) for s in states)
            assert first == second, f"{part} differs"
        rows = [read_log(p / "log.csv") for p in (a, b)]
        for row in itertools.chain(*rows):
            del row["seconds"], row["tokens_per_second"]
        assert rows[0] == rows[1] and len(rows[0]) == steps, rows
    return torn


def half_files(folder):
    """The temporary files of saves in a folder, as a set of (name, time)."""
    return {(p.name, p.stat().st_mtime_ns) for p in folder.glob("*.tmp")}


def read_log(path):
    """The rows of a log.csv, as dicts of text."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_log():
    """One row per step that was reported or evaluated; cut and continued where a run is resumed."""
    with data_folder() as folder:
        s = {"max_steps": 10, "log_every": 4, "eval_every": 3, "out_dir": f"{folder}/out"}
        run, said = train_tiny(folder, **s)
        path = Path(folder, "out/log.csv")
        rows = read_log(path)
        assert list(rows[0]) == list(log.COLUMNS), rows[0]
        assert [int(r["step"]) for r in rows] == [3, 4, 6, 8, 9, 10], rows
        assert ["loss" * bool(r["loss"]) + "val" * bool(r["val"]) for r in rows] == [
            "val", "loss", "val", "loss", "val", "lossval"], rows
        printed = [line.split("loss ")[1][:5] for line in said.splitlines() if "| loss" in line]
        assert printed == [f"{float(r['loss']):.3f}" for r in rows if r["loss"]], (printed, rows)
        assert float(rows[-1]["val"]) == float(f"{run.bound[0]:.8g}"), rows[-1]
        # a run that was killed at step 13, while writing a row, with a checkpoint of step 10
        good = path.read_bytes()
        path.write_bytes(good + b"12,1,2,,,3,4\n13,1,2,,")
        train_tiny(folder, **s, init_from="resume")  # nothing left to do: the last row stays one
        again = read_log(path)
        assert again == rows, again
        train_tiny(folder, **{**s, "max_steps": 16}, init_from="resume")
        steps = [int(r["step"]) for r in read_log(path)]
        assert steps == [3, 4, 6, 8, 9, 10, 12, 15, 16] and path.read_bytes().startswith(good[:300])
        # the settings beside it start the same run again
        config = f"{folder}/out/settings.py"
        got = configurator.override(train.DEFAULTS, [config])
        asked = {**train.DEFAULTS, **TINY, **s, "max_steps": 16, "dataset": f"{folder}"}
        assert got == asked, {k: (v, asked[k]) for k, v in got.items() if v != asked[k]}
        code, line = call_main(train, [config])
        assert code == 2 and "holds a run already (last.pt)" in line, line
        log.write_settings(Path(folder, "odd.py"), {"max_minutes": math.inf, "noise": 'a"\n\'b'})
        odd = configurator.override({"max_minutes": 1.0, "noise": ""}, [f"{folder}/odd.py"])
        assert odd == {"max_minutes": math.inf, "noise": 'a"\n\'b'}, odd
        # files of these names that are not ours, and a log without a checkpoint, are kept
        for name, text in (("settings.py", "x = 1\n"), ("log.csv", "a,b\n"), ("log.csv", good)):
            other = Path(folder, f"other{len(text)}")
            other.mkdir()
            (other / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            code, line = call_main(train, [config, f"--out_dir={other}"])
            assert code == 2 and f"holds a run already ({name})" in line, line
            assert "--init_from=resume" not in line, line
    return f"{len(rows)} rows, then {len(steps)} after a torn one; settings.py equals the settings"


def test_wandb():
    """--wandb=true: the same numbers go to wandb, offline too; without it, how to install it."""
    with data_folder() as folder:
        s = {"max_steps": 4, "log_every": 2, "eval_every": 2, "wandb": True}
        with importing_wandb(None), raises(configurator.SettingsError) as e:
            train_tiny(folder, **s)
        assert "pip install wandb" in e.error, e.error
        logged = []
        fake = ModuleType("wandb")
        fake.Error = type("Error", (Exception,), {})
        fake.init = lambda **k: logged.append(k) or SimpleNamespace(
            id="abc", log=lambda values, step: logged.append((step, sorted(values))),
            finish=lambda: logged.append("finish"),
        )
        with importing_wandb(fake):
            train_tiny(folder, **s)
            train_tiny(folder, **{**s, "max_steps": 6}, init_from="resume")
        report, val = ["loss", "lr", "seconds", "tokens_per_second"], ["val", "val_error"]
        steps = [x for x in logged if isinstance(x, tuple)]
        assert steps == [(n, part) for n in (2, 4, 6) for part in (report, val)], steps
        ids = [x["id"] for x in logged if isinstance(x, dict)]
        assert ids == [None, "abc"] and logged.count("finish") == 2, logged
        assert logged[0]["config"]["wandb"] is True and logged[0]["config"]["max_steps"] == 4
        if not importlib.util.find_spec("wandb"):
            raise Skip("wandb is not installed (pip install wandb); a stand-in was checked")
        said = f"{folder}/said"
        code, text = ended(start(folder, said, None, {"WANDB_MODE": "offline", "WANDB_SILENT":
                                                      "true"}, **s, out_dir=f"{folder}/w"), said)
        files = list(Path(folder, "w/wandb").glob("offline-run-*/run-*.wandb"))
        assert code == 0 and len(files) == 1 and files[0].stat().st_size > 500, text
    return "a stand-in got every row; the real one wrote its offline file"


@contextlib.contextmanager
def importing_wandb(module):
    """`import wandb` finds this module or, None, fails as where it is not installed."""
    before = sys.modules.get("wandb")
    sys.modules["wandb"] = module
    try:
        yield
    finally:
        del sys.modules["wandb"]
        if before is not None:
            sys.modules["wandb"] = before


def test_sharded():
    """--shard=true on 2 processes: the weights, checkpoints and resumptions of the plain run."""
    with data_folder() as folder:
        s = {"log_every": 1, "warmup_steps": 1, "seed": 3}
        for out in ("plain", "mixed"):
            train_tiny(folder, **s, max_steps=4, out_dir=f"{folder}/{out}")
        for out, more in (  # the accumulation leaves 2 sequences to a forward pass
            ("sharded", {"max_steps": 4, "micro_batch": 2, "sample_tokens": 4}),
            ("mixed", {"max_steps": 7, "init_from": "resume"}),
        ):
            two = start_two(folder, f"{folder}/{out}.said", **s, **more, shard="true",
                            out_dir=f"{folder}/{out}")
            for i, process in enumerate(two):
                code, text = ended(process, f"{folder}/{out}.said{i}", 150)
                assert code == 0, text[-1000:]
                assert ("a sample, unedited" in text) == (i == 0 and out == "sharded"), text
        states = [checkpoint.load_checkpoint(f"{folder}/{n}/last.pt") for n in ("plain", "sharded")]
        worst = [state_difference(*states)]
        for out in ("plain", "sharded"):
            train_tiny(folder, **s, max_steps=7, out_dir=f"{folder}/{out}", init_from="resume")
        states = [checkpoint.load_checkpoint(f"{folder}/{n}/last.pt")
                  for n in ("plain", "sharded", "mixed")]
        worst += [state_difference(states[0], other) for other in states[1:]]
        finals = [x["final"][0] for x in states]
        assert max(finals) - min(finals) < 1e-5, finals
        moved = train.CascadeLM(cascade.CascadeConfig(**states[0]["config"])).state_dict()
        assert diff(moved["blocks.0.attn.o.weight"],
                    states[0]["model"]["blocks.0.attn.o.weight"]) > 1e-3, "nothing was learnt"
        code, line = call_main(train, [*(f"--{k}={v}" for k, v in TINY.items()), "--max_steps=1",
                                       "--shard=true"])
        assert code == 2 and "torchrun" in line, line
    return within(max(worst), 5e-4, "sharded, and resumed both ways: weights, moments max|diff|")


def state_difference(a, b):
    """Largest difference of two checkpoints' tensors: weights, and moments as shares of theirs."""
    assert a["model"].keys() == b["model"].keys() and a["step"] == b["step"]
    worst = max(diff(v, b["model"][k]) for k, v in a["model"].items())
    for x, y in zip(tree_leaves(a["optimizers"]), tree_leaves(b["optimizers"]), strict=True):
        if isinstance(x, torch.Tensor):
            worst = max(worst, diff(x, y) / max(1e-12, x.abs().max().item()))
        else:
            assert x == y, (x, y)
    return worst


def test_not_finite():
    """A loss, gradient, bound, weight or moment that is not finite: what, when, what is saved."""

    def spoil(number):
        return lambda loss: loss * math.nan if number == "gradient" else loss + math.inf

    def weight(run):
        with torch.no_grad():
            run.model.blocks[0].attn.q.weight[0, 0] = math.nan

    def moment(run):
        run.optimizers[1].state[run.model.blocks[0].attn.q.weight]["momentum"][0, 0] = math.inf

    cases = [("gradient", spoil("gradient"), None), ("loss", spoil("loss"), None),
             ("validation bound", None, weight), ("model", None, moment)]
    with data_folder() as folder:
        for what, spoiled, after in cases:
            class Spoilt(train.Run):
                def train_step(self, progress, spoiled=spoiled, after=after):
                    if self.step == 5 and spoiled:
                        forward = self.loss.forward
                        self.loss.forward = lambda *a: spoiled(forward(*a))
                    total = super().train_step(progress)
                    if self.step == 6 and after:
                        after(self)
                    return total

            original, train.Run = train.Run, Spoilt
            try:
                with raises(configurator.SettingsError) as e:
                    train_tiny(folder, max_steps=20, eval_every=2, log_every=1)
            finally:
                train.Run = original
            step = 5 if what == "gradient" else 6
            for part in (f"the {what} is not finite at step {step} ", "last.pt is good, of step 4",
                         "--learning_rate", "--out_dir"):
                assert part in e.error and "\n" not in e.error, (part, e.error)
            state = checkpoint.load_checkpoint(f"{folder}/out/last.pt")
            assert state["step"] == 4 and checkpoint.all_finite(state), what
    return f"{len(cases)} kinds stopped; the checkpoint of step 4 stands"


def test_lock():
    """A second run in one out_dir is refused; a file that a dead run left is no matter."""
    with data_folder() as folder:
        argv = [f"--{k}={v}" for k, v in {**TINY, "max_steps": 2, "dataset": folder}.items()]
        out = Path(folder, "out")
        out.mkdir()
        with checkpoint.lock(out):
            for how in ("--overwrite=true", "--overwrite=false"):
                code, line = call_main(train, [*argv, f"--out_dir={out}", how])
                assert code == 2 and f"another run (process {os.getpid()})" in line, line
                assert line.count("\n") == 1 and not (out / "log.csv").exists(), line
        (out / "lock").write_text("99999")
        code, line = call_main(train, [*argv, f"--out_dir={out}"])
        assert code is None and (out / "last.pt").exists(), line
    return "refused while held, with the holder's id; not by a file left behind"


def test_shared_errors():
    """Under torchrun an error of all processes is printed by the main one, any other by its own."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}",
           "TORCHELASTIC_USE_AGENT_STORE": "True"}
    said = []
    with mock.patch.dict(os.environ, env):
        for rank, message in ((0, "shared"), (1, "shared"), (1, "mine alone")):
            with mock.patch.dict(os.environ, {"RANK": f"{rank}"}):
                processes = machine.Processes()
            err = io.StringIO()
            with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
                processes.fail(configurator.SettingsError(message))
                raise AssertionError("went on")
            said.append(err.getvalue())
    assert said == ["error: shared\n", "", "error: mine alone\n"], said
    return "shared: printed once; a rank's own: printed"


def test_killed_runs():
    """Killed in a half-written checkpoint, before its rename and at a random moment; resumed."""
    kills = [(2, "half"), (3, "before"), (3, random.random())]
    torn = survive(kills, 20)
    assert torn >= 2, torn
    return f"{len(kills)} kills, {torn} inside a save, 0 bits of difference"


def test_full_disk():
    """A save that the system refuses: one line, and the old checkpoint as it was."""
    if not resource:
        raise Skip("no module resource here to limit the size of files with")
    with data_folder() as folder:
        train_tiny(folder, max_steps=2)
        last = Path(folder, "out/last.pt")
        before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        argv = [f"--{k}={v}" for k, v in {**TINY, "max_steps": 4, "dataset": folder}.items()]
        for size in (len(before) // 2, 10):  # in the checkpoint; already in settings.py
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                code, line = call_main(
                    train, [*argv, f"--out_dir={folder}/out", "--init_from=resume"]
                )
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert code == 2 and "cannot write" in line and "free some space" in line, line
            assert line.count("\n") == 1, line
            assert last.read_bytes() == before and not list(last.parent.glob("*.tmp")), line
    return "refused in the middle of a checkpoint and before the first step"


# ---- faults: python test_all.py faults -----------------------------------------------------------


def faults_kills():
    """SIGKILL at 20 moments, 8 of them inside a save for certain, with a save every 2 steps."""
    r = random.Random(time.time_ns())
    kills = [(r.randint(1, 5), m) for m in ("half", "before", "after") * 3][:8]
    kills += [(r.randint(0, 6), r.random()) for _ in range(12)]
    r.shuffle(kills)
    torn = survive(kills, 160)
    return f"{len(kills)} kills, {torn} left a torn file; 0 steps lost, 0 bits of difference"


def faults_full_disk():
    """A file system that fills up in the middle of a run: the checkpoint stands, and is resumed."""
    with data_folder() as folder:
        s = {"max_steps": 8, "eval_every": 2}
        whole, _ = train_tiny(folder, **s, out_dir=f"{folder}/a")
        size = Path(folder, "a/last.pt").stat().st_size
        with mounted(folder / "small", f"size={size * 5 // 2}") as out:  # last and best, no third
            code, line = call_main(train, [f"--{k}={v}" for k, v in {
                **TINY, **s, "dataset": folder, "out_dir": out / "run"}.items()])
            assert code == 2 and "free some space" in line and line.count("\n") == 1, line
            step = checkpoint.load_checkpoint(out / "run/last.pt")["step"]
            assert step == 2 and not list(out.glob("run/*.tmp")), (step, line)
            subprocess.run(["mount", "-o", f"remount,size={size * 9}", out], check=True)
            rest, _ = train_tiny(folder, **s, out_dir=out / "run", init_from="resume")
        assert (weights(whole) == weights(rest)).all()
    return f"full at the save of step 4, resumed from step {step}, 0 bits of difference"


@contextlib.contextmanager
def mounted(path, options):
    """A tmpfs of its own; Skip where mounting is not allowed."""
    path.mkdir()
    run = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path],
                         capture_output=True, text=True, check=False)
    if run.returncode:
        raise Skip(f"cannot mount a tmpfs here: {run.stderr.strip()[:80]}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)  # a failed run holds files


def faults_read_only():
    """An out_dir that cannot be written or made, whoever asks: one line."""
    with data_folder() as folder:
        argv = [f"--{k}={v}" for k, v in {**TINY, "max_steps": 1, "dataset": folder}.items()]
        places = [f"{folder}/meta.json", f"{folder}/meta.json/run", "/proc/run", "/sys/kernel"]
        places = [p for p in places if p.startswith(f"{folder}") or Path(p).parent.is_dir()]
        for place in places:
            code, line = call_main(train, [*argv, f"--out_dir={place}"])
            assert code == 2 and "cannot write to" in line and line.count("\n") == 1, line
        with mounted(folder / "fixed", "ro") as out:
            for place in (out, out / "run"):
                code, line = call_main(train, [*argv, f"--out_dir={place}"])
                assert code == 2 and "Read-only file system" in line, line
    return f"{len(places) + 2} places refused, one line each"


def faults_lost_process():
    """One of two processes is killed: the other ends by itself with one line; then resumed."""
    waited = []
    with data_folder() as folder:
        s = {"max_steps": 40, "eval_every": 2, "log_every": 1, "eval_windows": 2}
        whole, _ = train_tiny(folder, **s, out_dir=f"{folder}/a")
        for victim in (1, 0):
            said = f"{folder}/said{victim}."
            out = {"out_dir": f"{folder}/b{victim}"}
            two = start_two(folder, said, **s, **out)
            wait_for_steps(two[0], f"{said}0", 6)
            two[victim].kill()
            began = time.perf_counter()
            code, text = ended(two[1 - victim], f"{said}{1 - victim}", 60)
            waited.append(time.perf_counter() - began)
            lines = [x for x in text.splitlines() if x.startswith("error: ")]
            assert code == 2 and len(lines) == 1 and "--init_from=resume" in lines[0], text
            assert "Traceback" not in text, text
            step = checkpoint.load_checkpoint(f"{folder}/b{victim}/last.pt")["step"]
            assert step >= 4, step
            rest, _ = train_tiny(folder, **s, **out, init_from="resume")
            within(diff(weights(whole), weights(rest)), 1e-4, "weights max|diff|")
    return within(max(waited), 30, "seconds until the other has ended")


def faults_two_runs():
    """A second run beside a living one is refused; when that is killed, its folder is free."""
    with data_folder() as folder:
        s = {"max_steps": 100_000, "eval_every": 5, "log_every": 1, "out_dir": f"{folder}/out"}
        process = start(folder, f"{folder}/said", **s)
        wait_for_steps(process, f"{folder}/said", 7)
        for how in ("--overwrite=true", "--init_from=resume"):
            code, line = call_main(train, [how, *(f"--{k}={v}" for k, v in {
                **TINY, **s, "dataset": folder}.items())])
            assert code == 2 and f"another run (process {process.pid})" in line, line
        process.kill()
        ended(process, f"{folder}/said")
        step = checkpoint.load_checkpoint(f"{folder}/out/last.pt")["step"]
        run, _ = train_tiny(folder, **{**s, "max_steps": step + 5}, init_from="resume")
        assert run.step == step + 5
    return f"refused with the pid; resumed from step {step} after SIGKILL"


def faults_torchrun():
    """torchrun: an error of all processes is one line; SIGTERM saves, and says how to go on."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    with data_folder() as folder:
        for argv, expected in ((["--lerning_rate=1"], "did you mean learning_rate"),
                               ([f"--dataset={folder}", f"--out_dir={folder}/meta.json"],
                                "cannot write")):
            code, _, err = command(*torchrun, *argv)
            lines = [x for x in err.splitlines() if x.startswith("error: ")]
            assert code and len(lines) == 1 and expected in lines[0], err[-2000:]
        s = {**TINY, "max_steps": 100_000, "log_every": 1, "dataset": folder,
             "out_dir": f"{folder}/out"}
        process = subprocess.Popen(
            [sys.executable, *torchrun, *(f"--{k}={v}" for k, v in s.items())], cwd=HERE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        while "| loss" not in (line := process.stdout.readline()):
            assert line, "torchrun ended before the first step"
        process.terminate()
        said, _ = process.communicate(timeout=60)
        step = checkpoint.load_checkpoint(f"{folder}/out/last.pt")["step"]
        assert f"stopped at step {step}, saved" in said and "--init_from=resume" in said, said
    return f"2 mistakes, one line each from two processes; SIGTERM saved step {step}"


# ---- the runner ----------------------------------------------------------------------------------


def run(name):
    """(verdict, seconds, what to say) of one test."""
    torch.set_num_threads(1)  # the models here are tiny: a second thread would only wait
    began = time.perf_counter()
    try:
        verdict, line = "PASS", globals()[name]()
        if isinstance(line, tuple):
            line = f"{line[0]}, allowed {line[1]}"
    except Skip as e:
        verdict, line = "SKIP", str(e)
    except Exception as e:
        verdict, line = "FAIL", f"{type(e).__name__}: {e}"
        traceback.print_exc()
    return verdict, time.perf_counter() - began, line


def main(words):
    """Run the tests whose name holds one of `words` (all without any); 0 if none failed.

    The functions named faults_* are tests too, but run only when `words` ask for them. Several
    tests are shared out over one process per core, at most four.
    """
    tests = [
        name for name in globals()
        if name.startswith("test_") and not words
        or name.startswith(("test_", "faults_"))
        and any(w in name.removeprefix("test_") for w in words)
    ]
    if not tests:
        print(f"error: no test has {' or '.join(words)} in its name", file=sys.stderr)
        return 2
    count = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    workers = min(len(tests), os.cpu_count() or 1, 4)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for name, found in zip(tests, pool.map(run, tests), strict=True):
            verdict, seconds, line = found
            count[verdict] += 1
            short = name.removeprefix("test_")
            print(f"{verdict}  {short:34s} {seconds:6.1f}s  {line}", flush=True)
    skipped = f", {count['SKIP']} skipped" if count["SKIP"] else ""
    print(f"{count['PASS']} passed, {count['FAIL']} failed{skipped}")
    return 1 if count["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
