r"""Write text from a checkpoint, several tokens a pass, and watch it crystallise.

    python sample.py                                    from out/nano, without a prompt
    python sample.py --prompt="KING." --mode=gpt        a token a pass, the distribution of verify
    python sample.py --prompt=FILE:path --stop='\n'     a prompt from a file; - is standard input
    python sample.py --num_samples=4 --delay=0.1        slowly, to watch
    python sample.py --out_dir=out/bd3lm --rule=entropy

    mode     context   yields                                              whose distribution
    gpt      causal    a token a pass                                      the GPT level's
    verify   causal    in two passes two tokens and the accepted drafts    the GPT level's, exactly
    block    causal    S tokens a pass, drawn jointly, not verified        the block level's
    block    block     S tokens in K passes, in the order of a rule; or    the block level's
                       an adaptive rule chooses how many passes it takes

A round of `verify` is two passes. x is the last token, M is [MASK]; here are three drafts, and what
a place gives stands below it:

    draft    in    x  M   M   M   M      a mask stands for each token to come. x does not see them,
             out   t      d1  d2  d3     so that t is the GPT level's own, and the first mask, in
                                         the place of t, is not used. The local head draws a draft
                                         in the place of each other, with a probability q
    read     in    t  d1  d2  d3         p is the GPT level's probability of a draft. It is accepted
             out   d1 d2  c              with a chance of min(1, p / q), up to the first that is
                                         refused, here d3. c is drawn in its place, or behind the
                                         last draft if all are accepted. c is the next x

So a round yields 1 + r tokens; r, those of the reading pass, is eval.py's figure of tokens a round.
As a library: `generate`, or `generate_stream`, which yields a `Step` at the start and after each
pass.
"""

import itertools
import math
import operator
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from model import attention
from util import checkpoint
from util.data import make_tokenizer, opening, read_text, token_id
from util.machine import choose_device, decode_in, take_turns
from util.rules import LIMITS, RULES
from util.settings import check, guarded, public, require, settings
from util.view import other_screen, printable, show

# ---- settings ------------------------------------------------------------------------------------
out_dir = "out/nano"  # a run's folder or a checkpoint file
prompt = ""  # text, FILE:path or -; empty: the end-of-text token, else a newline
num_samples = 1
max_new_tokens = 500
mode = "auto"  # auto: block for context="block"; gpt for a GPT or block_size=1; else verify
drafts = "auto"  # D of a round of verify, 1 .. S - 1; auto: the fastest, by times measured here, so
# that a seed gives another text of the same distribution where another D is chosen
temperature = 0.8  # 1: the trained distribution; 0: greedy
top_k = 0  # only the k most probable tokens; 0: all
top_p = 1.0  # only the most probable tokens, up to this much probability
stop = ""  # a token that ends a sample: text, \n, or a name such as <|endoftext|>
rule = "confidence"  # of util/rules.py; or random, left_to_right, threshold, entropy
passes = 0  # K, passes a block, but for threshold and entropy; 0: S, a token each
limit = 0.0  # for threshold a probability, 0 means 0.9; for entropy nats, 0 means 0.1
seed = 1337
device = "auto"
dtype = "auto"  # bfloat16 where the hardware multiplies it, but for small models on a CPU: float32
delay = 0.0  # seconds between passes
# --------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))
# of `generate`
OPTIONS = ("mode", "drafts", "temperature", "top_k", "top_p", "rule", "passes", "limit", "seed")
PROMPT, GPT, DRAFT = range(3)  # where a token comes from: the user, the GPT level, the block level


# ---- drawing -------------------------------------------------------------------------------------


def probabilities(logits, how):
    """p (..., V) float64 of logits (..., V) by how = (temperature, top_k, top_p). The token that
    crosses top_p is kept."""
    temperature, top_k, top_p = how
    logits = logits.double()
    if temperature < 1e-6:
        index = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, index, 1.0)
    p = (logits / temperature).softmax(dim=-1)
    if 0 < top_k < p.shape[-1]:
        best, index = p.topk(top_k, dim=-1)
        p = torch.zeros_like(p).scatter(-1, index, best / best.sum(dim=-1, keepdim=True))
    if top_p < 1:
        falling, index = p.sort(dim=-1, descending=True)
        before = falling.cumsum(dim=-1) - falling
        kept = falling.masked_fill(before >= top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, index, kept / kept.sum(dim=-1, keepdim=True))
    return p


