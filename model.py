"""CASCADE: a Llama-shaped transformer that writes blocks left to right, tokens inside in parallel.

Glossary, one meaning per word:

    B               batch: sequences in a tensor
    N, seq_len      tokens in a sequence (nanoGPT's block_size; here that word never means this)
    S, block_size   tokens in a diffusion block, as in the block-diffusion literature
    nb              blocks in a sequence, N // S
    C, H, Hkv, D    width, query heads, key/value heads, head dimension C // H
    V               vocabulary of real tokens
    mask_id         V: an input embedding only; the head has V rows, so [MASK] is never sampled
    x0, xt          clean tokens, noisy tokens, int64 (B, N)

Who sees whom, for three blocks of the clean and of the noisy stream (# = visible):

    keys          clean  noisy
    queries       0 1 2  0 1 2
    clean 0       # . .  . . .      clean block c sees clean blocks <= c
    clean 1       # # .  . . .
    clean 2       # # #  . . .
    noisy 0       . . .  # . .      noisy block b sees clean blocks < b and itself
    noisy 1       # . .  . # .
    noisy 2       # # .  . . #

So one pass over both streams gives, for every block at once, the logits that a pass over
[clean blocks before b, noisy block b] would give: N (N + S) visible entries of (2N)^2. A second
noisy copy is one more row and column of squares: copies do not see each other.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from corrupt import check_blocks, head_loss

try:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:
    raise SystemExit(
        f"error: torch 2.5 or newer is needed, not {torch.__version__}: "
        "pip install -r requirements.txt"
    ) from None

HIDDEN = -3e4  # added to a score it hides the key; finite, twice over in float16 too: no NaN


@dataclass
class CascadeConfig:
    """The shape of a model. Raises ValueError, one line, for a shape that cannot work."""

    vocab_size: int = 65
    seq_len: int = 256
    block_size: int = 16
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0  # 0: as many as n_head
    n_embd: int = 384
    n_hidden: int = 0  # width of the MLP; 0: 8/3 n_embd, up to a multiple of 32
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = True
    neighbours: int = 0  # on either side, that join a token's embedding (class Neighbours)
    objective: str = "diffusion"  # or "ar": the same network as a next-token GPT

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 32 * math.ceil(self.n_embd * 8 / 3 / 32)
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_blocks(self.seq_len, self.block_size)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.head_dim % 2:
            raise ValueError(
                f"rotary embedding needs even head dimension n_embd / n_head, not {self.head_dim}"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.neighbours < 0:
            raise ValueError(f"neighbours must be 0 or more, not {self.neighbours}")
        if self.objective not in ("diffusion", "ar"):
            raise ValueError(f"objective must be diffusion or ar, not {self.objective!r}")
        if self.objective == "ar" and self.block_size != 1:
            raise ValueError("objective ar writes one token at a time: set block_size to 1")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def mask_id(self):
        return self.vocab_size


# ---- masks and attention ---------------------------------------------------------------------


@lru_cache(maxsize=32)
def build_block_causal_mask(seq_len, block_size, device="cpu"):
    """(N, N) bool, True where visible: query i sees key j when j // S <= i // S."""
    check_blocks(seq_len, block_size)
    block = torch.arange(seq_len, device=device) // block_size
    return block[:, None] >= block[None, :]


@lru_cache(maxsize=32)
def build_two_stream_mask(seq_len, block_size, device="cpu", copies=1):
    """((1 + copies) N, the same) bool, True where visible: the picture above, with one row and one
    column of squares for each noisy copy. Used on small chunks and in tests."""
    clean = build_block_causal_mask(seq_len, block_size, device)
    same = clean & clean.T
    mask = torch.block_diag(*[same] * (1 + copies))
    mask[:, :seq_len] |= (clean & ~same).repeat(1 + copies, 1)
    return mask


def _sdpa(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(D) + mask) v on (B, H, N, D); grouped key/value heads are shared."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def block_causal_attention(q, k, v, block_size):
    """One stream, dense: q (B, H, N, D), k and v (B, Hkv, N, D) -> (B, H, N, D)."""
    N = q.shape[2]
    if block_size == 1:
        return _sdpa(q, k, v, causal=True)
    if block_size == N:
        return _sdpa(q, k, v)
    return _sdpa(q, k, v, build_block_causal_mask(N, block_size, q.device))


