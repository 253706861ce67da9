"""Write text block by block from a checkpoint, and watch it crystallise.

    python sample.py                                        from nothing, the nano of train.py
    python sample.py --prompt="KING." --steps=4             half the passes at S=8
    python sample.py --prompt=FILE:path --rule=threshold    a prompt from a file; "-" is stdin
    python sample.py --num_samples=4 --delay=0.1 | cat      in a pipe: plain text only

As a library: `from sample import generate`; `generate_stream` yields after every forward pass.

A block starts as S masks. Each forward pass predicts all of them, a rule chooses which to keep,
and after `steps` passes (K) none is left. The pass that writes a finished block into the cache is
the first pass of the next block, so K passes a block are all there are; NFE counts them.
"""

import os
import re
import shutil
import signal
import sys
import time
import unicodedata
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from checkpoint import load_model
from configurator import SettingsError, fail, override, public
from dataset import DataError, Tokenizer
from machine import choose_device
from model import BlockCache, CudaGraphs

# ---- settings ----------------------------------------------------------------------------------
out_dir = "out/nano"  # or a checkpoint file
prompt = ""  # text; FILE:path reads a file, - reads standard input
num_samples = 1
max_new_tokens = 500
rule = "confidence"  # random, confidence, threshold, entropy, left_to_right
steps = 0  # K, forward passes per block, 1..S; 0 = S. threshold and entropy choose by themselves
temperature = 0.8  # 1 = the trained distribution, 0 = greedy
top_k = 0  # keep the k most probable tokens; 0 = all
top_p = 1.0  # keep the most probable tokens up to this much probability
tau = 0.9  # rule threshold: reveal what is at least this certain
gamma = 0.5  # rule entropy: nats of joint uncertainty allowed per pass
stop = ""  # text of one token that ends a sample
seed = 1337
block_size = 0  # 0 = as trained; another needs --any_block_size=true
any_block_size = False
delay = 0.0  # seconds between frames, for watching
cuda_graphs = False  # on CUDA: replay recorded passes
device = "auto"
# -------------------------------------------------------------------------------------------------
DEFAULTS = public(dict(globals()))


# ---- unmasking rules: which masked positions to reveal now --------------------------------------


@dataclass
class View:
    """What a rule sees of the current blocks, one row per sample.

    masked (B, S) bool; certainty (B, S), the largest probability of each position; entropy (B, S)
    in nats; both of the model's own distribution, before temperature and truncation, and without
    the drawn token: a rule that looked at the draw would prefer likely draws and so sharpen the
    distribution. order (B, S): a uniformly random order, fixed per block. quota (B,): positions
    to reveal so that the block ends on time, ceil(remaining / steps left).
    """

    masked: torch.Tensor
    certainty: torch.Tensor
    entropy: torch.Tensor
    order: torch.Tensor
    quota: torch.Tensor
    tau: float
    gamma: float


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
    place = torch.arange(v.masked.shape[1], device=v.masked.device, dtype=v.order.dtype)
    return _first(place.expand_as(v.order), v.masked, v.quota)


def confidence(v):
    """The most certain positions."""
    return _first(-v.certainty, v.masked, v.quota)


def threshold(v):
    """Every position at least `tau` certain, and the most certain one in any case."""
    one = torch.ones_like(v.quota)
    return (v.masked & (v.certainty >= v.tau)) | _first(-v.certainty, v.masked, one)


def entropy(v):
    """The EB rule (arXiv 2505.24857): positions by rising entropy, as many as keep
    sum of entropies - largest entropy <= gamma, which bounds what drawing them together,
    as if independent, can cost in nats."""
    key = v.entropy.masked_fill(~v.masked, torch.inf)
    ranked, place = key.sort(dim=1, stable=True)
    # the largest of a prefix is its last, so the condition is on the sum of those before it
    before = torch.cat([torch.zeros_like(ranked[:, :1]), ranked[:, :-1].cumsum(dim=1)], dim=1)
    return v.masked & torch.zeros_like(v.masked).scatter(1, place, before <= v.gamma)


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
    if 0 < top_k < p.shape[-1]:
        kept = p.topk(top_k, dim=-1)
        p = torch.zeros_like(p).scatter(-1, kept.indices, kept.values)
    if top_p < 1.0:
        ranked, place = p.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked
        keep = before < top_p * ranked.sum(dim=-1, keepdim=True)
        p = torch.zeros_like(p).scatter(-1, place, ranked * keep)
    return p / p.sum(dim=-1, keepdim=True)


