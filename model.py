"""The network: a Llama that reads finished text and denoises blocks of [MASK]s behind it.

Glossary, one meaning per word:

    B               batch: sequences in a tensor
    N, seq_len      tokens in a sequence (nanoGPT's block_size; here that word never means this)
    S, block_size   tokens in a diffusion block, as in the block-diffusion literature
    nb              blocks in a sequence, N // S
    C, H, Hkv, D    width, query heads, key/value heads, head dimension, C // H unless set
    V               vocabulary of real tokens
    mask_id         V: an input embedding only; the head has V rows, so [MASK] is never sampled
    x0, xt          clean tokens, noisy tokens, int64 (B, N)
    streams         x0 and its noisy copies, (1 + copies, B, N), all at positions 0..N-1

Three levels in one set of weights:

    GPT level       with context="causal" the clean stream reads as a GPT: its logits at i predict
                    token i + 1
    block level     the S tokens of a block start as [MASK] and are denoised together
    token level     `LocalHead`: the tokens of one pass are drawn left to right, each seeing the w
                    tokens to its left, so that they agree (a joint pass); local_window w = 0: none

Who sees whom in training, for three blocks of the clean and of one noisy stream (# = visible,
/ = up to itself with context="causal", the whole block with context="block"):

    keys          clean  noisy
    queries       0 1 2  0 1 2
    clean 0       / . .  . . .      clean block c sees the clean blocks < c, and itself
    clean 1       # / .  . . .
    clean 2       # # /  . . .
    noisy 0       . . .  # . .      noisy block b sees the clean blocks < b, and itself
    noisy 1       # . .  . # .
    noisy 2       # # .  . . #

One pass over both streams gives, for every block at once, the logits that a pass over [clean
blocks before b, noisy block b] would give: about N (N + S) visible entries of (2N)^2. A second
noisy copy is one more row and column of squares; copies do not see each other.

Everything goes through `CascadeLM.trunk(tokens, positions, attend)`. Training, scoring and decoding
differ in `attend` alone: who sees whom, and where the keys come from.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from corrupt import check_blocks
from util.kernels import Part, View, attention_by_parts, norm_rotate, rms_norm

try:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:
    raise SystemExit(
        f"error: torch 2.5 or newer is needed, not {torch.__version__}: "
        "pip install -r requirements.txt"
    ) from None


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
    head_dim: int = 0  # D; 0: n_embd // n_head
    n_hidden: int = 0  # width of the MLP; 0: 8/3 n_embd, up to a multiple of 32
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = True
    context: str = "causal"  # who sees whom in the clean stream; or "block"
    local_window: int = 4  # w, the left tokens that the local head sees; 0: no local head
    local_hidden: int = 0  # width of the local head; 0: twice n_embd
    acceptance: bool = False  # the local head's estimate of what the GPT level accepts
    draft_rank: int = 0  # of what noisy positions add to the projections; 0: nothing
    objective: str = "diffusion"  # or "ar": the same network as a next-token GPT and nothing else

    def __post_init__(self):
        if self.objective == "ar":
            self.block_size, self.context, self.local_window, self.draft_rank = 1, "causal", 0, 0
        self.acceptance &= self.context == "causal" and self.local_window > 0
        self.local_hidden = self.local_hidden or 2 * self.n_embd
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 32 * math.ceil(self.n_embd * 8 / 3 / 32)
        check_blocks(self.seq_len, self.block_size)
        sizes = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden",
                 "local_hidden")
        C, H, kv = self.n_embd, self.n_head, self.n_kv_head
        D = self.head_dim or C // max(1, H)
        for wrong, what in (
            *((getattr(self, name) < 1, f"{name} must be at least 1") for name in sizes),
            (not self.head_dim and C % max(1, H), f"n_embd {C} is not divisible by n_head {H}"),
            (H % max(1, kv), f"n_head {H} is not divisible by n_kv_head {kv}"),
            (D < 1 or D % 2, "rotary embedding needs an even head dimension n_embd / n_head"),
            (self.objective not in ("diffusion", "ar"), "objective must be diffusion or ar"),
            (self.context not in ("causal", "block"), "context must be causal or block"),
            (not 0 <= self.local_window <= self.seq_len,
             f"local_window must lie in 0..seq_len, not {self.local_window}"),
            (self.draft_rank < 0, f"draft_rank must be 0 or more, not {self.draft_rank}"),
            (self.draft_rank and self.context == "block",
             "draft_rank is for drafts beside a GPT level: it needs context causal"),
        ):
            if wrong:
                raise ValueError(what)
        self.head_dim = D

    @property
    def mask_id(self):
        return self.vocab_size


# ---- who sees whom: attention of the streams -----------------------------------------------------


@lru_cache(maxsize=32)
def build_block_causal_mask(seq_len, block_size, device="cpu"):
    """(N, N) bool, True where visible: query i sees key j when j // S <= i // S."""
    check_blocks(seq_len, block_size)
    block = torch.arange(seq_len, device=device) // block_size
    return block[:, None] >= block[None, :]


