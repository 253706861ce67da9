"""How good a checkpoint is: exact likelihoods and bounds with their errors, beside a control.

    python eval.py --out_dir=out/nano

Text is cut into windows of seq_len tokens at fixed places. The last three quarters of each are
scored, so that every model has some context, and every block size is scored on the same tokens.

    GPT level        exact NLL of the next token
    draft            exact NLL of writing every block in one pass, its tokens drawn left to right
                     through the local head
    bound            above the NLL, estimated with `balanced` noise of a fixed generator: corrupt.py
    a rule, K = n    exact NLL of what a deterministic rule writes in n passes a block: the rule is
                     replayed on the text, and each pass adds -log p of the tokens that it reveals
                     (arXiv 2603.01367). Of adaptive rules K is the mean number of passes
    n-gram           the control: an interpolated n-gram of the training text (util/ngram.py)

tokens a round: an estimate, at temperature 1, of what the reading pass of a round writes (its
drafting pass writes one token more): 1 + a_1 + a_1 a_2 + ..., if draft i is accepted with a chance
of a_i, the mean over the text of sum_x min(p(x), q(x)) for the GPT level's p and the draft's q.
Draft i stands at place i + 1 of a block. Below is what the sampler wrote in rounds with room
for all drafts. It differs by a few per cent: rounds end, and begin anew, where text is hard, while
the estimate takes the places as independent. Of the n-gram: if it were the drafter. +- is a
standard error over windows, taken as independent. The model computes in float32.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from corrupt import corrupt_all_blocks
from model import at_least_float32, left_tokens
from sample import generate_stream
from util import checkpoint
from util.data import Dataset
from util.machine import choose_device
from util.ngram import NGram
from util.rules import LIMITS, RULES
from util.settings import check, guarded, public, require, settings

# ---- settings ------------------------------------------------------------------------------------
out_dir = "out/nano"  # a run's folder or a checkpoint file
dataset = ""  # empty: as trained
split = "val"
windows = 512  # how many to score; 0: all
rule_windows = 128  # how many for rules, which take K passes
texts = 64  # that the sampler writes, to count tokens a round; 0: none
ngram = 5  # order of the control; 0: none
batch = 16  # windows in a pass
device = "auto"
# --------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))
NGRAM_TOKENS = 10**7  # it counts no more of the training text: its tables stay in memory


class Figures(NamedTuple):
    """What `evaluate` found, as plain values."""

    nll: dict  # level: (nats per token, its standard error or, if there is one window, None)
    acceptance: list  # mean acceptance of drafts at places 2, 3, ... of a block; [] without drafts


# ---- windows and means ---------------------------------------------------------------------------


def check_scoring(config, ar):
    """UserError if windows have no part that can be scored; bounds are scored by whole blocks."""
    N, S = config.seq_len, config.block_size
    require(N >= 4 and (ar or N >= 2 * S), f"seq_len {N} is too short to score blocks of {S}")
    require(ar or config.local_window or N % (4 * S) == 0,
            f"a bound needs seq_len / 4 = {N / 4:g} to be a multiple of block_size {S}")


def cut_windows(tokens, N, count):
    """(W, N) int64: `count` windows of N tokens, or all if 0, evenly spread over the text."""
    every = len(tokens) // N
    count = min(count or every, every)
    starts = [i * every // count * N for i in range(count)]
    return torch.from_numpy(np.stack([tokens[i : i + N] for i in starts]).astype(np.int64))


def mean_and_error(nll):
    """(mean, standard error or None) of token figures (W, N), over the scored part of windows."""
    means = nll[:, nll.shape[1] // 4 :].double().mean(dim=1)
    error = (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else None
    return means.mean().item(), error


def by_place(acceptance, S):
    """Mean acceptances (S - 1 floats) at places 2 .. S of the whole blocks that are scored, of
    acceptances (W, N)."""
    W, N = acceptance.shape
    first = math.ceil(N / 4 / S) * S
    return acceptance[:, first:].reshape(-1, S).mean(dim=0)[1:].tolist()


def tokens_a_round(acceptance):
    return 1 + float(np.cumprod(acceptance).sum())


# ---- levels: what training calls -----------------------------------------------------------------


def compare(gpt, draft, head, targets):
    """(-log p, -log q, sum_x min(p, q)) of targets (M,), for p and q = softmax(states head^T) of
    two states (M, C). In pieces, so that large vocabularies fit."""
    found = []
    for i in torch.arange(len(targets), device=targets.device).split(max(1, 2**24 // len(head))):
        log_p, log_q = (at_least_float32(F.linear(h[i], head)).log_softmax(dim=-1)
                        for h in (gpt, draft))
        nll = [-x.gather(-1, targets[i, None])[:, 0] for x in (log_p, log_q)]
        found.append(torch.stack([*nll, torch.minimum(log_p, log_q).exp().sum(dim=-1)]))
    return torch.cat(found, dim=1).double()


def score_levels(model, x0, mask, weight, ar):
    """{level: (B, N) float64} of windows x0 (B, N): "gpt", and unless `ar` "draft", "acceptance"
    and, of models without a local head, "bound" by noise with mask and weight (B, N). A block
    context has the bound alone. The GPT level has no p of a window's first token."""
    c, found, head = model.config, {}, model.head_weight()
    (B, N), M = x0.shape, x0.numel()
    if not c.local_window and not ar:
        index = mask.flatten().nonzero()[:, 0]
        nll = model(x0, x0.masked_fill(mask, c.mask_id), index).masked.double()
        bound = torch.zeros(M, dtype=torch.float64, device=x0.device)
        bound[index] = nll * weight.flatten()[index] * c.block_size  # its mean is the bound
        found["bound"] = bound.view(B, N)
    if c.context == "block":
        return found
    if ar:
        return {"gpt": F.pad(model(x0).gpt.double(), (1, 0))}
    clean, h = model.streams(x0, torch.full_like(x0, c.mask_id)).chunk(2)
    if model.local is not None:
        h = model.local(h, left_tokens(x0, c.local_window, c.mask_id))
    before = F.pad(clean[:, :-1], (0, 0, 1, 0))  # what predicts token i, moved to i
    states = (model.norm(x).flatten(0, 1) for x in (before, h))
    levels = compare(*states, head, x0.flatten()).view(3, B, N)
    return found | dict(zip(("gpt", "draft", "acceptance"), levels, strict=True))


