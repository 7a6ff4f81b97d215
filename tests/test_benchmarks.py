"""The benchmarks run at a tiny size, without torch, and compare what they should."""

import numpy as np
import pytest

from benchmarks import __main__ as entry
from benchmarks import decode, train_step
from benchmarks.checkpoint import Checkpoint
from benchmarks.machine import Machine
from benchmarks.sides import Local, Seconds, Shape, Worker, alternate, median, ratio

TINY = Shape(vocab_size=96, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=32)


class Other:
    """Stands in for torch, with a fixed answer to every call."""

    def __init__(self, answer):
        self.generate = self.step = self.first_losses = lambda *_: answer


class Failing:
    def __init__(self, when):
        if when == "made":
            raise ValueError("cannot be made")

    def fail(self):
        raise ValueError("cannot be called")

    def add(self, a, b):
        return a + b


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    Checkpoint(TINY, path)
    return path


@pytest.fixture(autouse=True)
def _leave_malloc_alone(monkeypatch):
    monkeypatch.setattr("parallel.host.keep_freed_memory", lambda: False)


def test_decode_prints_speed_ratio_and_bandwidth(folder):
    prompt = np.ones((1, 4), np.int64)
    with Local(decode.Flaxtron, folder, prompt, 3) as ours, Local(Machine, TINY, 8) as machine:
        tokens = ours.call("generate", 3)[0]
        assert tokens.shape == (1, 3)
        sides = {"flaxtron": ours, "torch": Local(Other, tokens)}
        lines = decode.compare(sides, machine, TINY, 1, 3, 2)
        assert [word in line for word, line in zip(["tok/s", "/ torch", "GB/s"], lines, strict=True)] == [
            True
        ] * 3
        sides["torch"] = Local(Other, tokens + 1)
        with pytest.raises(RuntimeError, match="torch and flaxtron choose different tokens"):
            decode.compare(sides, machine, TINY, 1, 3, 1)


def test_train_step_refuses_another_loss(folder):
    ids = np.random.default_rng(0).integers(1, 96, (2, 8), np.int32)
    with Local(train_step.Flaxtron, folder, ids) as ours, Local(Machine, TINY, 16) as machine:
        first, second = ours.call("first_losses")[0]
        assert second < first
        assert ours.call("step")[0] < second
        lines = train_step.compare({"flaxtron": ours}, machine, TINY, 2, 8, 2)
        assert len(lines) == 2
        assert "GFLOP/s" in lines[1]
        other = Local(Other, [first, second * 1.1])
        with pytest.raises(RuntimeError, match="not the same step"):
            train_step.compare({"flaxtron": ours, "torch": other}, machine, TINY, 2, 8, 1)


def test_command_without_torch(monkeypatch, capsys):
    monkeypatch.setattr(entry, "has_torch", lambda: False)
    flags = entry.Flags(
        shape=TINY,
        batches=(2,),
        prompt_length=4,
        first_length=6,
        beams=2,
        new_tokens=2,
        train_batch=2,
        train_length=8,
        rounds=1,
    )
    entry.run(flags, side=Local)
    lines = capsys.readouterr().out.splitlines()
    starts = [
        "torch and transformers are not installed",
        "decode, batch 2",
        "first token, prompt of 6",
        "MVP, 2 beams",
        "train step, 2 x 8",
    ]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=False)] == [True] * 5


def test_worker_runs_elsewhere_and_tells_why_it_failed():
    with Worker(Failing, "called") as side:
        result, took = side.call("add", 2, 3)
        assert result == 5
        assert took.wall > 0
        with pytest.raises(RuntimeError, match="cannot be called"):
            side.call("fail")
    with pytest.raises(RuntimeError, match="cannot be made"):
        Worker(Failing, "made")


def test_flops_are_those_of_the_products():
    shape = Shape(vocab_size=10, n_embd=4, n_layer=1, n_head=1, rotary_dim=4)
    products = 4 * 4 * 4 + 2 * 4 * 16 + 4 * 10  # query, key, value, out; fc_in, fc_out; lm_head
    scores = 2 * 3 * 3 * 4  # of one sequence of 3 tokens: q·k and probs·v
    assert shape.kernel_size == products
    assert train_step.num_flops(shape, 2, 3) == 3 * 2 * (2 * 3 * products + 2 * scores)


def test_sides_take_turns_and_rounds_are_compared_one_by_one():
    order, clock = [], iter(range(1, 100))

    def turn(name):
        order.append(name)
        return Seconds(float(next(clock)), 1.0)

    times = alternate({"a": lambda: turn("a"), "b": lambda: turn("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [t.wall for t in times["b"]] == [2, 3, 6]
    assert median(times["b"]) == Seconds(3.0, 1.0)
    assert ratio(times["b"], times["a"]).wall == pytest.approx(6 / 5)  # of 2/1, 3/4, 6/5
