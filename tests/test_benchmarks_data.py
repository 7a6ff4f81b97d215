"""benchmarks/data.py at a tiny size."""

import re

import pytest

from benchmarks import data
from benchmarks.sides import Shape

TINY = Shape(vocab_size=300, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32)


@pytest.mark.long
def test_prints_shares(tmp_path):
    (tmp_path / "a.txt").write_text("some text, and more text\n" * 4000)
    sizes = dict(megabytes=1, vocab_size=270, rounds=1, steps=1, shape=TINY, batch=2, length=16)
    lines = list(data.run(data.Flags(text=str(tmp_path), **sizes)))

    assert re.fullmatch(r"tokenising 1 MB, \d+ documents: flaxtron [\d.]+ MB/s", lines[0])
    assert all(re.search(r"flaxtron / encode_batch\w* = [\d.]+$", line) for line in lines[1:3])
    assert all("ms of" in line and "M tok/s" in line for line in lines[3:])
    assert len(lines) == 5
