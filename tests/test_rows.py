"""Which row a new prompt takes, and what it may take over."""

import pytest

from inference.requests import Request, SamplingParams
from inference.rows import Row, choose_row, count_common, doubled

PROMPT = tuple(range(40))


def busy(number, prompt, output=(), index=None, step=1, new=9):
    request = Request(number, tuple(prompt), SamplingParams(max_new_tokens=new), list(output))
    return Row(number, request, index=len(prompt) if index is None else index, step=step)


@pytest.mark.parametrize(
    ("a", "b", "count"), [((), (1,), 0), ((1, 2), (1, 3, 2), 1), ((1, 2), (1, 2, 3), 2), ((2,), (1,), 0)]
)
def test_count_common(a, b, count):
    assert count_common(a, b) == count_common(b, a) == count


def test_doubled():
    assert doubled(4, 4) == [4]
    assert doubled(4, 30) == [4, 8, 16, 30]
    assert doubled(4, 16) == [4, 8, 16]


def test_what_a_row_holds():
    assert busy(0, (1, 2, 3), (4, 5), index=5).held() == (1, 2, 3, 4, 5)
    assert busy(0, (1, 2, 3), (4, 5), index=4).held() == (1, 2, 3, 4)
    assert busy(0, (1, 2, 3), index=7).held() == (1, 2, 3)  # of tokens under way nobody knows
    row = busy(0, (1, 2, 3), (4, 5), index=4)
    row.leave(3)
    assert (row.tokens, row.index, row.request) == ((1, 2, 3), 3, None)


def test_a_row_whose_last_step_is_under_way_is_idle_already():
    assert not busy(0, (1,), step=8).is_idle
    assert busy(0, (1,), step=9).is_idle
    reading = Row(0)
    reading.take(Request(0, (1,), SamplingParams()), 0)
    assert not reading.is_idle
    assert not reading.is_active
    assert Row(0).is_idle


def test_without_a_common_prefix_the_row_that_has_been_idle_longest_is_taken():
    rows = [Row(0, last_used=4), Row(1, last_used=2), Row(2, last_used=3)]
    assert choose_row(rows, PROMPT, True) == (rows[1], None, 0)
    assert choose_row([busy(0, (1,))], PROMPT, True) is None


def test_an_idle_row_with_a_common_prefix_is_taken_over():
    rows = [Row(0), Row(1, tokens=(*PROMPT[:9], 77), index=10)]
    assert choose_row(rows, PROMPT, True) == (rows[1], None, 9)
    assert choose_row(rows, PROMPT, False) == (rows[0], None, 0)
    rows[1].tokens = PROMPT  # its last token has to be read for its logits
    assert choose_row(rows, PROMPT, True) == (rows[1], None, 39)


def test_a_prefix_is_copied_from_a_busy_row_where_that_is_worth_it():
    rows = [Row(0, tokens=PROMPT[:10], last_used=3), busy(1, PROMPT[:30]), Row(2)]
    assert choose_row(rows, PROMPT, True) == (rows[2], rows[1], 30)
    rows[1] = busy(1, PROMPT[:25])
    assert choose_row(rows, PROMPT, True) == (rows[0], None, 10)
