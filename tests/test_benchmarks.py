"""The benchmarks run at a toy size and compare like with like."""

import jax
import numpy as np

from benchmarks import machine, peers
from benchmarks.__main__ import Flags, run


def test_every_benchmark_gives_its_figures():
    flags = Flags(
        width=32,
        layers=1,
        heads=2,
        vocab_size=64,
        batches=(1, 2),
        new_tokens=4,
        train_batch=2,
        train_length=8,
        rounds=1,
    )
    results = run(flags)
    assert [row["batch"] for row in results["decode"]] == [1, 2]
    for row in (*results["decode"], *results["train step"]):
        assert np.isfinite(row["flaxtron tok/s"])  # too short to say more
        assert ("ratio" in row) == ("torch tok/s" in row)


def test_contestants_take_turns_and_the_first_round_does_not_count():
    calls = []
    figures = machine.alternate(
        {name: lambda name=name: float(len(calls.append(name) or calls)) for name in "ab"}, 2
    )
    assert "".join(calls) == "ababab"
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert machine.ratio(figures, "b", "a") == np.median([4 / 3, 6 / 5])


def test_the_pair_has_the_size_asked_for():
    _, model, params = peers.make_pair(peers.gptj_config(32, 2, 4, 64))
    assert model.config.rotary_dim == 8
    assert params["trunk"]["embed"]["embedding"].shape == (64, 32)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
