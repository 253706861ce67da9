"""Every claim of this repository as a test.

    python test_all.py               all of them
    python test_all.py noise bound   those with one of these words in their name

One line each: PASS or FAIL, the name, the seconds, and what was measured beside what is allowed, or
the claim. The last line is `N passed, M failed`; the exit code is 1 if any failed.
"""

import copy
import gzip
import inspect
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import TestCase
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import torch

import bench
import eval
import model
import reference
import sample
import train
from corrupt import SCHEDULES, WEIGHTINGS, Rates, masked_diffusion_loss
from corrupt import corrupt_all_blocks as all_blocks
from corrupt import corrupt_target_block as target_block
from model import CascadeConfig, CascadeLM, NLLs, attention, clean_sees, noisy_sees
from util import checkpoint, data, hf, machine, settings
from util.muon import Muon
from util.ngram import NGram
from util.rules import left_to_right
from util.view import DIM, END, GREEN, YELLOW, other_screen, show

HERE = Path(__file__).resolve().parent
for message in ("flex_attention called without torch.compile", "Mismatch dtype"):
    warnings.filterwarnings("ignore", message=message)

# ---- what the tests share ------------------------------------------------------------------------


def within(measured, allowed, what):
    """The test's line; AssertionError when measured > allowed, or is not a number."""
    line = f"{what} = {measured:.2g}, allowed {allowed:.2g}"
    assert measured <= allowed, line
    return line


def diff(a, b):
    """Largest absolute difference of two tensors of one shape, in float64; a NaN fails."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    found = (a.detach().double() - b.detach().double()).abs().max().item()
    assert not math.isnan(found), "NaN"
    return found


class Worst(dict):
    """The largest differences so far, by name."""

    def note(self, name, a, b):
        self[name] = max(self.get(name, 0.0), diff(a, b))

    def within(self, allowed, **other):
        """The test's line; AssertionError where one is above `allowed`, or other[its name]."""
        limits = {name: other.get(name, allowed) for name in self}
        line = ", ".join(f"{name} {x:.1e} ({limits[name]:.0e})" for name, x in self.items())
        assert self and all(x <= limits[name] for name, x in self.items()), line
        return f"max|diff| (allowed): {line}"


def refuses(word, call, **how):
    """`call(**how)` must raise a UserError, one line that contains `word`."""
    with TestCase().assertRaises(settings.UserError, msg=how) as caught:
        call(**how)
    said = str(caught.exception)
    assert "\n" not in said and word in said, (word, said)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(seed=0, std=0.3, **shape):
    """A small random model whose every weight matters: initialisation leaves some at zero."""
    shape = {"vocab_size": 11, "seq_len": 15, "block_size": 3, "n_layer": 2, "n_head": 4,
             "n_embd": 32, "n_hidden": 40, "local_window": 2, "local_hidden": 24, **shape}
    if shape.get("context") == "block":
        shape["local_window"] = 0
    net, g = CascadeLM(CascadeConfig(**shape)), generator(seed)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * std)
    return net


def batch_for(net, batch=3):
    """(x0, xt, index): random tokens and the noise that a model of this shape trains on."""
    c, noise = net.config, "full" if net.config.local_window else "balanced"
    x0 = torch.randint(c.vocab_size, (batch, c.seq_len), generator=generator(1))
    noisy = all_blocks(x0, c.block_size, c.mask_id, generator(2), noise)
    return x0, noisy.xt, noisy.mask.flatten().nonzero()[:, 0]


# odd block size, S = 1, S = N, grouped heads, tied head, with q/k norm and without, heads wider
# than n_embd / n_head; a local window shorter than a block, longer, and none (partly masked blocks)
SHAPES = (
    {"block_size": 3, "n_kv_head": 1, "local_window": 2},
    {"block_size": 3, "n_layer": 1, "local_window": 0},
    {"block_size": 1, "tie_embeddings": True, "qk_norm": False, "local_window": 3},
    {"block_size": 15, "n_kv_head": 2, "qk_norm": False, "local_window": 0},
    {"block_size": 5, "n_kv_head": 2, "tie_embeddings": True, "local_window": 7, "head_dim": 12},
)
CONTEXTS = ("causal", "block")


def started(*argv):
    """A Python script, running in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-u", *argv], cwd=HERE, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ---- the network against the slow truth ----------------------------------------------------------


def test_reference_script():
    """python reference.py proves itself."""
    script = started("reference.py")
    out, err = script.communicate()
    assert script.returncode == 0 and out.count("PASS  ") == 4, out + err
    assert out.endswith("All CASCADE block-attention and cache tests passed\n"), out


@torch.no_grad()
def test_masks_and_attention():
    """Dense masks and FlexAttention's are the definition's, entry by entry. By them attention of
    one head is the float64 loop's, in half precision that of the same rounded numbers."""
    worst, cpu = Worst(), torch.device("cpu")
    for (N, S), (sees, causal, streams) in itertools.product(
        ((24, 4), (15, 3), (8, 1), (6, 6)),
        ((None, True, 1), (clean_sees, False, 1), (noisy_sees, False, 2)),
    ):
        rule, first = reference.two_stream_rule(N, S, causal), (streams - 1) * N
        want = torch.tensor([[rule(first + i, j) for j in range(streams * N)] for i in range(N)])
        mask = sees and model.build_block_causal_mask(N, S, cpu, sees, streams)
        if sees:
            flex = model.build_flex_mask(N, S, cpu, sees, streams)
            i, j = torch.arange(N)[:, None], torch.arange(streams * N)
            assert torch.equal(mask, want) and torch.equal(flex.mask_mod(0, 0, i, j), want), (N, S)
        q = torch.randn(1, N, 1, 8, generator=generator(1))
        k, v = torch.randn(2, 1, streams * N, 1, 8, generator=generator(2)).unbind()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            ins = [x.to(dtype) for x in (q, k, v)]
            truth = reference.reference_attention(
                *(x[0, :, 0] for x in ins), lambda i, j, want=want: want[i, j])
            worst.note(str(dtype)[6:], attention(*ins, mask, causal)[0, :, 0], truth)
            if sees and dtype == torch.float32:
                worst.note("flex", attention(*ins, flex)[0, :, 0], truth)
    for sees, streams in ((clean_sees, 1), (noisy_sees, 2)):  # many tiles of 128
        tiles = model.build_flex_mask(512, 16, cpu, sees, streams).to_dense()[0, 0].bool()
        dense = model.build_block_causal_mask(512, 16, cpu, sees, streams)
        assert torch.equal(tiles, dense.view(4, 128, -1, 128).any(dim=3).any(dim=1)), "tiles"
    return worst.within(1e-6, float16=1e-3, bfloat16=1e-2)


@torch.no_grad()
def test_no_leak():
    """Bitwise, for each pair of clean and noisy tokens in five blocks: what is computed at one
    moves with the other if and only if it may see it. And with context="block" a noisy block is
    what the Phase 1 note makes of it: one stream, with masks behind the block."""
    worst, at = Worst(), torch.arange(15) // 3
    for context in CONTEXTS:
        net = tiny_model(context=context, local_window=0)
        may_see = reference.two_stream_rule(15, 3, context == "causal")
        x0, xt, _ = batch_for(net, batch=1)
        before = net.streams(x0, xt)  # (2, 15, C)
        for j in range(30):
            both = torch.cat([x0, xt])
            both.view(-1)[j] = (both.view(-1)[j] + 1) % 11
            moved = (net.streams(both[:1], both[1:]) != before).any(dim=-1).flatten()
            assert moved.tolist() == [may_see(i, j) for i in range(30)], (context, j)
    for b in range(5):
        one = torch.where(at < b, x0, xt).masked_fill(at > b, net.config.mask_id)
        worst.note("one stream", net.streams(one)[0, at == b], before[1, at == b])
    return worst.within(1e-5)


def test_model_equals_oracle():
    """Logits, every NLL and every gradient, both contexts: heads, rotary embedding, groups, ties,
    q/k norm, local windows; soft targets, which are not differentiated, of the model itself and of
    another one; the head at once and in pieces. Then by FlexAttention, and in float64."""
    worst, other = Worst(), tiny_model(9, n_embd=16, block_size=5, local_window=0)
    for shape, (context, teacher, most) in itertools.product(
        SHAPES, (("causal", None, 2**25), ("causal", other, 3 * 11), ("block", None, 3 * 11))
    ):
        net, causal = tiny_model(**shape, context=context), context == "causal"
        x0, xt, index = batch_for(net)
        state = {k: v.detach().clone().requires_grad_() for k, v in net.state_dict().items()}
        logits, by = reference.reference_logits(state, net.config, x0), teacher or net
        p = reference.reference_logits(by.state_dict(), by.config, x0)[:, :-1].softmax(-1)
        slow = reference.reference_nlls(state, net.config, x0, xt, p)
        slow |= {k: v.flatten()[index] for k, v in slow.items() if k.startswith("masked")}
        want, soft = {name: slow[name] for name in ("gpt", "masked") if name in slow}, 0.0
        worst.note("NLLs", net(x0, xt, index).masked, want["masked"])
        if causal:
            soft, taught = 0.3, ["gpt", "masked"] if teacher else ["masked"]  # own p: drafts alone
            want |= {name: 0.7 * slow[name] + 0.3 * slow[f"{name}_soft"] for name in taught}
        if teacher:
            worst.note("AR", net(x0, soft=soft, teacher=teacher).gpt, want["gpt"])
        with patch.object(model, "head_nll", partial(model.head_nll, most=most)):
            fast = net(x0, xt, index, soft, teacher)._asdict()
        assert {k for k, v in fast.items() if v is not None} == want.keys(), (shape, fast)
        worst.note("logits", net.logits_of(x0), logits)
        for name in want:
            worst.note("losses", fast[name], want[name])
        for found in (fast, want):
            sum((found[name] * torch.rand(x.shape, generator=generator(3))).mean()
                for name, x in want.items()).backward()
        for name, weight in net.named_parameters():
            worst.note("gradients", weight.grad, state[name].grad)
        with torch.no_grad():
            net.flex = True
            worst.note("flex", net.logits_of(x0), logits)
            worst.note("flex", net(x0, xt, index).masked, slow["masked"])
            worst.note("float64", net.double().logits_of(x0), logits)
    assert all(p.grad is None for p in other.parameters()), "a teacher learns"
    return worst.within(5e-6, gradients=1e-5)


