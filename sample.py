"""Write text from a checkpoint, several tokens a pass, and watch it crystallise.

    python sample.py                                        from nothing, the nano of train.py
    python sample.py --prompt="KING." --mode=gpt            a token a pass, the same distribution
    python sample.py --mode=block --steps=2                 the block level, two passes a block
    python sample.py --mode=block --steps=0,1,4             the same, passes begin where it says
    python sample.py --prompt=FILE:path                     a prompt from a file; "-" is stdin
    python sample.py --num_samples=4 --delay=0.1 | cat      in a pipe: plain text only

As a library: `from sample import generate`; `generate_stream` yields after every forward pass.

    mode     a pass yields                                    whose distribution
    gpt      one token                                        the GPT level's
    block    S / K tokens, revealed by a rule; with a local   the block level's
             head those of one pass are drawn jointly
    verify   as many drafts as the GPT level accepts, and     the GPT level's, exactly
             one token more

NFE counts forward passes of the network. A prompt is read by a pass of its own; a finished block is
committed by the first pass of the next one, so a block costs K passes.
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from util.configurator import SettingsError, check_settings, guarded, override, public

# isort: split
import torch
import torch.nn.functional as F

from model import build_block_causal_mask, wanted_dtype
from util.checkpoint import find_checkpoint, load_model
from util.dataset import Tokenizer
from util.display import Display, printable
from util.machine import autocast, choose_device, choose_dtype
from util.schedules import plan, predict_excess

# ---- settings ----------------------------------------------------------------------------------
out_dir = "out/nano"  # or a checkpoint file
prompt = ""  # text; FILE:path reads a file, - reads standard input
num_samples = 1
max_new_tokens = 500
mode = "auto"  # gpt, block or verify; auto: verify, or block where there is no GPT level
drafts = 0  # mode verify: drafts in a pass, 1..S-1; 0 = S - 1
branches = 0  # mode verify: for how many numbers of accepted drafts a pass drafts on; 0: for all;
# with several samples on a CPU for none: a second pass drafts instead, which is faster there
# mode block
rule = "confidence"  # random, confidence, threshold, entropy, left_to_right
steps = "0"  # K, forward passes per block, 1..S; 0 = S. threshold and entropy choose by themselves
# 0,1,4: left to right, passes begin at these positions; auto: as `nats` has it, for each block
nats = 0.1  # steps=auto: as few passes as are expected to lose no more a token to the GPT level
temperature = 0.8  # 1 = the trained distribution, 0 = greedy
top_k = 0  # keep the k most probable tokens; 0 = all
top_p = 1.0  # keep the most probable tokens up to this much probability
tau = 0.9  # rule threshold: reveal what is at least this certain
gamma = 0.5  # rule entropy: nats of joint uncertainty allowed per pass
# every mode
stop = ""  # text of one token that ends a sample
seed = 1337
block_size = 0  # 0 = as trained; another needs --any_block_size=true
any_block_size = False
delay = 0.0  # seconds between frames, for watching
device = "auto"
dtype = "auto"  # bfloat16 on a GPU that multiplies it, else float32
# -------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))
READ = 512  # tokens of finished text in one pass, at most


# ---- unmasking rules: which masked positions to reveal now --------------------------------------


@dataclass
class View:
    """What a rule sees of the current blocks, one row per sample.

    masked (B, S) bool; logits (B, S, V), the model's own, before temperature and truncation, and
    without the drawn token: a rule that looked at the draw would prefer likely draws and so sharpen
    the distribution. order (B, S): a uniformly random order, fixed per block. quota (B,): positions
    to reveal so that the block ends on time, ceil(remaining / steps left).
    """

    masked: torch.Tensor
    logits: torch.Tensor
    order: torch.Tensor
    quota: torch.Tensor
    tau: float
    gamma: float

    # a millionth a position: those that are alike but for rounding, as all are of a first block of
    # masks, are then revealed from the left
    def leftmost(self):
        return 1e-6 * torch.arange(self.masked.shape[1], device=self.masked.device)

    def certainty(self):
        """(B, S) float64: the largest probability of each position."""
        return self.logits.double().log_softmax(dim=-1).amax(dim=-1).exp() - self.leftmost()

    def entropy(self):
        """(B, S) float64, in nats."""
        logp = self.logits.double().log_softmax(dim=-1)
        return self.leftmost() - (logp.exp() * logp).sum(dim=-1)


def _first(key, masked, count):
    """(B, S) bool: the count[r] masked positions of row r with the smallest key, ties leftmost."""
    key = key.masked_fill(~masked, torch.inf)
    rank = key.argsort(dim=1, stable=True).argsort(dim=1)
    return masked & (rank < count.unsqueeze(1))


def random(v):
    """One uniformly random order: with K = S exactly the distribution that was trained."""
    return _first(v.order, v.masked, v.quota)


def left_to_right(v):
    """From the left: with K = S the chain rule inside the block."""
    return v.masked & (v.masked.cumsum(dim=1) <= v.quota.unsqueeze(1))


def confidence(v):
    """The most certain positions."""
    return _first(-v.certainty(), v.masked, v.quota)


def threshold(v):
    """Every position at least `tau` certain, and the most certain one in any case."""
    certainty = v.certainty()
    return (v.masked & (certainty >= v.tau)) | _first(-certainty, v.masked, (v.quota > 0).long())


def entropy(v):
    """The EB rule (arXiv 2505.24857): positions by rising entropy, as many as keep
    sum of entropies - largest entropy <= gamma, which bounds what drawing them together,
    as if independent, can cost in nats."""
    ranked, position = v.entropy().masked_fill(~v.masked, torch.inf).sort(dim=1, stable=True)
    # the largest of a prefix is its last, so the condition is on the sum of those before it
    before = F.pad(ranked[:, :-1].cumsum(dim=1), (1, 0))
    return v.masked & torch.zeros_like(v.masked).scatter(1, position, before <= v.gamma)


RULES = {f.__name__: f for f in (random, confidence, threshold, entropy, left_to_right)}


# ---- drawing tokens ------------------------------------------------------------------------------


def truncated_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """(..., V) float64 probabilities after temperature, top-k and top-p, renormalised.

    float64 because low-precision draws act as a lower temperature (arXiv 2409.02908). The token
    that carries the sum across top_p is kept. temperature 0 puts everything on the largest logit.
    """
    logits = logits.double()
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    p = (logits / temperature).softmax(dim=-1)
    if not 0 < top_k < p.shape[-1] and top_p >= 1.0:
        return p
    if 0 < top_k < p.shape[-1]:
        kept = p.topk(top_k, dim=-1)
        p = torch.zeros_like(p).scatter(-1, kept.indices, kept.values)
    if top_p < 1.0:
        ranked, token = p.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked
        keep = before < top_p * ranked.sum(dim=-1, keepdim=True)
        p = torch.zeros_like(p).scatter(-1, token, ranked * keep)
    return p / p.sum(dim=-1, keepdim=True)


def draw(p, generator):
    """(..., V) float64 probabilities -> (...) int64 tokens, by the exponential race: the smallest
    E_i / p_i with E_i ~ Exp(1) is token i with probability p_i."""
    race = torch.empty_like(p).exponential_(generator=generator)
    return (p / race).argmax(dim=-1)


# ---- the cache ---------------------------------------------------------------------------------


class BlockCache:
    """Already-rotated keys and the values of finished tokens, preallocated; each row has its own
    `length`. Memory: 2 * n_layer * n_kv_head * head_dim * bytes of an element, for each token.

    A pass writes its keys behind `length`, and the next pass overwrites them but for the first
    `stay` tokens, by which `length` moves. Those must be final, so that keys computed while a
    block was noisy never remain.
    """

    def __init__(self, config, batch, capacity, device="cpu", dtype=torch.float32):
        shape = (config.n_layer, batch, capacity, config.n_kv_head, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def capacity(self):
        return self.k.shape[2]

    def bias(self, hidden):
        """The additive mask of a bool one, which the kernel would make anew in every layer."""
        bias = torch.zeros(hidden.shape, dtype=self.k.dtype, device=hidden.device)
        return bias.masked_fill_(hidden, -torch.inf)

    def attend(self, Q, visible):
        """attend(layer, q, k, v) of Q new tokens: each sees all of its row's cached tokens, and of
        the new ones those that visible (Q, Q) bool shows; None shows all."""
        low, high = (x.item() for x in self.length.aminmax())
        if low + Q > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {low + Q}")
        mask, end = None, min(high + Q, self.capacity)
        slots = self.length[:, None] + torch.arange(Q, device=self.length.device)  # (B, Q)
        slots = slots.clamp(max=end - 1)  # of a longer row that has nothing to read in this pass
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        if low < high:
            behind = torch.arange(end, device=slots.device) - self.length[:, None]  # (B, end)
            hidden = (behind >= Q)[:, None].repeat(1, Q, 1)
            if visible is not None:
                inside = ~visible.T[behind.clamp(0, Q - 1)].mT  # (B, Q, end)
                hidden |= inside & (behind >= 0)[:, None]
            mask = self.bias(hidden)[:, None]
        elif visible is not None:
            mask = F.pad(self.bias(~visible), (high, 0))

        def attend(layer, q, k, v):
            keys, values = self.k[layer], self.v[layer]
            if low == high:
                keys[:, high:end], values[:, high:end] = k, v
            else:
                keys[rows, slots], values[rows, slots] = k.to(keys.dtype), v.to(keys.dtype)
            q, k, v = q.to(keys.dtype), keys[:, :end], values[:, :end]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            gqa = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa).transpose(1, 2)

        return attend


@torch.inference_mode()
def read(model, tokens, cache, visible=None, offsets=None, stay=0, noisy=None):
    """One cached forward pass over new tokens (B, Q) behind those in `cache`: (B, Q, C).

    visible (Q, Q) bool: which of the new tokens each of them sees, besides all that is cached;
    None: all. offsets (Q,): their positions behind the cached text; None: in order. The keys of the
    first `stay` tokens, an int or (B,) int64, remain in the cache. noisy (Q,) bool: what stands in
    a block that is being denoised; None: the [MASK]s.
    """
    Q = tokens.shape[1]
    offsets = torch.arange(Q, device=tokens.device) if offsets is None else offsets
    positions = (cache.length[:, None] + offsets).clamp(max=model.config.seq_len - 1)
    noisy = (tokens == model.config.mask_id if noisy is None else noisy).unsqueeze(-1)
    h = model.trunk(tokens, positions, cache.attend(Q, visible), noisy=noisy)
    cache.length = cache.length + stay
    return h


# ---- generation ----------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How to decode; `check` raises ValueError, one line, for what cannot be honoured."""

    mode: str = "auto"  # gpt, block, verify
    drafts: int = 0  # verify: in a pass; 0 = S - 1
    branches: int = 0  # verify: numbers of accepted drafts for which a pass drafts on; 0: auto
    rule: str = "confidence"
    steps: int = 0  # K, passes per block; 0 = S
    plan: object = None  # or: View of a block's first pass -> cuts (B, S) bool, where passes begin
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    tau: float = 0.9
    gamma: float = 0.5
    seed: int = 1337
    stop_token: int | None = None  # a token id that ends a row, and is not part of it
    drafter: object = None  # verify: an NGram to draft in the block level's place

    def check(self, c):
        S, causal, diffusion = c.block_size, c.context == "causal", c.objective == "diffusion"
        if self.mode == "auto":
            self.mode = "gpt" if not diffusion else "verify" if causal and S > 1 else "block"
        if self.mode not in ("gpt", "block", "verify"):
            raise ValueError(f"mode must be auto, gpt, block or verify, not {self.mode!r}")
        if self.mode != "block" and not causal:
            raise ValueError(f"mode {self.mode} needs a GPT level: this model was trained with "
                             "context block; use mode block")
        if self.mode != "gpt" and not diffusion:
            raise ValueError(f"an autoregressive model has no blocks: mode {self.mode} is not for "
                             "it; use mode gpt")
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}: one of {', '.join(RULES)}")
        for name, most in (("steps", S), ("drafts", S - 1), ("branches", S)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in 1..{most} (blocks have {S} tokens), or be 0 "
                                 f"for the default, not {getattr(self, name)}")
        if self.mode == "verify" and S == 1:
            raise ValueError("mode verify needs blocks of two tokens or more: use mode gpt")
        if self.mode != "block" and (self.steps or self.plan):
            raise ValueError(f"steps are for mode block, not {self.mode}: set --mode=block")
        self.steps, self.drafts = self.steps or S, self.drafts or S - 1
        for name in ("temperature", "top_k", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("top_p", "tau"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], not {getattr(self, name)}")

    def probabilities(self, logits):
        return truncated_probabilities(logits, self.temperature, self.top_k, self.top_p)


@dataclass
class Step:
    """The state after one forward pass, for B rows.

    text (B, W) int64: the rows, of which settled (B,) tokens are final; done (B,) bool; nfe:
    forward passes so far. block (B, n) int64 stands at start (B,) of each row, mask_id where
    undecided; new (B, n) bool: decided by this pass. Mode verify: the first accepted (B,) tokens
    of the block were drafts, the next one is the GPT level's own, and drafts (B, D) follow it,
    mask_id where there are none.
    """

    text: torch.Tensor
    settled: torch.Tensor
    done: torch.Tensor
    nfe: int
    start: torch.Tensor
    block: torch.Tensor
    new: torch.Tensor
    accepted: torch.Tensor | None = None
    drafts: torch.Tensor | None = None

    def rows(self):
        """Each row's final tokens so far, prompt included, as lists of ids."""
        return [row[:n].tolist() for row, n in zip(self.text, self.settled, strict=True)]


class Writer:
    """The rows of one generation, and the window of each that its cache holds.

    tokens (B, W), [MASK] where nothing is written yet; length (B,), how many are final; base (B,),
    the token in the first slot of a row's cache. When a row no longer fits the context, it alone
    goes on from the later half of it, read again. objective "ar": a [MASK], which stands for the
    beginning of the text, is in front of every window.
    """

    def __init__(self, model, prompts, max_new_tokens, o):
        c, where = model.config, next(model.parameters()).device
        if max_new_tokens < 0 or not prompts:
            raise ValueError("max_new_tokens must be 0 or more; at least one prompt is needed")
        for row in prompts:
            if len(row) and not (0 <= min(row) and max(row) < c.vocab_size):
                raise ValueError(f"prompt tokens must lie in 0..{c.vocab_size - 1}")
        self.model, self.c, self.o, self.nfe = model, c, o, 0
        self.unit = 1 if c.context == "causal" else c.block_size  # windows start at multiples of it
        self.front = int(c.objective == "ar")
        self.generator = torch.Generator(where).manual_seed(o.seed)
        width = max(map(len, prompts)) + max_new_tokens + 2 * c.block_size + self.front
        self.ranks = torch.arange(max(width, c.seq_len, len(prompts)), device=where)
        rows = [[c.mask_id] * self.front + list(row) for row in prompts]
        self.tokens = torch.tensor([r + [c.mask_id] * (width - len(r)) for r in rows], device=where)
        self.length = torch.tensor([len(row) for row in rows], device=where)
        self.goal = self.length + max_new_tokens
        self.done, self.base = self.goal <= self.length, torch.zeros_like(self.length)
        new = c.block_size * (1 + (o.branches or o.drafts + 1)) + 1  # tokens of a pass, at most
        dtype = wanted_dtype(model.embed.weight)
        self.cache = BlockCache(c, len(rows), c.seq_len + new, where, dtype)

    def at(self, start, n):
        """(B, n): the n tokens of each row from start (B,) on."""
        index = start[:, None] + self.ranks[:n]
        return self.tokens.gather(1, index.clamp_(0, self.tokens.shape[1] - 1))

    def shown(self, start, block):
        """(B, w + n): what the local head sees of a block (B, n) at start (B,) and of the w tokens
        before it: [MASK] where the window has none."""
        index = start[:, None] - self.c.local_window + self.ranks[: self.c.local_window]
        before = self.tokens.gather(1, index.clamp(min=0))
        before = before.masked_fill(index < self.base[:, None], self.c.mask_id)
        return torch.cat([before, block], dim=1)

    def read(self, tokens, visible=None, offsets=None, stay=0, noisy=None):
        """`read` with these rows' cache, counted; rows that are done keep what they have."""
        self.nfe += 1
        if self.front:  # the first slot of every window holds [MASK]
            first = (self.cache.length == 0)[:, None] & (self.ranks[: tokens.shape[1]] == 0)
            tokens = tokens.masked_fill(first, self.c.mask_id)
        stay = torch.where(self.done, 0, stay)
        return read(self.model, tokens, self.cache, visible, offsets, stay, noisy)

    def prepare(self, end, room, carry=0):
        """Bring the tokens before end (B,) of each living row into the cache, with space in the
        context for `room` more, READ of them a pass: a long prompt needs no mask of its length
        squared. Unless what is missing is the same `carry` tokens of every row: the
        next pass can take those along. Returns how many it has to."""
        full = ~self.done & (end - self.base + room > self.c.seq_len)
        if bool(full.any()):
            half = min(self.c.seq_len // 2, self.c.seq_len - room) // self.unit * self.unit
            self.base = torch.where(full, end - half, self.base)
            self.cache.length = torch.where(full, 0, self.cache.length)
        missing = (end - self.base - self.cache.length).masked_fill(self.done, 0)
        most = int(missing.max())
        if not most or most == carry and bool(((missing == carry) | self.done).all()):
            return most
        size = max(1, READ // self.unit) * self.unit
        visible = build_block_causal_mask(size, self.unit, self.tokens.device)
        while most := int(missing.max()):
            n = min(most, size)
            self.read(self.at(self.base + self.cache.length, n), visible[:n, :n],
                      stay=missing.clamp(max=n))
            missing = (missing - n).clamp(min=0)
        return 0

    def settle(self, start, new, end):
        """Write `new` (B, n) at start (B,); what lies before end (B,) is final, cut at the goal or
        before a stop token."""
        index = start[:, None] + self.ranks[: new.shape[1]]
        new = new.masked_fill(index >= end[:, None], self.c.mask_id)
        self.tokens.scatter_(1, index.clamp(max=self.tokens.shape[1] - 1), new)
        end = torch.minimum(end, self.goal)
        finished = end >= self.goal
        if self.o.stop_token is not None:
            hit = (new == self.o.stop_token) & (index >= self.length[:, None])  # not of a prompt
            first = torch.where(hit, index, end[:, None]).amin(dim=1)
            finished |= first < end
            end = torch.minimum(end, first)
        self.length = torch.where(self.done, self.length, end)
        self.done = self.done | finished

    def step(self, start, block, new, *drafted):
        text = self.tokens[:, self.front :]
        return Step(text, self.length - self.front, self.done, self.nfe, start - self.front, block,
                    new, *drafted)

    def draw(self, p):
        """Tokens (B,) from a drafter's p (B, V), and what they were drawn from."""
        p = self.o.probabilities(p.log())
        return draw(p, self.generator), p

    def logits(self, h, start, block):
        """(B, S, V) of a block (B, S) that stands at start (B,), from the trunk's h (B, S, C): by
        the local head, each position sees to its left what the block shows."""
        if self.model.local is not None:
            left = self.shown(start, block).unfold(1, self.c.local_window, 1)[:, :-1].flip(2)
            h = self.model.local(h, left)
        return self.model.logits(h)

    def draw_pass(self, h, start, block, reveal):
        """Draw the positions `reveal` (B, S) bool of a block (B, S) at start (B,) in one pass, left
        to right: each sees the tokens to its left that are visible or drawn before it. Returns the
        block and the probabilities (B, S, V) that its tokens were drawn from, which mean nothing
        at other positions.
        """
        local, w, S = self.model.local, self.c.local_window, block.shape[1]
        race = torch.empty(*block.shape, self.c.vocab_size, dtype=torch.float64, device=h.device)
        race.exponential_(generator=self.generator)
        if local is None:
            p = self.o.probabilities(self.model.logits(h))
            return torch.where(reveal, (p / race).argmax(dim=-1), block), p
        shown = self.shown(start, block).flip(1)  # so that left tokens stand as the head reads them
        p = torch.zeros_like(race)
        with torch.inference_mode():
            part, weight = local.ready(h)
            for i in reveal.any(dim=0).nonzero()[:, 0].tolist():
                here = local(h[:, i], shown[:, S - i : S - i + w], (part[:, i], weight))
                p[:, i] = now = self.o.probabilities(self.model.logits(here))
                token = (now / race[:, i]).argmax(dim=-1)
                shown[:, S - i - 1] = torch.where(reveal[:, i], token, shown[:, S - i - 1])
        return shown[:, :S].flip(1), p


def write_tokens(w):
    """Mode gpt: a token a pass."""
    yield from first_token(w)
    while not bool(w.done.all()):
        start = w.length
        w.prepare(start - 1, 1)
        h = w.read(w.at(start - 1, 1), stay=1)
        token = draw(w.o.probabilities(w.model.logits(h)), w.generator)
        w.settle(start, token, start + 1)
        yield w.step(start, token, torch.ones_like(token, dtype=torch.bool))


def first_token(w):
    """The first token of rows from nothing is the block level's: the GPT level has no input yet."""
    S, start = w.c.block_size, w.length
    if bool(w.done.all()) or int(start.min()):
        return
    block = torch.full((len(start), S), w.c.mask_id, device=start.device)
    h = w.read(block)
    first = (start == 0)[:, None] & (w.ranks[:S] == 0)
    block, _ = w.draw_pass(h, start, block, first)
    w.settle(start, block[:, :1], start + first[:, 0])
    yield w.step(start, block[:, :1], first[:, :1])


def write_blocks(w):
    """Mode block: a block in at most K passes; a rule chooses what each pass reveals.

    With context="block" blocks stand where they stood in training, at multiples of S: the rest of a
    prompt that does not fill its last block are fixed tokens of the first block written.
    """
    S, mask_id, o = w.c.block_size, w.c.mask_id, w.o
    start = w.length // w.unit * w.unit
    both = build_block_causal_mask(2 * S, S, start.device).clone()  # a finished block and the next
    both[:S, :S] = build_block_causal_mask(S, w.unit, start.device)
    while not bool(w.done.all()):
        carry = w.prepare(start, S, carry=S)
        block = w.at(start, S)  # a finished row goes on, unseen
        order = torch.rand(block.shape, generator=w.generator, dtype=torch.float64,
                           device=block.device)
        passes_left = S if o.plan or o.rule in ("threshold", "entropy") else o.steps
        masked = block == mask_id
        while bool(masked.any()):
            tokens = torch.cat([w.at(start - carry, carry), block], dim=1)
            noisy = w.ranks[: carry + S] >= carry
            h = w.read(tokens, both if carry else None, stay=carry, noisy=noisy)[:, carry:]
            carry, new = 0, masked  # the last pass reveals what is left, by every rule
            if passes_left > 1:
                quota = -(-masked.sum(dim=1) // passes_left)
                view = View(masked, w.logits(h, start, block), order, quota, o.tau, o.gamma)
                if o.plan and passes_left == S:
                    run = o.plan(view).to(masked.device).cumsum(dim=1)  # each position's pass
                if o.plan:
                    new = masked & (run == run.masked_fill(~masked, S + 1).amin(1, keepdim=True))
                else:
                    new = RULES[o.rule](view)
            block, _ = w.draw_pass(h, start, block, new)
            masked, passes_left = block == mask_id, passes_left - 1
            if not bool(masked.any()):
                w.settle(start, block, start + S)
            yield w.step(start, block, new)
        start = torch.where(w.done, start, start + S)


def verify(drafts, q, p, count, generator):
    """Speculative sampling (arXiv 2211.17192): (accepted (B,), token (B,)).

    drafts (B, D) were drawn from q (B, D, V); p (B, D + 1, V) are the distributions to be drawn
    from, each given the drafts before it. Draft i is accepted with probability min(1, p / q); the
    token behind the accepted ones is drawn from the positive part of p - q where a draft was
    refused, from p where there was none: so all are distributed as p. Of row r the first count[r]
    drafts exist.
    """
    B, D = drafts.shape
    exists = torch.arange(D, device=p.device) < count[:, None]
    q = F.pad(q * exists.unsqueeze(-1), (0, 0, 0, 1))  # (B, D + 1, V)
    at = drafts.unsqueeze(-1)
    p_at, q_at = (x[:, :D].gather(-1, at)[..., 0] for x in (p, q))
    u = torch.rand(B, D, generator=generator, dtype=torch.float64, device=p.device)
    accepted = (exists & (u * q_at < p_at)).long().cumprod(dim=1).sum(dim=1)
    here = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    p, q = p.gather(1, here)[:, 0], q.gather(1, here)[:, 0]
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
    return accepted, draw(rest, generator)


def verify_layout(n, D, branches, device):
    """(visible, offsets) of a pass: the last token and D drafts behind it, read as text; then for
    each j of `branches` a block of n masks behind draft j, which sees the text as far as j."""
    text = torch.ones(D + 1, D + 1, dtype=torch.bool, device=device).tril()
    block = torch.ones(n, n, dtype=torch.bool, device=device)
    visible = torch.block_diag(text, *[block] * len(branches)).bool()
    offsets = [torch.arange(D + 1, device=device)]
    for i, j in enumerate(branches):
        visible[D + 1 + i * n :][:n, : j + 1] = True
        offsets.append(torch.arange(j + 1, j + 1 + n, device=device))
    return visible, torch.cat(offsets)


def write_verified(w):
    """Mode verify: each pass checks the drafts of the pass before, and drafts on behind `branches`
    numbers of them that may be accepted; without branches a pass of its own drafts on, behind what
    was accepted."""
    o, device, B = w.o, w.tokens.device, len(w.tokens)
    n = o.drafts + 1  # masks of a block: for the correction, and for the drafts behind it
    yield from first_token(w)
    # all branches make one long pass, which costs a CPU as much as two short ones; of several rows
    # three times as much
    branches = o.branches or (o.drafts + 1) * (device.type != "cpu" or B == 1)
    branches = 0 if o.drafter is not None else min(branches, o.drafts + 1)
    behind = sorted([0, *range(o.drafts, 0, -1)][:branches])  # none accepted; then the most
    plans = {False: (0, behind[:1]), True: (o.drafts, behind)}
    plans = {k: (D, js, *verify_layout(n, D, js, device)) for k, (D, js) in plans.items()}
    reveal = (w.ranks[:n] > 0).expand(B, n)
    drafts, count = w.tokens[:, :0], torch.zeros_like(w.length)
    q = torch.zeros(B, 0, w.c.vocab_size, dtype=torch.float64, device=device)
    while not bool(w.done.all()):
        start = w.length
        w.prepare(start - 1, 1)
        count = torch.minimum(count, w.base + w.c.seq_len - start)  # what gpt reads in this window
        D, behind, visible, offsets = plans[bool((count > 0).any())]
        masks = torch.full((B, max(1, len(behind)) * n), w.c.mask_id, device=device)
        tokens = [w.at(start - 1, 1), drafts[:, :D], masks[:, : len(behind) * n]]
        h = w.read(torch.cat(tokens, dim=1), visible, offsets)
        p = o.probabilities(w.model.logits(h[:, : D + 1]))
        accepted, token = verify(drafts[:, :D], q[:, :D], p, count, w.generator)
        w.cache.length = w.cache.length + torch.where(w.done, 0, accepted + 1)
        text = F.pad(drafts[:, :D], (0, 1)).scatter(1, accepted[:, None], token[:, None])
        w.settle(start, text, start + accepted + 1)
        if o.drafter is not None:
            drafts, q = o.drafter.draft(w.tokens, w.length, o.drafts, w.draw)
            count = torch.full_like(count, o.drafts)
        elif behind or not bool(w.done.all()):
            if behind:  # the branch that drafted on, -1 where none did
                which = [behind.index(j) if j in behind else -1 for j in range(D + 1)]
                which = torch.tensor(which, device=device)[accepted]
                h = h[:, D + 1 :].unflatten(1, (-1, n))[w.ranks[:B], which]
            else:
                h, which = w.read(masks), torch.zeros_like(accepted)
            block = F.pad(token[:, None], (0, o.drafts), value=w.c.mask_id)
            block, q = w.draw_pass(h, start + accepted, block, reveal)
            drafts, q = block[:, 1:], q[:, 1:]
            count = torch.where(which >= 0, o.drafts, 0)
        new = w.ranks[: D + 1] <= accepted[:, None]
        shown = drafts.masked_fill(count[:, None] == 0, w.c.mask_id)  # no branch drafted on here
        yield w.step(start, text, new, accepted, shown)


MODES = {"gpt": write_tokens, "block": write_blocks, "verify": write_verified}


@torch.no_grad()
def generate_stream(model, prompts, max_new_tokens, **options):
    """Continue each prompt (a list of ids, of any length, also 0) by max_new_tokens tokens,
    yielding a `Step` after every forward pass that wrote something. `options`: see Sampling.
    """
    o = Sampling(**options)
    o.check(model.config)
    w = Writer(model, prompts, max_new_tokens, o)
    nothing = w.tokens[:, :0]
    yield w.step(w.length, nothing, nothing.bool())
    yield from MODES[o.mode](w)


def generate(model, prompts, max_new_tokens, **options):
    """The rows of generate_stream when all is done, prompts included: lists of token ids."""
    *_, last = generate_stream(model, prompts, max_new_tokens, **options)
    return last.rows()


# ---- the command ---------------------------------------------------------------------------------


def read_prompt(value):
    """The prompt's text: as given, of a file (FILE:path), or of standard input (-)."""
    try:
        if value == "-":
            return sys.stdin.read()
        if value.startswith("FILE:"):
            return Path(value[5:]).read_text(encoding="utf-8")
    except OSError as e:
        raise SettingsError(f"--prompt={value}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise SettingsError(f"--prompt={value}: not UTF-8 text (byte {e.start})") from None
    return value


def load(s):
    """(model, tokenizer) of the settings; another block size than the trained one is refused."""
    model, state = load_model(s.out_dir, choose_device(s.device))
    trained = model.config.block_size
    if s.block_size not in (0, trained):
        if not s.any_block_size:
            raise SettingsError(
                f"this model was trained on blocks of {trained}; decoding with {s.block_size} "
                "hurts its text: leave --block_size out, or insist with --any_block_size=true"
            )
        model.config = replace(model.config, block_size=s.block_size)
    s.steps, s.plan = read_steps(s, model.config.block_size, state["digest"])
    return model, Tokenizer.from_meta(state["meta"])


def features(view):
    """(B, 1): what a block's first pass tells of its losses, the mean entropy."""
    return view.entropy().mean(dim=1, keepdim=True)


def read_steps(s, S, digest):
    """(steps, plan) of Sampling for --steps=K, 0,1,4 or auto, of a checkpoint's blocks of S."""
    if s.steps == "auto":
        path = find_checkpoint(s.out_dir).with_name("schedules.json")
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(path.read_text(encoding="utf-8"))
            weights = torch.tensor(found["excess"], dtype=torch.float64)
            if found["digest"] == digest and weights.shape == (2, S, S):
                return 0, lambda view: plan(predict_excess(weights, features(view).cpu()), s.nats)
        raise SettingsError(f"{path} is missing, or not of this checkpoint and block size: python "
                            f"eval.py --out_dir={s.out_dir} --schedules=true writes it, of a model "
                            "with a GPT level")
    with suppress(ValueError):
        begin = [int(x) for x in s.steps.split(",")]
        if len(begin) == 1:
            return begin[0], None
        if begin[0] == 0 and begin == sorted(set(begin)) and begin[-1] < S:
            cuts = torch.isin(torch.arange(S), torch.tensor(begin))
            return 0, lambda view: cuts.expand_as(view.masked)
    raise SettingsError(f"--steps={s.steps}: give a number of passes, auto, or where passes begin, "
                        f"rising from 0 and below {S}, as in 0,1,4")


def options(s, tokenizer):
    """The fields of Sampling that the settings ask for."""
    stop_ids = tokenizer.encode(s.stop)
    if len(stop_ids) > 1:
        raise SettingsError(f"--stop={s.stop!r} is {len(stop_ids)} tokens, not one")
    names = ("mode", "drafts", "branches", "rule", "steps", "plan", "temperature", "top_k", "top_p",
             "tau", "gamma", "seed")
    return {name: getattr(s, name) for name in names} | {
        "stop_token": stop_ids[0] if stop_ids else None
    }


RANGES = {"num_samples": (1, 10**6), "nats": (0, 1e3), "delay": (0, 3600), "seed": (0, 2**63 - 1)}


@guarded
def main(argv):
    s = SimpleNamespace(**override(DEFAULTS, argv))
    check_settings(s, {}, RANGES)
    model, tokenizer = load(s)
    ids = tokenizer.encode_prompt(read_prompt(s.prompt))
    s.device = str(next(model.parameters()).device)
    choose_dtype(s, s.device, small=True)
    stream = generate_stream(
        model, [ids] * s.num_samples, s.max_new_tokens, **options(s, tokenizer)
    )
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the display's clean-up
    display = Display(tokenizer, model.config.mask_id) if live else nullcontext()
    began, seconds, step, interrupted = time.perf_counter(), 0.0, None, False
    try:
        with display, autocast(s):
            for step in stream:
                seconds += time.perf_counter() - began
                if live:
                    display.show(step)
                time.sleep(s.delay)
                began = time.perf_counter()  # drawing and waiting are not the model's time
    except KeyboardInterrupt:
        interrupted = True
    if step is None:
        return 130
    rows = step.rows()
    for i, row in enumerate(rows):
        if len(rows) > 1:
            print(f"--- sample {i + 1} of {len(rows)}")
        text = tokenizer.decode(row)
        print(printable(text) if live else text, flush=True)
    if live:
        new = sum(len(row) for row in rows) - len(ids) * len(rows)
        print(
            f"\x1b[2m{new} tokens in {step.nfe} passes = {new / max(1, step.nfe):.2f} a pass, "
            f"{new / seconds:.0f} tokens/s in {s.dtype}\x1b[0m"
        )
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
