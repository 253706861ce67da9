"""The slow truth of CASCADE: who sees whom, the network and its NLLs, in float64 and plain loops.

    python reference.py        # seconds on a CPU: four PASS lines, exit status 0

Nothing here is fast, and nothing here comes from the rest of the repository, so a mistake in
model.py cannot be repeated by import. When the two disagree, this file is believed.

  part 1  attention with one head and no rotary embedding, with and without a cache of finished
          blocks. Running the file checks this part against itself.
  part 2  the network, its local head and its NLLs, as functions of a state_dict. test_all.py holds
          model.py to it, at sizes like N = 15 tokens and C = 32. Letters as there.
"""

import math
from functools import partial

import torch


def exact(t):  # half and single precision fit in a float64; autograd goes through
    return t.cpu().double()  # in this order: some accelerators have no float64


# ---- part 1: attention and cache, one head, no rotary embedding ----------------------------------


def causal_rule(i, j):  # a GPT: query i sees itself and all earlier tokens
    return j <= i


def block_causal_rule(S):
    """Query i sees key j when j's block is not after i's: its own block whole, left and right."""
    return lambda i, j: j // S <= i // S


def two_stream_rule(N, S, causal):
    """Indices 0..N-1 are the clean tokens, N..2N-1 the noisy tokens of the same N positions:

    by block        clean keys   noisy keys
                     0  1  2      0  1  2
    clean query 0    x  .  .      .  .  .     causal: of its own block a clean query sees only the
                1    x  x  .      .  .  .     tokens up to itself
                2    x  x  x      .  .  .
    noisy query 0    .  .  .      x  .  .     a noisy block has to predict its own clean copy, so it
                1    x  .  .      .  x  .     does not see that
                2    x  x  .      .  .  x
    """

    def visible(i, j):
        if i < N:  # clean query
            return j < N and (j <= i if causal else j // S <= i // S)
        if j < N:  # noisy query, clean key
            return j // S < (i - N) // S
        return (j - N) // S == (i - N) // S

    return visible


def draft_rule(lo, before):
    """Tokens 0..lo-1 are finished text, read by the rule `before`; behind them stands one noisy
    block, which sees the text and all of itself."""
    return lambda i, j: i >= lo or (j < lo and before(i, j))


def reference_attention(q, k, v, visible):
    """out_i = sum_j p_ij v_j,  p_i = softmax over the j with visible(i, j) of q_i . k_j / sqrt(D)

    q (..., Nq, D), k and v (..., Nk, D) -> float64 (..., Nq, D). Invisible keys are never touched,
    so there is no mask and no infinity that could hide a mistake."""
    q, k, v = exact(q), exact(k), exact(v)
    rows = []
    for i in range(q.shape[-2]):
        seen = [j for j in range(k.shape[-2]) if visible(i, j)]
        assert seen, f"query {i} sees no key at all"
        score = (q[..., i : i + 1, :] * k[..., seen, :]).sum(-1) / math.sqrt(q.shape[-1])
        p = torch.softmax(score, dim=-1)  # (..., len(seen))
        rows.append((p.unsqueeze(-1) * v[..., seen, :]).sum(-2))
    return torch.stack(rows, dim=-2)


def block_causal_attention(q, k, v, S):
    """reference_attention under block_causal_rule(S), with a dense mask: (..., N, D) float64."""
    block = torch.arange(q.shape[-2]) // S
    score = exact(q) @ exact(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
    score = score.masked_fill(block[None, :] > block[:, None], -math.inf)  # (query, key)
    return torch.softmax(score, dim=-1) @ exact(v)


class ReferenceCache:
    """Keys and values of the finished blocks of one sequence in one layer, each (tokens, D)."""

    def __init__(self, D):
        self.k = self.v = torch.zeros(0, D, dtype=torch.float64)

    def append(self, k, v):
        self.k, self.v = torch.cat([self.k, exact(k)]), torch.cat([self.v, exact(v)])


def attend_with_cache(q, k, v, cache, commit):
    """One block q, k, v (S, D) sees every cached token and itself: (S, D). No mask is needed, for
    what it may not see has not been written yet. Only a finished block is committed: the keys of a
    block with masks in it are wrong as soon as one of them is revealed."""
    keys, values = torch.cat([cache.k, exact(k)]), torch.cat([cache.v, exact(v)])
    if commit:
        cache.append(k, v)
    return torch.softmax(exact(q) @ keys.T / math.sqrt(q.shape[-1]), dim=-1) @ values


def cached_attention(q, k, v, S):
    """block_causal_attention of q, k, v (N, D), written block by block through a cache."""
    cache, out = ReferenceCache(q.shape[-1]), []
    for lo in range(0, q.shape[-2], S):
        b = slice(lo, lo + S)
        out.append(attend_with_cache(q[b], k[b], v[b], cache, commit=True))
    return torch.cat(out)


# ---- part 2: the network, differentiable in the tensors of its state_dict ------------------------


def rms_norm(x, weight, eps):  # over the last dimension
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def swiglu(x, w, prefix):  # down(silu(gate x) * (up x)) with silu(a) = a sigmoid(a)
    gate = x @ w[prefix + "gate_proj"].T
    return (gate * torch.sigmoid(gate) * (x @ w[prefix + "up_proj"].T)) @ w[prefix + "down_proj"].T


def rotate(x, base):
    """Rotary embedding of x (B, N, D) at positions 0..N-1, half-split layout (Llama).

    The pair (x1, x2) = (x[d], x[d + D/2]) turns by the angle position * base^(-2d/D):
    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), so q . k depends on distances alone.
    """
    N, D = x.shape[-2:]
    frequency = torch.tensor([base ** (-2 * d / D) for d in range(D // 2)], dtype=torch.float64)
    angle = torch.arange(N, dtype=torch.float64)[:, None] * frequency  # (N, D/2)
    x1, x2 = x[..., : D // 2], x[..., D // 2 :]  # (B, N, D/2) each
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def weights_below(state_dict, prefix):
    """{"self_attn.q_proj": float64, ...}: the weights whose names begin with prefix, without it."""
    return {name.removeprefix(prefix).removesuffix(".weight"): exact(t)
            for name, t in state_dict.items() if name.startswith(prefix)}


def context_rule(config):  # how finished text is read
    return causal_rule if config.context == "causal" else block_causal_rule(config.block_size)


def reference_trunk(state_dict, config, tokens, visible):
    """What the heads read, of one stream: tokens (B, N), real or mask -> float64 (B, N, C).

        x_i = embed[tokens_i]
        x = x + o(attention(q, k, v))           q, k, v from  h = rms_norm(x)
        x = x + down(silu(gate h) * (up h))     with          h = rms_norm(x)     per layer
    """
    H, Hkv, D, eps = config.n_head, config.n_kv_head, config.head_dim, config.norm_eps
    x = exact(state_dict["embed_tokens.weight"])[tokens.cpu()]  # (B, N, C)
    for layer in range(config.n_layer):
        w = weights_below(state_dict, f"layers.{layer}.")
        h = rms_norm(x, w["input_layernorm"], eps)
        q, k, v = (h @ w[f"self_attn.{name}_proj"].T for name in "qkv")
        heads = []
        for head in range(H):
            group = head // (H // Hkv)  # neighbouring query heads share one key/value head
            qh = q[..., head * D : (head + 1) * D]  # (B, N, D)
            kh = k[..., group * D : (group + 1) * D]
            vh = v[..., group * D : (group + 1) * D]
            if config.qk_norm:
                qh = rms_norm(qh, w["self_attn.q_norm"], eps)
                kh = rms_norm(kh, w["self_attn.k_norm"], eps)
            qh, kh = rotate(qh, config.rope_base), rotate(kh, config.rope_base)
            heads.append(reference_attention(qh, kh, vh, visible))
        x = x + torch.cat(heads, dim=-1) @ w["self_attn.o_proj"].T  # (B, N, H*D) -> (B, N, C)
        x = x + swiglu(rms_norm(x, w["post_attention_layernorm"], eps), w, "mlp.")
    return x


def reference_head(state_dict, config, x):
    """Logits of what the trunk or the local head gave: (..., C) -> (..., V). A head tied to the
    embedding leaves out row V, the mask's."""
    table = "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    head = exact(state_dict[table])[: config.vocab_size]
    return rms_norm(x, exact(state_dict["norm.weight"]), config.norm_eps) @ head.T


def reference_local(state_dict, config, x, left):
    """The local head at one position, x (B, C), left (B, w) = tokens i-1 .. i-w -> (B, C):
    x + down(silu(gate z) * (up z)) with z = [rms_norm(x), e(x_{i-1}), ..., e(x_{i-w})]."""
    w = weights_below(state_dict, "local.")
    z = [rms_norm(x, w["norm"], config.norm_eps), *(w["embed"][tokens] for tokens in left.T)]
    return x + swiglu(torch.cat(z, dim=-1), w, "mlp.")


def left_of(config, x0, i):
    """(B, w): the tokens i-1 .. i-w of x0 (B, N), the mask before the first."""
    masks = torch.full_like(x0[:, :1], config.vocab_size)
    return torch.cat([x0[:, j : j + 1] if j >= 0 else masks
                      for j in range(i - 1, i - 1 - config.local_window, -1)], dim=1)


def reference_logits(state_dict, config, tokens):
    """Logits of one stream of finished text: (B, N) -> (B, N, V). With a causal context they are
    about token i + 1, with a block context about token i itself."""
    x = reference_trunk(state_dict, config, tokens, context_rule(config))
    return reference_head(state_dict, config, x)


def reference_block_logits(state_dict, config, x0, xt):
    """Logits of every noisy block given the clean blocks before it: x0, xt (B, N) -> (B, N, V).

    What training computes in one pass over two streams is, by definition, what the sampler does
    block by block: run [x0^0, ..., x0^{b-1}, xt^b] and keep the logits of the last S positions. The
    local head then takes the positions one by one, with the tokens before each of them.
    """
    N, S = x0.shape[1], config.block_size
    assert N % S == 0
    logits = []
    for lo in range(0, N, S):
        tokens = torch.cat([x0[:, :lo], xt[:, lo : lo + S]], dim=1)  # (B, (b + 1) * S)
        x = reference_trunk(state_dict, config, tokens, draft_rule(lo, context_rule(config)))
        for i in range(lo, lo + S):
            h = x[:, i]
            if config.local_window:
                h = reference_local(state_dict, config, h, left_of(config, x0, i))
            logits.append(reference_head(state_dict, config, h))
    return torch.stack(logits, dim=1)


def reference_nlls(state_dict, config, x0, xt, p=None):
    """{name: float64}: NLLs in nats of tokens x0 beside noisy tokens xt, (B, N) each.

        masked       (B, N)      -log q(x0_i | xt, the text before the block, the left tokens)
        gpt          (B, N - 1)  -log p(x0_i | x0_{<i}) for i > 0, with a causal context
        masked_soft  (B, N)      -sum_x p(x) log q(x) for a teacher's p (B, N - 1, V) of tokens 1..,
                                 not differentiated; of token 0, of which there is none, masked
        gpt_soft     (B, N - 1)  the same of the GPT level
    """
    # Widened once, so that gradients add up in float64 and are rounded at the end.
    state_dict = {name: exact(t) for name, t in state_dict.items()}
    log_q, found = reference_block_logits(state_dict, config, x0, xt).log_softmax(-1), {}
    found["masked"] = -log_q.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
    if config.context == "causal":
        log_p = reference_logits(state_dict, config, x0)[:, :-1].log_softmax(-1)
        found["gpt"] = -log_p.gather(-1, x0[:, 1:].unsqueeze(-1)).squeeze(-1)
        if p is not None:
            soft = -(exact(p).detach() * log_q[:, 1:]).sum(-1)
            found["masked_soft"] = torch.cat([found["masked"][:, :1], soft], dim=1)
            found["gpt_soft"] = -(exact(p).detach() * log_p).sum(-1)
    return found


# ---- the checks of part 1: each returns (name, measured, allowed) --------------------------------

# (S, N, D): autoregressive, odd, ordinary, one block, a single token, long blocks
SHAPES = [(1, 7, 4), (3, 15, 5), (4, 16, 8), (6, 6, 3), (1, 1, 2), (16, 48, 16)]


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def max_diff(a, b):  # infinite for unlike shapes, which must fail and not crash
    if a.shape != b.shape:
        return math.inf
    return (a - b).abs().max().item() if a.numel() else 0.0


def largest(figures):  # Python's max() can swallow a NaN, this one cannot
    return torch.tensor(figures).max().item()


def check_loop():
    diffs = []
    for S, N, D in SHAPES:
        q, k, v = draw(1, 3, N, D)
        loop = reference_attention(q, k, v, block_causal_rule(S))
        diffs.append(max_diff(block_causal_attention(q, k, v, S), loop))
    return "block-causal attention equals a per-query loop", largest(diffs), 1e-12


def check_no_leak():
    """Keys and values change from block b on: no earlier row may move, each row of b must."""
    diffs = []
    for S, N, D in SHAPES:
        q, k, v = draw(2, 3, N, D)
        before = block_causal_attention(q, k, v, S)
        for lo in range(0, N, S):
            later = (torch.arange(N) >= lo)[:, None]
            k2, v2 = torch.where(later, draw(3, 2, N, D), torch.stack([k, v]))
            after = block_causal_attention(q, k2, v2, S)
            diffs.append(max_diff(after[:lo], before[:lo]))
            moved = (after - before)[lo : lo + S].abs().amax(-1)  # (S,)
            if not (moved > 1e-6).all():
                diffs.append(math.inf)  # a row blind to its own block would make the check vacuous
    return "no information from later blocks", largest(diffs), 0.0


def check_cache():
    diffs = []
    for S, N, D in SHAPES:
        q, k, v = draw(4, 3, N, D)
        diffs.append(max_diff(cached_attention(q, k, v, S), block_causal_attention(q, k, v, S)))
    return "cached equals uncached", largest(diffs), 1e-12


def check_prefix():
    """Two layers, so that keys depend on who saw whom. One pass fills the caches with p blocks, the
    rest is written block by block, for every p. Before each finished block a draft of it passes
    through, as in denoising: no trace of it may remain."""
    diffs = []
    for S, N, D in SHAPES:
        x, layers = draw(5, N, D), draw(6, 2, 3, D, D) / math.sqrt(D)

        def passing(x, caches, attend, layers=layers):
            for (wq, wk, wv), cache in zip(layers, caches, strict=True):
                x = x + attend(x @ wq, x @ wk, x @ wv, cache)
            return x

        def whole(q, k, v, cache, S=S):
            cache.append(k, v)
            return block_causal_attention(q, k, v, S)

        truth = [ReferenceCache(D), ReferenceCache(D)]
        want = passing(x, truth, whole)
        for filled in range(0, N + 1, S):
            caches = [ReferenceCache(D), ReferenceCache(D)]
            diffs.append(max_diff(passing(x[:filled], caches, whole), want[:filled]))
            for lo in range(filled, N, S):
                block = x[lo : lo + S]
                passing(block + draw(7, S, D), caches, partial(attend_with_cache, commit=False))
                got = passing(block, caches, partial(attend_with_cache, commit=True))
                diffs.append(max_diff(got, want[lo : lo + S]))
            for cache, t in zip(caches, truth, strict=True):
                diffs += [max_diff(cache.k, t.k), max_diff(cache.v, t.v)]
    return "cache after any prefix of blocks equals one full pass", largest(diffs), 1e-12


def main():
    failed = 0
    for check in (check_loop, check_no_leak, check_cache, check_prefix):
        name, measured, allowed = check()
        passed = measured <= allowed  # False for NaN
        if not passed:
            failed += 1
        figures = f"max|diff| = {measured:.1e}, allowed {allowed:.1e}"
        print(f"{'PASS' if passed else 'FAIL'}  {name:<53}  {figures}")
    if failed:
        print(f"{failed} CASCADE block-attention and cache tests failed")
        return 1
    print("All CASCADE block-attention and cache tests passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