@torch.no_grad()
def evaluate(model, x0, ar=False, batch=16, processes=None):
    """`Figures` of windows x0 (W, N) on the CPU, which `processes` share out. ar: an AR model,
    whose noisy stream was never trained. The bound's noise is always the same."""
    c, was_training = model.config, model.training
    model.eval()
    world, rank = (processes.world, processes.rank) if processes else (1, 0)
    noisy = corrupt_all_blocks(x0, c.block_size, c.mask_id, torch.Generator().manual_seed(0))
    found = {}
    for rows in torch.arange(len(x0))[rank::world].split(batch):
        text, mask, weight = (t[rows].to(model.cos.device) for t in (x0, noisy.mask, noisy.weight))
        for name, each in score_levels(model, text, mask, weight, ar).items():
            found.setdefault(name, torch.zeros(x0.shape, dtype=torch.float64))
            found[name][rows] = each.cpu()
    model.train(was_training)
    if processes:
        found = {name: processes.sum(x) for name, x in found.items()}
    acceptance = found.pop("acceptance", None)  # the others are NLLs
    places = [] if acceptance is None else by_place(acceptance, c.block_size)
    return Figures({name: mean_and_error(x) for name, x in found.items()}, places)


# ---- rules and the control -----------------------------------------------------------------------


@torch.no_grad()
def replay(model, x0, rule, K=1, limit=0.0):
    """(NLL (B, N) float64, passes (B, nb)) of writing each block of x0 (B, N) by a deterministic
    rule, in K passes or, if adaptive, as many as it takes: what a pass reveals adds its -log p, and
    is the text from then on. All blocks at once, each behind the text before it."""
    S, head = model.config.block_size, model.head_weight()
    blocks = x0.unflatten(1, (-1, S))  # (B, nb, S)
    masked = torch.ones_like(blocks, dtype=torch.bool)
    nll, passes = torch.zeros(blocks.shape, dtype=torch.float64, device=x0.device), 0
    for n in range(S):
        xt = blocks.masked_fill(masked, model.config.mask_id).flatten(1)
        h = model.norm(model.streams(x0, xt)[len(x0) :])
        log_p = F.linear(h, head).double().log_softmax(dim=-1).unflatten(1, (-1, S))
        left = masked.sum(dim=-1)  # (B, nb)
        count = (left / max(1, K - n)).ceil()
        new = RULES[rule](log_p, masked, count, limit, None)
        each = -log_p.gather(-1, blocks.unsqueeze(-1)).squeeze(-1)
        nll, passes, masked = nll + torch.where(new, each, 0.0), passes + (left > 0), masked & ~new
        if not masked.any():
            break
    return nll.flatten(1), passes


