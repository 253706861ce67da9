"""The network: a Llama that reads finished text as a GPT, and denoises blocks of [MASK]s behind it.

Glossary, one meaning per word:

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
                    "block" (each block sees itself whole)
    GPT level       the causal clean stream: its logits at i predict token i + 1
    block level     the noisy stream: its logits at i predict token i
    draft           a token that the block level proposes
    local head      draws the drafts of a block left to right, each seeing the w = local_window
                    tokens to its left; w = 0: none, and drafts are independent

Who sees whom, for three blocks (# = visible; / = up to itself with context="causal", the whole
block with context="block"):

    keys          clean  noisy
    queries       0 1 2  0 1 2
    clean 0       / . .  . . .      clean block c sees the clean blocks < c, and itself
    clean 1       # / .  . . .
    clean 2       # # /  . . .
    noisy 0       . . .  # . .      noisy block b sees the clean blocks < b, and itself, both ways;
    noisy 1       # . .  . # .      not its own clean copy, which it has to predict
    noisy 2       # # .  . . #

Both streams stand at positions 0..N-1. So one pass over them gives, for every block at once, what
the sampler's pass over [finished blocks before b, block b with its masks] gives. Left out on
purpose: dropout, biases, time conditioning (the [MASK]s show the noise level).
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from corrupt import count_blocks, require


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
        C, H = self.n_embd, self.n_head
        require(C % H == 0 or self.head_dim, f"n_embd {C} is not divisible by n_head {H}")
        self.head_dim = self.head_dim or C // H
        self.n_kv_head = self.n_kv_head or H
        self.n_hidden = self.n_hidden or 32 * math.ceil(C * 8 / 3 / 32)
        self.local_hidden = self.local_hidden or 4 * C
        require(H % self.n_kv_head == 0, f"n_head {H} is not divisible by n_kv_head")
        require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd: rotation turns pairs")
        require(self.context in ("causal", "block"), "context must be causal or block")
        require(self.context == "causal" or not self.local_window,
                "a local head needs context=causal: set that, or local_window=0")

    @property
    def mask_id(self):
        return self.vocab_size

    def check_training(self, noise, corruption="all", draft_weight=1.0, soft=0.0, teacher=False):
        """Raises ValueError, one line, unless a model of this shape may be trained so:

        context  noise                               local_window  soft           what it is
        causal   full                                > 0           any            the cascade
        causal   any                                 0             0              GPT and diffusion
        block    any; corruption "all" or "target"   0             0              block diffusion
        causal   none: draft_weight = 0              0             of a teacher   AR
        """
        causal, drafts, ar = self.context == "causal", self.local_window > 0, draft_weight == 0
        require(causal or not ar, "draft_weight=0 leaves a GPT alone: set context=causal")
        require(not (drafts and ar), "draft_weight=0 trains no local head: set local_window=0")
        require(not drafts or noise == "full", "a local head drafts whole blocks: set noise=full")
        require(corruption == "all" or not causal, "corruption=target needs context=block")
        require(soft or not teacher, "a teacher without weight teaches nothing: set soft above 0")
        require(not soft or drafts or (ar and teacher),
                "soft targets need a local head, or draft_weight=0 and a teacher")


# ---- who sees whom: the picture above ------------------------------------------------------------
# May query i see key j? Each rule is written once, for the dense mask and for FlexAttention.


def clean_sees(i, j, N, S):
    """Clean queries and keys: the blocks before, and the own one whole. (If causal: j <= i.)"""
    return j // S <= i // S


def noisy_sees(i, j, N, S):
    """Noisy queries; keys 0..N-1 are clean and N..2N-1 noisy, so that noisy block b is key block
    nb + b: the clean blocks before, and the own noisy one whole."""
    return (j // S < i // S) | (j // S == N // S + i // S)


def build_block_causal_mask(N, S, device="cpu", sees=clean_sees):
    """The dense mask of a rule, True where visible: (N, N) bool, or (N, 2N) of noisy_sees."""
    keys = 2 * N if sees is noisy_sees else N
    i, j = torch.arange(N, device=device), torch.arange(keys, device=device)
    return sees(i[:, None], j, N, S)


@torch.compiler.disable  # else a compiled model would make it anew in every pass
@lru_cache
def build_flex_mask(N, S, device, sees):
    """FlexAttention's block mask of a rule; on CUDA by compiled code, which holds no dense mask."""
    build = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    keys = 2 * N if sees is noisy_sees else N
    return build(lambda b, h, i, j: sees(i, j, N, S), None, None, N, keys, device=device)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v: q (B, Nq, H, D), k and v (B, Nk, Hkv, D) -> (B, Nq, H, D).

    mask: None, causal; bool, True where visible, broadcast to (B, H, Nq, Nk); or a BlockMask, for
    FlexAttention: compiled, its work and memory follow the visible entries; uncompiled it holds all
    scores, and on a CPU it has no backward.
    """
    if q.device.type == "cpu":
        v = v.to(q.dtype)  # float32 under autocast too: the CPU's bf16 kernel is the slower one
    else:
        q, k = q.to(v.dtype), k.to(v.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa).transpose(1, 2)
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)
    return y.transpose(1, 2)


# ---- the network ---------------------------------------------------------------------------------


def at_least_float32(x):
    """x in float32, whatever the autocast; a float64 model stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x, cos, sin):
    """Rotary embedding of x (B, L, heads, D), half-split layout: the pair (x[d], x[d + D/2]) turns
    by its position's angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class BlockCausalAttention(nn.Module):
    """Projections, q/k norm and rotary embedding; who sees whom is `attend`'s to say."""

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

    def forward(self, x, rope, attend, rows=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        if rows is not None:
            x = x.flatten(0, 1)[rows]
        return x + self.mlp(self.post_attention_layernorm(x))


class LocalHead(nn.Module):
    """What lets the drafts of one pass agree. With an embedding e of its own,

        z   = [norm(h_i), e(x_{i-1}), ..., e(x_{i-w})]
        h_i <- h_i + down(silu(gate z) * (up z))
    """

    def __init__(self, config):
        super().__init__()
        C, width = config.n_embd, max(1, config.n_embd // 4)
        self.norm = nn.RMSNorm(C, config.norm_eps)
        self.embed = nn.Embedding(config.vocab_size + 1, width)
        self.mlp = SwiGLU(C + config.local_window * width, config.local_hidden, C)

    def forward(self, h, left):
        """h (..., C) of the trunk, left (..., w) int64, x_{i-1} first -> (..., C), which the final
        norm and the output head read."""
        return h + self.mlp(torch.cat([self.norm(h), self.embed(left).flatten(-2)], dim=-1))


def left_tokens(x0, window, mask_id):
    """(B, N, w): of each position i of x0 (B, N) the tokens i-1 .. i-w, [MASK] before the first.
    Training shows them all (teacher forcing), and never token i."""
    N = x0.shape[1]
    return torch.stack([F.pad(x0, (d, 0), value=mask_id)[:, :N] for d in range(1, window + 1)], -1)


class NLLs(NamedTuple):
    """-log p in nats, float32; None where there is no such level, or no teacher.

    gpt          (B, N - 1)  of tokens 1.. of each row, by the GPT level
    masked       (M,)        of the tokens at `index`, by the block level; with a local head, drawn
                             left to right: the draft NLL
    gpt_soft     (B, N - 1)  the cross-entropy against the teacher's p of the same tokens; for a
    masked_soft  (M,)        window's first token there is no p, and it is -log p
    """

    gpt: torch.Tensor | None
    masked: torch.Tensor | None
    gpt_soft: torch.Tensor | None
    masked_soft: torch.Tensor | None


class CascadeLM(nn.Module):
    """The language model. Its weights have a Llama's names (with q/k norm a Qwen3's), but for the
    local head; the last row of embed_tokens is [MASK]'s.

    attention: how masked calls run, "sdpa", with a dense mask, anywhere, or "flex", FlexAttention,
    for CUDA under torch.compile.
    """

    def __init__(self, config, attention="sdpa"):
        super().__init__()
        require(attention in ("sdpa", "flex"), f"attention must be sdpa or flex, not {attention!r}")
        self.config, self.attention = config, attention
        self.embed_tokens = nn.Embedding(config.vocab_size + 1, config.n_embd)
        self.layers = nn.ModuleList(CascadeBlock(config) for _ in range(config.n_layer))
        self.local = LocalHead(config) if config.local_window else None
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # position * rope_base^(-2 d / D); drafts may stand up to two blocks behind a full window
        position = torch.arange(config.seq_len + 2 * config.block_size, dtype=torch.float64)
        d = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angle = position[:, None, None] * config.rope_base**-d  # (length, 1, D / 2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.init_weights()

    def init_weights(self):
        """What gets what. Draws come from torch's default generator: seed it for repeatability."""
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
                nn.init.zeros_(p)  # layers and local head are the identity, the first loss is log V
            else:  # norms
                nn.init.ones_(p)

    def trunk(self, tokens, positions, attend, rows=None):
        """The one way through the network: tokens (B, L) int64 -> (B, L, C), what the heads read.

        positions (L,) or (B, L) int64. attend(layer, q, k, v): attention of q (B, L, H, D), given
        the pass's own k and v (B, L, Hkv, D). Training, scoring and cached decoding differ in it
        alone: who sees whom, and where further keys come from. rows (M,) int64: of which tokens,
        flat in (B, L), the output is needed, (M, C); the last MLP runs for them alone.
        """
        rope = self.cos[positions], self.sin[positions]  # (..., L, 1, D / 2)
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            x = layer(x, rope, partial(attend, i), rows if last else None)
        return x

    def streams(self, x0, xt=None, rows=None):
        """The clean stream x0 (B, N) -> (B, N, C); with the noisy one, xt (B, N), both in one pass
        -> (2B, N, C), the clean one first. rows as `trunk`."""
        (B, N), S, device = x0.shape, self.config.block_size, x0.device
        build = build_block_causal_mask if self.attention == "sdpa" else build_flex_mask
        clean_mask = None if self.config.context == "causal" else build(N, S, device, clean_sees)
        noisy_mask = None if xt is None else build(N, S, device, noisy_sees)

        def attend(layer, q, k, v):
            clean = attention(q[:B], k[:B], v[:B], clean_mask)
            if xt is None:
                return clean
            k, v = (torch.cat([x[:B], x[B:]], dim=1) for x in (k, v))  # (B, 2N, Hkv, D)
            return torch.cat([clean, attention(q[B:], k, v, noisy_mask)])

        tokens = x0 if xt is None else torch.cat([x0, xt])
        return self.trunk(tokens, torch.arange(N, device=device), attend, rows)

    def head_weight(self):
        """(V, C), a row for each real token."""
        return self.embed_tokens.weight[:-1] if self.config.tie_embeddings else self.lm_head.weight

    def logits_of(self, tokens):
        """tokens (B, N) int64, real or mask_id -> logits (B, N, V) of the clean stream, float32: of
        token i + 1 at i with context="causal", of token i with context="block"."""
        return at_least_float32(F.linear(self.norm(self.streams(tokens)), self.head_weight()))

    def forward(self, x0, xt=None, index=None, teacher=None):
        """The `NLLs` of a batch: x0, xt (B, N) int64, index (M,) int64; without xt those of AR.

        teacher: the model whose GPT level gives soft targets p: this model itself, for its drafts,
        or another of the same vocabulary, for both levels. No gradient goes through p.
        """
        c, head, N = self.config, self.head_weight(), x0.shape[1]
        gpt = gpt_soft = masked = masked_soft = p_h = p_head = None
        if xt is None:
            clean = self.streams(x0)
        elif c.context == "causal":
            clean, noisy = self.streams(x0, xt).chunk(2)
            h = noisy.flatten(0, 1)[index]
        else:  # the clean stream has no loss
            h = self.streams(x0, xt, rows=index + x0.numel())

        if c.context == "causal":
            clean = self.norm(clean[:, :-1])  # predicts tokens 1..
            if teacher is not None and teacher is not self:
                p_h, p_head = teacher.next_token_states(x0)
            gpt, gpt_soft = head_nll(clean, head, x0[:, 1:], p_h, p_head)
            if teacher is self:
                p_h, p_head = clean, head
        if xt is not None:
            if self.local is not None:
                left = left_tokens(x0, c.local_window, c.mask_id)
                h = self.local(h, left.flatten(0, 1)[index])
            if p_h is not None:  # row i - 1 of N - 1 has the p of token i
                p_h = p_h.flatten(0, 1)[(index - index // N - 1).clamp(min=0)]
            masked, masked_soft = head_nll(self.norm(h), head, x0.flatten()[index], p_h, p_head)
            if p_h is not None:
                masked_soft = torch.where(index % N == 0, masked, masked_soft)
        return NLLs(gpt, masked, gpt_soft, masked_soft)

    @torch.no_grad()
    def next_token_states(self, x0):
        """(h (B, N - 1, C), head (V, C)) of the GPT level: softmax(h head^T) is p of tokens 1.."""
        require(self.config.context == "causal", "a teacher needs a GPT level: context=causal")
        return self.norm(self.streams(x0)[:, :-1]), self.head_weight()


def head_nll(h, head, targets, p_h=None, p_head=None, most=2**25):
    """(nll, soft), float32, the shape of targets. With q = softmax(h head^T): -log q[targets], and
    the cross-entropy of q against p = softmax(p_h p_head^T), None without; p is a constant.

    h (..., C), head (V, C), targets (...) int64, p_h (..., C'), p_head (V, C'). More than `most`
    logits (134 MB) are never all held: each piece of them is computed again for its gradient.
    """

    def piece(h, targets, p_h):
        log_q = at_least_float32(F.linear(h, head)).log_softmax(dim=-1)
        nll = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if p_h is None:
            return nll, None
        with torch.no_grad():
            p = at_least_float32(F.linear(p_h, p_head)).softmax(dim=-1)
        return nll, -(p * log_q).sum(dim=-1)

    rows = max(1, most // len(head))
    if targets.numel() <= rows:
        return piece(h, targets, p_h)
    hs, ts = h.flatten(0, -2).split(rows), targets.flatten().split(rows)
    ps = [None] * len(hs) if p_h is None else p_h.flatten(0, -2).split(rows)
    found = [checkpoint(piece, *x, use_reentrant=False) for x in zip(hs, ts, ps, strict=True)]
    nll, soft = zip(*found, strict=True)
    nll = torch.cat(nll).view(targets.shape)
    return nll, None if p_h is None else torch.cat(soft).view(targets.shape)