@lru_cache(maxsize=64)
def stream_parts(N, S, streams, skip, causal, device, dtype=torch.float32, chunk=64):
    """The picture above as a tuple of Parts: work and memory follow the visible entries.

    The streams are cut into chunks of whole blocks, about `chunk` tokens. A chunk's queries see the
    clean keys before it (a part without a mask), and within the chunk what a small mask shows,
    which is the same for all chunks; a chunk of a single block needs none. `skip` leaves out the
    queries of the first streams. dtype: that of the queries, on a CPU always float32.
    """
    sizes = [S * d for d in range(1, N // S + 1) if N // S % d == 0]
    T = max((size for size in sizes if size <= chunk), default=S)
    bias, parts = {True: None, False: None}, []  # of the clean stream, of a noisy one
    if T > S:
        seen = build_block_causal_mask(T, S, device)
        own = seen & seen.T
        for clean, m in ((True, seen), (False, torch.cat([seen & ~own, own], dim=1))):
            blank = torch.zeros(m.shape, dtype=dtype, device=device)
            bias[clean] = blank.masked_fill_(~m, -math.inf)
    if causal and not skip:
        parts.append(Part(View(0, 0, N, N), (View(0, 0, N, N),), None, True, True))
    for s in range(max(skip, int(causal)), streams):
        keys = [View(0, 0, N, T)] * (s == 0 or T > S) + [View(s, 0, N, T)] * (s > 0)
        parts.append(Part(View(s - skip, 0, N, T), tuple(keys), bias[s == 0], False, True))
        for a in range(T, N, T):
            before = (View(0, 0, a, a),)
            parts.append(Part(View(s - skip, a, a + T, T), before, None, False, False))
    return tuple(parts)


def chunked_attention(q, k, v, parts):
    """Attention of the streams, exact, on any device, by the parts that `stream_parts` lists.

    k, v (streams, B, N, Hkv, D): clean, then each noisy copy; q (the same, H heads), or without the
    clean stream. Returns the shape of q. On a CPU in float32, whatever comes in: its kernel for
    bf16 is the slower one.
    """
    dtype, groups = v.dtype, q.shape[3] // k.shape[3]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=3) for x in (k, v))
    if q.device.type == "cpu" and dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    return attention_by_parts(q.contiguous(), k.contiguous(), v.contiguous(), parts).to(dtype)


@lru_cache(maxsize=32)
def flex_block_mask(N, S, streams, skip, causal, device):
    """FlexAttention's block mask of the streams laid end to end; made once for each shape, by
    compiled code on CUDA: plain code would hold all (streams N)^2 entries."""

    def visible(b, h, i, j):
        i = i + skip * N
        qb, kb = i % N // S, j % N // S
        own = (i // N == j // N) & (kb == qb)
        if causal:
            own = own & ((i >= N) | (j <= i))
        return ((j < N) & (kb < qb)) | own

    make = torch.compile(create_block_mask) if device.startswith("cuda") else create_block_mask
    return make(visible, None, None, (streams - skip) * N, streams * N, device=device)


def flex_stream_attention(q, k, v, block_mask, backend="AUTO"):
    """As chunked_attention, by FlexAttention: fast once compiled, on CUDA. q, k, v as there.

    `backend` FLASH: flash-attn's kernels in place of Triton's. Uncompiled it materialises the
    scores, and on a CPU it has no backward: tests use it so.
    """
    streams, N = q.shape[0], q.shape[2]
    q, k, v = (x.to(v.dtype).permute(1, 3, 0, 2, 4).flatten(2, 3) for x in (q, k, v))
    options = {"BACKEND": backend} if backend != "AUTO" else None  # older torches have no such key
    y = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1],
                       kernel_options=options)
    return y.unflatten(2, (streams, N)).permute(2, 0, 3, 1, 4)


# ---- the network ---------------------------------------------------------------------------------


def wanted_dtype(weight):
    """The dtype in which a product with this weight takes its input: autocast's, or its own."""
    device = weight.device.type
    on = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else weight.dtype


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, ready for the next product."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, wanted_dtype(self.weight))


def rotary_tables(config):
    """(cos, cos) and (-sin, sin), (seq_len, 1, D), of position * base^(-2 d / D) for the pair
    (d, d + D / 2)."""
    d = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angle = torch.arange(config.seq_len, dtype=torch.float64)[:, None] * config.rope_base**-d
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class Projection(nn.Linear):
    """W x; of noisy positions W x + B A x, so that what drafts may differ from what reads text."""

    def __init__(self, inputs, outputs, rank):
        super().__init__(inputs, outputs, bias=False)
        if rank:
            self.draft_in = nn.Parameter(torch.empty(rank, inputs))  # A
            self.draft_out = nn.Parameter(torch.empty(outputs, rank))  # B

    def forward(self, x, noisy=None):
        """noisy: None, True of all, or bool that spreads over x (..., inputs) -> (..., outputs)"""
        y = super().forward(x)
        if noisy is None:
            return y
        return y + F.linear(F.linear(x, self.draft_in) * noisy, self.draft_out)


class BlockCausalAttention(nn.Module):
    """Projections, q/k norm and the rotary embedding, half-split layout; `attend` does the rest."""

    def __init__(self, config):
        super().__init__()
        C, D, rank = config.n_embd, config.head_dim, config.draft_rank
        self.D = D
        self.q = Projection(C, config.n_head * D, rank)
        self.k = Projection(C, config.n_kv_head * D, rank)
        self.v = Projection(C, config.n_kv_head * D, rank)
        self.o = Projection(config.n_head * D, C, rank)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.norm_eps)
            self.k_norm = RMSNorm(D, config.norm_eps)
        self.eps = config.norm_eps

    def turned(self, x, norm, rope):
        """(..., N, heads * D) -> (..., N, heads, D), normed and rotated, float32:
        `attend` takes it into the dtype of its kernel."""
        weight = getattr(self, norm).weight if hasattr(self, norm) else None
        return norm_rotate(x.unflatten(-1, (-1, self.D)), weight, self.eps, *rope)

    def forward(self, h, rope, attend, noisy=None, skip=0):
        """h (..., N, C) -> (..., N, H * D), the input of the output projection `o`.

        `skip`: so many streams at the front give keys and values alone.
        """
        q = self.turned(self.q(h[skip:] if skip else h, noisy), "q_norm", rope)
        k = self.turned(self.k(h, noisy), "k_norm", rope)
        v = self.v(h, noisy).unflatten(-1, (-1, self.D))
        return attend(q, k, v).flatten(-2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config):
        super().__init__()
        C, hidden, rank = config.n_embd, config.n_hidden, config.draft_rank
        self.gate, self.up = Projection(C, hidden, rank), Projection(C, hidden, rank)
        self.down = Projection(hidden, C, rank)

    def forward(self, x, noisy=None):
        return self.down(F.silu(self.gate(x, noisy)) * self.up(x, noisy), noisy)


