"""The control beside small models: an interpolated n-gram of the training text.

    p_n(x | h) = max(count(h x) - d, 0) / count(h) + d distinct(h) / count(h) * p_{n-1}(x | h')

h: the n - 1 tokens before, h' all of them but the first. Absolute discounting with d = 0.75 (Ney,
Essen and Kneser 1994). p_0 is uniform; a history that never occurred hands on p_{n-1}.
"""

import numpy as np

DISCOUNT = 0.75


class NGram:
    """Counts of the grams of 1 to `order` tokens in `tokens` (n,), ids below V."""

    def __init__(self, tokens, V, order=5):
        self.V, self.order, self.levels = V, order, []
        tokens = np.asarray(tokens, np.int64)
        gram = np.zeros(len(tokens) + 1, np.int64)  # ids of the grams of one token less, by place
        for n in range(1, order + 1):
            # a gram is its first n - 1 tokens, by their id, and its last; sorted, the grams of one
            # history stand together, from first[history] on
            keys, gram, count = np.unique(gram[:-1] * V + tokens[n - 1 :], return_inverse=True,
                                          return_counts=True)
            histories = np.arange((keys[-1] // V if n > 1 else 0) + 2)
            first = np.searchsorted(keys // V, histories)
            total = np.concatenate([[0], count.cumsum()])[first]
            # the grams, sorted; how often each occurs; where those of a history begin; how often it
            # occurs. An id of -1 matches none
            self.levels.append((keys, count, first, np.diff(total)))

    def probabilities(self, before):
        """p (M, V) float64 of the next token: before (M, order - 1) int64, the last token last."""
        M, p = len(before), np.full((len(before), self.V), 1 / self.V)
        for n in range(1, self.order + 1):
            history = np.zeros(M, np.int64)  # the id of the last n - 1 tokens, -1 if never seen
            for j in range(n - 1):
                keys = self.levels[j][0]
                key = history * self.V + before[:, before.shape[1] - n + 1 + j]
                at = np.searchsorted(keys, key).clip(max=len(keys) - 1)
                history = np.where((history >= 0) & (keys[at] == key), at, -1)
            keys, count, first, total = self.levels[n - 1]
            seen = np.flatnonzero((history >= 0) & (history < len(total)))
            seen = seen[total[history[seen]] > 0]
            history = history[seen]
            distinct = first[history + 1] - first[history]
            p[seen] *= (DISCOUNT * distinct / total[history])[:, None]
            row = np.repeat(np.arange(len(seen)), distinct)
            gram = np.arange(distinct.sum()) + np.repeat(first[history] - (
                distinct.cumsum() - distinct), distinct)
            p[seen[row], keys[gram] % self.V] += (count[gram] - DISCOUNT) / total[history][row]
        return p
