"""Schedules: at which positions of a block its passes begin, chosen from a table of losses.

    losses (b, S, S)   [block, j, i]: -log p of token i, drawn in a pass that begins at j <= i,
                       with the text before j visible; nothing is read where j > i
    cuts (..., S)      bool, True where a pass begins: always at position 0

Nothing here knows the model. `losses` may be measured, averaged, or predicted.
"""

import torch
import torch.nn.functional as F


def equal_cuts(S):
    """(S, S) bool: row K - 1 has K passes as left_to_right has them, ceil(remaining / left)."""
    cuts = torch.zeros(S, S, dtype=torch.bool)
    for K in range(1, S + 1):
        cuts[K - 1, [n * (S // K) + min(n, S % K) for n in range(K)]] = True
    return cuts


def price(losses, cuts):
    """(b, n): NLL of each block by n schedules, cuts (n, S) or (b, n, S)."""
    S = losses.shape[-1]
    begin = (cuts * torch.arange(S)).cummax(dim=-1).values  # of the pass that draws i
    return losses.gather(1, begin.expand(len(losses), -1, S)).sum(dim=-1)


def cheapest(losses):
    """(best (b, S), cuts (b, S, S)): for each block and number of passes K the least NLL, at
    [:, K - 1], and its cuts. By dynamic programming over the last pass, which begins at j:

        best_K[e] = min over j < e of best_{K-1}[j] + sum_{j <= i < e} losses[j, i]
    """
    b, S, _ = losses.shape
    run = F.pad(losses.double().triu().cumsum(dim=-1), (1, 0))  # (b, j, e): of tokens j..e-1
    run = run.masked_fill(torch.ones(S, S + 1).tril().bool(), torch.inf)
    before = torch.full((b, S + 1), torch.inf, dtype=torch.float64)
    before[:, 0], cuts, out = 0.0, torch.zeros(b, S + 1, S, dtype=torch.bool), []
    for _ in range(S):
        before, j = (before[:, :S, None] + run).min(dim=1)  # (b, e)
        cuts = cuts.gather(1, j[..., None].expand(-1, -1, S)) | F.one_hot(j, S).bool()
        out.append((before[:, S], cuts[:, S]))
    return tuple(torch.stack(each, dim=1) for each in zip(*out, strict=True))


def allocate(nll, passes):
    """(b, S): the share of each K for each block, of nll (b, S), so that the sum of NLL is least at
    `passes` a block on average, or fewer where more would not help.

    Each block takes the K with the least nll + rate * K. The rate is where the mean crosses
    `passes`; the two choices that meet there are mixed. (The convex frontier.)
    """
    S, low, high = nll.shape[1], 0.0, (nll.max() - nll.min()).item() + 1

    def choose(rate):
        K = (nll + rate * torch.arange(S)).argmin(dim=1)
        return F.one_hot(K, S).double(), K.double().mean().item() + 1

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if choose(middle)[1] > passes else (low, middle)
    (more, many), (fewer, few) = choose(low), choose(high)
    share = min(1.0, (passes - few) / max(many - few, 1e-9))
    return share * more + (1 - share) * fewer


def fit_excess(excess, features):
    """(1 + n, S, S): least squares of excess losses (b, S, S), those above the GPT level's, by
    features (b, n) of each block's first pass; n = 0: their mean, a table by position alone."""
    x = F.pad(features.double(), (1, 0), value=1.0)
    fitted = torch.linalg.lstsq(x, excess.double().flatten(1)).solution
    return fitted.view(-1, *excess.shape[1:])


def predict_excess(weights, features):
    """(b, S, S): the excess losses that weights (1 + n, S, S) of fit_excess expect."""
    return torch.einsum("bn,nji->bji", F.pad(features.double(), (1, 0), value=1.0), weights)


def plan(excess, nats):
    """(b, S): the cuts with the fewest passes whose expected excess (b, S, S) is at most `nats` a
    token; where there are none, those with the least."""
    best, cuts = cheapest(excess)
    enough = best <= nats * best.shape[1]
    K = torch.where(enough.any(dim=1), enough.double().argmax(dim=1), best.argmin(dim=1))
    return cuts[torch.arange(len(cuts)), K]
