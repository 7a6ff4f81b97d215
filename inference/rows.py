"""The rows of the engine's cache as the host sees them: what each holds, and which one a new prompt should take."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from inference.requests import Request

COPY_FROM = 16
"""A prefix that another row holds is copied if it is at least so many tokens longer than what an idle row holds."""


@dataclasses.dataclass(eq=False)
class Row:
    """One row of the cache.

    Attributes:
        number: which one.
        request: that it works for, or None.
        tokens: those whose keys and values the cache holds, of a row without a request.
        index: how many tokens the cache holds, those under way included.
        step: tokens generated, those under way included.
        is_reading: it still reads its prompt.
        last_used: number of its last request.
    """

    number: int
    request: Request | None = None
    tokens: tuple[int, ...] = ()
    index: int = 0
    step: int = 0
    is_reading: bool = False
    last_used: int = -1

    @property
    def is_active(self) -> bool:
        """Whether it is to generate."""
        return (
            self.request is not None
            and not self.is_reading
            and self.step < self.request.params.max_new_tokens
        )

    @property
    def is_idle(self) -> bool:
        """Whether it may take a request: it has none, or the last step of the one that it has is under way."""
        return self.request is None or not (self.is_reading or self.is_active)

    def held(self) -> tuple[int, ...]:
        """The tokens that a new prompt may begin with."""
        if self.request is None:
            return self.tokens
        return (*self.request.prompt, *self.request.output)[: self.index]

    def take(self, request: Request, num_held: int) -> None:
        """Begins a request, the first tokens of whose prompt it holds."""
        self.request, self.is_reading, self.step, self.tokens = request, True, 0, ()
        self.index, self.last_used = num_held, request.number

    def leave(self, at_most: int) -> None:
        """Ends the request; keeps what the cache holds of it, up to so many tokens."""
        self.tokens = self.held()[:at_most]
        self.index, self.request, self.is_reading = len(self.tokens), None, False


def choose_row(rows: Sequence[Row], prompt: Sequence[int], share: bool) -> tuple[Row, Row | None, int] | None:
    """Where a new prompt should go.

    Args:
        rows: all of them.
        prompt: its tokens.
        share: whether keys and values may be taken over.

    Returns:
        (an idle row, a row to copy from or None, how many of the prompt's first tokens the idle row then holds), or
        None where no row is idle.
    """
    idle = [row for row in rows if row.is_idle]
    if not idle:
        return None
    oldest = min(idle, key=lambda row: row.last_used)
    if not share:
        return oldest, None, 0
    # The last token is read in any case: its logits are needed.
    common = {row.number: min(count_common(row.held(), prompt), len(prompt) - 1) for row in rows}
    here = max(idle, key=lambda row: (common[row.number], -row.last_used))
    best = max(rows, key=lambda row: common[row.number])
    if common[best.number] >= common[here.number] + COPY_FROM:
        return oldest, best, common[best.number]
    return here, None, common[here.number]


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first elements two sequences share."""
    length = min(len(a), len(b))
    same = np.asarray(a[:length]) == np.asarray(b[:length])
    return length if same.all() else int(same.argmin())


def doubled(first: int, last: int) -> list[int]:
    """first, twice that, ... and last."""
    lengths = [first]
    while lengths[-1] * 2 < last:
        lengths.append(lengths[-1] * 2)
    return lengths if last == first else [*lengths, last]
