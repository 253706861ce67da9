"""The measures: likelihoods with their errors, drafts that are accepted, and judged samples.

    python eval.py --out_dir=out/nano                     every level, and rules at K passes
    python eval.py --out_dir=out/nano --drafts=true       tokens a pass of mode verify, and controls
    python eval.py --out_dir=out/nano --schedules=true    what a choice of passes can win at most
    python eval.py --out_dir=out/nano --exact=true        the bound against the truth, S <= 8
    python eval.py --out_dir=out/nano --samples=true --judge=out/judge     quality against speed
    python eval.py --out_dir=out/nano --json=true         one JSON object alone on stdout

Text is scored in windows of seq_len tokens, so models of one seq_len are scored on the same tokens:

    bound  <=  mean cross-entropy of masked tokens, averaged over k, how many of a block are masked
    gpt     =  NLL of the GPT level; the first token of a window, before which it has nothing to
               read, is the block level's. Of an AR model: its NLL
    rule K  =  NLL of what a decoding rule writes in K passes a block, replayed on the text
               (arXiv 2603.01367); "left_to_right 1" is one joint pass
    n-gram  =  the control: an interpolated n-gram of the training text

Noise and choices come from `seed`, drawn for all windows at once: the batch size changes nothing
beyond rounding. Models run in float32; sums are float64. `+-` is a standard error with windows
taken as independent: how far another text of this kind may lie.
"""

import math
import sys
import time
from contextlib import nullcontext
from csv import DictWriter
from json import dumps, loads
from pathlib import Path
from types import SimpleNamespace

from util.configurator import SettingsError, check_settings, guarded, override, public, writing

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from corrupt import corrupt_all_blocks, head_nll, head_overlap
from model import left_tokens
from sample import RULES, View, features, generate_stream
from util.checkpoint import find_checkpoint, load_model
from util.dataset import DataError, Tokenizer, load_dataset
from util.display import Progress, chart
from util.judge import check_vocabulary, judged, load_judge, repetition, token_entropy
from util.machine import choose_device
from util.ngram import NGram
from util.schedules import allocate, cheapest, equal_cuts, fit_excess, plan, predict_excess, price

# ---- settings ------------------------------------------------------------------------------------
out_dir = "out/nano"  # or a checkpoint file
dataset = ""  # empty: as trained
split = "val"
windows = 0  # how many to score, evenly spread; 0 = all
rule_windows = 256  # how many for the NLL of rules, which take K passes
ngram = 5  # order of the control; 0: none
batch = 32  # windows per forward pass
seed = 0  # of noise, choices and samples
drafts = False  # instead: what mode verify accepts, at temperature 1
schedules = False  # instead: passes that begin where it is best, and what an oracle would win
exact = False  # instead: enumerate all mask sets
exact_windows = 16
samples = False  # instead: generate text and have it judged
judge = ""  # an autoregressive checkpoint of this vocabulary, or hf:DIR, a Hugging Face model
rows = ""  # rule:K, threshold:tau and entropy:gamma, comma-separated; empty = a grid of them
num_samples = 64  # of each row, generated as one batch
sample_tokens = 0  # of each sample; 0 = the context
temperature = 1.0  # 1 = the trained distribution
csv = ""  # append the figures to this file
json = False
device = "auto"
# -------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))
RANGES = {
    **dict.fromkeys(("windows", "sample_tokens", "ngram"), (0, math.inf)), "seed": (0, 2**63 - 1),
    **dict.fromkeys(("rule_windows", "batch", "exact_windows", "num_samples"), (1, math.inf)),
}
KNOBS = {"threshold": "tau", "entropy": "gamma"}  # what sets an adaptive rule; the others: steps

NGRAM_TOKENS = 10**7  # the control counts no more than these: its tables stay in memory

# ---- scoring -------------------------------------------------------------------------------------


