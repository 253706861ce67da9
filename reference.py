"""
The slow truth of CASCADE: who sees whom, the whole network and its loss, in float64 plain loops.

    python reference.py        # a few seconds on a CPU: four PASS lines, exit status 0

Nothing here is meant to be fast, and nothing here comes from the rest of the repository, so a
mistake in model.py cannot be repeated by import. When the two disagree, this file is believed.

  part 1  attention with one head and no rotary embedding, with and without a cache of finished
          blocks. Running the file checks this part against itself.
  part 2  the whole network, its local head and the terms of the loss as functions of a state_dict.
          test_all.py holds model.py to it, at sizes like N = 32 tokens and C = 64 channels.

Letters: B batch, N tokens, S tokens in a diffusion block, nb = N // S blocks, C width, H query
heads, Hkv key/value heads, D = C // H head width, V real tokens (token V is the mask).

Left out on purpose: speed, dropout, sampling, low precision.
"""

import math

import torch


def exact(t):
    """float16, bfloat16 and float32 all fit in a float64 without rounding. Keeps autograd."""
    return t.cpu().double()  # in this order: some accelerators have no float64


# ------------------------------------------------------------------------------------------------
# part 1: attention and cache, one head, no rotary embedding


def causal_rule(i, j):
    """A GPT: query i sees itself and all earlier tokens."""
    return j <= i


def block_causal_rule(S):
    """Query i sees key j when j's block is not after i's: its own block whole, left and right.

    S = 2, nb = 2     key 0  1  2  3
            query 0       x  x  .  .
                  1       x  x  .  .
                  2       x  x  x  x
                  3       x  x  x  x
    """
    return lambda i, j: j // S <= i // S


