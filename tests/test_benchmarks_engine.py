"""The benchmarks of engine and server measure what they say, without a model."""

import pytest

from benchmarks import engine, serving
from benchmarks.sides import Local

LOAD = engine.Load(num_requests=4, num_rows=2, prompt=(1, 3), new=(2, 5))


class Ways:
    """Stands in for the two ways; one may choose other tokens."""

    def __init__(self, differ=""):
        self.asked = LOAD.requests(50)
        self.differ = differ

    def answer(self, way, count=None):
        return [[len(way) if way == self.differ else 7] * new for _, new in self.asked[:count]]

    def continuously(self):
        return self.answer("continuously")

    def in_groups(self):
        return self.answer("in_groups")

    def one_at_a_time(self, count):
        return self.answer("one_at_a_time", count)


def test_the_load_is_mixed_and_the_same_every_time():
    asked = engine.Load().requests(100)
    assert asked == engine.Load().requests(100) != engine.Load(seed=1).requests(100)
    lengths, news = {len(prompt) for prompt, _ in asked}, {new for _, new in asked}
    assert min(lengths) >= 8
    assert max(lengths) <= 64
    assert min(news) < 12
    assert max(news) > 200


def test_other_tokens_are_no_ratio():
    lines = engine.compare(Local(Ways), LOAD, 50, 2, 3)
    assert len(lines) == 2
    for way in ("in_groups", "one_at_a_time"):
        with pytest.raises(RuntimeError, match="got different tokens: the ratio would mean nothing"):
            engine.compare(Local(Ways, way), LOAD, 50, 1, 3)


def test_gaps_and_rates():
    run = serving.Run(2.0, [[1.0, 1.1, 1.3], [1.0, 1.1]])
    assert run.rate == 2.5
    assert run.gaps == pytest.approx([0.1, 0.2, 0.1])
    assert "2.5 tok/s; gap between tokens: median 100.0 ms, p99 200.0 ms = 2.00 x" in serving.summary(
        "a", [run]
    )
