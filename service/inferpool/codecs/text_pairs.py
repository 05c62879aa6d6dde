"""Joins two tokenized texts to one row, as the post-processor of a tokenizer's file says.

`tokenizers` can encode pairs itself. But for a pair that it truncates it also makes an encoding of every
piece that is cut off from the first text with every such piece of the second: two texts of a few thousand
words take gigabytes. Here each text is tokenized once, whole, and the special tokens are put around the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from inferpool.codecs.text_tokenizer import PROBES
from inferpool.errors import ConfigError


class JoinedPair:
    """The row of a pair of texts.

    Attributes:
        ids: its token ids.
        type_ids: the type of each token.
        truncated: whether tokens were cut off.
    """

    __slots__ = ("ids", "truncated", "type_ids")

    def __init__(self, ids: list[int], type_ids: list[int], truncated: bool) -> None:
        self.ids = ids
        self.type_ids = type_ids
        self.truncated = truncated

    def __len__(self) -> int:
        return len(self.ids)


class CutPair:
    """The tokens that are left of a pair, with the attributes that the encoding of the whole pair has."""

    __slots__ = ("ids", "offsets", "sequence_ids", "type_ids", "word_ids")

    def __init__(self, encoding: Any, kept: Sequence[int]) -> None:
        """Keep the tokens of `encoding` at the indices `kept`."""
        for name in self.__slots__:
            values = getattr(encoding, name)
            setattr(self, name, [values[index] for index in kept])


class PairJoiner:
    """Puts the special tokens of a tokenizer around two texts, and truncates them as the tokenizer would."""

    def __init__(self, tokenizer: Any) -> None:
        """Read what `tokenizer` does with pairs, and switch its truncation off, which happens here.

        Raises ConfigError if it puts tokens elsewhere than before, between and after the two texts.
        """
        truncation = tokenizer.truncation
        tokenizer.no_truncation()
        self._most: Final[int] = truncation["max_length"] - tokenizer.num_special_tokens_to_add(True)
        self._strategy: Final[str] = truncation["strategy"]
        self._keeps_end: Final[bool] = truncation["direction"] == "left"
        first, second = (tokenizer.encode(text, add_special_tokens=False) for text in PROBES)
        joined = tokenizer.encode(*PROBES)
        owners = joined.sequence_ids
        begin = owners.index(0) if 0 in owners else 0
        end = begin + len(first)
        start = end + next((at for at, owner in enumerate(owners[end:]) if owner == 1), 0)
        stop = start + len(second)
        if joined.ids[begin:end] != first.ids or joined.ids[start:stop] != second.ids:
            raise ConfigError(
                "text.pairs: the tokenizer does not put the first text before the second; expected special"
                " tokens before, between and after them"
            )
        self._ids: Final = (joined.ids[:begin], joined.ids[end:start], joined.ids[stop:])
        types = joined.type_ids
        self._types: Final = (types[:begin], types[end:start], types[stop:])
        self._first_type: Final[int] = types[begin]
        self._second_type: Final[int] = types[start]

    def join(self, first: Sequence[int], second: Sequence[int]) -> JoinedPair | None:
        """Return the row of the texts with these tokens; None if the text to truncate is too short for it."""
        lengths = self._lengths(len(first), len(second))
        if lengths is None:
            return None
        one, two = self._cut(first, lengths[0]), self._cut(second, lengths[1])
        before, between, after = self._ids
        types_before, types_between, types_after = self._types
        return JoinedPair(
            [*before, *one, *between, *two, *after],
            [
                *types_before,
                *[self._first_type] * len(one),
                *types_between,
                *[self._second_type] * len(two),
                *types_after,
            ],
            lengths != (len(first), len(second)),
        )

    def cut(self, encoding: Any) -> CutPair:
        """Return what `join` leaves of a pair, which `encoding` has whole and with its special tokens.

        `join` must have a row for the two texts.
        """
        owners = encoding.sequence_ids
        sizes = owners.count(0), owners.count(1)
        lengths = self._lengths(*sizes)
        assert lengths is not None  # else `join` has none
        kept, seen = [], [0, 0]
        for index, owner in enumerate(owners):
            if owner is None:
                kept.append(index)
                continue
            skipped = sizes[owner] - lengths[owner] if self._keeps_end else 0
            if skipped <= seen[owner] < skipped + lengths[owner]:
                kept.append(index)
            seen[owner] += 1
        return CutPair(encoding, kept)

    def _cut(self, tokens: Sequence[int], length: int) -> Sequence[int]:
        return tokens[len(tokens) - length :] if self._keeps_end else tokens[:length]

    def _lengths(self, first: int, second: int) -> tuple[int, int] | None:
        """Return how many tokens are left of each text, as `tokenizers` counts them."""
        excess = first + second - self._most
        if excess <= 0:
            return first, second
        if self._strategy == "only_first":
            return (first - excess, second) if first > excess else None
        if self._strategy == "only_second":
            return (first, second - excess) if second > excess else None
        shorter, longer = min(first, second), max(first, second)
        longer = shorter if shorter > self._most else max(shorter, self._most - shorter)
        if shorter + longer > self._most:
            shorter = self._most // 2
            longer = shorter + self._most % 2
        return (longer, shorter) if first > second else (shorter, longer)