def two_stream_rule(N, S, causal=False):
    """Indices 0..N-1 are the clean tokens, N..2N-1 the noisy tokens at the same N positions.

    A noisy block must predict its own clean copy, so that is the one past block it cannot see.

    nb = 3, by block    clean keys   noisy keys
                         0  1  2      0  1  2
      clean query 0      x  .  .      .  .  .     causal: of its own block a clean query sees only
                  1      x  x  .      .  .  .     the tokens up to itself
                  2      x  x  x      .  .  .
      noisy query 0      .  .  .      x  .  .
                  1      x  .  .      .  x  .
                  2      x  x  .      .  .  x
    """

    def visible(i, j):
        if i < N:  # clean query
            return j < N and (j <= i if causal else j // S <= i // S)
        if j < N:  # noisy query, clean key
            return j // S < (i - N) // S
        return (j - N) // S == (i - N) // S

    return visible


def draft_rule(lo, before):
    """Tokens 0..lo-1 are finished text, read by the rule `before`; behind them is one noisy block,
    which sees the text and all of itself."""
    return lambda i, j: j < lo and before(i, j) if i < lo else True


def reference_attention(q, k, v, visible):
    """out_i = sum_j p_ij v_j,  p_i = softmax over the j with visible(i, j) of q_i . k_j / sqrt(D)

    q (..., Nq, D), k and v (..., Nk, D) -> float64 (..., Nq, D). Invisible keys are never touched,
    so there is no mask and no infinity that could hide a mistake. Each query must see some key.
    """
    q, k, v = exact(q), exact(k), exact(v)
    rows = []
    for i in range(q.shape[-2]):
        seen = [j for j in range(k.shape[-2]) if visible(i, j)]
        assert seen, f"query {i} sees no key at all"
        score = (q[..., i : i + 1, :] * k[..., seen, :]).sum(-1) / math.sqrt(q.shape[-1])
        p = torch.softmax(score, dim=-1)  # (..., len(seen))
        rows.append((p.unsqueeze(-1) * v[..., seen, :]).sum(-2))
    return torch.stack(rows, dim=-2)  # (..., Nq, D)


def oracle_streams(q, k, v, S, causal, skip=0):
    """The oracle's loop on streams q, k, v (streams, 1, N, 1, D) in the layout of model.py: each
    noisy copy by itself beside the clean stream. Returns (streams - skip, 1, N, 1, D) float64."""
    N, rows = q.shape[2], []
    for copy in range(1, len(q)):
        pair = [torch.cat([x[0, 0, :, 0], x[copy, 0, :, 0]]) for x in (q, k, v)]
        y = reference_attention(*pair, two_stream_rule(N, S, causal))
        rows = rows or [y[:N]]
        rows.append(y[N:])
    return torch.stack(rows)[skip:, None, :, None]


def block_causal_attention(q, k, v, S):
    """The same as reference_attention under block_causal_rule(S), with a dense (N, N) mask.

    q, k, v (..., N, D) -> float64 (..., N, D).
    """
    q, k, v = exact(q), exact(k), exact(v)
    block = torch.arange(q.shape[-2]) // S
    hidden = block[None, :] > block[:, None]  # (query, key)
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return torch.softmax(score.masked_fill(hidden, -math.inf), dim=-1) @ v


class ReferenceCache:
    """Keys and values of the finished blocks of one sequence in one layer, each (tokens, D)."""

    def __init__(self, D):
        self.k = torch.zeros(0, D, dtype=torch.float64)
        self.v = torch.zeros(0, D, dtype=torch.float64)

    def append(self, k, v):
        self.k = torch.cat([self.k, exact(k)])
        self.v = torch.cat([self.v, exact(v)])


def attend_with_cache(q, k, v, cache, commit):
    """One block q, k, v (S, D) sees every cached token and itself. Returns float64 (S, D).

    No mask is needed: what a block may not see has not been written yet. Only a finished block is
    committed. The keys of a block with masks in it are wrong the moment one of them is revealed.
    """
    keys, values = torch.cat([cache.k, exact(k)]), torch.cat([cache.v, exact(v)])
    score = exact(q) @ keys.T / math.sqrt(q.shape[-1])
    if commit:
        cache.append(k, v)
    return torch.softmax(score, dim=-1) @ values


def cached_attention(q, k, v, S):
    """block_causal_attention for q, k, v (N, D), written block by block through a cache."""
    cache, out = ReferenceCache(q.shape[-1]), []
    for lo in range(0, q.shape[-2], S):
        b = slice(lo, lo + S)
        out.append(attend_with_cache(q[b], k[b], v[b], cache, commit=True))
    return torch.cat(out)


# ------------------------------------------------------------------------------------------------
# part 2: the whole network, a function of its parameters


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


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


def context_rule(config):
    """How finished text is read."""
    return causal_rule if config.context == "causal" else block_causal_rule(config.block_size)


def reference_trunk(state_dict, config, tokens, visible, noisy=None):
    """What the heads read, of one stream: tokens (B, N), real or mask -> float64 (B, N, C).

        x_i = embed[tokens_i]
        x = x + o(attention(q, k, v))           q, k, v from  h = rms_norm(x)
        x = x + down(silu(gate(h)) * up(h))     with          h = rms_norm(x)     per layer

    With config.draft_rank, at the positions where noisy (N,) is True: each projection W z is
    W z + B (A z), and [MASK] has the embedding embed + draft_mask. Differentiable in the tensors of
    state_dict.
    """
    weight = {name: exact(t) for name, t in state_dict.items()}
    H, Hkv, eps = config.n_head, config.n_kv_head, config.norm_eps
    D = config.head_dim

    drafts = config.draft_rank and noisy is not None
    x = weight["embed.weight"][tokens.cpu()]  # (B, N, C)
    if drafts:
        masked = (tokens.cpu() == config.vocab_size) & noisy
        x = x + masked.double().unsqueeze(-1) * weight["draft_mask"]
    for layer in range(config.n_layer):
        prefix = f"blocks.{layer}."  # "blocks.0.attn.q.weight" becomes w["attn.q"]
        w = {n.removeprefix(prefix).removesuffix(".weight"): t for n, t in weight.items()
             if n.startswith(prefix)}

        def project(name, z, w=w):
            y = z @ w[name].T
            if drafts:
                change = z @ w[f"{name}.draft_in"].T @ w[f"{name}.draft_out"].T
                y = y + noisy.double().unsqueeze(-1) * change
            return y

        h = rms_norm(x, w["attn_norm"], eps)
        q, k, v = project("attn.q", h), project("attn.k", h), project("attn.v", h)
        heads = []
        for head in range(H):
            group = head // (H // Hkv)  # neighbouring query heads share one key/value head
            qh = q[..., head * D : (head + 1) * D]  # (B, N, D)
            kh = k[..., group * D : (group + 1) * D]
            vh = v[..., group * D : (group + 1) * D]
            if config.qk_norm:
                qh, kh = rms_norm(qh, w["attn.q_norm"], eps), rms_norm(kh, w["attn.k_norm"], eps)
            qh, kh = rotate(qh, config.rope_base), rotate(kh, config.rope_base)
            heads.append(reference_attention(qh, kh, vh, visible))
        x = x + project("attn.o", torch.cat(heads, dim=-1))  # (B, N, H*D) -> (B, N, C)

        h = rms_norm(x, w["mlp_norm"], eps)
        gate = project("mlp.gate", h)
        x = x + project("mlp.down", gate * torch.sigmoid(gate) * project("mlp.up", h))
    return x


def swiglu(z, gate, up, down):
    """down(silu(gate z) * (up z))"""
    gate = z @ gate.T
    return (gate * torch.sigmoid(gate) * (z @ up.T)) @ down.T


def reference_head(state_dict, config, x):
    """Logits of what the trunk or the local head gave: head(rms_norm(x)), (..., C) -> (..., V).

    The mask embedding is row V: a head tied to the embedding leaves it out.
    """
    table = "embed.weight" if config.tie_embeddings else "head.weight"
    norm, head = exact(state_dict["norm.weight"]), exact(state_dict[table])[: config.vocab_size]
    return rms_norm(x, norm, config.norm_eps) @ head.T


def reference_local(state_dict, config, x, left, second=False):
    """The local head at one position: x (B, C), left (B, w) = tokens i-1 .. i-w -> (B, C).

        z = [rms_norm(x), e(x_{i-1}), ..., e(x_{i-w})],    x + down(silu(gate z) * (up z))

    `second`: its other output instead, (B,), the logit of what the GPT level accepts, which is
    down' silu(up' hidden) of the hidden layer silu(gate z) * (up z).
    """
    w = {name[6:-7]: exact(t) for name, t in state_dict.items() if name.startswith("local.")}
    z = [rms_norm(x, w["norm"], config.norm_eps), *(w["embed"][t] for t in left.T)]
    z = torch.cat(z, dim=-1)
    if not second:
        return x + swiglu(z, w["gate"], w["up"], w["down"])
    up = swiglu(z, w["gate"], w["up"], w["accept.up"])
    return (up * torch.sigmoid(up) @ w["accept.down"].T)[:, 0]


def reference_logits(state_dict, config, tokens):
    """Logits of one stream of finished text: (B, N) -> (B, N, V). With a causal context they are
    about token i + 1, with a block context about token i itself."""
    x = reference_trunk(state_dict, config, tokens, context_rule(config))
    return reference_head(state_dict, config, x)


def left_of(config, x0, xt, joint, position):
    """(B, w): the tokens to the left of `position`, as the local head sees them. Tokens of earlier
    blocks are finished text; those of its own are noisy, or clean too where they are drawn in the
    same pass (joint). There is [MASK] before the first."""
    first = position // config.block_size * config.block_size
    column = []
    for j in range(position - 1, position - 1 - config.local_window, -1):
        if j < 0:
            column.append(torch.full((len(x0),), config.vocab_size))
        else:
            column.append((x0 if joint or j < first else xt)[:, j])
    return torch.stack(column, dim=1)


def reference_block_logits(state_dict, config, x0, xt, joint=False):
    """Logits of every noisy block given the clean blocks before it: x0, xt (B, N) -> (B, N, V).

    What training computes in one pass over two streams is, by definition, what the sampler does
    block by block: run [x0^0, ..., x0^{b-1}, xt^b] and keep the logits of the last S positions.
    `joint`: with the tokens to the left shown to the local head, else masked ones appear as [MASK].
    """
    N, S = x0.shape[1], config.block_size
    assert N % S == 0, f"{N} tokens are not a whole number of blocks of {S}"
    logits = []
    for lo in range(0, N, S):
        tokens = torch.cat([x0[:, :lo], xt[:, lo : lo + S]], dim=1)  # (B, (b + 1) * S)
        rule, noisy = draft_rule(lo, context_rule(config)), torch.arange(lo + S) >= lo
        x = reference_trunk(state_dict, config, tokens, rule, noisy)
        for i in range(lo, lo + S):
            h = x[:, i]
            if config.local_window:
                h = reference_local(state_dict, config, h, left_of(config, x0, xt, joint, i))
            logits.append(reference_head(state_dict, config, h))
    return torch.stack(logits, dim=1)


def reference_terms(state_dict, config, x0, xt, weight, share):
    """{term: float64 scalar} of the loss, in nats per token. x0, xt, weight, share (B, N).

        bound = 1 / (B nb) sum_i weight_i * -log p(x0_i | xt)       masked left tokens as [MASK]
        joint = 1 / (B nb) sum_i share_i  * -log p(x0_i | xt, left) left tokens shown
        gpt   = 1 / (B (N - 1)) sum_{i>0} -log p(x0_i | x0_{<i})    causal context alone

    weight and share are 0 wherever xt is not masked. A weight of 1 / k (k masks in the block) gives
    each block the mean over its masks. Differentiable in the tensors of state_dict.
    """
    # Widened once, so that gradients add up in float64 and are rounded at the end.
    state_dict = {name: exact(t) for name, t in state_dict.items()}
    B, N = x0.shape
    terms = {}
    for name, joint, w in (("bound", False, weight), ("joint", True, share)):
        log_p = reference_block_logits(state_dict, config, x0, xt, joint).log_softmax(-1)
        nll = -log_p.gather(-1, x0.cpu().unsqueeze(-1)).squeeze(-1)  # (B, N)
        terms[name] = (exact(w) * nll).sum() / (B * (N // config.block_size))
    if config.context == "causal":
        log_p = reference_logits(state_dict, config, x0)[:, :-1].log_softmax(-1)
        terms["gpt"] = -log_p.gather(-1, x0[:, 1:].cpu().unsqueeze(-1)).mean()
    return terms


# ------------------------------------------------------------------------------------------------
# the checks of part 1: each returns (name, measured, allowed)

# (S, N, D): autoregressive, odd, ordinary, one block, a single token, long blocks
SHAPES = [(1, 7, 4), (3, 15, 5), (4, 16, 8), (6, 6, 3), (1, 1, 2), (16, 48, 16)]


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def max_diff(a, b):
    """Largest absolute difference; infinite for unlike shapes, which must fail and not crash."""
    if a.shape != b.shape:
        return math.inf
    return (a - b).abs().max().item() if a.numel() else 0.0


def largest(figures):
    return torch.tensor(figures).max().item()  # Python's max() can swallow a NaN, this one cannot


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


def full_pass(x, S, layers, caches):
    """x + attention, twice: the second layer's keys depend on who saw whom in the first."""
    for (wq, wk, wv), cache in zip(layers, caches, strict=True):
        q, k, v = x @ wq, x @ wk, x @ wv
        cache.append(k, v)
        x = x + block_causal_attention(q, k, v, S)
    return x


def one_block(x, layers, caches, commit):
    for (wq, wk, wv), cache in zip(layers, caches, strict=True):
        x = x + attend_with_cache(x @ wq, x @ wk, x @ wv, cache, commit)
    return x


def check_prefix():
    """One pass fills the cache with p blocks, the rest is written block by block, for every p.

    Before each finished block a draft of it passes through, as in denoising: no trace may remain.
    """
    diffs = []
    for S, N, D in SHAPES:
        x, layers = draw(5, N, D), draw(6, 2, 3, D, D) / math.sqrt(D)
        truth = [ReferenceCache(D), ReferenceCache(D)]
        want = full_pass(x, S, layers, truth)
        for filled in range(0, N + 1, S):
            caches = [ReferenceCache(D), ReferenceCache(D)]
            diffs.append(max_diff(full_pass(x[:filled], S, layers, caches), want[:filled]))
            for lo in range(filled, N, S):
                one_block(x[lo : lo + S] + draw(7, S, D), layers, caches, commit=False)
                got = one_block(x[lo : lo + S], layers, caches, commit=True)
                diffs.append(max_diff(got, want[lo : lo + S]))
            for cache, t in zip(caches, truth, strict=True):
                diffs += [max_diff(cache.k, t.k), max_diff(cache.v, t.v)]
    return "cache after any prefix of blocks equals one full pass", largest(diffs), 1e-12


def main():
    checks = [check_loop, check_no_leak, check_cache, check_prefix]
    failed = 0
    for check in checks:
        name, measured, allowed = check()
        passed = measured <= allowed  # False for NaN
        failed += not passed
        figures = f"max|diff| = {measured:.1e}, allowed {allowed:.1e}"
        print(f"{'PASS' if passed else 'FAIL'}  {name:<53}  {figures}")
    if failed:
        print(f"{failed} of {len(checks)} CASCADE block-attention and cache tests failed")
        return 1
    print("All CASCADE block-attention and cache tests passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