def step_generator(seed, step):
    """The generator of everything random in one training step; step -1 is the evaluation's."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step + 1) % 2**32)


def ar_input(x0, mask_id):
    """What objective "ar" reads to predict x0 (B, N): x0 shifted right behind one [MASK], which
    stands for the beginning of the text. So it is scored on the tokens that diffusion is."""
    return torch.cat([torch.full_like(x0[:, :1], mask_id), x0[:, :-1]], dim=1)


class Score(nn.Module):
    """-log p in nats, by level: what training and evaluation share. A module, so that DDP and
    fully_shard can wrap it."""

    def __init__(self, model, joint_target="text", gpt_target="text", teacher=None):
        super().__init__()
        self.model, self.teacher = model, teacher
        self.joint_target, self.gpt_target = joint_target, gpt_target

    def forward(self, x0, xt, index, drafted=None):
        """(gpt, single, joint, accept), float32, of tokens x0 (B, N) and noisy copies xt
        (copies, B, N), whose positions `index` (M,), flat, are masked:

        gpt     (B (N - 1),)  of tokens 1.. of each row by the GPT level; None without one
        single  (M,)          of the masked tokens, each by itself: the others are [MASK] to it
        joint   (M,)          of the masked tokens drawn in one pass, left to right through the
                              local head; without one, `single`
        accept  (A,)          cross-entropy of the local head's estimates of what the GPT level
                              accepts, of the masked tokens drafted (A,), ranks in `index`; or None

        xt (B, N) is a stream by itself: of `corrupt_target_block`, or what objective "ar" reads.
        """
        c, model, head, N = self.model.config, self.model, self.model.head_weight(), x0.shape[1]
        gpt, soft, accept, targets = None, {}, None, x0.expand_as(xt).flatten()[index]
        streams = xt[None] if xt.ndim == 2 else torch.cat([x0[None], xt])
        if xt.ndim == 2 or c.context == "block":
            h = model.stream_trunk(streams, index)
        else:  # the rows of the clean stream first, for they have a loss too
            clean = torch.arange(x0.numel(), device=x0.device).view(x0.shape)[:, :-1].flatten()
            h = model.stream_trunk(streams, torch.cat([clean, index + x0.numel()]), len(clean))
            clean, h = h.split([len(clean), len(index)])
            clean = model.norm(clean.detach() if model.frozen else clean)
            if torch.is_grad_enabled():  # evaluation is of the text
                soft["gpt"] = clean.detach(), head
                if self.teacher is not None:
                    soft["teacher"] = next_token_rows(self.teacher, x0)
            gpt = head_nll(clean, head, x0[:, 1:].flatten(), soft.get(self.gpt_target))
        if model.local is None:
            single = head_nll(model.norm(h), head, targets)
            return gpt, single, single, None
        # what predicts token i stands at i - 1; nothing for i = 0
        row = index % x0.numel()
        before, known = (row - row // N - 1).clamp(min=0), index % N > 0
        teacher = soft.get(self.joint_target)
        if teacher:
            teacher = teacher[0][before], teacher[1]
        ready, nll = model.local.ready(h), []
        for inside, soft in ((xt, None), (x0.expand_as(xt), teacher)):
            left = left_tokens(x0, inside, c.block_size, c.local_window, c.mask_id)
            hidden = model.local.hidden(h, left.flatten(0, -2)[index], ready)
            drawn = model.norm(h + model.local.down(hidden))
            nll.append(head_nll(drawn, head, targets, soft))
        single, joint = nll
        if c.acceptance and drafted is not None:
            label = head_overlap(clean[before[drafted]], drawn[drafted], head)
            logit = model.local.acceptance(hidden[drafted])
            accept = F.binary_cross_entropy_with_logits(logit, label, reduction="none")
        joint = joint if teacher is None else torch.where(known, joint, single)
        return gpt, single, joint, accept


@torch.no_grad()
def next_token_rows(model, x0):
    """(h (B (N - 1), C), head (V, C)): softmax(h head^T) is what a model with a GPT level says of
    tokens 1.. of each row of x0 (B, N)."""
    c, ar = model.config, model.config.objective == "ar"
    h = model.stream_trunk((ar_input(x0, c.mask_id) if ar else x0)[None])[0]
    h = h[:, 1:] if ar else h[:, :-1]  # an AR model reads token i one position later
    return model.norm(h.flatten(0, 1)), model.head_weight()


@torch.no_grad()
def token_nll(score, x0, masks):
    """{level: float64}: -log p, in nats, of the tokens of x0 (B, N) that masks (copies, B, N) hide.

    "single" and "joint", (copies, B, N), as `Score` has them and 0 where nothing is hidden. "gpt",
    (B, N), where there is a GPT level: of tokens 1.., 0 of the first. objective "ar": "gpt" alone.
    """
    c, where = score.model.config, score.model.cos.device
    x0, masks = x0.to(where), masks.to(where)
    if c.objective == "ar":
        every = torch.arange(x0.numel(), device=where)
        return {"gpt": score(x0, ar_input(x0, c.mask_id), every)[1].double().view(x0.shape)}
    index = masks.flatten().nonzero()[:, 0]
    gpt, *nll, _ = score(x0, x0.expand_as(masks).masked_fill(masks, c.mask_id), index)
    found = {} if gpt is None else {"gpt": F.pad(gpt.double().view(len(x0), -1), (1, 0))}
    for name, each in zip(("single", "joint"), nll, strict=True):
        found[name] = torch.zeros(masks.shape, dtype=torch.float64, device=where)
        found[name].view(-1)[index] = each.double()
    return found


def ar_nll(model, x0):
    """(B, N) float64: -log p of each token by a model of objective "ar"."""
    return token_nll(Score(model), x0, x0[None] == x0)["gpt"]


def window_terms(score, x0, mask, weight, scored=None):
    """{term: (B,) float64} in nats per token of windows x0 (B, N), with noise mask, weight (B, N);
    of tokens that scored (B, N) leaves out, 0:

    bound   the bound, of which the noise is a sample
    joint   exact NLL of one joint pass a block; without a local head, of one factorised pass
    gpt     exact NLL of what the GPT level writes
    """
    c, terms, where = score.model.config, {}, score.model.cos.device
    nll = token_nll(score, x0, torch.stack([mask, torch.ones_like(mask)]))
    if c.objective == "diffusion":
        terms = {"bound": nll["single"][0] * weight.to(where) * c.block_size,
                 "joint": nll["joint"][1]}
    terms |= {"gpt": gpt_nll(nll)} if c.context == "causal" else {}
    scored = 1 if scored is None else scored.to(where)
    return {name: (each * scored).mean(dim=1) for name, each in terms.items()}


def gpt_nll(nll):
    """(B, N): what the GPT level writes, of a token_nll whose last mask hides all: its first token
    is the block level's."""
    first = nll["joint"][-1, :, :1] if "joint" in nll else nll["gpt"][:, :1]
    return torch.cat([first, nll["gpt"][:, 1:]], dim=1)