def draw(p, generator):
    """(..., V) float64 probabilities -> (...) int64 tokens, by the exponential race: the smallest
    E_i / p_i with E_i ~ Exp(1) is token i with probability p_i."""
    race = torch.empty_like(p).exponential_(generator=generator)
    return (p / race).argmax(dim=-1)


# ---- generation ----------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How to decode; `check` raises ValueError, one line, for what cannot be honoured."""

    rule: str = "confidence"
    steps: int = 0  # K, passes per block; 0 = S
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    tau: float = 0.9
    gamma: float = 0.5
    seed: int = 1337
    stop_token: int | None = None  # a token id that ends a row, and is not part of it
    cuda_graphs: bool = False  # replay recorded passes (model.CudaGraphs)

    def check(self, S, on_cuda):
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}: one of {', '.join(RULES)}")
        self.steps = self.steps or S
        if not 1 <= self.steps <= S:
            raise ValueError(f"steps must lie in 1..{S} (the block size), not {self.steps}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must lie in (0, 1], not {self.tau}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be 0 or more, not {self.gamma}")
        if self.cuda_graphs and not on_cuda:
            raise ValueError("cuda_graphs needs a CUDA device: leave it out")


def check_prompts(prompts, max_new_tokens, c):
    """ValueError, one line, unless the prompts (lists of ids) fit the model of config `c`."""
    if max_new_tokens < 0 or not prompts:
        raise ValueError("max_new_tokens must be 0 or more, and there must be at least one prompt")
    longest = c.seq_len - c.block_size
    for row in prompts:
        if len(row) > longest:
            raise ValueError(
                f"a prompt of {len(row)} tokens leaves no room for a block in the context of "
                f"{c.seq_len}: shorten it to {longest}"
            )
        if len(row) and not (0 <= min(row) and max(row) < c.vocab_size):
            raise ValueError(f"prompt tokens must lie in 0..{c.vocab_size - 1}")


@dataclass
class Step:
    """The state after one forward pass, for B rows.

    block (B, S) int64, mask_id where undecided; revealed (B, S) bool, decided by this pass;
    start (B,), the place of the block in each row; settled (B,), how many tokens of each row are
    final; done (B,) bool; nfe, forward passes so far; text, the rows, padded.
    """

    block: torch.Tensor
    revealed: torch.Tensor
    start: torch.Tensor
    settled: torch.Tensor
    done: torch.Tensor
    nfe: int
    text: torch.Tensor

    def rows(self):
        """Each row's final tokens so far, prompt included, as lists of ids."""
        return [row[:n].tolist() for row, n in zip(self.text, self.settled, strict=True)]