@lru_cache(maxsize=128)
def _chunk_bias(before, length, block_size, copies, noisy_only, device, dtype):
    """(queries, before + (1 + copies) length) additive mask of one chunk; all see `before` keys."""
    mask = build_two_stream_mask(length, block_size, device, copies)
    mask = mask[length:] if noisy_only else mask
    bias = torch.zeros(mask.shape, device=device, dtype=dtype).masked_fill_(~mask, -math.inf)
    return F.pad(bias, (before, 0))


def chunked_two_stream_attention(q, k, v, block_size, chunk=64):
    """Clean and noisy streams, exact, on any device: work and memory follow the visible entries.

    The queries of a chunk of blocks, clean and noisy together, meet the clean keys up to the
    chunk's end and the chunk's own noisy keys, so no (2N, 2N) mask or score matrix exists.
    k, v (1 + copies, B, Hkv, N, D): clean, then each noisy copy; q (the same, B, H, N, D), or
    without the clean stream. Returns the shape of q. A chunk: about `chunk` tokens, whole blocks.
    """
    step = block_size * max(1, chunk // block_size)
    # split, not sliced: the gradient of each slice would be a zero-filled copy of the whole
    k, *noisy_k = (x.split(step, dim=2) for x in k.unbind())
    v, *noisy_v = (x.split(step, dim=2) for x in v.unbind())
    out = []
    for i, queries in enumerate(q.split(step, dim=3)):
        keys = [*k[: i + 1], *(copy[i] for copy in noisy_k)]
        values = [*v[: i + 1], *(copy[i] for copy in noisy_v)]
        arguments = block_size, len(noisy_k), queries, *keys, *values
        if i < FEW_CHUNKS or not torch.is_grad_enabled():
            out.append(_attend_chunk(*arguments))
        else:
            out.append(checkpoint(
                _attend_chunk, *arguments, use_reentrant=False, preserve_rng_state=False
            ))
    return torch.cat(out, dim=3)


# The keys of a chunk are joined into one tensor, which its gradient needs. Kept, they would add up
# to N^2 / chunk; so from here on a chunk keeps its parts and joins them anew for the gradient
FEW_CHUNKS = 32  # 2,048 tokens


def _attend_chunk(block_size, copies, queries, *parts):
    """One chunk's attention: queries (streams, B, H, n, D) against the joined keys and values,
    `parts`: clean keys of the chunks up to this one, its noisy keys, and the same of the values."""
    streams, _, _, length, _ = queries.shape
    half = len(parts) // 2
    before = sum(part.shape[2] for part in parts[: half - 1 - copies])
    bias = _chunk_bias(
        before, length, block_size, copies, streams == copies, queries.device, queries.dtype
    )
    y = _sdpa(
        torch.cat(queries.unbind(), dim=2),
        torch.cat(parts[:half], dim=2),
        torch.cat(parts[half:], dim=2),
        bias,
    )  # (B, H, streams * n, D)
    return torch.stack(y.chunk(streams, dim=2))


@lru_cache(maxsize=32)
def flex_block_mask(seq_len, block_size, copies, noisy_only, device):
    """FlexAttention's block mask of all streams laid end to end; built once per shape."""

    def visible(b, h, i, j):
        i = i + seq_len if noisy_only else i
        qb, kb = i % seq_len // block_size, j % seq_len // block_size
        return ((j < seq_len) & (kb < qb)) | ((i // seq_len == j // seq_len) & (kb == qb))

    keys = (1 + copies) * seq_len
    queries = keys - seq_len if noisy_only else keys
    return create_block_mask(visible, None, None, queries, keys, device=device)


def flex_two_stream_attention(q, k, v, block_mask):
    """As chunked_two_stream_attention, by FlexAttention: fast once compiled, on CUDA.

    Uncompiled it materialises the scores, and on a CPU it has no backward: tests use it so.
    """
    N = q.shape[3]
    q, k, v = (torch.cat(x.unbind(), dim=2) for x in (q, k, v))  # (B, H, streams * N, D)
    y = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return torch.stack(y.split(N, dim=2))


class BlockCache:
    """Already-rotated keys and the values of finished blocks, preallocated for one generation.

    Memory: 2 * n_layer * n_kv_head * head_dim * bytes per element, for each token of each row.
    Row r's tokens fill slots start[r] .. length - 1: rows of different length end at one slot, so
    a step is one slice and never a copy. Boundaries stay at multiples of S of the true position.

    A pass writes its keys behind `length`; only `commit` moves `length`, and it is given clean
    tokens alone, so keys of a noisy block are overwritten by the next pass and never stay.
    """

    def __init__(self, config, batch, capacity, start=None, device="cpu", dtype=torch.float32):
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.start = torch.zeros(batch, dtype=torch.long, device=device) if start is None else start
        self.length = 0
        self.mask_id = config.mask_id
        # (B, neighbours): the last tokens before `length`, [MASK] where there are none
        self.before = torch.full((batch, config.neighbours), config.mask_id, device=device)
        self.graphs = None  # CudaGraphs, to replay passes and not launch each of their kernels
        self.hidden = None  # (B, 1, 1, capacity) additive mask of the slots before a row's start
        if bool((self.start > 0).any()):
            before = torch.arange(capacity, device=device) < self.start[:, None]
            self.hidden = before[:, None, None, :] * torch.tensor(HIDDEN, dtype=dtype)

    @property
    def capacity(self):
        return self.k.shape[3]

    def positions(self, count):
        """(B, count) true positions of the next `count` slots; 0 in the padding before a row."""
        slots = torch.arange(self.length, self.length + count, device=self.start.device)
        return (slots - self.start[:, None]).clamp_(min=0)

    def behind(self, tokens):
        """(B, neighbours + Q): the last tokens of the cache and, behind them, `tokens` (B, Q)."""
        if not self.before.shape[1]:
            return tokens
        past = torch.cat([self.before, tokens], dim=1)
        first = self.length - self.before.shape[1]
        slots = torch.arange(first, first + past.shape[1], device=past.device)
        return past.masked_fill(slots < self.start[:, None], self.mask_id)

    def commit(self, past, count):
        """Move `length` behind the first `count` of the tokens of `past` = behind(tokens)."""
        self.before.copy_(past[:, count : count + self.before.shape[1]])
        self.length += count

    def attend(self, layer, q, k, v, commit, block_size):
        """Attention of `commit` finished tokens and, behind them, one noisy block.

        q (B, H, Q, D), k and v (B, Hkv, Q, D), for the Q slots behind `length`.
        """
        a, b, e = self.length, self.length + commit, self.length + q.shape[2]
        self.k[layer, :, :, a:e], self.v[layer, :, :, a:e] = k, v
        q = q.to(self.k.dtype)
        keys, values = self.k[layer], self.v[layer]
        out = []
        if b > a:
            mask = None if self.hidden is None else self.hidden[..., :b]
            if commit > block_size:  # a prompt of several blocks: they also hide from each other
                rows = build_block_causal_mask(b, block_size, q.device)[a:]
                rows = torch.zeros(rows.shape, dtype=q.dtype, device=q.device).masked_fill_(
                    ~rows, HIDDEN
                )
                mask = rows if mask is None else rows + mask
            out.append(_sdpa(q[:, :, :commit], keys[:, :, :b], values[:, :, :b], mask))
        if e > b:  # the noisy block sees every finished block and itself: nothing to mask
            mask = None if self.hidden is None else self.hidden[..., :e]
            out.append(_sdpa(q[:, :, commit:], keys[:, :, :e], values[:, :, :e], mask))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)


class CudaGraphs:
    """Cached passes recorded once per number of tokens (one block, or two) and then replayed.

    At batch 1 a pass is hundreds of kernels, each shorter than its launch; a replay launches once.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.recorded = model, cache, {}
        self.length = torch.zeros((), dtype=torch.long, device=cache.k.device)

    def __call__(self, past):
        self.length.fill_(self.cache.length)
        if past.shape[1] not in self.recorded:
            self.recorded[past.shape[1]] = self.record(past.clone())
        graph, inputs, logits = self.recorded[past.shape[1]]
        inputs.copy_(past)
        graph.replay()
        return logits.clone()  # the next replay writes to the same memory

    def record(self, inputs):
        """(graph, inputs, logits); a pass repeated at one length leaves the cache the same."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate what they need before the recording
            for _ in range(3):
                self.model.static_pass(inputs, self.cache, self.length)
        torch.cuda.current_stream().wait_stream(stream)
        torch.clear_autocast_cache()  # casts of weights belong to the recording
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model.static_pass(inputs, self.cache, self.length)
        torch.clear_autocast_cache()
        return graph, inputs, logits


# ---- the network -----------------------------------------------------------------------------


def by_hand(x, dtype):
    """Whether norm and rotary embedding take derivatives written by hand: a CPU runs the plain
    formulas as a chain of ten operations. A compiler fuses them better than a hand does."""
    return x.dtype == dtype and not x.is_cuda and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    """y = n * weight with n = x / rms.

    Backward: dweight = sum g n; dx = (g weight - n mean(g weight n)) / rms.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / rms
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        n = x * scale
        gn = g * n
        mean = (gn @ weight).div_(x.shape[-1]).unsqueeze(-1)
        dx = (g * weight).addcmul_(n, mean, value=-1).mul_(scale)
        return dx, gn.flatten(0, -2).sum(dim=0), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        if by_hand(x, self.weight.dtype):
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary_tables(config):
    """cos and sin, (seq_len, 1, D / 2), of position * base^(-2 d / D) for pair (d, d + D / 2)."""
    d = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angle = torch.arange(config.seq_len, dtype=torch.float64)[:, None] * config.rope_base**-d
    return angle.cos().float()[:, None], angle.sin().float()[:, None]


class _Rotate(torch.autograd.Function):
    """Written into one output, so that no slices are differentiated: the gradient turns back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(x)
        (x1, x2), (y1, y2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
        torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
        return out

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(g, cos, -sin), None, None


def rotate(x, cos, sin):
    """Rotary embedding, half-split layout: turn each pair (x_d, x_{d + D/2}) by its angle.

    x (..., N, H, D); cos, sin (..., N, 1, D / 2) in float32, so that angles keep their precision.
    """
    if by_hand(x, cos.dtype):
        return _Rotate.apply(x, cos, sin)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).type_as(x)


class BlockCausalAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.D = D
        self.q = nn.Linear(C, config.n_head * D, bias=False)
        self.k = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.v = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.o = nn.Linear(config.n_head * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def heads(self, projection, norm, h, rope):
        """Project (..., N, C), split heads, norm, rotate -> (..., heads, N, D)."""
        x = projection(h).unflatten(-1, (-1, self.D))  # (..., N, heads, D)
        # autocast norms in float32 on CUDA: back to the dtype of v
        return (rotate(norm(x), *rope).type_as(x) if rope else x).transpose(-3, -2)

    def forward(self, h, rope, attend, noisy_only=False):
        """h (..., N, C) -> (..., N, heads * D), the input of the output projection `o`.

        `attend(q, k, v)` is one of the attentions above. With `noisy_only`, h holds all streams
        and only the noisy ones ask: the last layer's clean stream gives keys and values alone.
        """
        q = self.heads(self.q, self.q_norm, h[1:] if noisy_only else h, rope)
        k = self.heads(self.k, self.k_norm, h, rope)
        v = self.heads(self.v, None, h, None)
        return attend(q, k, v).transpose(-3, -2).flatten(-2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@cache  # a recorded CUDA graph reads it; there are at most N / S values of n
def neighbour_index(n, left, right, block_size, device="cpu"):
    """(n, left + right) int64: where the neighbours of n tokens, whole blocks, are found in a row
    of [past (left + n), own (n), MASK (1)], at the offsets -left..-1 and 1..right."""
    place = torch.arange(n, device=device)[:, None]
    d = torch.tensor([*range(-left, 0), *range(1, right + 1)], device=device)
    inside = (place + d).div(block_size, rounding_mode="floor") == place // block_size
    other = torch.where(d < 0, left + place + d, left + 2 * n)  # what is past, or [MASK]
    return torch.where(inside, left + n + place + d, other)


class Neighbours(nn.Module):
    """What joins the embedding of token i: mix [e(i-w), ..., e(i-1), e(i+1), ..., e(i+w)].

    e are embeddings of their own, a quarter as wide. A neighbour that i may not see or that does
    not exist counts as [MASK]; to the right of i's block that is every one. So pairs and triples
    of tokens, which a small model otherwise learns to look up by attention, are there at once.
    The window is that of the neural language model of Bengio et al. (JMLR 3, 2003). Offsets that
    no place of the trained blocks sees have no weights: with S = 1, as in a GPT, all to the right.
    """

    def __init__(self, config):
        super().__init__()
        self.left, self.mask_id = config.neighbours, config.mask_id
        self.right = min(self.left, config.block_size - 1)
        width = max(1, config.n_embd // 4)
        self.embed = nn.Embedding(config.vocab_size + 1, width)
        self.mix = nn.Linear((self.left + self.right) * width, config.n_embd, bias=False)

    def forward(self, tokens, past, block_size):
        """tokens (..., n), whole blocks -> (..., n, C).

        past (..., w + n): the tokens from w before the first on, as later blocks see them.
        """
        n = tokens.shape[-1]
        row = torch.cat([past.expand(*tokens.shape[:-1], -1), tokens], dim=-1)
        row = F.pad(row, (0, 1), value=self.mask_id)
        index = neighbour_index(n, self.left, self.right, block_size, tokens.device)
        return self.mix(self.embed(row[..., index]).flatten(-2))


class CascadeBlock(nn.Module):
    """One layer (a transformer block; diffusion blocks are runs of S tokens)."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = BlockCausalAttention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, attend, index=None):
        """x (..., N, C) -> the same shape; with `index` (last layer of two streams) -> (M, C).

        `index` holds the flat positions of the noisy copies that carry loss: after the attention
        nothing else is needed, so the output projection and the MLP run on those rows alone.
        """
        y = self.attn(self.attn_norm(x), rope, attend, noisy_only=index is not None)
        if index is not None:
            x, y = x[1:].flatten(0, 2)[index], y.flatten(0, 2)[index]
        x = x + self.attn.o(y)
        return x + self.mlp(self.mlp_norm(x))


class CascadeLM(nn.Module):
    """The language model. `forward(tokens)` gives logits (B, N, V) at every position.

    Diffusion: logits at position i are of token i. objective "ar": of token i + 1.
    """

    def __init__(self, config, attention="chunk"):
        super().__init__()
        if attention not in ("chunk", "flex"):
            raise ValueError(f"attention must be chunk or flex, not {attention!r}")
        self.config = config
        self.attention = attention
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last row is [MASK]
        self.near = Neighbours(config) if config.neighbours else None
        self.blocks = nn.ModuleList(CascadeBlock(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """What gets what. Draws come from torch's default generator: seed it for repeatability.

        embed                  N(0, 0.02^2), every row, [MASK] too
        near.embed             N(0, 1): unlike codes from the start, for mix to tell apart
        near.mix               U(-a, a) with a = 0.02 sqrt(3 / fan_in): what it adds is as large as
                               the embedding. Not 0: near.embed would have no gradient at first,
                               and an optimizer that divides by its size follows rounding errors
        q, k, v, gate, up      U(-a, a) with a = sqrt(3 / fan_in) / 2: half of unit gain
        o, down                0: every layer starts as the identity
        head                   0 (untied): the first loss is log V whatever the width
        norms                  1
        """
        for name, p in self.named_parameters():
            leaf = name.split(".")[-2]
            if leaf == "embed":
                nn.init.normal_(p, std=1.0 if name.startswith("near") else 0.02)
            elif leaf in ("q", "k", "v", "gate", "up", "mix"):
                a = (0.02 if leaf == "mix" else 0.5) * math.sqrt(3 / p.shape[1])
                nn.init.uniform_(p, -a, a)
            elif leaf in ("o", "down", "head"):
                nn.init.zeros_(p)
            elif leaf.endswith("norm"):
                nn.init.ones_(p)
            else:
                raise AssertionError(f"no initialisation for {name}")

    def head_weight(self):
        """(V, C), a row for each real token: [MASK] has none."""
        return self.embed.weight[:-1] if self.config.tie_embeddings else self.head.weight

    def embedded(self, tokens, past):
        """(..., n, C) of tokens (..., n); past (..., neighbours + n), see Neighbours."""
        h = self.embed(tokens)
        return h if self.near is None else h + self.near(tokens, past, self.config.block_size)

    def logits(self, h):
        """Final norm and head: (..., C) -> (..., V) float32, whatever the autocast."""
        return F.linear(self.norm(h), self.head_weight()).float()

    def check_tokens(self, tokens):
        """Raises ValueError unless tokens (B, n) fit the context and are whole blocks."""
        n = tokens.shape[1]
        check_blocks(n, self.config.block_size)
        if n > self.config.seq_len:
            raise ValueError(f"{n} tokens exceed the model's context of {self.config.seq_len}")

    def forward(self, tokens):
        """tokens (B, N) int64 in 0..V (V is [MASK]) -> logits (B, N, V), block-causal."""
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens):
        """(B, N, C): `forward` before the final norm and the head."""
        self.check_tokens(tokens)
        N, S = tokens.shape[1], self.config.block_size
        rope = self.cos[:N], self.sin[:N]
        past = F.pad(tokens, (self.config.neighbours, 0), value=self.config.mask_id)
        h = self.embedded(tokens, past)
        for block in self.blocks:
            h = block(h, rope, lambda q, k, v: block_causal_attention(q, k, v, S))
        return h

    def masked_logits(self, x0, xt, index):
        """Two-stream pass: logits (M, V) of the noisy copies at flat positions `index` (M,).

        x0 (B, N), xt (B, N) or (copies, B, N) int64. Equal to a pass over [clean blocks before b,
        noisy block b] for each block b of each copy, for all of them at once.
        """
        return self.logits(self.masked_hidden(x0, xt, index))

    def masked_hidden(self, x0, xt, index):
        """(M, C): `masked_logits` before the final norm and the head."""
        self.check_tokens(x0)
        N = x0.shape[1]
        rope = self.cos[:N], self.sin[:N]
        tokens = torch.cat([x0[None], xt.view(-1, *x0.shape)])  # (1 + copies, B, N)
        past = F.pad(x0, (self.config.neighbours, 0), value=self.config.mask_id)
        h = self.embedded(tokens, past)  # (1 + copies, B, N, C)
        for block in self.blocks[:-1]:
            h = block(h, rope, self.two_stream_attend(tokens, noisy_only=False))
        return self.blocks[-1](h, rope, self.two_stream_attend(tokens, True), index)

    def two_stream_attend(self, tokens, noisy_only):
        """The attention of one layer over the streams `tokens`, `attend(q, k, v)`, by the path in
        use."""
        S = self.config.block_size
        if self.attention == "chunk":
            return lambda q, k, v: chunked_two_stream_attention(q, k, v, S)
        streams, _, N = tokens.shape
        mask = flex_block_mask(N, S, streams - 1, noisy_only, str(self.cos.device))
        return lambda q, k, v: flex_two_stream_attention(q, k, v, mask)

    def ar_logits(self, x0):
        """objective "ar": logits (B, N, V) of x0 itself, all N tokens of a window.

        The input is x0 shifted right behind one [MASK], which serves as the beginning of text, so
        the baseline is scored on exactly the tokens that the diffusion model is scored on.
        """
        return self.logits(self.ar_hidden(x0))

    def ar_hidden(self, x0):
        """(B, N, C): `ar_logits` before the final norm and the head."""
        first = torch.full_like(x0[:, :1], self.config.mask_id)
        return self.hidden(torch.cat([first, x0[:, :-1]], dim=1))

    def loss(self, num_blocks, x0, xt=None, weight=None, index=None):
        """The training loss in nats per token, of masked tokens or, without `xt`, of all of x0.

        x0 (B, N), xt (B, N) or (copies, B, N) int64; weight, as xt, float32; index (M,), the flat
        positions in xt that carry loss; `num_blocks`: noisy blocks (objective "ar": tokens) of the
        global batch, the normaliser.
        """
        if xt is None:
            h, targets = self.ar_hidden(x0).flatten(0, 1), x0.flatten()
            weight = torch.ones_like(targets, dtype=torch.float32)
        else:
            h = self.masked_hidden(x0, xt, index)
            targets, weight = x0.expand_as(xt).flatten()[index], weight.flatten()[index]
        return head_loss(self.norm(h), self.head_weight(), targets, weight, num_blocks)

    @torch.no_grad()
    def decode(self, tokens, cache, commit):
        """One cached forward pass: logits (B, S, V) of the last block of `tokens`.

        tokens (B, Q): `commit` tokens of finished blocks, whose keys and values stay in the
        cache, then (diffusion) one noisy block, whose do not. objective "ar": all are finished.
        """
        c = self.config
        Q = tokens.shape[1]
        if commit % c.block_size or Q - commit not in (0, c.block_size):
            raise ValueError(f"cannot commit {commit} of {Q} tokens in blocks of {c.block_size}")
        if cache.length + Q > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens, not {cache.length + Q}")
        if c.objective == "diffusion" and bool((tokens[:, :commit] == c.mask_id).any()):
            raise ValueError("a block with masked tokens is not finished: it cannot be cached")
        past = cache.behind(tokens)
        if cache.graphs is not None and Q <= 2 * c.block_size:
            logits = cache.graphs(past)
        else:
            positions = cache.positions(Q)
            logits = self._cached_pass(
                past, positions, lambda *qkv: cache.attend(*qkv, commit, c.block_size)
            )
        cache.commit(past, commit)
        return logits

    def _cached_pass(self, past, positions, attend):
        """Logits of the last block of past = cache.behind(tokens), tokens at `positions` (B, Q);
        attend(layer, q, k, v) reads and writes the cache."""
        rope = self.cos[positions], self.sin[positions]  # (B, Q, 1, D / 2)
        h = self.embedded(past[:, self.config.neighbours :], past)
        for layer, block in enumerate(self.blocks):
            h = block(h, rope, lambda q, k, v, i=layer: attend(i, q, k, v))
        return self.logits(h[:, -self.config.block_size :])

    @torch.no_grad()
    def static_pass(self, past, cache, length):
        """A pass of `decode` whose shapes and work depend on no number on the host.

        past: cache.behind(tokens). length: int64 tensor (), the cache's. Every pass reads the whole
        cache, hidden where it must not be seen, which is the price of replaying one recording for
        every position.
        """
        S, where = self.config.block_size, past.device
        place = torch.arange(past.shape[1] - self.config.neighbours, device=where)
        slots, seen = length + place, torch.arange(cache.capacity, device=where)
        visible = seen < (length + (place // S + 1) * S)[:, None]  # to the end of its own block
        visible = visible & (seen >= cache.start[:, None, None])  # (B, Q, capacity)
        bias = torch.zeros(visible.shape, dtype=cache.k.dtype, device=where)
        bias = bias.masked_fill_(~visible, HIDDEN).unsqueeze(1)

        def attend(layer, q, k, v):
            keys, values = cache.k[layer], cache.v[layer]
            keys.index_copy_(2, slots, k.to(keys.dtype))
            values.index_copy_(2, slots, v.to(keys.dtype))
            return _sdpa(q.to(keys.dtype), keys, values, bias)

        positions = (slots - cache.start[:, None]).clamp(min=0)
        return self._cached_pass(past, positions, attend)

    def count_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def train_flops(self, batch, masked, copies=1):
        """Matrix FLOPs of one training step (forward and backward) on `batch` sequences.

        A product with P weights costs 2 P per token forward and 4 P backward: 6 P. Attention over
        E visible entries costs 2 * 2 E D per head forward, three times that in all: 12 E H D.
        Diffusion: the clean stream and its noisy copies, but for the last layer, where the clean
        one computes keys and values alone and the `masked` tokens, of all copies together, alone
        pass through o, the MLP and the head.
        """
        c = self.config
        N, C = c.seq_len, c.n_embd
        kv = 2 * C * c.n_kv_head * c.head_dim
        q, tail = C * C, C * C + 3 * C * c.n_hidden
        head, tokens = C * c.vocab_size, batch * N
        mix = self.near.mix.weight.numel() if self.near else 0
        if c.objective == "ar":
            entries, weights = batch * N * (N + 1) // 2, c.n_layer * (q + kv + tail) + mix + head
            return 6 * tokens * weights + c.n_layer * 12 * entries * C
        entries = batch * N * (N + c.block_size) // 2  # of one stream
        weights = (1 + copies) * tokens * ((c.n_layer - 1) * (q + kv + tail) + mix)
        weights += tokens * (copies * q + (1 + copies) * kv) + masked * (tail + head)
        return 6 * weights + 12 * C * entries * ((1 + copies) * (c.n_layer - 1) + copies)