@torch.no_grad()
def test_draft_nll():
    """The draft NLL is that of drawing a block token by token: over all 27 blocks the probabilities
    add up to 1, and so do those of a token, whatever the others are: it does not see itself."""
    net, worst = tiny_model(vocab_size=3, seq_len=9, local_window=4), Worst()
    x0 = torch.tensor([[0, 2, 1, 0, 0, 0, 1, 2, 2]]).repeat(27, 1)
    x0[:, 3:6] = torch.tensor([*itertools.product(range(3), repeat=3)])
    nll = net(x0, torch.full_like(x0, 3), torch.arange(x0.numel())).masked.view(27, 9)[:, 3:6]
    each = (-nll).exp().view(3, 3, 3, 3)  # by the block's three tokens: the probability of each
    for j in range(3):
        worst.note("a token", each[..., j].sum(dim=j), torch.ones(3, 3))
    worst.note("a block", (-nll.sum(dim=1)).exp().sum(), torch.tensor(1.0))
    return worst.within(1e-6)


@torch.no_grad()
def test_bfloat16():
    """NLLs under bf16 autocast, and of bf16 weights, against float32. Their type is float32."""
    worst = Worst()
    for context in CONTEXTS:
        net = tiny_model(context=context, std=0.1, n_embd=64)
        batch = *batch_for(net), 0.5 if context == "causal" else 0.0
        full = net(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            cast = net(*batch)
        for nlls in (cast, net.bfloat16()(*batch)):
            for x, want in zip(nlls, full, strict=True):
                if x is not None:
                    assert x.dtype == torch.float32
                    worst.note(context, x, want)
    return worst.within(1e-2)


def test_compiles_whole():
    """Traced for torch.compile, training by dense masks is one graph in both contexts; and so are a
    token's pass, a round and a block's pass, with the same tokens for the same random numbers."""
    compiled = partial(torch.compile, fullgraph=True, backend="eager")
    causal, block, how = tiny_model(), tiny_model(context="block"), (0.9, 8, 0.9)
    for net in (causal, block):
        batch = *batch_for(net), 0.5 if net is causal else 0.0
        torch.testing.assert_close(compiled(net)(*batch), net(*batch), rtol=0, atol=0)
    left = torch.tensor([[3, 2], [4, 11]])
    u = torch.rand(2, 6, generator=generator(), dtype=torch.float64)
    choose = partial(left_to_right, count=torch.ones(2), limit=0, score=None)
    for call, net, args in (
        (sample.gpt_pass, causal, (left, u)),
        (sample.verify_round, causal, (left, 2, u)),
        (sample.block_pass, block, (left, left[:, :0], torch.full((2, 3), 11), choose, u[:, :3])),
    ):
        found = []
        for run in (call, compiled(call)):
            cache = sample.BlockCache(net.config, 2)
            cache.length.copy_(torch.tensor([3, 6]))
            with torch.no_grad():
                drafter = [] if call is sample.gpt_pass else [sample.Drafter(net)]
                found.append(run(net, *drafter, cache, how, *args))
        torch.testing.assert_close(*found, rtol=0, atol=0)


# ---- the noise, the bound, and learning ----------------------------------------------------------


def test_noise_counts():
    """`balanced`: every k equally often in each group of sequences. The rates of a batch are
    stratified, but the strata tie none to a block's place: each by itself is uniform."""
    for B, nb, S in ((6, 4, 4), (8, 2, 16), (12, 3, 9), (10, 6, 4)):
        n = all_blocks(torch.zeros(B, nb * S).long(), S, 9, generator(B), "balanced")
        k, group = n.mask.view(B, nb, S).sum(dim=-1), S // math.gcd(S, nb)
        for rows in k[: B // group * group].split(group):
            often = torch.bincount(rows.flatten(), minlength=S + 1)
            assert often[0] == 0 and (often[1:] == often[1]).all(), (B, nb, S, often)
    draw = partial(all_blocks, torch.zeros(5, 12).long(), 4, 9, noise="uniform")
    m = torch.stack([draw(generator=generator(i)).m for i in range(4000)])  # (4000, 5, 3)
    assert m.mean(dim=(1, 2)).std() < 0.25 * math.sqrt(1 / 12 / 15), "not stratified"
    assert (m.var(dim=0) * 12 - 1).abs().max() < 0.1
    worst = (m.mean(dim=0) - 0.5005).abs().max().item() / math.sqrt(1 / 12 / 4000)
    return within(worst, 4.5, "mean rate by place, std errors off")


def test_noise_masks():
    """Exact counts mask k tokens, rates mask at rate m, both anywhere; the weights of the table and
    of the Phase 1 note: (1/m) * mean over the masked. And the note's corruption: clean before one
    block b, masked after it, b uniform; a loss at masked positions of b, at least one, alone."""
    B, N, S = 4000, 24, 4
    x0, at = torch.randint(9, (B, N), generator=generator(1)), torch.arange(N) // S
    for noise, weighting in itertools.product(SCHEDULES, WEIGHTINGS):
        n = all_blocks(x0, S, 9, generator(2), noise, Rates(clip_low=0.4, clip_high=0.6), weighting)
        assert torch.equal(n.xt, x0.masked_fill(n.mask, 9))
        inside = n.mask.view(B, N // S, S)
        k, place = inside.sum(dim=-1), inside.flatten(0, 1).double().mean(dim=0)
        assert (place - place.mean()).abs().max() < 0.02, place
        if noise in ("balanced", "full"):
            assert (k == (n.m * S).round()).all() and (noise == "balanced" or (k == S).all())
            each = 1 / k
        else:
            assert abs((k / S - n.m).mean().item()) < 0.01
            assert noise == "uniform" or (0.4 <= n.m.min() and n.m.max() <= 0.6)
            each = 1 / (n.m * S)
        if weighting == "cascade":
            each = 1 / (n.m * k.clamp(min=1))
        assert diff(n.weight.view(inside.shape), each.unsqueeze(-1) * inside) < 1e-5 * each.max()
        n = target_block(x0, S, 9, generator(4), noise, weighting=weighting)
        assert torch.equal(n.xt, x0.masked_fill(n.mask | (at > n.block), 9))
        assert not (n.mask & (at != n.block)).any() and n.mask.any(dim=1).all()
        assert torch.equal(n.weight > 0, n.mask) and n.block.shape == (B, 1)
        share = torch.bincount(n.block[:, 0], minlength=N // S) / B
        assert (share - S / N).abs().max() < 0.03, share


def diffusion(net, x0, n):
    """(the model's NLLs of x0 beside `Noisy` n of it, their masked diffusion loss)"""
    index = n.mask.flatten().nonzero()[:, 0]
    nlls = net(x0, n.xt, index)
    weight = n.weight.flatten()[index]
    return nlls, masked_diffusion_loss(nlls.masked, weight, n.block.numel())


@torch.no_grad()
def test_bound():
    """By enumeration on a tiny model: masks by count and by rate have the same expected loss, and
    `balanced` and `uniform` noise estimate it, in all blocks or in one, for both contexts.
    `clipped` noise has another, and so has the note's weighting."""
    worst, S = 0.0, 4
    for context in CONTEXTS:
        net = tiny_model(vocab_size=5, n_embd=16, n_head=2, std=0.5, seq_len=12, block_size=S,
                         context=context, local_window=0)
        x0, _, _ = batch_for(net, batch=2)
        # The summed NLL of a set M of k in a block weighs P(k) P(M | k) S/k = 1/S / C(S,k) * S/k in
        # one form, the integral over m of m^(k-1) (1-m)^(S-k), (k-1)! (S-k)! / S!, in the other.
        counts = by_rate = 0.0
        for bits in itertools.product((False, True), repeat=S):
            k, mask = sum(bits), torch.tensor(bits).repeat(3).expand_as(x0)
            if k:
                index = mask.flatten().nonzero()[:, 0]
                nll = net(x0, x0.masked_fill(mask, 5), index).masked.double().sum().item() / 24
                counts += nll / math.comb(S, k) / k
                by_rate += nll * math.factorial(k - 1) * math.factorial(S - k) / math.factorial(S)
        assert abs(counts - by_rate) < 1e-6, (counts, by_rate)
        x0 = x0.repeat(500, 1)
        for noise, corruption, weighting in (
            ("balanced", all_blocks, "elbo"), ("balanced", target_block, "elbo"),
            ("uniform", all_blocks, "elbo"), ("uniform", target_block, "elbo"),
            ("clipped", all_blocks, "elbo"), ("uniform", target_block, "cascade"),
        ):
            rates = Rates(1e-6 if weighting == "elbo" else 1e-2, 0.9, 1.0)
            noisy = (corruption(x0, S, 5, generator(i), noise, rates, weighting) for i in range(10))
            losses = torch.stack([diffusion(net, x0, n)[1] for n in noisy]).double()
            error = losses.std().item() / math.sqrt(len(losses))
            off = abs(losses.mean().item() - counts) / error
            if noise == "clipped" or weighting == "cascade":
                assert off > 10, (noise, weighting, off)
            else:
                assert error < 0.02, (noise, corruption, error)
                worst = max(worst, off)
    return within(worst, 5, f"exact {counts:.4f} nats/token in both forms; std errors off")


def test_memorisation():
    """200 steps of train.py's optimizers on one batch of random tokens, from exactly log 128 = 4.85
    to under 0.5 nats: as a cascade, as block diffusion, and in the Phase 1 note's form, where six
    draws had 0.38 to 0.45. Lower mask rates than 0.9 would give one token a weight above all."""
    x0, found = torch.randint(128, (4, 64), generator=generator()), {}
    torch.manual_seed(0)
    s = SimpleNamespace(**train.DEFAULTS | {"beta1": 0.8, "beta2": 0.9})
    for name, corruption, noise, weighting, context, window in (
        ("cascade", all_blocks, "full", "elbo", "causal", 6),
        ("all blocks", all_blocks, "balanced", "elbo", "block", 0),
        ("target block", target_block, "uniform", "cascade", "block", 0),
    ):
        net = CascadeLM(CascadeConfig(vocab_size=128, seq_len=64, block_size=8, n_layer=1, n_head=8,
                                      n_embd=128, context=context, local_window=window))
        optimizers = train.make_optimizers(net, s)
        draw = partial(corruption, x0, 8, 128, noise=noise, rates=Rates(0.9), weighting=weighting)
        for step in range(200):
            nlls, loss = diffusion(net, x0, draw(generator=generator(step)))
            if context == "causal":
                loss = loss + nlls.gpt.mean()
            if step == 0:
                first = torch.cat([x.flatten() for x in nlls if x is not None])
                assert (first - math.log(128)).abs().max() < 1e-5, "the first loss"
            loss.backward()
            for optimizer, peak in zip(optimizers, (1e-2, 5e-3), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * min(1.0, (step + 1) / 10) * (1 - step / 200)
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            noisy = [draw(generator=generator(1000 + i)) for i in range(50)]
            found[name] = np.mean([diffusion(net, x0, n)[0].masked.mean().item() for n in noisy])
    said = ", ".join(f"{name} {nll:.2f}" for name, nll in found.items())
    return within(max(found.values()), 0.5, f"{said}; the worst")


# ---- settings, data, the control -----------------------------------------------------------------

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 16, "block_size": 4, "batch_size": 4,
        "max_steps": 8, "eval_every": 4, "log_every": 2, "eval_windows": 4, "final_windows": 8,
        "learning_rate": 1e-2, "warmup_steps": 2, "device": "cpu", "dtype": "float32"}
BLOCK = {"context": "block", "local_window": 0, "soft": 0, "noise": "balanced"}


def tiny_data(folder, text="abc abd, bcd. " * 40):
    """A prepared dataset of a few characters; returns its path, as --dataset takes it."""
    where, tokenizer = f"{folder}/data", data.CharTokenizer("".join(sorted(set(text))))
    with redirect_stdout(io.StringIO()):
        data.write(where, tokenizer, "a test", train=[text], val=[text[:200]])
    return where


def flags(folder, name="run", **how):
    """Arguments of train.py for a tiny run in folder/name."""
    how = TINY | {"dataset": f"{folder}/data", "out_dir": f"{folder}/{name}"} | how
    return [f"--{name}={value}" for name, value in how.items()]


def command(script, argv):
    """(exit code, stdout, stderr) of a script's main, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = script.main(argv)
    return code, out.getvalue(), err.getvalue()


def trained(folder, name="run", argv=None, **how):
    """The last checkpoint in folder/name after a tiny run, or one by these arguments."""
    tiny_data(folder)
    code, _, err = command(train, argv or flags(folder, name, **how))
    assert code == 0, err
    return checkpoint.load(f"{folder}/{name}/last.pt")


def test_settings(folder):
    """Types, whatever they come from; later wins; a config file may begin with a byte order mark,
    import and have names of its own; ~ is the home folder."""
    defaults = {"steps": 10, "rate": 0.1, "on": False, "name": "x"}
    config = Path(folder, "c.py")
    config.write_text("\ufeffimport math\n_n = int(math.pi) + 1\nsteps = _n * 5\n"
                      "rate = 1\nname = 7\n")
    for argv, want in (
        (["--steps=1e3"], {"steps": 1000}), (["--rate=1"], {"rate": 1.0}),
        (["--steps=12345678901234567"], {"steps": 12345678901234567}), (["--on=0"], {"on": False}),
        (["--on=TRUE"], {"on": True}), (["--name=~/a=b"], {"name": os.path.expanduser("~/a=b")}),
        (["--steps=1", str(config), "--rate=2"], {"steps": 20, "rate": 2.0, "name": "7"}),
    ):
        found, given = settings.settings(defaults, argv)
        assert vars(found) == defaults | want and given == want.keys(), (argv, found)
        assert all(type(getattr(found, name)) is type(x) for name, x in defaults.items()), argv
    wrong = partial(refuses, call=settings.settings, defaults=defaults)
    for word, arg in (
        ("int", "--steps=1.5"), ("int", "--steps=inf"), ("float", "--rate=nan"), ("bool", "--on=2"),
        ("did you mean steps", "--step=1"), ("--key=value", "--on"), ("no config file", "no.py"),
    ):
        wrong(word, argv=[arg])
    for word, text in (("ZeroDivision", "1/0"), ("str", "name = 3.5"), ("unknown", "stps = 1")):
        config.write_text(text)
        wrong(word, argv=[str(config)])
    refuses("pip install nothing", settings.optional, package="nothing.at.all")


def test_tokenizers(folder):
    """Text -> ids -> text, and again by the tokenizer that meta.json describes."""
    text, said = "Grüße, 世界 \U0001f600\r\n\ttab, <|endoftext|>", "round trip"
    found = [data.CharTokenizer("".join(sorted(set(text)))), data.ByteTokenizer()]
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        found.append(data.GPT2Tokenizer())
    else:
        said += "; SKIPPED gpt2: $TIKTOKEN_CACHE_DIR, with its files, is not set"
    try:
        import tokenizers as tk

        letters = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
        bpe = tk.Tokenizer(tk.models.BPE({c: i for i, c in enumerate(letters)}, []))
        bpe.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tk.decoders.ByteLevel()
        bpe.add_special_tokens([data.EOT])
        found.append(data.HFTokenizer(bpe.to_str(), 300))
    except ImportError:
        said += "; SKIPPED hf: tokenizers is not installed"
    for tokenizer in found:
        with redirect_stdout(io.StringIO()):
            data.write(folder, tokenizer, "a test", train=[text, text], val=[text])
        read, ids = data.Dataset(folder), tokenizer.encode(text)
        again, whole = data.make_tokenizer(read.meta), [*ids, tokenizer.eot]
        assert again.decode(ids) == text and (again.encode(text) == ids).all(), tokenizer.kind
        assert read.split("train").tolist() == [x for x in whole if x is not None] * 2
        assert read.bytes_per_token("val") == len(text.encode()) / len(read.split("val"))
    return f"{', '.join(t.kind for t in found)} {said}"


def prepared(name, *argv):
    """What data/name/prepare.py does: (exit code, stdout, stderr)."""
    script = runpy.run_path(str(HERE / "data" / name / "prepare.py"))
    return command(SimpleNamespace(**script), [*map(str, argv)])


def test_prepare_text(folder):
    """Files and folders, plain or packed, with a byte order mark or without, each once, hidden ones
    left out; validation has its share, whatever the sizes; what is no text is refused by name, and
    the dataset that is there stays."""
    texts = Path(folder, "texts")
    (texts / ".git").mkdir(parents=True)
    for name, content in (("book.txt", b"\xef\xbb\xbfThe king.\r\n" + b"It was night. " * 5000),
                          ("a.txt.gz", gzip.compress(b"Gone. " * 20)), ("empty.txt", b""),
                          ("b.txt.xz", lzma.compress(b"Exit. " * 20)), (".git/x", b"\x00")):
        Path(texts, name).write_bytes(content)
    Path(texts, "again.txt").symlink_to(texts / "book.txt")
    Path(folder, "short.txt").write_text("ab" * 30)
    with patch.dict(os.environ, CASCADE_DATA=folder):
        code, out, err = prepared("text", texts, texts / "book.txt", "--name=mine")
        assert code == 0 and "3 files, of which 2 and the end of another" in out, (out, err)
        read, whole = data.Dataset("mine"), 11 + 14 * 5000 + 2 * 120  # characters
        train_ids, val_ids = read.split("train"), read.split("val")
        assert data.make_tokenizer(read.meta).decode(train_ids[:14]) == "The king.\r\nIt "
        val = data.make_tokenizer(read.meta).decode(val_ids)
        assert val.count("Gone. ") == val.count("Exit. ") == 20
        assert val.endswith(f"night. {data.EOT}") and len(train_ids) == int(0.9 * whole) + 1
        Path(texts, "picture.png").write_bytes(b"\0PNG")
        for word, *argv in (("picture.png", texts, "--name=mine"), ("no/t", "no/t", "--name=mine"),
                            ("--name=mine", texts), ("choose another", texts, "--name=enwik8"),
                            ("--tokenizer", texts / "book.txt", "--name=mine", "--tokenizer=bpe")):
            code, _, err = prepared("text", *argv)
            assert code == 2 and word in err and err.count("\n") == 1, (argv, err)
        assert len(data.Dataset("mine").split("train")) == len(train_ids), "it was replaced"
        _, _, err = prepared("text", f"{folder}/short.txt", "--name=mine", "--tokenizer=char")
        assert data.Dataset("mine").meta["tokens"] == {"train": 30, "val": 30}, err


def test_prepare_others(folder):
    """The text that ships here prepares itself. Downloads and local copies must have the hash that
    is known; enwik8 comes out of archives; the first documents of FineWeb-Edu validate, and none is
    begun after the tokens asked for."""
    wrong, zipped = Path(folder, "wrong.txt"), io.BytesIO()
    wrong.write_text("To be")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("enwik8", "To be")
    unpack = runpy.run_path(str(HERE / "data" / "enwik8" / "prepare.py"))["unpack"]
    for content in (b"To be", gzip.compress(b"To be"), zipped.getvalue()):
        assert unpack(content) == b"To be"
    refuses("damaged", unpack, content=gzip.compress(b"To be")[:-9])
    few = SimpleNamespace(kind="hf", vocab_size=98, eot=None, meta={}, encode=np.array)
    refuses("do not fit", partial(data.write, f"{folder}/few", few, "", train=[[97, 98]]))
    rows = [{"text": f"{i:3d} " * 25} for i in range(40)]  # 100 bytes each
    stub = SimpleNamespace(load_dataset=lambda **_: iter(rows))
    with patch.dict(os.environ, CASCADE_DATA=folder), patch.dict(sys.modules, datasets=stub), \
            patch.object(data, "GPT2Tokenizer", data.ByteTokenizer):
        with redirect_stdout(io.StringIO()):
            data.prepare_shipped("shakespeare")
        read = data.Dataset("shakespeare")
        assert read.meta["tokens"] == {"train": 4_551_552, "val": 505_728}
        assert "AGAMEMNON." in data.make_tokenizer(read.meta).decode(read.split("val")[:2000])
        for name in ("shakespeare_char", "enwik8"):
            for word, where in (("sha256", wrong), ("local copy", "nothing")):
                code, _, err = prepared(name, f"--input={where}")
                assert code == 2 and word in err, err
        code, _, err = prepared("fineweb_edu", "--val_tokens=150", "--tokens=1e3")
        assert code == 0, err
        read = data.Dataset("fineweb_edu")
    both = data.ByteTokenizer().decode([*read.split("val"), *read.split("train")])
    assert both == "".join(row["text"] + data.EOT for row in rows[:12])
    assert read.meta["tokens"] == {"val": 202, "train": 1010}


def test_hf(folder):
    """The GPT level of a run becomes a folder of Hugging Face, and comes back bit for bit, with its
    tokenizer; transformers finds the same logits in it. What this network lacks is refused."""
    try:
        import safetensors.torch as st
        import tokenizers as tk
    except ImportError as e:
        return f"SKIPPED: {e.name} is not installed"
    said, bpe = "", tk.Tokenizer(tk.models.BPE({"a": 0, "b": 1, data.EOT: 2}, []))
    with redirect_stdout(io.StringIO()):
        data.write(f"{folder}/data", data.HFTokenizer(bpe.to_str(), 7), "", train=["ab" * 99],
                   val=["ba" * 30])
    for name, how in (("llama", {"qk_norm": False, "tie_embeddings": True, "n_kv_head": 1}),
                      ("qwen", {})):
        run, to = f"{folder}/{name}", Path(folder, f"{name}-hf")
        code, _, err = command(train, flags(folder, name, **how, sample_tokens=0))
        assert code == 0, err
        command(hf, [f"--out_dir={run}", f"--to={to}"])
        still = flags(folder, "back", init_from=f"hf:{to}", max_steps=1, learning_rate=0, muon_lr=0,
                      sample_tokens=0, overwrite=True)
        code, out, err = command(train, [arg for arg in still if not arg.startswith("--n_")])
        assert code == 0 and "fresh: local" in out, err
        model_, state = checkpoint.load_model(run)
        back = checkpoint.load(f"{folder}/back/last.pt")
        for key, weight in state["model"].items():
            if not key.startswith("local."):  # of the embeddings all but [MASK]
                assert torch.equal(weight[:7], back["model"][key][:7]), key
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            said = "; SKIPPED transformers: it is not installed"
            continue
        tokens = torch.randint(7, (2, 16), generator=generator())
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(to)(tokens).logits
            assert diff(model_.logits_of(tokens), theirs) < 1e-4
    config, weights = json.loads((to / "config.json").read_text()), to / "model.safetensors"
    st.save_file(st.load_file(weights) | {"model.q.bias": torch.ones(16)}, weights)
    for word, changes in (
        ("architecture", {"architectures": ["MistralForCausalLM"]}), ("q.bias", {}),
        ("rope_type", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}),
        ("sliding_window", {"sliding_window": 8}), ("attention_bias", {"attention_bias": True}),
        ("tokens at most", {"max_position_embeddings": 8}), ("eos_token_id", {"eos_token_id": 9}),
    ):
        (to / "config.json").write_text(json.dumps(config | changes))
        refuses(word, hf.read_folder, folder=to, seq_len=16)
    return f"Llama and Qwen3 out and in, 7 refused{said}"


def test_bench_and_tools(folder):
    """bench.py measures each kind of run to its table; the animation is an SVG that ends with the
    text; the plot shows the levels of each run."""
    trained(folder)
    trained(folder, "block", **BLOCK)
    decode, svg = ["--tokens=8", "--rounds=1"], Path(folder, "a.svg")
    for argv, rows in (
        (["train", *flags(folder, rounds=1, steps=1)], ["this run", "as a GPT"]),
        (["memory", *flags(folder), "--lengths=16,32"], ["    16", "    32"]),
        (["rounds", "--sizes=nano", "--batches=1,2", "--seconds=0.1"], ["nano "] * 2),
        (["decode", f"--out_dir={folder}/run", "--batches=2", *decode],
         ["    2  gpt", "    2  verify", "    2  block"]),
        (["decode", f"--out_dir={folder}/block", "--batches=1", *decode],
         ["    1  K = 1", "    1  K = 2", "    1  K = 4"]),
    ):
        code, out, err = command(bench, argv)
        assert code == 0 and all(f"\n{row}" in out for row in rows), (argv, out, err)
        assert "--batches=2" not in argv or " 4.00  " in out, "S tokens a pass in mode block"
    tools = [SimpleNamespace(**runpy.run_path(str(HERE / "tools" / f"{name}.py")))
             for name in ("animate", "plot")]
    code, _, err = command(tools[0], [f"--out_dir={folder}/run", f"--svg={svg}"])
    frames = ElementTree.parse(svg).getroot().findall("{http://www.w3.org/2000/svg}g")
    assert code == 0 and "240 tokens" in "".join(frames[-1].itertext()) and len(frames) > 20, err
    code, _, err = command(tools[1], [f"{folder}/run", f"{folder}/block", f"--svg={svg}"])
    if "pip install matplotlib" in err:
        return "SKIPPED the plot: matplotlib is not installed"
    assert code == 0 and svg.read_text().count("line2d") > 3, err


def test_ngram():
    """Against counts in dictionaries, for orders 1, 2 and 4, and histories that never occurred."""
    text, worst = [x % 7 for x in b"the quick brown fox, the quicker fox" * 5], Worst()

    def slow(h):  # p (9,) of the next token by the formula; h: a list, the tokens before
        p, n = slow(h[1:]) if h else [1 / 9] * 9, len(h)
        count = Counter(text[i + n] for i in range(len(text) - n) if text[i : i + n] == h)
        if not count:
            return p
        rest = 0.75 * len(count)
        return [(max(count[x] - 0.75, 0) + rest * p[x]) / count.total() for x in range(9)]

    for order in (1, 2, 4):
        before = [([0, 0, 0] + text + [8, 8, 8])[i : i + order - 1] for i in (*range(60), 183)]
        fast = NGram(text, 9, order).probabilities(np.array(before, np.int64))
        want = torch.tensor([slow(h) for h in before], dtype=torch.float64)
        worst.note(f"order {order}", torch.from_numpy(fast), want)
    return worst.within(1e-12)


def test_muon():
    """The steps of torch.optim.Muon, which computes in bf16, for wide and tall matrices, and for
    heads, pieces of rows or columns, as if each were a matrix of its own."""

    def cut(x, heads, dim):  # (2, rows, columns) -> the heads of the two matrices
        return [matrix for piece in x.chunk(heads, dim) for matrix in piece]

    draw, worst = partial(torch.randn, generator=generator()), Worst()
    for rows, columns, *how in ((48, 48, 1, 1), (48, 96, 1, 1), (96, 48, 1, 1),
                                (48, 96, 4, 1), (48, 96, 4, 2)):
        start = draw(2, rows, columns)
        ours = [torch.nn.Parameter(x.clone()) for x in start]
        theirs = [torch.nn.Parameter(x.clone()) for x in cut(start, *how)]
        a = Muon([{"params": ours, "heads": how[0], "by_columns": how[1] == 2}], 0.1, 0.1)
        b = torch.optim.Muon(theirs, 0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for g in draw(3, *start.shape):
            for p, grad in zip([*ours, *theirs], [*g, *cut(g, *how)], strict=True):
                p.grad = grad
            a.step()
            b.step()
        for p, want in zip(cut(torch.stack(ours), *how), theirs, strict=True):
            worst.note(f"{rows} x {columns} in {how[0]}", p, want)
    return worst.within(4e-3)


@torch.no_grad()
def test_evaluate():
    """Every figure against the oracle: NLLs of the last three quarters of each window, acceptances
    sum_x min(p, q) by place, the bound of fixed noise; whatever the batch size."""
    worst = Worst()
    for shape in ({"block_size": 4}, {"block_size": 4, "local_window": 0},
                  {"block_size": 2, "context": "block"}):
        net, slow = tiny_model(seq_len=16, vocab_size=7, **shape), {}
        c, state = net.config, net.state_dict()
        x0 = torch.randint(7, (5, 16), generator=generator(1))
        if c.context == "causal":
            masks = torch.full_like(x0, 7)
            nlls = reference.reference_nlls(state, c, x0, masks)
            slow = {"gpt": nlls["gpt"][:, 3:], "draft": nlls["masked"][:, 4:]}
            p = reference.reference_logits(state, c, x0).softmax(-1)[:, 3:-1]
            q = reference.reference_block_logits(state, c, x0, masks).softmax(-1)[:, 4:]
            a = torch.minimum(p, q).sum(-1).view(5, 3, 4).mean(dim=(0, 1))[1:]
            worst.note("acceptance", torch.tensor(eval.evaluate(net, x0).acceptance), a)
            control = NGram(x0.flatten(), 7, order=3)
            nll, accepted = eval.score_ngram(net, control, x0)
            pairs = x0.unfold(1, 2, 1)[:, 2:-1].reshape(-1, 2)  # before each of the scored tokens
            q = torch.from_numpy(control.probabilities(pairs.numpy())).view(5, 12, 7)
            worst.note("n-gram", nll[:, 4:], -q.gather(-1, x0[:, 4:, None])[..., 0].log())
            worst.note("n-gram", accepted[:, 4:], torch.minimum(p, q).sum(-1))
        if not c.local_window:
            noisy = all_blocks(x0, c.block_size, 7, generator(0))
            nll = reference.reference_nlls(state, c, x0, noisy.xt)["masked"]
            slow["bound"] = (nll * noisy.weight * c.block_size)[:, 4:]
        for found in (eval.evaluate(net, x0, batch=batch).nll for batch in (2, 5)):
            assert found.keys() == slow.keys()
            for name, nll in slow.items():
                means = nll.mean(dim=1)
                want = torch.stack([means.mean(), means.std() / 5**0.5])  # and its standard error
                worst.note(name, torch.tensor(found[name]), want)
    ar = eval.evaluate(tiny_model(seq_len=16, block_size=4, local_window=0), x0, ar=True)
    assert ar.nll.keys() == {"gpt"} and ar.acceptance == []
    assert eval.tokens_a_round([0.5, 0.5, 0.2]) == 1 + 0.5 + 0.25 + 0.05
    uniform = CascadeLM(CascadeConfig(7, 16, 4, n_layer=1))  # all levels alike: drafts are accepted
    assert eval.written_rounds(uniform, x0) == (4.0, 0.0)
    assert eval.written_rounds(uniform, x0[:1, :8]) == (4.0, None)  # a round of 5, one of 1
    return worst.within(5e-6)


# ---- training, and what is refused ---------------------------------------------------------------


def test_batches():
    """A step's tokens and noise, drawn for the global batch: pieced together from the processes and
    micro-batches they are the same; every step has others; a seed gives them again."""
    text = np.random.default_rng(0).integers(0, 9, 500)

    def drawn(how, step=3, world=1, micro=0):  # x0, xt and weight (B, N) of a step
        s = SimpleNamespace(**train.DEFAULTS | TINY | how | {"micro_batch": micro})
        found = [train.draw_batches(s, 9, text, step, rank, world) for rank in range(world)]
        assert found[0][1] == (16 if s.corruption == "all" else 4), "target blocks"
        batches = [batch for batches, _ in found for batch in batches]
        x0, xt, index, weight = zip(*batches, strict=True)
        weight = [torch.zeros(x.shape).view(-1).index_put((i,), w).view(x.shape)
                  for x, i, w in zip(x0, index, weight, strict=True)]
        return [torch.cat(x) for x in (x0, xt, weight)]

    for how in ({}, {"noise": "balanced"}, {"noise": "uniform", "corruption": "target"}):
        x0, xt, weight = whole = drawn(how)
        assert (xt[weight > 0] == 9).all() and ((xt == x0) | (xt == 9)).all(), how
        for split in ({}, {"world": 2}, {"micro": 1}, {"micro": 3}, {"world": 2, "micro": 1}):
            torch.testing.assert_close(whole, drawn(how, **split), rtol=0, atol=0)
        assert not torch.equal(x0, drawn(how, step=4)[0]), how


def test_loss():
    """The terms of the loss by their formulas, as a micro-batch's share of the global means."""
    gpt = torch.rand(2, 14, generator=generator())  # 14 next tokens of 2 of 4 sequences
    masked, weight = torch.rand(2, 7, generator=generator(1))  # 7 masked tokens of 20 blocks in all
    s, worst = SimpleNamespace(**train.DEFAULTS | TINY | {"seq_len": 15}), Worst()
    both = torch.stack([gpt.sum() / 56, (weight * masked).sum() / 20])
    worst.note("cascade", train.loss_terms(s, NLLs(gpt, masked), weight, 20), both)
    worst.note("bound", train.loss_terms(s, NLLs(masked=masked), weight, 20), both[1:])
    assert train.loss_weights(s) == {"gpt": 1.0, "draft": s.draft_weight}
    return worst.within(1e-6)


def test_processes(folder):
    """Micro-batches, and two processes of torchrun with micro-batches of their own, end with the
    weights of one pass in one process, but for rounding; a mistake is said once."""
    how = {"max_steps": 4, "eval_every": 2, "eval_windows": 1,  # fewer windows than processes
           "local_window": 0, "soft": 0, "noise": "uniform"}  # as many masks as chance has it
    whole, worst = trained(folder, **how), Worst()
    found = {f"micro-batch {n}": trained(folder, f"m{n}", **how, micro_batch=n) for n in (1, 3)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py",
                *flags(folder, "two", **how, micro_batch=1)]
    running = started(*torchrun)
    out, err = running.communicate()
    assert running.returncode == 0 and out.count("device ") == 1, err
    found["processes"] = checkpoint.load(f"{folder}/two/last.pt")
    for name, state in found.items():
        for key, p in state["model"].items():
            worst.note(name, p, whole["model"][key])
        worst.note("final", *(torch.tensor(x["final"]["nll"]["gpt"]) for x in (state, whole)))
    _, err = started(*torchrun).communicate()
    assert err.count("holds a run") == 1, err
    return worst.within(1e-5)


def test_resume_bitwise(folder):
    """Killed without warning, or stopped by Ctrl-C or SIGTERM, which finish the step, save, and
    print the command that goes on: resumed, the weights, optimizers and log are, bit for bit, those
    of a run without interruption. A new run replaces an old one by its first checkpoint."""
    how = {"max_steps": 200, "eval_every": 50, "log_every": 1}
    whole, old = trained(folder, "whole", **how), trained(folder, max_steps=4)
    argv = flags(folder, **how, overwrite=True)
    for number, at in ((signal.SIGINT, 3), (signal.SIGKILL, 60), (signal.SIGTERM, 120),
                       (signal.SIGKILL, 160)):
        running = started("train.py", *argv)
        next(line for line in running.stdout if line[11:12] == "/" and int(line[5:11]) >= at)
        last = checkpoint.load(f"{folder}/run/last.pt")
        assert at > 3 or last["settings"] == old["settings"], "replaced before the first checkpoint"
        running.send_signal(number)
        out, err, code = running.stdout.read(), running.stderr.read(), running.wait()
        last, best = (checkpoint.load(f"{folder}/run/{name}.pt") for name in ("last", "best"))
        assert code == (-9 if number == signal.SIGKILL else 128 + number) and not err, (code, err)
        if number != signal.SIGKILL:
            *_, said, told = out.splitlines()
            assert said.startswith(f"stopped at step {last['step']}"), said
            assert best["settings"]["max_steps"] == 200, "best.pt is of the run that was replaced"
            python, script, *argv = shlex.split(told)
            assert (python, script) == ("python", "train.py"), told
    again = trained(folder, argv=argv)
    for name in ("model", "optimizers", "figures", "final", "best", "best_step"):
        torch.testing.assert_close(whole[name], again[name], rtol=0, atol=0)
    assert Path(folder, "run", "log.csv").read_text().splitlines() == again["log"]
    logs = [[line.split(",") for line in state["log"]] for state in (whole, again)]
    ours, theirs = ([[row[0], *row[2:-2]] for row in log] for log in logs)  # without the clock's
    assert ours == theirs and len(ours) == 1 + 200
    return f"stopped 4 times, at last resumed at step {last['step']} of 200"


def test_starting_points(folder):
    """From another run's weights: a GPT learns to draft; what is not given, shape and noise, comes
    from there; a local head of another shape is fresh. With a teacher both levels learn its p."""
    still = {"max_steps": 1, "learning_rate": 0, "muon_lr": 0}
    gpt = trained(folder, "gpt", draft_weight=0, local_window=0, soft=0)
    new = trained(folder, init_from=f"{folder}/gpt", local_window=3, **still)
    for name, p in gpt["model"].items():
        assert torch.equal(p, new["model"][name]), name
    assert new["final"]["nll"]["gpt"] == gpt["final"]["nll"]["gpt"]
    other = trained(folder, "other", init_from=f"{folder}/run", local_window=2, **still)["model"]
    assert (other["local.mlp.down_proj.weight"] == 0).all(), "a head that fits in part is fresh"
    block = trained(folder, "block", **BLOCK | {"noise": "clipped", "clip_low": 0.4})
    again = trained(folder, "again", [f"--init_from={folder}/block", f"--dataset={folder}/data",
                                      "--max_steps=1", f"--out_dir={folder}/again"])
    assert again["config"] == block["config"]
    assert all(again["settings"][name] == block["settings"][name] for name in checkpoint.METHOD)
    taught = trained(folder, "taught", teacher=f"{folder}/gpt", soft=1, max_steps=60)
    return within(taught["final"]["nll"]["gpt"][0], 1.5, "nats of a GPT level taught by p alone")


def test_configs(folder):
    """Every config file trains, made tiny, and is scored to its kind's rows and the n-gram's."""
    rules = [f"{rule}, K = {K}" for rule in ("left_to_right", "confidence") for K in (1, 2, 8)]
    kinds = {"ar.py": ("1 gpt\n", ["GPT level"]),
             "bd3lm.py": ("1 bound\n", ["bound", *rules, "threshold", "entropy"])}
    cascade = "1 gpt + 1 draft\n", ["GPT level", "draft: one pass a block", "  as the sampler"]
    tiny_data(folder, "To be, or not to be. " * 40)
    how = {"seq_len": 64, "max_steps": 2, "max_minutes": 0, "eval_windows": 2, "overwrite": True}
    argv = [arg for arg in flags(folder, **how) if not arg.startswith("--block_size")]
    names, ngrams = sorted(path.name for path in (HERE / "config").glob("[a-z]*.py")), set()
    for name in names:
        loss, levels = kinds.get(name, cascade)
        code, out, err = command(train, [str(HERE / "config" / name), *argv])
        assert code == 0 and f"loss       {loss}" in out and "300 tokens in " in out, (name, err)
        code, out, err = command(eval, [f"--out_dir={folder}/run"])
        _, _, *rows, ngram = out.splitlines()
        assert code == 0 and len(rows) == len(levels), (name, out, err)
        for row, level in zip(rows, levels, strict=True):
            assert row.startswith(level) and (" <= " in row) == (level == "bound"), (name, row)
        ngrams.add(ngram[:60])
    assert len(ngrams) == 1 and "5-gram" in ngrams.pop()


def test_refusals():
    """A call that cannot work, or an option that would be ignored, ends in one line."""
    net, block = tiny_model(vocab_size=5), tiny_model(context="block", vocab_size=5)
    x = torch.zeros(1, 3).long()
    cascade, gpt = (CascadeConfig(local_window=w).check_training for w in (6, 0))
    noise = {"x0": x, "block_size": 3, "mask_id": 9, "generator": generator()}
    for word, call, how in (
        ("multiple", CascadeConfig, {"seq_len": 15}), ("n_layer", CascadeConfig, {"n_layer": 0}),
        ("divisible", CascadeConfig, {"n_embd": 100}), ("odd", CascadeConfig, {"head_dim": 5}),
        ("local_window", CascadeConfig, {"context": "block"}),
        ("noise=full", cascade, {"noise": "balanced"}),
        ("set soft", cascade, {"noise": "full", "teacher": True}),
        ("local_window=0", cascade, {"noise": "full", "draft_weight": 0}),
        ("context=block", gpt, {"noise": "uniform", "corruption": "target"}),
        ("a teacher", gpt, {"noise": "full", "draft_weight": 0, "soft": 0.5}),
        ("exceed", net, {"x0": x.repeat(1, 6)}), ("needs xt", block, {"x0": x}),
        ("whole blocks", net, {"x0": x[:, :2], "xt": x[:, :2], "index": x[0]}),
        ("int64", net, {"x0": x, "xt": x, "index": x[0] == 0}),
        ("soft targets", block, {"x0": x, "xt": x, "index": x[0], "soft": 0.5}),
        ("balanced", all_blocks, noise | {"noise": "white"}),
        ("rates", target_block, noise | {"rates": Rates(m_min=0)}),
        ("weights", masked_diffusion_loss, {"nll": x[0], "weight": x, "num_blocks": 1}),
    ):
        refuses(word, call, **how)
    for word, model_, how in (
        ("mode", net, {"mode": "draft"}), ("auto or block", block, {"mode": "verify"}),
        ("drafts", net, {"drafts": 3}), ("drafts", net, {"mode": "gpt", "drafts": 2}),
        ("top_p", net, {"top_p": 1.5}), ("above 0", net, {"top_p": 0.0}),
        ("passes", net, {"mode": "block", "passes": 2}), ("rule", net, {"rule": "random"}),
        ("passes", block, {"rule": "entropy", "passes": 2}), ("limit", block, {"limit": 0.5}),
        ("unknown option tau", net, {"tau": 1}), ("number", net, {"drafts": "auto"}),
    ):
        refuses(word, partial(sample.generate, model_, [[1]], 3), **how)
    for prompts, count in (([[]], 3), ([], 3), ([[5]], 3), ([[-1]], 3), ([[1]], -1)):
        refuses("prompt", sample.generate, model=net, prompts=prompts, max_new_tokens=count)


def test_mistakes(folder):
    """A user's mistake: exit code 2, one line on stderr that names it, and out_dir untouched; a bug
    keeps its traceback."""
    trained(folder)
    trained(folder, "gpt", draft_weight=0, local_window=0, soft=0)
    run, other = Path(folder, "run"), tiny_data(f"{folder}/other", "xyz, zyx. " * 60)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    Path(folder, "bad.pt").write_bytes(before["last.pt"][:5000])
    torch.save({"model": {}}, f"{folder}/foreign.pt")
    broken = tiny_data(f"{folder}/broken")
    Path(broken, "val.bin").write_bytes(b"{")
    Path(folder, "latin-1.txt").write_bytes(b"\xff")
    this, fresh = f"--out_dir={run}", partial(flags, folder, "fresh")
    mistakes = {train: (
        ("holds a run", *flags(folder)), ("did you mean", *fresh(n_layers=2)),
        ("no config file", "config/nothing.py"), ("int", *fresh(n_layer="two")),
        ("must be", *fresh(dtype="float16")), ("max_minutes", *fresh(max_steps=0)),
        ("multiple", *fresh(seq_len=18)), ("noise=full", *fresh(noise="balanced")),
        ("seq_len / 4", *fresh(**BLOCK, block_size=8)), ("more text", *fresh(seq_len=400)),
        ("no dataset", *fresh(dataset="nothing")), ("damaged", *fresh(dataset=broken)),
        ("not on this machine", *fresh(device="cuda:9")), ("no checkpoint", *fresh(teacher="no")),
        ("there is no", *fresh(init_from="resume")), ("or less", *fresh(soft=1.5)),
        ("cannot teach", *fresh(seq_len=32, teacher=run)), ("or more", *fresh(batch_size=0)),
        ("damaged", *fresh(init_from=f"{folder}/bad.pt")),
        ("format", *fresh(init_from=f"{folder}/foreign.pt")),
        ("vocabulary", *fresh(init_from=run, dataset=other)),
        ("leave n_embd, or", *fresh(init_from=run, n_embd=32)),
        ("other data", this, "--init_from=resume", f"--dataset={other}"),
        ("leave learning_rate, or", this, "--init_from=resume", "--learning_rate=1"),
        ("not finite", *fresh(learning_rate=1e30, grad_clip=0, final_lr=1, warmup_steps=0)),
        ("make room", *fresh(out_dir=f"{folder}/bad.pt/x")),
    ), eval: (
        ("no checkpoint", "--out_dir=nothing"), ("no split", this, "--split=test"),
        ("vocabulary", this, f"--dataset={other}"),
    ), sample: (
        ("not UTF-8", this, f"--prompt=FILE:{folder}/latin-1.txt"), ("2 tokens", this, "--stop=ab"),
        ("no 'q'", this, "--prompt=q"), ("or gpt", f"--out_dir={folder}/gpt", "--mode=verify"),
        ("text file", this, "--prompt=FILE:nothing"), ("or less", this, "--drafts=4"),
    )}
    for script, table in mistakes.items():
        for word, *argv in table:
            code, _, err = command(script, argv)
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (word, err)
            assert word in err, (word, err)
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}, "a file was touched"
    assert not list(Path(folder, "fresh").glob("*.pt")), "something was saved"
    with patch.object(train, "make_optimizers", side_effect=ZeroDivisionError):
        TestCase().assertRaises(ZeroDivisionError, command, train, fresh())


# ---- decoding ------------------------------------------------------------------------------------


def window_of(row, N, unit=1):
    """(begin, end) of a text's window: it moves on by half whenever it is full."""
    half, end = math.ceil(N / unit / 2) * unit, len(row) // unit * unit
    return max(0, (end - N) // half + 1) * half, end


def slow_states(net, text, lo):
    """What the oracle's trunk gives for `text`, a list, whose tokens from lo on are a block."""
    rule = reference.draft_rule(lo, reference.context_rule(net.config))
    return reference.reference_trunk(net.state_dict(), net.config, torch.tensor([text]), rule)


def slow_log_q(net, h, text, i):
    """log q (V,) of token i of a block with states h, given the tokens of `text` before it."""
    c, state, here = net.config, net.state_dict(), h[:, i]
    if c.local_window:
        left = reference.left_of(c, torch.tensor([text]), i)
        here = reference.reference_local(state, c, here, left)
    return reference.reference_head(state, c, here)[0].log_softmax(-1)


def slow_rule(rule, log_p, masked, count, limit):
    """Which of the places `masked` of a block to reveal by log_p {place: (V,)}, ties leftmost."""
    sure = {i: log_p[i].max().exp().item() for i in masked}
    h = {i: -(log_p[i].exp() * log_p[i]).sum().item() for i in masked}
    best = sorted(masked, key=lambda i: 1e-6 * i - sure[i])
    if rule == "left_to_right":
        return masked[:count]
    if rule == "confidence":
        return best[:count]
    if rule == "threshold":
        return [i for i in masked if sure[i] >= limit] or best[:1]
    rising = sorted(masked, key=lambda i: 1e-6 * i + h[i])
    before = itertools.accumulate((h[i] for i in rising), initial=0.0)  # of the smaller ones
    return [i for i, x in zip(rising, before, strict=False) if x <= limit]


def slow_block(net, before, block, rule="confidence", passes=1, limit=0.0, truth=None):
    """(block with a token in the place of each mask, their NLL, how many passes it took), behind
    the text `before`, by the oracle: the likeliest tokens, or those of `truth`."""
    lo, text, nll, n = len(before), before + block, torch.zeros(()), 0
    while masked := [i for i, token in enumerate(text) if token == net.config.mask_id]:
        h, new = slow_states(net, text, lo), masked
        if net.config.context == "block":
            log_p = {i: slow_log_q(net, h, text, i) for i in masked}
            new = slow_rule(rule, log_p, masked, math.ceil(len(masked) / max(1, passes - n)), limit)
        for i in sorted(new):
            log_q = slow_log_q(net, h, text, i)
            text[i] = truth[i - lo] if truth else log_q.argmax().item()
            nll = nll - log_q[text[i]]
        n += 1
    return text[lo:], nll, n


def wrong_drafter(net):
    """The same GPT level, but drafts from another [MASK]."""
    other = copy.deepcopy(net)
    other.embed_tokens.weight.data[-1].normal_(generator=generator(5))
    return other


PROMPTS = [[1], [2, 3, 4], [0, 1] * 7, [4] * 15, [3, 1, 2] * 12]


@torch.no_grad()
def test_decoding_greedy():
    """At temperature 0 `verify` writes what `gpt` writes, and that what a loop without a cache
    does: 150 tokens past the end of the context, prompts of five lengths, a batch as each row
    alone, for several D. A wrong drafter changes the passes and nothing else."""
    passes = []
    for shape in SHAPES[0], SHAPES[1], SHAPES[4]:
        net, want = tiny_model(vocab_size=5, **shape), [[*row] for row in PROMPTS]
        for row, _ in itertools.product(want, range(150)):
            begin, _ = window_of(row, 15)
            row.append(net.logits_of(torch.tensor([row[begin:]]))[0, -1].argmax().item())
        *_, step = sample.generate_stream(net, PROMPTS, 150, temperature=0, mode="gpt")
        assert step.rows == want and step.passes == step.tokens == 750, shape
        for drafts, drafter in itertools.product((0, 1, 2), (net, wrong_drafter(net))):
            how = {"temperature": 0, "mode": "verify", "drafts": drafts}
            *_, step = sample.generate_stream(drafter, PROMPTS, 150, **how)
            assert step.rows == want, (shape, drafts)
            assert sample.generate(drafter, PROMPTS[2:3], 150, **how) == want[2:3], shape
            kinds = Counter(itertools.chain(*step.kinds))
            assert 0 < sum(step.accepted) <= kinds[sample.DRAFT] and step.tokens == 750
            c = kinds[sample.GPT] - step.passes / 2  # each round writes t, and this many c
            assert 0 <= c <= step.passes / 2 >= len(step.accepted)
            passes.append(step.passes)
    assert passes[0] != passes[1]
    return f"18 times 750 tokens, at first in {passes[0]} passes, by a wrong drafter {passes[1]}"


@torch.no_grad()
def test_decoding_blocks():
    """Mode block at temperature 0 writes what the oracle does, past the end of the context: drafts
    of a causal context; by four rules, behind prompts that do not fill a block."""
    tiny = partial(tiny_model, vocab_size=5, n_layer=1, n_head=2, seq_len=12)
    block = tiny(std=0.5, block_size=4, context="block")
    for net, how in (
        (tiny(block_size=3), {}), (tiny(block_size=4, local_window=0), {}),
        (tiny(block_size=12), {}), (tiny(block_size=12, context="block"), {"passes": 5}),
        (block, {"passes": 3, "rule": "left_to_right"}), (block, {"passes": 4}),
        (block, {"rule": "threshold", "limit": 0.45}), (block, {"rule": "entropy", "limit": 1.3}),
    ):
        c, want = net.config, [[*row] for row in PROMPTS]
        for row in want:
            goal = len(row) + 26
            while len(row) < goal:
                begin, end = window_of(row, 12, c.unit)
                begun = (row[end:] + [5] * c.block_size)[: c.block_size]  # or nothing but masks
                new, _, _ = slow_block(net, row[begin:end], begun, **how)
                row += new[len(row) - end :][: min(goal, begin + 12) - len(row)]
        found = sample.generate(net, PROMPTS, 26, mode="block", temperature=0, **how)
        assert found == want, (c.context, how)
    for rule, limit in ("threshold", 0.9), ("entropy", 0.1):  # if none is given, as the help has it
        assert sample.resolve(block.config, {"rule": rule}).limit == limit, rule


@torch.no_grad()
def test_replay():
    """The NLL and the passes of a rule's own order, all blocks at once, are the oracle's."""
    net = tiny_model(std=0.5, seq_len=12, block_size=4, context="block", vocab_size=5, n_layer=1)
    x0, worst = torch.randint(5, (3, 12), generator=generator(1)), Worst()
    for rule, K, limit in (("left_to_right", 1, 0), ("left_to_right", 3, 0), ("confidence", 2, 0),
                           ("confidence", 4, 0), ("threshold", 1, 0.45), ("entropy", 1, 1.3)):
        nll, passes = eval.replay(net, x0, rule, K, limit)
        for row, lo in itertools.product(range(3), (0, 4, 8)):
            before, block = x0[row, :lo].tolist(), x0[row, lo : lo + 4].tolist()
            _, want, n = slow_block(net, before, [5] * 4, rule, K, limit, truth=block)
            worst.note(rule, nll[row, lo : lo + 4].sum(), want)
            assert passes[row, lo // 4] == n, (rule, K)
        assert limit == 0 or len(passes.unique()) > 1, f"{rule} chooses nothing"
    return worst.within(5e-6)


@torch.no_grad()
def test_decoding_cached():
    """A cached pass over text and a block behind it, at every place, rows of different lengths,
    equals the oracle's pass over all; both contexts. No trace of a noisy block remains."""
    worst = Worst()
    for shape, context in itertools.product(SHAPES, CONTEXTS):
        net = tiny_model(**shape, context=context)
        c, S = net.config, net.config.block_size
        x0, xt, _ = batch_for(net)
        cache = sample.BlockCache(c, 3)
        for first in range(0, c.seq_len - S + 1, c.unit):
            lengths = [first, (first + 2 * c.unit) % (c.seq_len - S + c.unit), 0]
            cache.length.zero_()
            sample.read(net, x0, cache, c.seq_len)  # of which each row keeps its part
            cache.length.copy_(torch.tensor(lengths))
            for T in (0, c.unit):  # the pass over a block alone leaves its noisy keys behind
                whole = [torch.cat([x0[r, : n + T], xt[r, :S]]) for r, n in enumerate(lengths)]
                new = torch.stack([text[n:] for text, n in zip(whole, lengths, strict=True)])
                h = sample.read(net, new, cache, T)
                for r, n in enumerate(lengths):
                    worst.note(context, h[r], slow_states(net, whole[r].tolist(), n + T)[0, n:])
    return worst.within(1e-5)


def slow_truncation(p, temperature, top_k, top_p):
    """p (V,) after temperature, top-k and top-p, one token after the other."""
    p = (p.double().log() / temperature).softmax(-1).tolist()
    falling, kept = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)], []
    total = sum(p[i] for i in falling)
    while sum(p[i] for i in kept) < top_p * total and len(kept) < len(falling):
        kept.append(falling[len(kept)])
    total = sum(p[i] for i in kept)
    return torch.tensor([p[i] / total if i in kept else 0.0 for i in range(len(p))])


def chi_square(rows, texts, exact):
    """How many standard deviations `rows` are off the probabilities `exact` of `texts` (M, N)."""
    count = Counter(map(tuple, rows))
    found, expected = torch.tensor([count[tuple(t)] for t in texts.tolist()]), exact * len(rows)
    assert (found[exact == 0] == 0).all(), "a token that was cut off was drawn"
    many = expected >= 5
    chi, df = ((found - expected) ** 2 / expected)[many].sum().item(), many.sum().item() - 1
    return (chi - df) / math.sqrt(2 * df)


@torch.no_grad()
def test_decoding_distribution():
    """Texts have the distribution of their level after temperature, top-k and top-p: chi-square of
    8,000 against all, enumerated. gpt and verify, with a wrong drafter too, across the end of a
    window; a block, its tokens one given the other, or one a pass, from the left or anywhere."""
    tiny = partial(tiny_model, vocab_size=3, seq_len=9, n_layer=1, n_head=2)
    causal, block, orders = tiny(), tiny(context="block"), [*itertools.permutations(range(3, 6))]

    def of_gpt(net, i, xt):  # logits (texts, V) of token i, given those of xt that are no mask yet
        return net.logits_of(xt[:, window_of(range(i), 9)[0] : i])[:, -1]

    def of_block(net, i, xt):
        noisy = xt.index_fill(1, torch.arange(3, 6), 3) if net is causal else xt  # drafts: masks
        return reference.reference_block_logits(net.state_dict(), net.config, xt, noisy)[:, i]

    worst, runs = 0.0, 0
    for logits_at, prompt, ways, decoders in (
        (of_gpt, [1, 2, 0, 1, 2], [range(5, 10)], [(causal, {"mode": "gpt"}), (causal, {}),
                                                   (causal, {"drafts": 1}),
                                                   (wrong_drafter(causal), {})]),
        (of_block, [1, 2, 0], orders[:1], [(causal, {"mode": "block"})]),
        (of_block, [1, 2, 0], orders[:1], [(block, {"rule": "left_to_right"})]),
        (of_block, [1, 2, 0], orders, [(block, {"rule": "random"})]),
    ):
        n = len(ways[0])
        texts = torch.tensor([prompt + [*t] for t in itertools.product(range(3), repeat=n)])
        for how in ((1.0, 0, 1.0), (0.7, 2, 1.0), (1.3, 0, 0.8), (0.9, 2, 0.7)):
            exact = torch.zeros(len(texts), dtype=torch.float64)
            for order in ways:
                p, xt = torch.ones_like(exact), texts.clone()
                xt[:, -n:] = 3
                for i in order:
                    logits = logits_at(decoders[0][0], i, xt)
                    q = torch.stack([slow_truncation(x, *how) for x in logits.softmax(-1)])
                    found = sample.probabilities(logits, how)
                    assert found.dtype == torch.float64 and diff(found, q) < 1e-6
                    p *= sample.pick(q, texts[:, i])
                    xt[:, i] = texts[:, i]
                exact += p / len(ways)
            options = dict(zip(("temperature", "top_k", "top_p"), how, strict=True))
            for net, more in decoders:
                runs += 1
                rows = sample.generate(net, [prompt] * 8000, n, **options, **more, seed=runs)
                worst = max(worst, chi_square(rows, texts, exact))
    return within(worst, 4, f"{runs} runs, chi-square, standard deviations above its mean")


@torch.no_grad()
def test_decoding_rounds():
    """In the rounds of verify the draft distributions are those of D + 1 masks, and with D = S - 1
    training's, place by place, by the oracle; and the mean of sum_i prod_{j <= i} min(1, p_j / q_j)
    is that of accepted drafts."""
    worst, excess = Worst(), []
    for D, shape in ((2, {"block_size": 3}), (4, {"block_size": 5, "local_window": 7}),
                     (2, {"block_size": 5}), (2, {"local_window": 0})):
        net = tiny_model(n_layer=1, n_head=1, vocab_size=5, **shape)
        c, state = net.config, net.state_dict()
        with patch.object(sample, "accept", wraps=sample.accept) as accept:
            stream = sample.generate_stream(net, [[1], [2, 3]] * 10, 30, temperature=1.0, drafts=D)
            next(stream)
            for step in stream:  # after a drafting pass
                drafted = copy.deepcopy([*zip(step.rows, step.pending, strict=True)])
                next(stream)  # after the reading pass
                _, q, *_ = accept.call_args.args  # (B, D, V)
                for r, (row, drafts) in enumerate(drafted):
                    if len(drafts) < D:
                        continue  # near the goal or the end of a window
                    begin, _ = window_of(row[:-1], c.seq_len)
                    text, lo = row[begin:] + drafts, len(row) - 1 - begin
                    p = reference.reference_logits(state, c, torch.tensor([text]))[0].softmax(-1)
                    h = slow_states(net, text[:lo] + [c.mask_id] * (D + 1), lo)
                    chance, expected = 1.0, 0.0
                    for i, draft in enumerate(drafts, lo + 1):
                        want = slow_log_q(net, h, text, i).exp()
                        worst.note("q", q[r, i - lo - 1], want)
                        chance *= min(1.0, (p[i - 1, draft] / want[draft]).item())
                        expected += chance
                    excess.append(step.kinds[r][len(row) :].count(sample.DRAFT) - expected)
    excess = torch.tensor(excess)
    off = abs(excess.mean().item()) / (excess.std().item() / math.sqrt(len(excess)))
    return within(off, 3.5, f"{worst.within(5e-6)}; {len(excess)} rounds, standard errors off")


@torch.no_grad()
def test_decoding_choice():
    """D is the fastest by the times of rounds and the acceptances; none where rounds are slow; an
    unvalidated model has its rounds counted. The local head's table changes no draft."""
    net = tiny_model(block_size=8, seq_len=24, n_layer=1)
    for slow, want in ({0: 1, 1: 1.1, 3: 1.2, 7: 9}, 3), ({0: 1, 1: 3, 3: 3, 7: 3.1}, 7), (
            {0: 1, 1: 9, 3: 9, 7: 20}, 0):
        with patch.object(sample, "time_rounds", return_value=slow):
            D, why = sample.choose_drafts(net, [[1]], [0.9] * 7)
            assert D == want and "last validation" in why, (D, why)
    D, why = sample.choose_drafts(net, [[1]] * 2, temperature=1.0)
    assert D in (0, 1, 3, 7) and "rounds written for it" in why
    drafter, h, u = sample.Drafter(net), torch.randn(2, 7, 32), torch.rand(2, 7).double()
    left, found = torch.tensor([[3] * 9, [1] * 9])[:, : net.config.local_window], []
    for _ in range(2):
        found.append(drafter(h, left, (1.0, 0, 1.0), u))
        assert (drafter.table is None) == (len(found) == 2)
        drafter.table = None
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_decoding_ends():
    """A stop token ends its row, is left out, and counts in no prompt; [MASK] is never written,
    however hot; passes are those of the network; a seed repeats a text; a model in bfloat16."""
    net, block = tiny_model(vocab_size=5), tiny_model(context="block", vocab_size=5)
    for mode, stop_token in itertools.product(("gpt", "verify", "block"), range(5)):
        greedy = partial(sample.generate, net, PROMPTS, 40, temperature=0, mode=mode)
        rows = greedy(stop_token=stop_token)
        for row, prompt, whole in zip(rows, PROMPTS, greedy(), strict=True):
            text = whole[len(prompt) :]
            end = text.index(stop_token) if stop_token in text else len(text)
            assert row == whole[: len(prompt) + end], (mode, stop_token)
    rows = sample.generate(block, PROMPTS, 40, temperature=100.0, passes=1)
    assert {*itertools.chain(*rows)} == {*range(5)}
    for (each, mode), count in itertools.product(
        ((net, "gpt"), (net, "verify"), (net, "block"), (block, "block")), (1, 2, 7, 13)
    ):
        with patch.object(each, "trunk", wraps=each.trunk) as trunk:  # one token: nothing to read
            *_, step = sample.generate_stream(each, [[1]], count, mode=mode)
            assert step.passes == trunk.call_count, (mode, count)
    rows = [sample.generate(net, [[1]], 30, seed=seed) for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2], "the seed"
    assert machine.decode_in("bfloat16", net) == "bfloat16"
    kinds = {name.split(".")[-2]: p.dtype for name, p in net.named_parameters()}
    assert kinds["q_norm"] == torch.float32 and kinds["q_proj"] == torch.bfloat16
    for mode in ("gpt", "verify", "block"):
        assert len(sample.generate(net, [[1]], 20, mode=mode)[0]) == 21
    assert machine.decode_in("auto", tiny_model()) == "float32" or torch.cuda.is_available()


def test_sample_command(folder):
    """A prompt of text, of a file (without its byte order mark, line ends as they are) or of
    standard input; special names as --stop; a GPT; plain text in pipes, its figures on stderr."""
    trained(folder, max_steps=60)
    run, file, texts = f"--out_dir={folder}/run", Path(folder, "prompt.txt"), set()
    file.write_bytes(b"\xef\xbb\xbfabc abd,")
    for prompt in ("abc abd,", f"FILE:{file}", "-"):
        with patch.object(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"abc abd,"))):
            code, out, err = command(sample, [run, f"--prompt={prompt}", "--stop=."])
        assert code == 0 and "tokens/s in float32" in err and "\x1b" not in out, err
        texts.add(out)
    assert len(texts) == 1 and out.startswith("abc abd,") and "." not in out, texts
    file.write_bytes(b"\xef\xbb\xbfa\r\nb\rc")
    assert data.read_text(file) == "a\r\nb\rc"
    assert data.token_id(data.ByteTokenizer(), data.EOT) == 255
    assert data.token_id(data.CharTokenizer("\n\\n"), r"\n") == 0
    trained(folder, "gpt", draft_weight=0, local_window=0, soft=0)
    _, out, err = command(sample, [f"--out_dir={folder}/gpt", "--num_samples=2"])
    assert out.count("--- sample") == 2 and err.startswith("1000 tokens in 1000 passes"), err


def test_view():
    """A frame on a small terminal: the end of the text and what is proposed, each token in its
    color, no line too long, no control character; the other screen is left behind."""
    chars, screen, size = "ab\u6f22\n\t\x1b", io.StringIO(), os.terminal_size((7, 4))
    step = sample.Step([[0] * 25 + [1, 2, 2, 3, 0, 4, 5, 1]], [[0] * 30 + [1, 2, 2]], [[0, 6]])
    with patch.object(sys, "stdout", screen), patch("shutil.get_terminal_size", return_value=size):
        with other_screen():
            show(step, data.CharTokenizer(chars).decode, mask_id=6)
    lines = [f"aaaaaa{END}", f"ab\u6f22\u6f22{END}",  # each of the latter is two columns wide
             f"a{END}{YELLOW} {END}{GREEN} b{END}{DIM}a{END}{DIM}_{END}", f"{DIM}propos{END}"]
    frame = "\x1b[?1049h\x1b[?25l\x1b[H\x1b[J" + "\n".join(lines) + "\x1b[?25h\x1b[?1049l"
    assert screen.getvalue() == frame, repr(screen.getvalue())


# ---- the runner ----------------------------------------------------------------------------------


def run(name):
    """(verdict, seconds, what to say) of one test."""
    torch.set_num_threads(1)  # the models here are tiny: a second thread would only wait
    test, began, verdict = globals()[name], time.perf_counter(), "PASS"
    try:
        with tempfile.TemporaryDirectory() as folder:  # for those that ask for one
            line = test(folder) if inspect.signature(test).parameters else test()
        line = line or " ".join(test.__doc__.split())[:90] + " ..."  # nothing measured
    except Exception as e:
        verdict, line = "FAIL", f"{type(e).__name__}: {e}"
        traceback.print_exc()
    return verdict, time.perf_counter() - began, line


def main(words):
    """Run the tests whose name holds one of `words`, or all; 0 if none failed."""
    names = [name for name in globals() if name.startswith("test_")]
    names = [name for name in names if not words or any(w in name[5:] for w in words)]
    if not names:
        print(f"error: no test has {' or '.join(words)} in its name", file=sys.stderr)
        return 2
    count = Counter()
    workers = min(len(names), os.cpu_count() or 1, 4)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for name, (verdict, seconds, line) in zip(names, pool.map(run, names), strict=True):
            count[verdict] += 1
            print(f"{verdict}  {name[5:]:24s} {seconds:5.1f}s  {line}", flush=True)
    print(f"{count['PASS']} passed, {count['FAIL']} failed")
    return 1 if count["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
