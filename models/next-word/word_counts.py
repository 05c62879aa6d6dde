"""The next word by counting: what the network of the next-word model is held against."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from transformer import Array


class Counts:
    """The next word by counts of the words before it, which is what the network is held against.

    Smoothed by interpolation after Kneser and Ney, "Improved backing-off for m-gram language modeling"
    (1995), with a discount of 0.75. Probabilities are [words] each.
    """

    def __init__(self, rows: Sequence[Sequence[int]], vocabulary: int, first_word: int) -> None:
        """Count in rows of token ids; those from `first_word` on are words, and what may come next."""
        self._words = vocabulary - first_word
        self._after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for row in rows:
            for index, word in enumerate(row):
                if word >= first_word:
                    for length in (0, 1, 2):
                        self._after[tuple(row[max(0, index - length) : index])][word - first_word] += 1
        preceding = Counter(
            word for before in self._after if len(before) == 1 for word in self._after[before]
        )
        self._preceding = self._shares(preceding)
        self.single = self._shares(self._after[()])

    def after(self, *before: int) -> Array:
        """Return the probabilities after none, one or two tokens."""
        rest = self.after(*before[1:]) if before else self._preceding
        counts = self._after.get(before) if before else None
        if counts is None:
            return rest
        seen, times = list(counts), np.array(list(counts.values()))
        probabilities = rest * (0.75 * len(seen) / times.sum())
        probabilities[seen] += (times - 0.75) / times.sum()
        return probabilities

    def _shares(self, counts: Counter[int]) -> Array:
        smoothed = np.array([counts[word] + 0.5 for word in range(self._words)])
        shares: Array = smoothed / smoothed.sum()
        return shares