@torch.no_grad()
def generate_stream(model, prompts, max_new_tokens, **options):
    """Continue each prompt (a list of ids, of any length, also 0) by max_new_tokens tokens,
    yielding a `Step` after every forward pass. `options` are the fields of Sampling.

    A prompt need not fill its last block: its rest are fixed tokens of the first block written,
    at their true positions. When the context is full, its later half is read again as the start
    of a new one, in the same pass that begins the next block. objective "ar" runs the same loop:
    its blocks are single tokens, each predicted by the pass that commits the one before.
    """
    c, o = model.config, Sampling(**options)
    S, ar = c.block_size, c.objective == "ar"
    where = next(model.parameters()).device
    o.check(S, where.type == "cuda")
    check_prompts(prompts, max_new_tokens, c)
    generator = torch.Generator(where).manual_seed(o.seed)
    have = torch.tensor([len(row) for row in prompts], device=where)
    goal = have + max_new_tokens
    width = int(goal.max()) + 2 * S
    text = [[*row, *[c.mask_id] * (width - len(row))] for row in prompts]
    text = torch.tensor(text, device=where)
    start, settled, done, nfe = have // S * S, have.clone(), goal <= have, 0
    cache, pending = open_cache(model, text, start, c.seq_len - S, o.cuda_graphs)
    yield Step(text[:, :0], text[:, :0] >= 0, have, settled, done, nfe, text)
    while not bool(done.all()):
        if cache.length + pending.shape[1] + (0 if ar else S) > cache.capacity:
            cache, pending = open_cache(model, text, start, c.seq_len // S // 2 * S, o.cuda_graphs)
        place = start[:, None] + torch.arange(S, device=where)  # a finished row goes on, unseen
        block = text.gather(1, place)
        order = torch.rand(block.shape, generator=generator, dtype=torch.float64, device=where)
        steps_left = S if o.rule in ("threshold", "entropy") else o.steps
        while bool((block == c.mask_id).any()):
            tokens = pending if ar else torch.cat([pending, block], dim=1)
            logits = model.decode(tokens, cache, pending.shape[1])
            revealed, block = reveal(logits, block, c.mask_id, order, steps_left, o, generator)
            pending, nfe, steps_left = pending[:, :0], nfe + 1, steps_left - 1
            if not bool((block == c.mask_id).any()):
                text.scatter_(1, place, block)
                settled, done = settle(block, place, goal, have, o.stop_token, settled, done)
            yield Step(block, revealed, start, settled, done, nfe, text)
        pending, start = block, start + S


def reveal(logits, block, mask_id, order, steps_left, o, generator):
    """One denoising step: (revealed (B, S) bool, the block with those positions drawn)."""
    masked = block == mask_id
    logp = logits.double().log_softmax(dim=-1)
    certainty, entropy = logp.amax(dim=-1).exp(), -(logp.exp() * logp).sum(dim=-1)
    quota = -(-masked.sum(dim=1) // steps_left)
    revealed = RULES[o.rule](View(masked, certainty, entropy, order, quota, o.tau, o.gamma))
    p = truncated_probabilities(logits, o.temperature, o.top_k, o.top_p)
    return revealed, torch.where(revealed, draw(p, generator), block)


def open_cache(model, text, start, most, graphs):
    """A fresh cache, and the finished tokens (B, Q) that the next pass commits to it.

    Each row keeps its last `most` tokens before `start`, both whole blocks. Rows end in the same
    slot; a shorter one is padded on the left by whole blocks, which the cache hides.
    """
    c = model.config
    keep = start.clamp(max=most)
    width = int(keep.max())
    pad = width - keep
    slot = torch.arange(width, device=text.device)
    pending = text.gather(1, (start[:, None] - width + slot).clamp(min=0))
    pending = pending.masked_fill(slot < pad[:, None], 0)
    if c.objective == "ar":  # a row's first token is predicted from one [MASK], as in training
        pending = torch.cat([torch.zeros_like(text[:, :1]), pending], dim=1)
        pending.scatter_(1, pad[:, None], c.mask_id)
    kind = text.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else model.embed.weight.dtype
    cache = BlockCache(c, len(text), c.seq_len, pad, text.device, dtype)
    cache.graphs = CudaGraphs(model, cache) if graphs else None
    return cache, pending


def settle(block, place, goal, have, stop_token, settled, done):
    """(settled, done) after a block at `place`: cut at the goal or before a stop token."""
    upto = torch.minimum(place[:, -1] + 1, goal)
    finished = upto >= goal
    if stop_token is not None:
        hit = (block == stop_token) & (place >= have[:, None])
        first = torch.where(hit, place, upto[:, None]).amin(dim=1)
        upto, finished = torch.minimum(upto, first), finished | hit.any(dim=1)
    return torch.where(done, settled, upto), done | finished


def generate(model, prompts, max_new_tokens, **options):
    """The rows of generate_stream when all is done, prompts included: lists of token ids."""
    *_, last = generate_stream(model, prompts, max_new_tokens, **options)
    return last.rows()


# ---- the terminal --------------------------------------------------------------------------------

PLAIN, DIM, BRIGHT = "", "\x1b[2m", "\x1b[1;92m"


def columns(text):
    """Terminal columns of a string: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def printable(text):
    """Text without the control characters that would move the cursor."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def wrap(pieces, width):
    """[(style, text)] -> lines of at most `width` columns, as lists of (style, text)."""
    lines, used = [[]], 0
    for style, text in pieces:
        for char in printable(text):
            size = 1 if char.isascii() else columns(char)
            if char == "\n" or used + size > width:
                lines.append([])
                used = 0
            if char != "\n":
                lines[-1].append((style, char))
                used += size
    return lines


def styled(line):
    """A line's characters as one string, an escape code wherever the style changes."""
    out, now = [], PLAIN
    for style, char in line:
        if style != now:
            out.append("\x1b[0m" + style)
            now = style
        out.append(char)
    return "".join(out) + ("\x1b[0m" if now else "")


class Display:
    """Shows the end of every sample while it is written: masks dim, new tokens bright, settled
    text plain. It draws on the terminal's alternate screen: a resized window or the echo of Ctrl-C
    leaves nothing behind, and on leaving the old screen and the cursor return, whatever happened.
    """

    def __init__(self, tokenizer, mask_id, out=None):
        self.tokenizer, self.mask_id, self.out = tokenizer, mask_id, out or sys.stdout
        encoding = (self.out.encoding or "").lower().replace("-", "")
        self.glyph = "\u2591" if encoding.startswith("utf") else "_"

    def __enter__(self):
        self.out.write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *_):
        self.out.write("\x1b[?25h\x1b[?1049l")
        self.out.flush()

    def pieces(self, step, row, room=sys.maxsize):
        """[(style, text)] of one row: its last `room` tokens or more, then the block in the making.

        The cut moves by whole rooms, so that lines do not break anew with every token.
        """
        start, settled = int(step.start[row]), int(step.settled[row])
        end = min(start, settled)
        cut = max(0, end - room) // room * room
        out = [(PLAIN, self.tokenizer.decode(step.text[row, cut:end].tolist()))]
        shown = settled - end if step.done[row] else step.block.shape[1]
        inside, fresh = step.block[row, :shown].tolist(), step.revealed[row, :shown].tolist()
        for token, new in zip(inside, fresh, strict=True):
            if token == self.mask_id:
                out.append((DIM, self.glyph))
            else:
                out.append((BRIGHT if new else PLAIN, self.tokenizer.token_text(token)))
        return out

    def show(self, step):
        size = shutil.get_terminal_size()
        rows = min(len(step.text), size.lines)  # of more samples than lines, the first
        height, width = size.lines // rows, max(1, size.columns - 1)
        lines = []
        for row in range(rows):
            lines += wrap(self.pieces(step, row, height * width), width)[-height:]
        frame = "\x1b[H\x1b[J" + "\n".join(styled(line) for line in lines)
        self.out.write("\x1b[?2026h" + frame + "\x1b[?2026l")  # drawn at once where supported
        self.out.flush()


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
    return model, Tokenizer.from_meta(state["meta"])


def options(s, tokenizer):
    """The fields of Sampling that the settings ask for."""
    stop_ids = tokenizer.encode(s.stop)
    if len(stop_ids) > 1:
        raise SettingsError(f"--stop={s.stop!r} is {len(stop_ids)} tokens, not one")
    return {
        "rule": s.rule, "steps": s.steps, "temperature": s.temperature, "top_k": s.top_k,
        "top_p": s.top_p, "tau": s.tau, "gamma": s.gamma, "seed": s.seed,
        "stop_token": stop_ids[0] if stop_ids else None, "cuda_graphs": s.cuda_graphs,
    }


def command(argv):
    """Run the command; its exit code."""
    s = SimpleNamespace(**override(DEFAULTS, argv))
    model, tokenizer = load(s)
    ids = tokenizer.encode(read_prompt(s.prompt))
    if s.num_samples < 1:
        raise SettingsError(f"--num_samples must be at least 1, not {s.num_samples}")
    stream = generate_stream(
        model, [ids] * s.num_samples, s.max_new_tokens, **options(s, tokenizer)
    )
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the display's clean-up
    display = Display(tokenizer, model.config.mask_id) if live else nullcontext()
    began, seconds, step, interrupted = time.perf_counter(), 0.0, None, False
    try:
        with display:
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
            f"{new / seconds:.0f} tokens/s\x1b[0m"
        )
    return 130 if interrupted else 0


def main(argv):
    try:
        return command(argv)
    except (SettingsError, DataError, ValueError) as e:
        fail(e)
    except BrokenPipeError:  # the reader has gone, as in `| head`; let the exit not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
