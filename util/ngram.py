"""The control beside every small model: an interpolated n-gram of the training text, as a language
model and as a drafter.

    p_n(x | h) = max(count(h x) - d, 0) / count(h) + d distinct(h) / count(h) * p_{n-1}(x | h')

h: the n - 1 tokens before, h' all of them but the first; absolute discounting with d = 0.75 (Ney,
Essen and Kneser 1994); p_0 is uniform, and a history that never occurred hands on p_{n-1}.
"""

import numpy as np
import torch

DISCOUNT = 0.75


class NGram:
    """Counts of all grams of up to `order` tokens of a text, an int array of ids below V."""

    def __init__(self, tokens, vocab_size, order=5):
        self.V, self.order, self.levels = vocab_size, order, []
        tokens = np.asarray(tokens, np.int64)
        gram = np.zeros(len(tokens) + 1, np.int64)  # of the grams of one token less, each one's id
        for n in range(1, order + 1):
            # a gram is the one without its last token, and that token: sorted keys number them
            keys = gram[:-1] * vocab_size + tokens[n - 1 :]
            keys, gram, count = np.unique(keys, return_inverse=True, return_counts=True)
            history = keys // vocab_size
            total = np.bincount(history, weights=count)
            self.levels.append((keys, count, total, np.bincount(history)))

    def find(self, n, gram, x):
        """Ids among the grams of n tokens of: `gram` (an id of n - 1 tokens, -1 unseen), then x."""
        keys = self.levels[n - 1][0]
        wanted = np.where((gram < 0) | (x < 0) | (x >= self.V), -1, gram * self.V + x)
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where(keys[at] == wanted, at, -1)

    def probability(self, before, x):
        """p(x | before), float64 (M,): before (M, order - 1) int64, the last token last, -1 or V
        where there is none; x (M,)."""
        p = np.full(len(x), 1 / self.V)
        for n in range(1, self.order + 1):
            gram = np.zeros(len(x), np.int64)
            for j in range(n - 1):
                gram = self.find(j + 1, gram, before[:, before.shape[1] - n + 1 + j])
            _, count, total, distinct = self.levels[n - 1]
            here, seen = self.find(n, gram, x), (gram >= 0) & (gram < len(total))
            gram = np.where(seen, gram, 0)
            seen &= total[gram] > 0
            of = np.where(seen, total[gram], 1)
            more = np.where(here >= 0, count[here] - DISCOUNT, 0) / of
            p = np.where(seen, more + DISCOUNT * distinct[gram] / of * p, p)
        return p

    def nll(self, x0):
        """(W,) mean -log p in nats per token of windows x0 (W, N), each with nothing before it."""
        x0 = x0.numpy()
        padded = np.pad(x0, ((0, 0), (self.order - 1, 0)), constant_values=-1)
        before = np.lib.stride_tricks.sliding_window_view(padded, self.order - 1, axis=1)[:, :-1]
        p = self.probability(before.reshape(x0.size, -1), x0.reshape(-1))
        return torch.from_numpy(-np.log(p)).view(x0.shape).mean(dim=1)

    def draft(self, text, length, count, draw):
        """(drafts (B, count), q (B, count, V)) behind the first length (B,) tokens of text (B, W).
        draw(p) draws a token from each row of p (B, V) float64, and returns what it drew from."""
        index = length[:, None] + torch.arange(1 - self.order, 0)
        before = text.cpu().gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
        drafts, q = [], []
        for _ in range(count):
            every = np.repeat(before.numpy(), self.V, axis=0)
            p = self.probability(every, np.tile(np.arange(self.V), len(before)))
            token, p = draw(torch.from_numpy(p).view(len(before), self.V).to(text.device))
            drafts.append(token)
            q.append(p)
            before = torch.cat([before[:, 1:], token[:, None].cpu()], dim=1)
        return torch.stack(drafts, dim=1), torch.stack(q, dim=1)