class CascadeBlock(nn.Module):
    """One layer (a transformer block; diffusion blocks are runs of S tokens)."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = BlockCausalAttention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, attend, noisy=None, skip=0, index=None):
        """x (..., N, C) -> the same shape, or (M, C) of the rows that `index` names.

        After the attention of the last layer nothing else is needed than the rows with a loss, so
        the output projection and the MLP run on those alone.
        """
        y = self.attn(self.attn_norm(x), rope, attend, noisy, skip)
        x = x[skip:] if skip else x
        if index is not None:
            x, y = (t.flatten(0, -2).index_select(0, index) for t in (x, y))
        x = x + self.attn.o(y, noisy)
        return x + self.mlp(self.mlp_norm(x), noisy)


class LocalHead(nn.Module):
    """The token level: h_i <- h_i + down(silu(gate z) * (up z)), z = [norm(h_i), e(x_{i-1}), ...,
    e(x_{i-w})], with a small embedding e of its own.

    A left token is shown if it is visible, or drawn in the same pass before i; otherwise it is
    [MASK]. Training shows both: *single*, where masked tokens stay [MASK], whose loss is a bound,
    and *joint*, where all are shown, whose loss is the NLL of drawing all of them in one pass.

    Its second output (`acceptance`) is the logit of a_i = sum_x min(p(x), q(x)) = 1 - TV(p, q): how
    probably the GPT level, which has p for token i, accepts a draft of it from this head's q. It
    reads the hidden layer, from which no gradient returns: what else is trained does not notice.
    """

    ACCEPTS = 16  # units of it

    def __init__(self, config):
        super().__init__()
        self.C, width = config.n_embd, max(1, config.n_embd // 4)
        inputs = self.C + config.local_window * width
        self.norm = RMSNorm(self.C, config.norm_eps)
        self.embed = nn.Embedding(config.vocab_size + 1, width)
        self.gate = nn.Linear(inputs, config.local_hidden, bias=False)
        self.up = nn.Linear(inputs, config.local_hidden, bias=False)
        self.down = nn.Linear(config.local_hidden, self.C, bias=False)
        self.accept = None
        if config.acceptance:  # without a random draw, and last: the others' draws stay as they are
            shapes = (config.local_hidden, self.ACCEPTS), (self.ACCEPTS, 1)
            up, down = (nn.utils.skip_init(nn.Linear, *shape, bias=False) for shape in shapes)
            self.accept = nn.ModuleDict({"up": up, "down": down})

    def ready(self, h):
        """(part, weight): of [gate z, up z] what norm(h) makes, which serves every choice of left
        tokens, (..., 2 * hidden), and the weight that the left tokens meet."""
        both = torch.cat([self.gate.weight, self.up.weight])
        own, weight = both.split([self.C, both.shape[1] - self.C], dim=1)
        return F.linear(self.norm(h), own), weight

    def hidden(self, h, left, ready=None):
        """h (..., C), left (..., w) int64, x_{i-1} first -> (..., local_hidden)."""
        part, weight = ready or self.ready(h)
        gate, up = (part + F.linear(self.embed(left).flatten(-2), weight)).chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, h, left, ready=None):
        """The same -> (..., C), what the final norm and the output head read."""
        return h + self.down(self.hidden(h, left, ready))

    def acceptance(self, hidden):
        """Of `hidden` (..., local_hidden) the logit of a_i, (...) float32."""
        up = F.silu(self.accept["up"](hidden.detach()))
        return self.accept["down"](up)[..., 0].float()


def left_tokens(before, inside, block_size, window, mask_id):
    """(..., N, w): the tokens i-1 .. i-w to the left of each position i, as the local head sees
    them: those of i's own block from `inside` (..., N), earlier ones from `before` (..., N)."""
    N = inside.shape[-1]
    rank = torch.arange(N, device=inside.device) % block_size
    seen = [torch.where(rank + d < block_size, inside, before) for d in range(1, window + 1)]
    seen = [F.pad(x, (d, 0), value=mask_id)[..., :N] for d, x in enumerate(seen, start=1)]
    return torch.stack(seen, dim=-1)


