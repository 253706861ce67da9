"""The network: a Llama that reads finished text as a GPT, and denoises the block that comes next.

The same weights do both. Training reads a text twice in one pass: clean, to predict each next
token, and with blocks masked, to predict what they hide. Decoding drafts a block in one pass, and
lets the GPT accept or refuse each draft.

    B               batch: sequences in a tensor
    N, seq_len      tokens in a sequence (nanoGPT calls this block_size; here it never means that)
    S, block_size   tokens in a diffusion block, as in the block-diffusion literature
    nb              blocks in a sequence, N // S
    C, H, Hkv, D    width, query heads, key/value heads, head dimension
    V               vocabulary of real tokens
    mask_id         V: an input embedding only; the head has V rows, so [MASK] is never sampled
    x0, xt          clean tokens, noisy tokens, int64 (B, N): the clean and the noisy stream
    index           (M,) int64: the masked positions of xt that have a loss, flat in (B, N)
    context         how finished text is read: "causal" (each token sees those up to itself) or
                    "block" (those up to the end of its block)
    GPT level       the causal clean stream: its logits at i predict token i + 1
    block level     the noisy stream: its logits at i predict token i, and propose a draft of it
    local head      draws the drafts of a block left to right, each given the w = local_window
                    tokens before it, so that they agree; w = 0: none, and they are independent

Who sees whom, by blocks (# = visible; / = up to itself if the context is causal, else the whole):

    keys          clean  noisy
    queries       0 1 2  0 1 2
    clean 0       / . .  . . .      clean block c sees the clean blocks < c, and itself
    clean 1       # / .  . . .
    clean 2       # # /  . . .
    noisy 0       . . .  # . .      noisy block b sees the clean blocks < b, and itself, both ways;
    noisy 1       # . .  . # .      not its own clean copy, which it has to predict
    noisy 2       # # .  . . #

In code: `clean_sees`, `noisy_sees`, and the two attention calls in `CascadeLM.streams`. Each stream
has positions 0..N-1, so that one pass gives, for all blocks at once, what the sampler's pass over
[finished blocks before b, block b with its masks] gives.
"""

import math
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
except ImportError:
    print(f"error: torch {torch.__version__} is too old: pip install -r requirements.txt",
          file=sys.stderr)
    sys.exit(2)

from corrupt import count_blocks
from util.settings import require


@dataclass
class CascadeConfig:
    """The shape of a model; a 0 becomes what it stands for. ValueError, one line, if impossible."""

    vocab_size: int = 65
    seq_len: int = 256
    block_size: int = 16
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0  # 0: as many as n_head
    n_embd: int = 384
    head_dim: int = 0  # 0: n_embd // n_head
    n_hidden: int = 0  # width of the MLP; 0: 8/3 n_embd, up to a multiple of 32
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = True
    context: str = "causal"
    local_window: int = 6  # w; 0: no local head
    local_hidden: int = 0  # width of the local head; 0: 4 n_embd

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_embd"):
            require(getattr(self, name) > 0, f"{name} must be at least 1")
        for name in ("n_kv_head", "head_dim", "n_hidden", "local_window", "local_hidden"):
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        count_blocks(self.seq_len, self.block_size)
        C, H, w = self.n_embd, self.n_head, self.local_window
        require(C % H == 0 or self.head_dim, f"n_embd {C} is not divisible by n_head {H}")
        self.head_dim = self.head_dim or C // H
        self.n_kv_head = self.n_kv_head or H
        self.n_hidden = self.n_hidden or 32 * math.ceil(C * 8 / 3 / 32)
        self.local_hidden = self.local_hidden or 4 * C
        self.mask_id = self.vocab_size
        # finished text is read in units of 1 or S tokens, which see each other
        self.unit = 1 if self.context == "causal" else self.block_size
        require(H % self.n_kv_head == 0, f"n_head {H} is no multiple of n_kv_head {self.n_kv_head}")
        require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd: rotation turns pairs")
        require(self.context in ("causal", "block"), "context must be causal or block")
        require(self.context == "causal" or w == 0, "a local_window needs context=causal")

    def check_training(self, noise, corruption="all", draft_weight=1.0, soft=0.0, teacher=False):
        """ValueError unless this shape may be trained so (soft: the share of soft targets):

        context  noise                               local_window  soft             what it is
        causal   full                                > 0           any              the cascade
        causal   any                                 0             0                GPT + diffusion
        block    any; corruption "all" or "target"   0             0                block diffusion
        causal   unused, as draft_weight = 0         0             0, or a teacher  AR"""
        causal, drafts, ar = self.context == "causal", self.local_window > 0, draft_weight == 0
        require(not ar or (causal and not drafts),
                "draft_weight=0, a GPT alone, needs context=causal and local_window=0")
        require(not drafts or noise == "full", "a local head drafts whole blocks: set noise=full")
        require(corruption == "all" or not causal, "corruption=target needs context=block")
        require(soft or not teacher, "a teacher gives soft targets: set soft above 0")
        require(not soft or drafts or (ar and teacher),
                "soft targets need local_window above 0, or draft_weight=0 and a teacher")


