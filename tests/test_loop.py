"""The compiled loop: how often it compiles, and that it updates its cache in place."""

import re
from typing import Any

import jax
import numpy as np
import pytest

import inference
import modelzoo
import parallel
from inference import GenerationConfig, decode, loop
from tests.fake_lm import FakeLM, expected


def run_fake(ids, **fields: Any):
    return inference.generate(FakeLM(), {}, ids, config=GenerationConfig(**fields))


def test_new_lengths_do_not_compile_again():
    run_fake([[1, 2, 3]], max_new_tokens=4)
    programs: Any = (loop.begin, loop.proceed_program())
    before = [program._cache_size() for program in programs]
    for length, num_new in ((1, 4), (7, 9), (16, 16), (12, 2)):
        prompt = list(range(1, length + 1))
        out = run_fake([prompt], max_new_tokens=num_new)
        assert out.sequences.tolist() == [prompt + expected(prompt, num_new)]
    assert [program._cache_size() for program in programs] == before


def test_beams_of_new_lengths_do_not_compile_again():
    def run(prompt, num_new):
        return run_fake([prompt], max_new_tokens=num_new, num_beams=2).sequences.tolist()

    run([1, 2, 3], 4)
    programs: Any = (loop.begin, loop.proceed_program())
    before = [program._cache_size() for program in programs]
    for length, num_new in ((1, 4), (12, 9), (16, 2)):
        prompt = list(range(1, length + 1))
        assert run(prompt, num_new) == [prompt + expected(prompt, num_new)]
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize("num_rows", [1, 2])
def test_the_loop_updates_its_cache_in_place(num_rows, monkeypatch):
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=97))
    params = parallel.init_params(model, jax.random.key(7))
    texts = []

    def compile_only(**arguments):
        texts.append(program.lower(**arguments).compile().as_text())
        return program(**arguments)

    program: Any = loop.proceed_program()
    monkeypatch.setattr(loop, "proceed_program", lambda: compile_only)
    ids = np.ones((num_rows, 4), int)
    inference.generate(model, params, ids, config=GenerationConfig(max_new_tokens=40, min_new_tokens=1))
    # [.., heads 4, slots 64, 16]: nothing of the cache's shape may be copied.
    assert re.search(r"\[(\d,)?4,64,16\]\S* dynamic-update-slice\(", texts[0])
    assert not re.search(r"\[(\d,)?4,64,16\]\S* copy\(", texts[0])


@pytest.mark.parametrize("fields", [dict(), dict(num_beams=2), dict(do_sample=True)], ids=str)
def test_a_cache_that_grows_gives_the_same_tokens(fields, monkeypatch):
    monkeypatch.setattr(decode, "FIRST_SLOTS", 16)
    out = run_fake([[5, 6, 7], [1, 2, 3]], max_new_tokens=100, **fields)
    monkeypatch.setattr(decode, "FIRST_SLOTS", 128)
    whole = run_fake([[5, 6, 7], [1, 2, 3]], max_new_tokens=100, **fields)
    np.testing.assert_array_equal(out.sequences, whole.sequences)
    if not fields:
        assert out.sequences[0, 3:].tolist() == expected([5, 6, 7], 100)