class CascadeLM(nn.Module):
    """The language model. `forward(tokens)` gives logits (B, N, V) at every position.

    context="block": the logits at position i are of token i. context="causal": of token i + 1.
    """

    def __init__(self, config, attention="chunk"):
        super().__init__()
        if attention not in ("chunk", "flex", "flash"):
            raise ValueError(f"attention must be chunk, flex or flash, not {attention!r}")
        self.config = config
        self.attention, self.frozen = attention, False
        self.embed = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last row is [MASK]
        self.blocks = nn.ModuleList(CascadeBlock(config) for _ in range(config.n_layer))
        self.local = LocalHead(config) if config.local_window else None
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.draft_rank:
            self.draft_mask = nn.Parameter(torch.empty(config.n_embd))  # added to [MASK]
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """What gets what. Draws come from torch's default generator: seed it for repeatability.

        embed                  N(0, 0.02^2), every row, [MASK] too
        local.embed            N(0, 1): as large as norm(h), beside which it stands
        q, k, v, gate, up      U(-a, a) with a = sqrt(3 / fan_in) / 2: half of unit gain
        o, down                0: every layer, and the local head, starts as the identity
        draft_in               as q; draft_out, draft_mask 0: what drafts starts as what reads text
        head                   0 (untied): the first loss is log V whatever the width
        norms                  1
        """
        for name, p in self.named_parameters():
            leaf = name.split(".")[-1 if "draft_" in name else -2]
            if leaf == "embed":
                nn.init.normal_(p, std=1.0 if name.startswith("local") else 0.02)
            elif leaf in ("q", "k", "v", "gate", "up", "draft_in"):
                a = 0.5 * math.sqrt(3 / p.shape[1])
                nn.init.uniform_(p, -a, a)
            elif leaf in ("o", "down", "head", "draft_out", "draft_mask"):
                nn.init.zeros_(p)
            elif leaf.endswith("norm"):
                nn.init.ones_(p)
            else:
                raise AssertionError(f"no initialisation for {name}")

    def freeze(self):
        """From here on only what drafts learns: the local head and what `draft_rank` adds. What the
        GPT level uses has no gradient, and no optimizer may hold it."""
        for name, p in self.named_parameters():
            p.requires_grad = name.startswith("local.") or "draft_" in name
        self.frozen = True

    def trunk(self, tokens, positions, attend, skip=0, index=None, noisy=None):
        """The network from token ids to what the heads read: tokens (..., N) int64 -> (..., N, C).

        positions (N,) or (..., N) int64. attend(layer, q, k, v): attention of q (..., N, H, D) over
        the keys that it sees. In the last layer, `skip` leading streams are left out, and of the
        others' tokens, laid end to end, only those at `index` (M,) come back, as (M, C). `noisy`:
        what stands in a block that is being denoised; None, True for all, or (..., N, 1) bool.
        """
        rope = self.cos[positions], self.sin[positions]  # (..., N, 1, D)
        x = self.embed(tokens)
        noisy = noisy if self.config.draft_rank else None
        if noisy is not None:
            x = x + (tokens == self.config.mask_id).unsqueeze(-1) * self.draft_mask
        for layer, block in enumerate(self.blocks):
            last = (skip, index) if layer == len(self.blocks) - 1 else ()
            x = block(x, rope, partial(attend, layer), noisy, *last)
        return x

    def stream_trunk(self, streams, index=None, own=0):
        """`trunk` over streams (1 + copies, B, N). With context="block" the clean one of several
        has no loss, and `index` counts from the first noisy one; else its first `own` entries are
        of the clean stream. That is read by itself where the noisy ones have projections of their
        own, or nothing in it learns: then without a graph."""
        (count, _, N), c, device = streams.shape, self.config, streams.device
        check_blocks(N, c.block_size)
        if N > c.seq_len:
            raise ValueError(f"{N} tokens exceed the model's context of {c.seq_len}")
        causal = c.context == "causal"
        apart = count > 1 and causal and (self.frozen or c.draft_rank > 0)
        last = int(count > 1 and not causal)  # streams without queries in the last layer
        flex = self.attention != "chunk"
        make = flex_block_mask if flex else stream_parts
        how = {skip: make(N, c.block_size, count, skip, causal, str(device))
               for count, skip in (((1, 0), (count, 1)) if apart else ((count, 0), (count, last)))}
        path = flex_stream_attention if flex else chunked_attention
        if self.attention == "flash":
            path = partial(path, backend="FLASH")

        def attend(layer, q, k, v):
            return path(q, k, v, how[len(k) - len(q)])

        positions = torch.arange(N, device=device)
        if not apart:
            return self.trunk(streams, positions, attend, last, index)
        text, (ours, theirs) = [], (None, None) if index is None else (
            index[:own], index[own:] - streams[0].numel())

        def read(layer, *qkv):
            text.append(qkv[1:])
            return attend(layer, *qkv)

        def beside(layer, q, k, v):
            k, v = (torch.cat(pair) for pair in zip(text[layer], (k, v), strict=True))
            return attend(layer, q, k, v)

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            clean = self.trunk(streams[:1], positions, read, index=ours)
        noisy = self.trunk(streams[1:], positions, beside, index=theirs, noisy=True)
        return torch.cat([clean, noisy])

    def head_weight(self):
        """(V, C), a row for each real token: [MASK] has none."""
        return self.embed.weight[:-1] if self.config.tie_embeddings else self.head.weight

    def logits(self, h):
        """The final norm and the head: (..., C) -> (..., V) float32, whatever the autocast."""
        return F.linear(self.norm(h), self.head_weight()).float()

    def forward(self, tokens):
        """tokens (B, N) int64 in 0..V (V is [MASK]) -> logits (B, N, V), as the context reads."""
        return self.logits(self.stream_trunk(tokens[None])[0])

    def count_parameters(self):
        return sum(p.numel() for p in self.parameters())