# ---- who sees whom: the picture above ------------------------------------------------------------
# May query i see key j? A rule for each call that needs a mask, dense or FlexAttention's.


def clean_sees(i, j, N, S):
    """Clean queries and keys if context="block": the blocks before, and the own one whole."""
    return j // S <= i // S


def noisy_sees(i, j, N, S):
    """Noisy queries; keys 0..N-1 are clean and N..2N-1 noisy, so that noisy block b is key block
    nb + b: the clean blocks before, and the own noisy one whole."""
    return (j // S < i // S) | (j // S == N // S + i // S)


def build_block_causal_mask(N, S, device="cpu", sees=clean_sees, streams=1):
    """A rule's dense mask for keys of 1 or 2 streams: (N, streams * N) bool, True where visible."""
    i, j = torch.arange(N, device=device)[:, None], torch.arange(streams * N, device=device)
    return sees(i, j, N, S)


@torch.compiler.disable  # else a compiled model would make it anew in every pass
@lru_cache
def build_flex_mask(N, S, device, sees, streams):
    """The same as FlexAttention's block mask; on CUDA by compiled code, without the dense mask."""
    build = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return build(lambda b, h, i, j: sees(i, j, N, S), None, None, N, streams * N, device=device)


def attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(D)) v: q (B, Nq, H, D), k and v (B, Nk, Hkv, D) -> (B, Nq, H, D).

    mask: bool, True where visible, broadcast to (B, H, Nq, Nk); or a BlockMask: then FlexAttention,
    which has to be compiled to be fast, and has no backward on a CPU. causal: Nq = Nk."""
    dtype = v.dtype  # autocast's; norm and rotation made q and k float32
    if q.device.type == "cpu":
        k, v = k.to(q.dtype), v.to(q.dtype)  # float32: the CPU's bf16 kernel is the slower one
    else:
        q, k = q.to(dtype), k.to(dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    else:
        with torch.autocast(q.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
    return y.transpose(1, 2).to(dtype)


# ---- the network ---------------------------------------------------------------------------------


def at_least_float32(x):  # whatever the autocast; float64 stays
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x, cos, sin):
    """Rotary embedding, half-split: each pair (x1, x2) = (x[d], x[d + D/2]) turns by its angle into
    (x1 cos - x2 sin, x2 cos + x1 sin), given the tables (cos, cos) and (-sin, sin)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class BlockCausalAttention(nn.Module):
    """Projections, q/k norm and rotary embedding; `attend` decides who sees whom."""

    def __init__(self, config):
        super().__init__()
        C, self.D = config.n_embd, config.head_dim
        self.q_proj = nn.Linear(C, config.n_head * self.D, bias=False)
        self.k_proj = nn.Linear(C, config.n_kv_head * self.D, bias=False)
        self.v_proj = nn.Linear(C, config.n_kv_head * self.D, bias=False)
        self.o_proj = nn.Linear(config.n_head * self.D, C, bias=False)
        norm = partial(nn.RMSNorm, self.D, config.norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, rope, attend):
        q = self.q_proj(x).unflatten(-1, (-1, self.D))  # (B, L, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.D))  # (B, L, Hkv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.D))
        q = rotate(self.q_norm(at_least_float32(q)), *rope)
        k = rotate(self.k_norm(at_least_float32(k)), *rope)
        return self.o_proj(attend(q, k, v).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate x) * (up x))"""

    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.gate_proj = nn.Linear(inputs, hidden, bias=False)
        self.up_proj = nn.Linear(inputs, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, outputs, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CascadeBlock(nn.Module):
    """One layer (a transformer block; diffusion blocks are runs of S tokens)."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = BlockCausalAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config.n_embd, config.n_hidden, config.n_embd)

    def forward(self, x, rope, attend, index=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        if index is not None:
            x = x.flatten(0, 1).index_select(0, index)
        return x + self.mlp(self.post_attention_layernorm(x))


class LocalHead(nn.Module):
    """h_i <- h_i + down(silu(gate z) * (up z)) with z = [norm(h_i), e(x_{i-1}), ..., e(x_{i-w})]. e
    is an embedding of its own. It shows each draft those before it, so that they agree."""

    def __init__(self, config):
        super().__init__()
        C, width = config.n_embd, max(1, config.n_embd // 4)
        self.norm = nn.RMSNorm(C, config.norm_eps)
        self.embed = nn.Embedding(config.vocab_size + 1, width)
        self.mlp = SwiGLU(C + config.local_window * width, config.local_hidden, C)

    def forward(self, h, left):
        """h (..., C) of the trunk, left (..., w) int64, x_{i-1} first -> (..., C) for the head."""
        return h + self.mlp(torch.cat([self.norm(h), self.embed(left).flatten(-2)], dim=-1))


def left_tokens(x0, window, mask_id):
    """(B, N, w): for each token i of x0 (B, N) those at i-1 .. i-w, [MASK] before the first."""
    return F.pad(x0, (window, 0), value=mask_id)[:, :-1].unfold(1, window, 1).flip(-1)


class NLLs(NamedTuple):
    """-log p in nats, not yet weighted, or what soft targets make of it; None: not there."""

    gpt: torch.Tensor | None = None  # (B, N - 1), of tokens 1.. of each sequence, by the GPT level
    masked: torch.Tensor | None = None  # (M,), of tokens at index; with a local head, draft NLL


class CascadeLM(nn.Module):
    """The language model. Its weights have a Llama's names (with q/k norm a Qwen3's) but for the
    local head; embed_tokens has a row more, for [MASK]. flex: in training masked attention is
    FlexAttention, for CUDA under torch.compile, and not by dense masks."""

    def __init__(self, config, flex=False):
        super().__init__()
        self.config, self.flex = config, flex
        self.embed_tokens = nn.Embedding(config.vocab_size + 1, config.n_embd)
        self.layers = nn.ModuleList(CascadeBlock(config) for _ in range(config.n_layer))
        self.local = LocalHead(config) if config.local_window else None
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # position * rope_base^(-2 d / D), (length, 1, D / 2); blocks of drafts reach past seq_len
        position = torch.arange(config.seq_len + config.block_size)[:, None, None]
        d = torch.arange(config.head_dim // 2).double()
        angle = position * config.rope_base ** (-2 * d / config.head_dim)
        cos, sin = angle.cos().float(), angle.sin().float()
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1), persistent=False)
        self.init_weights()

    def init_weights(self):
        """What gets what, drawn from torch's default generator: seed it for repeatability. The
        weights of norms are 1."""
        for name, p in self.named_parameters():
            module = name.split(".")[-2]
            if module == "embed_tokens":  # every row, [MASK] too
                nn.init.normal_(p, std=0.02)
            elif module == "embed":  # the local head's: as large as norm(h), beside which it stands
                nn.init.normal_(p, std=1.0)
            elif module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                a = 0.5 * math.sqrt(3 / p.shape[1])  # half of unit gain
                nn.init.uniform_(p, -a, a)
            elif module in ("o_proj", "down_proj", "lm_head"):
                nn.init.zeros_(p)  # layers are the identity; by an lm_head the first loss is log V

    def trunk(self, tokens, positions, attend, index=None):
        """The one way through the network: tokens (B, L) int64 -> (B, L, C), what the heads read.

        positions (L,) or (B, L) int64. attend(layer, q, k, v): attention of q (B, L, H, D), given
        the pass's own k and v (B, L, Hkv, D). Training, scoring and cached decoding differ in it
        alone: who sees whom, and where further keys come from. index (M,) int64, flat in (B, L):
        the tokens whose output (M, C) is needed, if not all; the last MLP runs for them alone."""
        rope = self.cos[positions], self.sin[positions]  # (..., L, 1, D)
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, partial(attend, i), index if layer is self.layers[-1] else None)
        return x

    def streams(self, x0, xt=None, index=None):
        """The clean stream x0 (B, N) -> (B, N, C). Or both in one pass, a batch of the B sequences
        of x0 and then the B of xt -> (2B, N, C), or what `index` names of it, as in `trunk`."""
        (B, N), S, device = x0.shape, self.config.block_size, x0.device
        require(N <= self.config.seq_len, f"{N} tokens exceed seq_len {self.config.seq_len}")
        require(xt is None or N % S == 0, f"{N} noisy tokens are not whole blocks of {S}")
        causal = self.config.context == "causal"
        build = build_flex_mask if self.flex and self.training else build_block_causal_mask
        clean_mask = None if causal else build(N, S, device, clean_sees, 1)
        noisy_mask = None if xt is None else build(N, S, device, noisy_sees, 2)

        def attend(layer, q, k, v):
            clean = attention(q[:B], k[:B], v[:B], clean_mask, causal)
            if xt is None:
                return clean
            k, v = (torch.cat([x[:B], x[B:]], dim=1) for x in (k, v))  # (B, 2N): clean, noisy
            return torch.cat([clean, attention(q[B:], k, v, noisy_mask)])

        tokens = x0 if xt is None else torch.cat([x0, xt])
        return self.trunk(tokens, torch.arange(N, device=device), attend, index)

    def head_weight(self):
        """(V, C), a row for each real token."""
        return self.embed_tokens.weight[:-1] if self.config.tie_embeddings else self.lm_head.weight

    def logits(self, h):
        """h (..., C) of the trunk or the local head -> (..., V) float32."""
        return at_least_float32(F.linear(self.norm(h), self.head_weight()))

    def logits_of(self, tokens):
        """tokens (B, N), real or mask_id -> logits (B, N, V) of the clean stream, at i: of token
        i + 1 with context="causal", of token i with context="block" (where finished blocks and one
        with masks behind them are what a pass of the sampler reads)."""
        return self.logits(self.streams(tokens))

    def forward(self, x0, xt=None, index=None, soft=0.0, teacher=None):
        """The `NLLs` of a batch: x0, xt (B, N) int64, index (M,) int64; x0 alone for AR.

        soft: this share of each is instead a cross-entropy against p, without a gradient: that of a
        teacher's GPT level, for both levels; without a teacher this model's own, for the masked
        tokens. Of token 0 of a sequence there is no p."""
        c, head, share, B = self.config, self.head_weight(), None, len(x0)
        indexed = index is not None and index.dtype == torch.int64
        require(xt is None or indexed, "xt needs an int64 index")
        if c.context == "block":  # only the second B of the batch of 2B have a loss
            require(xt is not None and soft == 0, "context=block needs xt, and has no soft targets")
            h = self.norm(self.streams(x0, xt, index + x0.numel()))
            return NLLs(masked=head_nll(h, head, x0.flatten()[index]))

        h = self.streams(x0, xt)
        before = self.norm(h[:B, :-1])  # (B, N - 1, C), what predicts tokens 1..
        p_h, p_head = before, head  # p = softmax(p_h p_head^T)
        if teacher is not None:
            with torch.no_grad():
                p_h, p_head = teacher.norm(teacher.streams(x0)[:, :-1]), teacher.head_weight()
            share = torch.full(p_h.shape[:2], soft, device=h.device)
        gpt = head_nll(before, head, x0[:, 1:], share, p_h, p_head)
        if xt is None:
            return NLLs(gpt)
        if share is not None or soft > 0:  # the p of token i, moved to i
            p_h = F.pad(p_h, (0, 0, 1, 0)).flatten(0, 1)[index]
            share = torch.where(index % x0.shape[1] == 0, 0.0, soft)
        h, targets = h[B:].flatten(0, 1)[index], x0.flatten()[index]
        if self.local is not None:  # all left tokens are shown: teacher forcing
            h = self.local(h, left_tokens(x0, c.local_window, c.mask_id).flatten(0, 1)[index])
        return NLLs(gpt, head_nll(self.norm(h), head, targets, share, p_h, p_head))


def head_nll(h, head, targets, soft=None, p_h=None, p_head=None, most=2**25):
    """nll = -log q[targets] for q = softmax(h head^T); or (1 - soft) * nll + soft * ce, where ce is
    the cross-entropy of q against the constant p = softmax(p_h p_head^T).

    h (..., C), head (V, C), targets and soft (...), p_h and p_head with a C of their own -> float32
    (...). More logits than `most`, 134 MB, are made in pieces, and anew for the gradient."""

    def piece(h, targets, soft=None, p_h=None):
        log_q = at_least_float32(F.linear(h, head)).log_softmax(dim=-1)
        nll = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if soft is None:
            return nll
        with torch.no_grad():
            p = at_least_float32(F.linear(p_h, p_head)).softmax(dim=-1)
        return (1 - soft) * nll - soft * (p * log_q).sum(dim=-1)

    size = max(1, most // len(head))
    if targets.numel() <= size:
        return piece(h, targets, soft, p_h)
    whole = [h.flatten(0, -2), targets.flatten()]
    if soft is not None:
        whole += [soft.flatten(), p_h.flatten(0, -2)]
    again = partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
    found = [again(*each) for each in zip(*(x.split(size) for x in whole), strict=True)]
    return torch.cat(found).view(targets.shape)