@torch.no_grad()
def score_ngram(model, control, x0, batch=16):
    """(NLL, acceptance), (W, N) float64 each, of the n-gram `control` on windows x0 (W, N); the
    acceptance as a drafter for the model's GPT level, 0 where it has none."""
    W, N = x0.shape
    nll, acceptance = torch.zeros(2, W, N, dtype=torch.float64)
    for rows in torch.arange(W).split(max(1, min(batch, 2**24 // N // control.V))):
        padded = np.pad(x0[rows].numpy(), ((0, 0), (control.order - 1, 0)), constant_values=-1)
        before = np.lib.stride_tricks.sliding_window_view(padded, control.order, axis=1)[..., :-1]
        q = control.probabilities(before.reshape(len(rows) * N, control.order - 1))
        q = torch.from_numpy(q).view(len(rows), N, -1)
        nll[rows] = -q.gather(-1, x0[rows].unsqueeze(-1)).squeeze(-1).log()
        if model.config.context == "causal":
            p = model.logits_of(x0[rows].to(model.cos.device)).double().softmax(dim=-1).cpu()
            acceptance[rows, 1:] = torch.minimum(p[:, :-1], q[:, 1:]).sum(dim=-1)
    return nll, acceptance


def written_rounds(model, x0):
    """(mean, standard error or, if there is one round, None) of the tokens that the reading pass of
    a round writes, with all S - 1 drafts, at temperature 1, behind the first quarter of each window
    of x0 (W, N)."""
    N = x0.shape[1]
    *_, step = generate_stream(model, x0[:, : N // 4].tolist(), N - N // 4, mode="verify",
                               temperature=1.0)
    found = 1 + torch.tensor(step.accepted).double()
    error = found.std().item() / math.sqrt(len(found)) if len(found) > 1 else None
    return found.mean().item(), error


# ---- the table -----------------------------------------------------------------------------------

NAMES = {"gpt": "GPT level", "draft": "draft: one pass a block", "bound": "bound"}
HEAD = "level                          nats/token           bits/byte  tokens a round"


def table_row(name, figure, bytes_per_token, rounds=None, sign="="):
    """One line: figure is (mean, standard error or None) in nats per token."""
    mean, error = figure
    said = "of one window" if error is None else f"+- {error:.4f}"
    line = f"{name:27s} {sign:>2} {mean:.4f} {said:14s} {mean / math.log(2) / bytes_per_token:8.4f}"
    return line if rounds is None else f"{line}  {rounds:13.2f}"


def table_rows(figures, bytes_per_token):
    """The lines of `Figures`."""
    for name, figure in figures.nll.items():
        rounds = tokens_a_round(figures.acceptance) if name == "draft" else None
        sign = "<=" if name == "bound" else "="
        yield table_row(NAMES[name], figure, bytes_per_token, rounds, sign)


@guarded
def main(argv):
    s, _ = settings(DEFAULTS, argv)
    check(s, least={"rule_windows": 1, "batch": 1})
    model, state = checkpoint.load_model(s.out_dir, choose_device(s.device))
    c, S, ar = model.config, model.config.block_size, state["settings"]["draft_weight"] == 0
    data = Dataset(s.dataset or state["settings"]["dataset"], c.seq_len)
    data.require_vocabulary(state["meta"], s.out_dir)
    check_scoring(c, ar)
    text, ratio = data.split(s.split), data.bytes_per_token(s.split)
    x0 = cut_windows(text, c.seq_len, s.windows)
    print(f"{s.out_dir}, step {state['step']}: {s.split} of {data.name}, the last "
          f"{c.seq_len - c.seq_len // 4} tokens of {len(x0)} windows of {c.seq_len}\n{HEAD}")
    figures = evaluate(model, x0, ar, s.batch)
    for line in table_rows(figures, ratio):
        print(line, flush=True)
    if figures.acceptance and s.texts:
        mean, error = written_rounds(model, cut_windows(text, c.seq_len, s.texts))
        said = "in one round" if error is None else f"+- {error:.2f}"
        print(f"{'  as the sampler writes':65s} {mean:9.2f} {said}", flush=True)
    if c.context == "block":
        few = cut_windows(text, c.seq_len, s.rule_windows).to(model.cos.device)
        rows = [(rule, K, 0.0) for rule in ("left_to_right", "confidence") for K in (1, 2, S)]
        rows += [(rule, 1, limit) for rule, limit in LIMITS.items()]
        for rule, K, limit in rows:
            found = [replay(model, x, rule, K, limit) for x in few.split(s.batch)]
            nll, passes = (torch.cat(x).cpu() for x in zip(*found, strict=True))
            name = f"{rule}, K = {passes.double().mean():.3g}"
            print(table_row(name, mean_and_error(nll), ratio), flush=True)
    if s.ngram:
        control = NGram(data.split("train")[:NGRAM_TOKENS], data.meta["vocab_size"], s.ngram)
        nll, acceptance = score_ngram(model, control, x0, s.batch)
        drafts = c.context == "causal" and not ar
        rounds = tokens_a_round(by_place(acceptance, S)) if drafts else None
        print(table_row(f"{s.ngram}-gram", mean_and_error(nll), ratio, rounds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