@torch.no_grad()
def evaluate(score, split, windows, seed=0, batch=16, autocast=nullcontext, processes=None,
             loss_on="all"):
    """{term: (mean, standard error)} of window_terms over windows spread evenly over the split, a
    mean over all of their tokens or, with loss_on="completion", over those of completions.

    The noise, `balanced`, is drawn for all windows at once from a fixed generator, so the figures
    are the same on every call, at any batch size and number of processes.
    """
    c, where = score.model.config, score.model.cos.device
    windows = min(windows, len(split) // c.seq_len)
    stride = (len(split) - c.seq_len) / max(windows - 1, 1)
    starts = (torch.arange(windows, dtype=torch.float64) * stride).long()
    blank = torch.zeros(windows, c.seq_len, dtype=torch.long)
    scored = torch.ones(windows, c.seq_len, dtype=torch.float64)
    if loss_on == "completion":
        scored = torch.from_numpy(split.completions(starts.numpy(), c.seq_len)).double()
    share = (scored.mean(dim=1) / scored.mean().clamp(min=1e-9)).to(where)  # of a window's tokens
    noise = corrupt_all_blocks(blank, c.block_size, c.mask_id, step_generator(seed, -1))
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    if not scored.any():
        raise SettingsError("no validation window has a completion to score: raise --eval_windows, "
                            "or give validation text with the separator")
    total = {}
    batches = torch.arange(windows).split(batch)
    # sharded weights are gathered by all processes together: none may sit the last round out
    for i in range(rank, len(batches) + -len(batches) % world, world):
        rows, own = batches[i % len(batches)], i < len(batches)
        x0 = torch.from_numpy(split.window(starts[rows].numpy(), c.seq_len))
        with autocast():
            terms = window_terms(score, x0, noise.mask[rows], noise.weight[rows], scored[rows])
        for name, each in terms.items():
            blank = torch.zeros(windows, dtype=torch.float64, device=where)
            total.setdefault(name, blank)[rows] += own * each
    if processes:
        total = {name: processes.sum(each) for name, each in total.items()}
    total = {name: each / scored.mean().clamp(min=1e-9).item() for name, each in total.items()}
    # a ratio of sums over windows; its standard error by the usual linearisation
    return {name: (each.mean().item(), window_error(each - each.mean() * (share - 1)))
            for name, each in total.items()}


def window_error(x):
    """Standard error of the mean of x (W,), windows taken as independent."""
    return x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


# ---- likelihoods: functions of a Score and windows x0 (W, N) int64, nats per token ---------------


def in_batches(work, x0, *more, batch=32, tick=lambda tokens: None):
    """work(x, ...) of `batch` windows at a time, joined; tick(tokens) after each."""
    out = []
    for parts in zip(x0.split(batch), *(m.expand_as(x0).split(batch) for m in more), strict=True):
        out.append(work(*parts).cpu())
        tick(parts[0].numel())
    return torch.cat(out)


def score_gpt(score, x0, **how):
    """(W,): exact NLL of what the GPT level writes."""
    return in_batches(lambda x: gpt_nll(token_nll(score, x, x[None] == x)).mean(dim=1), x0, **how)


def score_single(score, x0, mask, **how):
    """(W, N): of the tokens that mask (W, N) or (N,) hides, each by itself; 0 of the others."""
    return in_batches(lambda x, m: token_nll(score, x, m[None])["single"][0], x0, mask, **how)


def score_noise(score, x0, seed, **how):
    """(loss, k), each (W, nb): every block's mean cross-entropy, and how many of it are masked."""
    c = score.model.config
    noise = corrupt_all_blocks(x0, c.block_size, c.mask_id, step_generator(seed, -1))
    nll = score_single(score, x0, noise.mask, **how)
    blocks = len(x0), -1, c.block_size
    return (nll * noise.weight).view(blocks).sum(-1), noise.mask.view(blocks).sum(-1)


def block_logits(model, h, x0, seen):
    """(B nb, S, V) of blocks whose tokens `seen` (B, N) shows to the local head, from h (B, N, C)
    of the trunk."""
    c = model.config
    if model.local is not None:
        h = model.local(h, left_tokens(x0, seen, c.block_size, c.local_window, c.mask_id))
    return model.logits(h).view(-1, c.block_size, c.vocab_size)


@torch.no_grad()
def score_rule(score, x0, rule="left_to_right", value=0, **how):
    """(W,): exact NLL of text written by a deterministic rule, and (W,) passes a token. value: K,
    the passes of a block (0: S), or tau of `threshold`, gamma of `entropy`.

    The rule is replayed: each pass sees the tokens that it has revealed so far, chooses what to
    reveal next from the model's own distributions, and adds -log p of those tokens, drawn jointly
    where there is a local head.
    """
    model, c = score.model, score.model.config
    S = c.block_size

    def replay(x0):
        x0 = x0.to(model.cos.device)
        xt, masked = torch.full_like(x0, c.mask_id), torch.ones_like(x0, dtype=torch.bool)
        masked, left = masked.view(-1, S), S if rule in KNOBS else value or S
        total, passes = 0.0, 0.0
        while bool(masked.any()):
            h = model.stream_trunk(torch.stack([x0, xt]))[-1]
            quota = -(-masked.sum(dim=1) // left)
            view = View(masked, block_logits(model, h, x0, xt), masked.double(), quota, tau=value,
                        gamma=value)
            now = RULES[rule](view)  # which reads its own of the two at most
            masked, left = masked & ~now, left - 1
            xt = x0.masked_fill(masked.view(x0.shape), c.mask_id)
            logp = block_logits(model, h, x0, xt).double().log_softmax(-1)
            logp = logp.gather(-1, x0.view(-1, S, 1))[..., 0] * now
            total = total - logp.view(x0.shape).sum(dim=1)
            passes = passes + now.any(dim=1).view(len(x0), -1).sum(dim=1)
        return torch.stack([total, passes], dim=1) / x0.shape[1]

    return in_batches(replay, x0, **how).unbind(dim=1)


@torch.no_grad()
def score_passes(score, x0, batch=32, **how):
    """(W, nb, 2 S + 1, S + 1). S passes price every schedule from left to right: of each block,

    [..., j, i]      -log p of token i in a pass that begins at j <= i and has drawn j..i-1, the
                     text before j visible
    [..., S + j, i]  KL of that distribution from the GPT level's: what drawing i so is expected to
                     lose, whichever token the text has
    [..., 2 S, i]    -log p of token i by the GPT level. Both are NaN without one
    [..., 0, S]      `features` of the first pass
    """
    model, c = score.model, score.model.config
    S, N = c.block_size, x0.shape[1]
    masks = (torch.arange(N) % S >= torch.arange(S)[:, None])[:, None]  # (S, 1, N)

    def work(x):
        x = x.to(model.cos.device).expand(S, -1, -1)
        xt = x.masked_fill(masks.to(x.device), c.mask_id)
        h = model.stream_trunk(torch.cat([x[:1], xt]))
        view = View(xt[0].view(-1, S) == c.mask_id, block_logits(model, h[-S], x[0], xt[0]), None,
                    None, 0, 0)
        q = block_logits(model, h[-S:], x, x).double().log_softmax(-1).view(*x.shape, -1)
        p = torch.full_like(q[0], math.nan)
        if c.context == "causal":  # whose first token is the block level's, as in gpt_nll
            p = torch.cat([q[0, :, :1], model.logits(h[0, :, :-1]).double().log_softmax(-1)], dim=1)
        at = x[0, ..., None]
        table = torch.cat([-q.gather(-1, at.expand(S, -1, -1, -1))[..., 0],
                           (p.exp() * (p - q)).sum(-1), -p.gather(-1, at)[None, ..., 0]])
        table = table.unflatten(-1, (-1, S)).permute(1, 2, 0, 3)
        known = features(view).view(*table.shape[:2], 1, 1).expand(-1, -1, 2 * S + 1, -1)
        return torch.cat([table, known], dim=-1)

    return in_batches(work, x0, batch=max(1, batch // S), **how)


def score_exact(score, x0, **how):
    """(bound, random order, left to right), (W,) each, from all 2^S - 1 mask sets A: each token by
    itself, as the bound has it.

    The bound of a block, per token:  sum_A sum_{i in A} -log p(x_i | rest) / (C(S, |A|) |A| S).
    The likelihood of revealing it in a uniformly random order is f(all positions), where

        f(empty) = 1,   f(A) = 1/|A| * sum_{i in A} p(x_i | rest outside A) f(A without i):

    the mean over S! orders in 2^S - 1 steps, here in logarithms. By Jensen its NLL is <= the bound.
    """
    S = score.model.config.block_size
    log_f, bound, ltr = {0: torch.zeros(1, dtype=torch.float64)}, 0.0, 0.0
    for A in range(1, 2**S):  # bit i is position i, so A without i has come before A
        inside = [i for i in range(S) if A >> i & 1]
        mask = torch.isin(torch.arange(x0.shape[1]) % S, torch.tensor(inside))
        nll = score_single(score, x0, mask, **how).view(len(x0), -1, S)
        k = len(inside)
        bound += nll.sum(dim=-1) / (math.comb(S, k) * k * S)
        paths = torch.stack([log_f[A ^ (1 << i)] - nll[..., i] for i in inside])
        log_f[A] = paths.logsumexp(dim=0) - math.log(k)
        if k == S - inside[0]:  # all positions from the first on: a condition of the chain rule
            ltr += nll[..., inside[0]] / S
    return tuple(x.mean(dim=1) for x in (bound, -log_f[2**S - 1] / S, ltr))


@torch.no_grad()
def acceptance(score, x0):
    """(estimates, labels), each (W, N - 1): what the local head thinks that the GPT level accepts
    of a joint pass at tokens 1.. of windows x0 (W, N), and 1 - TV of the two distributions."""
    model, c = score.model, score.model.config
    x0 = x0.to(model.cos.device)
    clean, h = model.stream_trunk(torch.stack([x0, torch.full_like(x0, c.mask_id)]))
    hidden = model.local.hidden(h, left_tokens(x0, x0, c.block_size, c.local_window, c.mask_id))
    p, q = (model.logits(x).softmax(-1) for x in (clean, h + model.local.down(hidden)))
    label = torch.minimum(p[:, :-1], q[:, 1:]).sum(-1)
    return model.local.acceptance(hidden)[:, 1:].sigmoid(), label


def calibration_error(estimate, label):
    """Expected calibration error over ten bins of the estimates."""
    ranked = (10 * estimate.flatten()).long().clamp(max=9)
    off = torch.bincount(ranked, (estimate - label).flatten().double(), minlength=10)
    return off.abs().sum().item() / ranked.numel()


# ---- the jobs ------------------------------------------------------------------------------


class Evaluation:
    """A checkpoint and its text. Each job prints as it goes, and fills a table of plain figures."""

    def __init__(self, s):
        self.s, self.device, self.table = s, choose_device(s.device), []
        self.say = (lambda line: None) if s.json else lambda line: print(line, flush=True)
        self.model, self.state = load_model(s.out_dir, self.device)
        self.score, self.c = Score(self.model), self.model.config
        c, state, trained = self.c, self.state, self.state["settings"]
        name = s.dataset or trained.get("dataset")
        if not name:
            raise SettingsError(f"{s.out_dir} does not say what it was trained on: give --dataset")
        self.data = load_dataset(name)
        check_vocabulary(state["meta"], self.data.meta, f"--dataset={name}")
        self.text = self.data.split(s.split)
        self.run = {
            "run": s.out_dir, "objective": c.objective, "block_size": c.block_size,
            "seq_len": c.seq_len, "parameters": self.model.count_parameters(),
            "train_seed": trained.get("seed"), "step": state["step"],
            "train_tokens": state["step"] * trained.get("batch_size", 0) * c.seq_len,
            "train_minutes": state["seconds"] / 60, "dataset": self.data.name,
            "split": s.split, "bytes_per_token": self.text.bytes_per_token,
        }
        kind = "autoregressive" if c.objective == "ar" else f"blocks of {c.block_size}"
        self.say(f"model      {find_checkpoint(s.out_dir)}: step {state['step']}, "
                 f"{self.run['parameters']:,} parameters, context {c.seq_len}, {kind}")
        if state["settings"].get("loss_on") == "completion":
            self.say("note       all of the text is scored here, not its completions alone")

    def cut(self, length, most):
        """(W, length): the split's windows from its start, or `most` of them, evenly spread."""
        count = len(self.text) // length
        if not count:
            raise DataError(
                f"{self.s.split} of {self.data.name} has {len(self.text)} tokens, fewer than "
                f"a window of {length}: give another --dataset or --split"
            )
        W = min(most or count, count)
        self.say(f"text       {self.data.name}, {self.s.split}: {W:,} of {count:,} windows of "
                 f"{length} tokens; the tail of {len(self.text) % length} is left out")
        starts = torch.arange(W) * count // W * length
        return torch.from_numpy(self.text.window(starts.numpy(), length))

    def how(self, passes):
        """Arguments of the score functions: the batch size, and a bar over `passes` windows."""
        bar = Progress("scoring", passes * self.c.seq_len, "tok")
        bar.advance(0)
        return {"batch": self.s.batch, "tick": bar.advance}

    def line(self, method, sign, each, passes=math.nan):
        """Say a likelihood in nats per token, bits per byte and perplexity, and add its row."""
        mean, error = each.mean().item(), window_error(each)
        bits = mean / math.log(2) / self.text.bytes_per_token
        self.say(
            f"{method:20s} {sign:>2} {mean:.4f} +- {error:.4f} nats/token  {sign:>2} {bits:.4f} "
            f"bits/byte  {sign:>2} {math.exp(mean):.3f} perplexity"
            + ("" if math.isnan(passes) else f"  {passes:.3f} passes/token")
        )
        self.table.append({"method": method, "sign": sign, "windows": len(each), "nll": mean,
                           "nll_error": error, "bits_per_byte": bits, "passes_per_token": passes})

    def control(self):
        """{its name: the n-gram of the training text}; empty for ngram = 0."""
        if not self.s.ngram:
            return {}
        text, name = self.data.split("train"), f"{self.s.ngram}-gram"
        if len(text) > NGRAM_TOKENS:
            self.say(f"{name}     of the first {NGRAM_TOKENS:,} tokens of the training text")
        text = text.window([0], min(len(text), NGRAM_TOKENS))[0]
        return {name: NGram(text, self.c.vocab_size, self.s.ngram)}

    def likelihood(self):
        """Every level, the control, rules at K passes, and the bound's shape over k."""
        s, c = self.s, self.c
        grid, x0 = rule_grid(s.rows, c, exact=True), self.cut(c.seq_len, s.windows)
        if c.context == "causal":
            self.line("gpt", "=", score_gpt(self.score, x0, **self.how(len(x0))), 1.0)
        if c.objective == "diffusion":
            loss, k = score_noise(self.score, x0, s.seed, **self.how(len(x0)))
            self.line("bound", "<=", loss.mean(dim=1))
        for name, control in self.control().items():
            self.line(name, "=", control.nll(x0))
        if c.objective == "ar":
            return
        x0 = self.cut(c.seq_len, s.rule_windows)
        for rule, K in grid:
            nll, passes = score_rule(self.score, x0, rule, K, **self.how(len(x0)))
            self.line(f"{rule} {K:g}", "=", nll, passes.mean().item())
        if c.block_size > 1:
            count = torch.bincount(k.flatten(), minlength=c.block_size + 1)[1:]
            total = torch.bincount(k.flatten(), loss.flatten(), minlength=c.block_size + 1)[1:]
            self.say(chart(total, count))

    def drafts(self):
        """Tokens a pass of mode verify at temperature 1, by the block level and by the control, and
        how often draft i is accepted where it is reached."""
        s, c, most = self.s, self.c, self.c.block_size - 1
        if c.acceptance:
            x0 = self.cut(c.seq_len, s.rule_windows)
            found = in_batches(lambda x: torch.stack(acceptance(self.score, x), dim=-1), x0,
                               **self.how(len(x0)))
            estimate, label = (x.mean(dim=0) for x in found.unbind(-1))
            error = calibration_error(*found.unbind(-1))
            self.say(f"estimates  {estimate.mean():.3f} of the drafts accepted, {label.mean():.3f} "
                     f"are; calibration error {error:.4f}; by rank in a block " + " ".join(
                         f"{estimate[i - 1 :: most + 1].mean():.2f}/"
                         f"{label[i - 1 :: most + 1].mean():.2f}" for i in range(1, most + 1)))
        n = min(s.sample_tokens or c.seq_len, c.seq_len)  # past it windows slide, and drafts end
        self.say(f"samples    {s.num_samples} of {n} tokens a row from nothing, temperature 1\n\n"
                 "drafter          drafts  tokens/pass   accepted, draft by draft")
        for name, drafter in ({"block level": None} | self.control()).items():
            tokens, passes, reached, accepted = 0, 0, torch.zeros(most), torch.zeros(most)
            # branches: drafts behind every number of accepted ones, so that a round is one pass
            for step in generate_stream(self.model, [[]] * s.num_samples, n, mode="verify",
                                        drafts=most, branches=c.block_size, seed=s.seed,
                                        drafter=drafter):
                if step.accepted is None or step.done.any():
                    continue
                tokens, passes = tokens + int(step.accepted.sum()) + s.num_samples, passes + 1
                for i in range(step.block.shape[1] - 1):
                    reached[i] += int((step.accepted >= i).sum())
                    accepted[i] += int((step.accepted > i).sum())
            rate = tokens / max(1, passes) / s.num_samples
            shares = (accepted / reached.clamp(min=1)).tolist()
            self.table.append({"drafter": name, "drafts": most, "tokens_per_pass": rate,
                               "accepted": shares})
            shares = " ".join(f"{x:.2f}" for x in shares)
            self.say(f"{name:16s} {most:6d} {rate:12.3f}   {shares}")

    def schedules(self):
        """Where a block's passes should begin, and how many: fitted on every other window, scored
        on the rest. The oracle knows the losses, so no predictor wins more, but most of that is
        luck with single tokens. The KL oracle knows what each choice is expected to lose: all that
        can be won before the draw, as far as the GPT level is the text's distribution."""
        s, c, S = self.s, self.c, self.c.block_size
        if c.objective == "ar":
            raise SettingsError("an autoregressive model has no blocks: leave --schedules out")
        x0 = self.cut(c.seq_len, s.windows or s.rule_windows)
        if len(x0) < 4:
            raise SettingsError("--schedules fits on half of the windows: give 4 or more")
        table = score_passes(self.score, x0, **self.how(len(x0)))
        losses, lost, gpt = table[..., :S].split([S, S, 1], dim=2)
        known = table[..., 0, S:]
        fitted, scored = (losses[i::2].flatten(0, 1) for i in (0, 1))
        expected, cuts = cheapest(fitted.mean(dim=0, keepdim=True))
        average, best = price(scored, cuts[0]), cheapest(scored)[0]
        least, where = cheapest(lost[1::2].flatten(0, 1))
        row = self.against(average, expected, best, len(x0) // 2)
        for K in range(1, S + 1):
            begin = " ".join(str(j) for j in cuts[0, K - 1].nonzero()[:, 0].tolist())
            row(f"equal {K}", K, price(scored, equal_cuts(S)[K - 1 : K]))
            row(f"average {K}", K, average[:, K - 1], begin)
            row(f"oracle's K {K}", K, (allocate(average, K) * average).sum(dim=1))  # cuts: average
            row(f"oracle {K}", K)
            if c.context == "causal":
                row(f"KL oracle {K}", K, (allocate(least, K) * price(scored, where)).sum(dim=1))
        for rule, value in rule_grid(s.rows, c, exact=True):
            if rule != "left_to_right":
                text, how = x0[1::2].contiguous(), self.how(len(x0) // 2)
                nll, passes = score_rule(self.score, text, rule, value, **how)
                row(f"{rule} {value:g}", passes.mean().item() * S, nll * c.seq_len)
        if c.context == "block":  # steps=auto goes by what is lost against the GPT level
            return
        row("gpt", S, gpt[1::2])
        weights = fit_excess((losses - gpt)[::2].flatten(0, 1), known[::2].flatten(0, 1))
        excess = predict_excess(weights, known[1::2].flatten(0, 1))
        levels = (expected[0] / S - gpt[::2].mean()).tolist()  # what average cuts lose, for each K
        for nats in sorted({round(x, 3) for x in levels}, reverse=True):
            chosen = plan(excess, nats)[:, None]
            passes = chosen.sum(dim=-1).double().mean().item()
            row(f"plan {nats:g}", passes, price(scored, chosen))
        path = find_checkpoint(s.out_dir).with_name("schedules.json")
        with writing(path):
            path.write_text(dumps({"digest": self.state["digest"], "excess": weights.tolist()}))
        self.say(f"\nfor sample.py --mode=block --steps=auto: {path}")

    def against(self, average, expected, best, count):
        """row(method, passes a block, NLL of `count` windows): say a method beside average cuts of
        as many passes, and how many the oracle needs for its NLL; without one, the oracle itself.
        average, best (b, S): each block's NLL in K passes; expected (1, S): by which K is chosen.
        """
        def windows(nll):  # (count,), nats per token
            return nll.reshape(count, -1).sum(dim=1) / self.c.seq_len

        def oracle(passes):
            return windows((allocate(best, passes) * best).sum(dim=1))

        grid = [1 + i / 4 for i in range(4 * best.shape[1] - 3)]
        curve = torch.stack([oracle(passes).mean() for passes in grid])
        falls = int((curve > curve[-1] + 1e-9).sum()) + 1

        def row(method, passes, nll=None, cuts=""):
            nll = oracle(passes) if nll is None else windows(nll)
            ahead = nll - windows((allocate(expected, passes) * average).sum(dim=1))
            least = np.interp(-nll.mean(), -curve[:falls], grid[:falls], right=math.nan).item()
            found = {"method": method, "passes": passes, "nll": nll.mean().item(),
                     "nll_error": window_error(nll), "against_average": ahead.mean().item(),
                     "against_error": window_error(ahead), "oracle_passes": least, "cuts": cuts}
            self.table.append(found)
            self.say("{:16s} {:7.3f}   {:.4f} +- {:.4f}   {:+.4f} +- {:.4f}   {:7.3f}   {}".format(
                *found.values()).replace("nan", "  -"))

        self.say("\nmethod           passes   nats/token          against average     oracle's   "
                 "cuts\n                 a block                       cuts, as many      passes")
        return row

    def exact(self):
        """The bound by enumeration, how loose it is, and whether the estimate finds it."""
        s, S = self.s, self.c.block_size
        if self.c.objective == "ar":
            raise SettingsError("an autoregressive model's NLL is exact: leave --exact out")
        if S > 8:
            raise SettingsError(
                f"--exact needs 2^S - 1 passes, {2**S - 1:,} at S = {S}, and stops at S = 8: the "
                "NLL of left_to_right, printed without --exact, is exact at any S"
            )
        x0 = self.cut(self.c.seq_len, s.exact_windows)
        how = self.how(len(x0) * 2**S)
        bound, order, ltr = score_exact(self.score, x0, **how)
        estimate = score_noise(self.score, x0, s.seed, **how)[0].mean(dim=1)
        self.line("exact bound", "<=", bound)
        self.line("random order", "=", order)
        self.line("left to right", "=", ltr)
        self.line("estimated bound", "<=", estimate)
        for name, off in (("the exact bound above the random order's NLL", bound - order),
                          ("the estimate above the exact bound", estimate - bound)):
            self.say(f"{name}: {off.mean().item():+.4f} +- {window_error(off):.4f} nats/token")

    def samples(self):
        """Each rule's text under the judge; the first row is held-out text of the same length."""
        s, n = self.s, self.s.sample_tokens or self.c.seq_len
        grid, tokenizer = rule_grid(s.rows, self.c), Tokenizer.from_meta(self.state["meta"])
        judge, name = load_judge(s.judge, self.state, tokenizer, self.device, ar_nll)
        text, nfe, speed = self.cut(n, s.num_samples), math.nan, math.nan
        self.say(
            f"judge      {name}\nsamples    {s.num_samples} of {n} tokens a row from nothing, one "
            f"batch, temperature {s.temperature:g}, none redrawn\n\nrule             setting  "
            "NFE/token  tokens/s   judge: nats/token  bits/byte  entropy  repeated"
        )
        for rule, value in [("held-out text", math.nan), *grid]:
            if rule in RULES:
                text, nfe, speed = generate_timed(self.model, rule, value, n, s)
            row = {
                "judge": s.judge, "samples": len(text), "tokens": n, "temperature": s.temperature,
                "rule": rule, "setting": value, "nfe_per_token": nfe, "tokens_per_s": speed,
                **judged(judge, text, tokenizer), "entropy": token_entropy(text),
                "repetition": repetition(text),
            }
            self.table.append(row)
            self.say(
                f"{rule:16s} {value:7g} {nfe:10.3f} {speed:9.0f}   {row['judge_nll']:8.3f} "
                f"+- {row['judge_error']:.3f} {row['judge_bits_per_byte']:10.3f} "
                f"{row['entropy']:8.3f} {row['repetition']:9.3f}".replace("nan", "  -")
            )


def rule_grid(rows, c, exact=False):
    """[(rule, value)] of the setting `rows`; if empty, K = S, S/2, S/4 ... 1 and adaptive rules.
    `exact`: of the deterministic rules."""
    if not rows and c.objective == "ar":
        return [("left_to_right", 1)]
    if not rows:
        steps = sorted({max(1, c.block_size // 2**i) for i in range(8)}, reverse=True)
        rules = ["random"] * (not exact) + ["left_to_right", "confidence"]
        grid = [(rule, K) for rule in rules for K in steps]
        return [*grid, ("threshold", 0.9), ("threshold", 0.5), ("entropy", 0.1), ("entropy", 1.0)]
    try:
        pairs = [row.strip().split(":") for row in rows.split(",")]
        grid = [(rule, float(v) if rule in KNOBS else int(v)) for rule, v in pairs]
    except ValueError:
        raise SettingsError("write --rows=random:8,threshold:0.9,entropy:0.5 (rule:K)") from None
    names = [rule for rule in RULES if not exact or rule != "random"]
    for rule, value in grid:
        if rule not in names:
            raise SettingsError(f"unknown rule {rule!r} in --rows: one of {', '.join(names)}")
        most = {"threshold": 1, "entropy": math.inf}.get(rule, c.block_size)
        if not (0 if rule in KNOBS else 1) <= value <= most:
            raise SettingsError(f"--rows={rule}:{value}: tau must lie in 0..1, gamma be 0 or more, "
                                f"K lie in 1..{c.block_size}")
    return grid


def generate_timed(model, rule, value, tokens, s):
    """(text (B, tokens), forward passes per token, tokens/s) of one batch from empty prompts.

    Passes are those that revealed some of a sample, on average: what it takes by itself. In a batch
    an adaptive rule waits for the slowest sample, and tokens/s, those of the batch, show it.
    """
    mode, knob = "gpt" if model.config.objective == "ar" else "block", KNOBS.get(rule, "steps")
    began, passes = time.perf_counter(), 0
    for step in generate_stream(model, [[]] * s.num_samples, tokens, mode=mode, rule=rule,
                                seed=s.seed, temperature=s.temperature, **{knob: value}):
        passes = passes + step.new.any(dim=1).double()
    text = torch.tensor(step.rows())
    return text, passes.mean().item() / tokens, text.numel() / (time.perf_counter() - began)


# ---- the command ---------------------------------------------------------------------------------


def append_csv(path, table):
    """Append rows (dicts of the same keys) to a CSV file, which is made with a header if new."""
    table = [{k: f"{v:.6g}" if isinstance(v, float) else v
              for k, v in row.items() if not isinstance(v, list)} for row in table]
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", newline="", encoding="utf-8") as f:
            f.seek(0)
            text = f.read()
            head = text.partition("\n")[0].rstrip("\r")
            if head not in ("", ",".join(table[0])):
                raise SettingsError(f"--csv={path} has other columns: give another file")
            writer = DictWriter(f, table[0], lineterminator="\n")
            if not head:
                writer.writeheader()
            elif not text.endswith("\n"):  # an editor's habit
                f.write("\n")
            writer.writerows(table)
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(f"--csv={path} cannot be written ({e}): give another file") from None


@guarded
def main(argv):
    s = SimpleNamespace(**override(DEFAULTS, argv))
    check_settings(s, {}, RANGES)
    asked = [job for job in ("drafts", "schedules", "exact", "samples") if getattr(s, job)]
    if len(asked) > 1:
        raise SettingsError(f"one at a time: --{' or --'.join(asked)}")
    evaluation, job = Evaluation(s), (asked or ["likelihood"])[0]
    getattr(evaluation, job)()
    run, table = evaluation.run, evaluation.table
    if s.json:  # which knows no NaN: null instead
        found = dumps({"job": job, "settings": vars(s), "run": run, "rows": table})
        print(dumps(loads(found, parse_constant=lambda word: None)))
    if s.csv:
        append_csv(s.csv, [run | row for row in table])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