def draw(p, u):
    """Tokens (...) of p (..., V), which need not add up to 1, by u (...) in [0, 1): the first whose
    cumulative share exceeds u. float64: rounded draws act as a lower temperature (2409.02908)."""
    total = p.cumsum(dim=-1)
    return (total / total[..., -1:] <= u.unsqueeze(-1)).sum(dim=-1)


def pick(p, token):  # the entries (...) of p (..., V) at tokens (...)
    return p.gather(-1, token.unsqueeze(-1)).squeeze(-1)


class Drafter:
    """model.LocalHead laid out for draws one after the other. gate and up are one product, and it
    is cut in two: what the states give is computed for all places at once; what each token gives,
    at each of the w places to the left, is a table, unless the vocabulary is too large for one."""

    def __init__(self, model):
        self.model, local, C = model, model.local, model.config.n_embd
        if local is None:
            return
        gate_up = torch.cat([local.mlp.gate_proj.weight, local.mlp.up_proj.weight])
        self.of_states, self.of_left = gate_up[:, :C], gate_up[:, C:]
        (V, e), w = local.embed.weight.shape, model.config.local_window
        self.table, self.offset = None, torch.arange(w, device=gate_up.device) * V
        if w * V * len(gate_up) <= 2**25:  # 128 MB
            parts = self.of_left.unflatten(1, (w, e))
            self.table = torch.einsum("ve,hwe->wvh", local.embed.weight, parts).flatten(0, 1)

    def __call__(self, h, left, how, u):
        """Drafts (B, D) and the q (B, D, V) that they were drawn from: left to right, each given
        those before it. h (B, D, C) of one pass; left (B, w), the text before, its last token
        first; u (B, D)."""
        model, drafts, q = self.model, [], []
        if model.local is not None:
            states = F.linear(model.local.norm(h), self.of_states)
        for i in range(h.shape[1]):
            here = h[:, i]
            if model.local is not None:
                if self.table is None:
                    z = F.linear(model.local.embed(left).flatten(-2), self.of_left)
                else:
                    z = F.embedding_bag(left + self.offset, self.table, mode="sum")
                gate, up = (states[:, i] + z).chunk(2, dim=-1)
                here = here + model.local.mlp.down_proj(F.silu(gate) * up)
            q.append(probabilities(model.logits(here), how))
            drafts.append(draw(q[i], u[:, i]))
            left = torch.cat([drafts[i][:, None], left[:, :-1]], dim=1)
        return torch.stack(drafts, dim=1), torch.stack(q, dim=1)


def accept(p, q, drafts, u, u_next):
    """Speculative sampling (arXiv 2211.17192): (number n (B,) of accepted drafts, next token (B,)).

    drafts (B, D) were drawn from q (B, D, V); p (B, D + 1, V) is what they shall be distributed as,
    each given those before it. Draft i is accepted with a chance of min(1, p(d_i) / q(d_i)) if all
    before it were. The next token is drawn from the positive part of p - q in the next place, where
    q = 0 if no draft stands there. u (B, D) and u_next (B,) are random numbers in [0, 1)."""
    q = F.pad(q, (0, 0, 0, 1))  # (B, D + 1, V)
    passed = u * pick(q[:, :-1], drafts) < pick(p[:, :-1], drafts)
    n = passed.long().cumprod(dim=1).sum(dim=1)
    here = n[:, None, None].expand(-1, 1, p.shape[-1])
    p, q = p.gather(1, here)[:, 0], q.gather(1, here)[:, 0]
    rest = (p - q).clamp(min=0)
    # where p = q nothing is left of p - q, and a refusal is due to rounding
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
    return n, draw(rest, u_next)


# ---- passes: none copies to the host, so that each can be compiled as one graph ------------------
# how: (temperature, top_k, top_p). left (B, w), at least (B, 1): the last tokens of each row, the
# last one first. u: random numbers in [0, 1), float64. D is a number of drafts. What a row has no
# room for, in its window or up to its goal, is computed as well, and dropped on the host.


class BlockCache:
    """Keys, already rotated, and values of B windows, allocated once. Of row r the first length[r]
    tokens are final; what stands behind them the next pass overwrites."""

    def __init__(self, config, batch, device="cpu", dtype=torch.float32):
        c = config
        capacity = c.seq_len + c.block_size  # a block of masks may stand behind a full window
        shape = (2, c.n_layer, batch, capacity, c.n_kv_head, c.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype).unbind()
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)


def read(model, tokens, cache, T):
    """One pass over tokens (B, Q) behind the cached ones -> (B, Q, C). The first T are finished
    text, the rest a block that is being written, which sees all. With context="block", T and
    cache.length are whole blocks. The keys of this pass stand behind `length`, and the next pass
    overwrites them unless `length` is raised before."""
    (B, Q), unit, device = tokens.shape, model.config.unit, tokens.device
    i = torch.arange(Q, device=device)
    # with 5 cached tokens, Q = 3 and T = 1: slots 5 6 7, last 0 2 2, and key 6 has place 1
    slots = cache.length[:, None] + i  # (B, Q): positions, too
    # token i sees the cache, and the tokens of this pass up to last[i]
    last = torch.where(i < T, i // unit * unit + unit - 1, Q - 1)
    # (B, keys): the place of each key in this pass, < 0 if it is cached; those that an earlier,
    # longer pass left behind are >= Q, where nobody sees them
    place = torch.arange(cache.k.shape[2], device=device) - cache.length[:, None]
    mask = (place[:, None] <= last[:, None])[:, None]  # (B, 1, Q, keys)
    batch = torch.arange(B, device=device)[:, None]

    def attend(layer, q, k, v):
        keys, values = cache.k[layer], cache.v[layer]
        keys[batch, slots], values[batch, slots] = k.to(keys.dtype), v.to(keys.dtype)
        return attention(q, keys, values, mask).to(v.dtype)

    return model.trunk(tokens, slots, attend)


def gpt_pass(model, cache, how, left, u):
    """The next token (B,); u (B, 1)."""
    h = read(model, left[:, :1], cache, 1)
    return draw(probabilities(model.logits(h[:, 0]), how), u[:, 0])


def verify_round(model, drafter, cache, how, left, D, u):
    """The two passes of the picture above: (tokens (B, D + 2): t, D drafts, c; n (B,): how many
    drafts are accepted). u (B, 2 D + 2). D + 1 masks draft as well as the S of training.
    The reading pass could carry the masks of the next round as well, behind each number of drafts
    that may be accepted: one pass a round, which would pay on a GPU."""
    masks = left.new_full((len(left), D + 1), model.config.mask_id)
    h = read(model, torch.cat([left[:, :1], masks], dim=1), cache, 1)
    cache.length.add_(1)
    t = draw(probabilities(model.logits(h[:, 0]), how), u[:, 0])
    left = torch.cat([t[:, None], left[:, :-1]], dim=1)
    drafts, q = drafter(h[:, 2:], left, how, u[:, 1 : D + 1])
    proposed = torch.cat([t[:, None], drafts], dim=1)
    p = probabilities(model.logits(read(model, proposed, cache, D + 1)), how)  # (B, D + 1, V)
    n, c = accept(p, q, drafts, u[:, D + 1 : -1], u[:, -1])
    return torch.cat([proposed, c[:, None]], dim=1), n


def block_pass(model, drafter, cache, how, left, text, block, choose, u):
    """block (B, S) with the tokens that this pass reveals. text (B, T): finished tokens that it
    reads first. choose(log_p, masked): for context="block", an unmasking rule. u (B, S)."""
    T = text.shape[1]
    h = read(model, torch.cat([text, block], dim=1), cache, T)[:, T:]
    cache.length.add_(T)
    if model.config.context == "causal":
        return drafter(h, left, how, u)[0]
    logits, masked = model.logits(h), block == model.config.mask_id
    token = draw(probabilities(logits, how), u)
    return torch.where(choose(logits.double().log_softmax(dim=-1), masked), token, block)


# ---- the text, on the host -----------------------------------------------------------------------


@dataclass
class Step:
    """The state after a pass. The same object is yielded each time, and its lists grow: copy what
    you want to keep. Numbers are sums over rows: a pass for three rows counts three. A row counts
    both passes of a round, even if t finishes it."""

    rows: list  # of each row its tokens, prompt included
    kinds: list  # of each token PROMPT, GPT or DRAFT
    pending: list  # of each row what may come next: drafts, or the rest of a block with its masks
    tokens: int = 0  # written
    passes: int = 0  # not counted are those that read a prompt, or a window that has moved
    # of each round of verify that had room for all of its drafts: how many were accepted
    accepted: list = field(default_factory=list)

    def __str__(self):
        said = f"{self.tokens} tokens in {self.passes} passes, "
        said += f"{self.tokens / max(1, self.passes):.2f} a pass"
        if self.accepted:  # a drafting pass yields one token, a reading pass the others
            rounds = len(self.accepted)
            said += f"; {rounds} rounds of 1 + {1 + sum(self.accepted) / rounds:.2f} tokens"
        return said


class Writer:
    """The rows of a generation, and the window of each: the part of it that the network sees, at
    most seq_len tokens with the one that is drawn. When it is full it moves on by half. Where it
    begins depends on the length of the text alone, so that all modes see the same."""

    def __init__(self, model, prompts, max_new_tokens, stop_token, o):
        c, B, weight = model.config, len(prompts), model.embed_tokens.weight
        device, dtype = weight.device, weight.dtype
        if device.type == "cpu":  # attention's own dtype there
            dtype = torch.promote_types(dtype, torch.float32)
        self.model, self.config, self.o, self.stop_token = model, c, o, stop_token
        self.drafter = Drafter(model)
        self.how = o.temperature, o.top_k, o.top_p
        rows = [list(map(int, row)) for row in prompts]
        self.step = Step(rows, [[PROMPT] * len(row) for row in rows], [[] for _ in rows])
        self.goal = [len(row) + max_new_tokens for row in rows]
        self.unfinished = set(range(B)) if max_new_tokens else set()
        self.begin = [-1] * B  # where the window that is cached begins; -1: none is
        self.new_cache = partial(BlockCache, c, device=device, dtype=dtype)
        self.cache = self.new_cache(B)
        self.generator = torch.Generator(device).manual_seed(o.seed)

    def uniform(self, n):
        """(B, n) random numbers in [0, 1)."""
        g = self.generator
        return torch.rand(len(self.goal), n, dtype=torch.float64, generator=g, device=g.device)

    def tensor(self, lists):
        return torch.tensor(lists, dtype=torch.int64, device=self.cache.k.device)

    def window(self, r):
        """(begin, end) of row r's window, in whole units of finished text."""
        N, unit = self.config.seq_len, self.config.unit
        begin, end = max(0, self.begin[r]), len(self.step.rows[r]) // unit * unit
        while end - begin >= N:
            begin += math.ceil(N / unit / 2) * unit
        return begin, end

    def prepare(self, T):
        """Set the cache up for a pass that begins with the last T tokens of each window. What
        stands before them earlier passes have read; but a window that has moved is read anew, for
        its positions are new. Returns left (B, w), and room as a list."""
        c, rows, moved = self.config, self.step.rows, []
        lengths, room = [0] * len(rows), [0] * len(rows)
        for r in self.unfinished:
            begin, end = self.window(r)
            lengths[r] = end - begin - T
            room[r] = min(begin + c.seq_len, self.goal[r]) - len(rows[r])
            if begin != self.begin[r]:
                moved.append(r)
            self.begin[r] = begin
        if any(lengths[r] for r in moved):
            texts = [rows[r][self.begin[r] : self.begin[r] + lengths[r]] for r in moved]
            n, part = max(map(len, texts)), self.new_cache(len(moved))
            # zeros fill the shorter ones: they stand behind `length`, where no pass sees them
            tokens = self.tensor([(text + [0] * n)[:n] for text in texts])
            read(self.model, tokens, part, n)
            self.cache.k[:, moved], self.cache.v[:, moved] = part.k, part.v
        self.cache.length.copy_(self.tensor(lengths))
        w = max(1, c.local_window)
        left = [(row[-w:][::-1] + [c.mask_id] * w)[:w] for row in rows]
        return self.tensor(left), room

    def write(self, r, tokens, last, pending=()):
        """What a pass gave row r: drafts, but for the last token, whose kind is `last`. The row is
        finished at its goal, or by a stop token, which is left out."""
        self.step.passes += 1
        for i, token in enumerate(tokens, 1):
            if token != self.stop_token:
                self.step.rows[r].append(token)
                self.step.kinds[r].append(last if i == len(tokens) else DRAFT)
                self.step.tokens += 1
            if token == self.stop_token or len(self.step.rows[r]) == self.goal[r]:
                self.unfinished.remove(r)
                break
        self.step.pending[r] = [*pending] if r in self.unfinished else []


# ---- modes: a token, a round or a block for every row that is not finished; yields after each pass


def write_gpt(writer):
    left, _ = writer.prepare(1)
    found = gpt_pass(writer.model, writer.cache, writer.how, left, writer.uniform(1))
    tokens = found.tolist()
    for r in [*writer.unfinished]:
        writer.write(r, [tokens[r]], GPT)
    yield


def write_verified(writer):
    """It yields after each of the two passes of a round, for whoever watches: both have run before
    the first. Where the tokens of a round are cut off depends on lengths alone, so that what is
    left keeps its distribution."""
    left, room = writer.prepare(1)
    D, step, rows = writer.o.drafts, writer.step, [*writer.unfinished]
    found = verify_round(writer.model, writer.drafter, writer.cache, writer.how, left, D,
                         writer.uniform(2 * D + 2))
    tokens, accepted = (x.tolist() for x in found)  # here the host waits for the device
    for r in rows:
        writer.write(r, tokens[r][:1], GPT, tokens[r][1:-1][: room[r] - 1])
    yield
    for r in rows:
        fits = room[r] - 1 if r in writer.unfinished else 0  # t may have ended the row
        drafts = tokens[r][1 : 1 + accepted[r]][:fits]
        if fits >= D:
            step.accepted.append(len(drafts))
        if len(drafts) < fits:
            writer.write(r, [*drafts, tokens[r][-1]], GPT)  # with c
        else:
            writer.write(r, drafts, DRAFT)
    yield


def write_blocks(writer):
    """With context="block", blocks stand where they stood in training: if a prompt ends inside of a
    block, its last tokens are the beginning of the first block that is written."""
    c, o, todo, texts = writer.config, writer.o, [*writer.unfinished], writer.step.rows
    S = c.block_size
    spans = {r: writer.window(r) for r in todo}
    # the first pass reads the block before, or as much of it as every window has
    T = min(S, *(end - begin for begin, end in spans.values()))
    left, room = writer.prepare(T)
    block, text = [[0] * S for _ in texts], [[0] * T for _ in texts]  # 0: of finished rows
    for r, (_, end) in spans.items():
        block[r] = (texts[r][end:] + [c.mask_id] * S)[:S]
        text[r] = texts[r][end - T : end]
    block, text = writer.tensor(block), writer.tensor(text)
    for n in range(S):  # a causal context takes one pass
        count = ((block == c.mask_id).sum(dim=1) / max(1, (o.passes or S) - n)).ceil()
        u, score = writer.uniform(2 * S).chunk(2, dim=1)
        choose = partial(RULES[o.rule], count=count, limit=o.limit, score=score)
        block = block_pass(writer.model, writer.drafter, writer.cache, writer.how, left, text,
                           block, choose, u)
        text = text[:, :0]  # it is cached now
        found = block.tolist()
        for r in todo:
            new = found[r][len(texts[r]) - spans[r][1] :][: room[r]]  # what stands behind the row
            written, pending = ([], new) if c.mask_id in found[r] else (new, [])
            writer.write(r, written, DRAFT, pending)
        yield
        todo = [r for r in todo if c.mask_id in found[r]]
        if not todo:
            return


MODES = {"gpt": write_gpt, "verify": write_verified, "block": write_blocks}


def resolve(config, given):
    """The options of a generation, of which the caller has `given` some. UserError if a model of
    this shape cannot decode so."""
    unknown = ", ".join(given.keys() - OPTIONS)
    require(not unknown, f"unknown option {unknown}; known are {', '.join(OPTIONS)}, stop_token")
    o = SimpleNamespace(**{**{name: DEFAULTS[name] for name in OPTIONS}, "drafts": 0, **given})
    require(o.drafts != "auto", "drafts is a number here: choose_drafts finds the fastest")
    S, block, modes = config.block_size, config.context == "block", ["gpt", "block"]
    if block:
        modes = ["block"]
    elif S > 1:
        modes = ["verify", "gpt", "block"]
    check(o, {"mode": ["auto", *modes], "rule": RULES},
          most={"drafts": S - 1, "top_p": 1, "passes": S, "seed": 2**63 - 1})
    if o.mode == "auto":
        o.mode = modes[0]
    adaptive = o.rule in LIMITS
    for name, used in (("drafts", o.mode == "verify"), ("rule", block), ("limit", adaptive),
                       ("passes", block and not adaptive)):
        require(used or getattr(o, name) in (0, DEFAULTS[name]), f"{name} would be ignored in mode "
                f"{o.mode} with context={config.context} and rule={o.rule}: leave it out")
    require(o.top_p > 0, "top_p must be above 0")
    o.drafts = o.drafts or S - 1
    o.limit = o.limit or LIMITS.get(o.rule, 0.0)
    return o


@torch.inference_mode()
def generate_stream(model, prompts, max_new_tokens, stop_token=None, **options):
    """Continue `prompts`, lists of at least one token id, of any lengths, by max_new_tokens tokens
    each or up to stop_token, an id. Yields a `Step` at the start and after each pass. options: the
    settings above that are in OPTIONS, but drafts is a number: 0, the default, stands for S - 1,
    and choose_drafts finds the fastest. That a model was trained as a GPT (draft_weight=0) only its
    checkpoint knows: give mode="gpt". UserError for what this model cannot do."""
    o, V = resolve(model.config, options), model.config.vocab_size
    require(len(prompts) and max_new_tokens >= 0, "give a prompt or more, and max_new_tokens >= 0")
    for row in prompts:
        require(len(row) and min(row) >= 0 and max(row) < V,
                f"a prompt needs at least one token, and all in 0 .. {V - 1}")
    writer = Writer(model, prompts, max_new_tokens, stop_token, o)
    yield writer.step
    while writer.unfinished:
        for _ in MODES[o.mode](writer):
            yield writer.step


def generate(model, prompts, max_new_tokens, stop_token=None, **options):
    """The rows that generate_stream ends with: lists of token ids, the prompts included."""
    *_, last = generate_stream(model, prompts, max_new_tokens, stop_token, **options)
    return last.rows


# ---- how many drafts -----------------------------------------------------------------------------


@torch.inference_mode()
def time_rounds(model, prompts, counts, seconds=0.5, **options):
    """{D: seconds of a round with D drafts behind these prompts, or of a pass of gpt for D = 0} for
    D in `counts`; the rounds take turns for `seconds` in all."""
    writer = Writer(model, prompts, 10**9, None, resolve(model.config, options))

    def once(D):
        writer.o.drafts = D
        for _ in (write_verified if D else write_gpt)(writer):
            pass

    return take_turns({D: partial(once, D) for D in counts}, seconds)


def choose_drafts(model, prompts, acceptance=(), **options):
    """(D, why): with how many drafts `verify` writes fastest on this machine, behind these prompts;
    0 if a token a pass is faster. acceptance: mean acceptances by place (eval.Figures); if they
    are not known, rounds are counted. options: of `generate`."""
    S, whence = model.config.block_size, "the acceptances of its last validation"
    chances = list(itertools.accumulate(acceptance, operator.mul))  # that the first i are accepted
    if not chances:
        new = S + 500 // len(prompts)
        *_, step = generate_stream(model, prompts, new, **options | {"mode": "verify"})
        n = torch.tensor(step.accepted)
        chances = [((n >= i).sum() / max(1, len(n))).item() for i in range(1, S)]
        whence = f"{len(n)} rounds written for it, as it was not validated"
    few = [D for D in (1, 3, 7, 15, 31) if D < S - 1] + [S - 1]
    taken = time_rounds(model, prompts, [0, *few], **options)
    gain = {D: (2 + sum(chances[:D])) * taken[0] / taken[D] for D in few}
    best = max(gain, key=gain.get)
    said = ", ".join(f"{D}: {x:.2f}" for D, x in gain.items())
    said += f" times the speed of gpt, by rounds timed just now and {whence}"
    if gain[best] < 1.1:
        return 0, f"drafts     none, for they would not pay ({said})"
    return best, f"drafts     {best} a round ({said})"


# ---- the command ---------------------------------------------------------------------------------


@guarded
def main(argv):
    s, _ = settings(DEFAULTS, argv)
    check(s, {"dtype": ("auto", "float32", "bfloat16")}, {"num_samples": 1}, {"delay": 3600})
    device = choose_device(s.device)
    model, state = checkpoint.load_model(s.out_dir, device)
    if state["settings"]["draft_weight"] == 0:
        check(s, {"mode": ("auto", "gpt")})  # a GPT: it cannot draft
        s.mode = "gpt"
    s.dtype = decode_in(s.dtype, model)
    tokenizer, text = make_tokenizer(state["meta"]), s.prompt
    if text == "-" or text.startswith("FILE:"):
        text = read_text(text.removeprefix("FILE:"))
    prompt = tokenizer.encode(text).tolist() or opening(tokenizer)
    stop_token = token_id(tokenizer, s.stop) if s.stop else None
    prompts, options = [prompt] * s.num_samples, {name: getattr(s, name) for name in OPTIONS}
    require(s.drafts == "auto" or (s.drafts.isdecimal() and int(s.drafts)),
            f"--drafts must be auto or a number from 1 on, not {s.drafts!r}")
    options["drafts"] = 0 if s.drafts == "auto" else int(s.drafts)
    if s.drafts == "auto" and resolve(model.config, options).mode == "verify":
        acceptance = (state["final"] or state["figures"] or {}).get("acceptance", [])
        options["drafts"], why = choose_drafts(model, prompts, acceptance, **options)
        options["mode"] = "verify" if options["drafts"] else "gpt"
        print(why, file=sys.stderr)
    stream = generate_stream(model, prompts, s.max_new_tokens, stop_token, **options)
    terminal = sys.stdout.isatty()
    plain = os.environ.get("TERM", "") in ("", "dumb") or os.environ.get("NO_COLOR")
    live = terminal and not plain
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that other_screen is left
    step, seconds, code = None, 0.0, 0
    try:
        with other_screen() if live else nullcontext():
            began = time.perf_counter()
            for step in stream:
                seconds += time.perf_counter() - began
                if live:
                    show(step, tokenizer.decode, model.config.mask_id)
                time.sleep(s.delay)
                began = time.perf_counter()  # to show and to wait is not the model's time
    except KeyboardInterrupt:
        code = 130
    if step is None:
        return code
    # also what was written before Ctrl-C; an opening that the user did not type is left out
    for i, row in enumerate(step.rows):
        if s.num_samples > 1:
            print(f"--- sample {i + 1} of {s.num_samples}")
        written = tokenizer.decode(row if text else row[len(prompt) :])
        print(printable(written) if terminal else written, flush=True)
    print(f"{step}, {step.tokens / seconds:,.0f} tokens/s in {s.dtype}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
