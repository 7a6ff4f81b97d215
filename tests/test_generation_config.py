"""GenerationConfig: transformers' defaults, and every bad value refused with its name."""

import dataclasses

import numpy as np
import pytest

from inference import GenerationConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("max_new_tokens", 2.5),
        ("min_new_tokens", -1),
        ("min_length", -1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", "0.9"),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("num_return_sequences", 0),
        ("num_return_sequences", 2),
        ("eos_token_id", -1),
        ("eos_token_id", (3, "a")),
        ("pad_token_id", -100),
    ],
)
def test_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^GenerationConfig.{field} = "):
        GenerationConfig(**{field: value})


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_matters_only_to_sampling(temperature):
    with pytest.raises(ValueError, match=r"^GenerationConfig\.temperature = "):
        GenerationConfig(do_sample=True, temperature=temperature)
    GenerationConfig(do_sample=False, temperature=temperature)


@pytest.mark.parametrize(
    ("field", "value"),
    [("guidance_scale", 1.5), ("max_time", 3.0), ("use_cache", False)],
)
def test_what_is_not_there_is_refused_not_ignored(field, value):
    with pytest.raises(ValueError, match=rf"^GenerationConfig\.{field} = .* does not support it"):
        GenerationConfig(**{field: value})


def test_lists_and_numpy_scalars_make_hashable_configs():
    config = GenerationConfig(
        eos_token_id=[1, 2],
        suppress_tokens=[5],
        max_new_tokens=np.int64(3),  # pyright: ignore[reportArgumentType]
    )
    assert config == GenerationConfig(eos_token_id=(1, 2), suppress_tokens=(5,), max_new_tokens=3)
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.eos_ids == (1, 2)


def test_fill_id_is_pad_then_first_eos():
    assert GenerationConfig(pad_token_id=7, eos_token_id=(1, 2)).fill_id == 7
    assert GenerationConfig(eos_token_id=(1, 2)).fill_id == 1
    assert GenerationConfig(pad_token_id=0, eos_token_id=4).fill_id == 0
    assert GenerationConfig().fill_id == 0


@pytest.mark.parametrize(
    ("fields", "at_least", "at_most"),
    [
        ({}, 0, 20),
        ({"max_new_tokens": 7}, 0, 7),
        ({"max_new_tokens": 7, "max_length": 12}, 0, 7),
        ({"max_length": 12}, 0, 2),
        ({"max_new_tokens": 7, "min_length": 14}, 4, 7),
        ({"max_new_tokens": 7, "min_new_tokens": 3}, 3, 7),
    ],
)
def test_length_fields_read_as_transformers_reads_them(fields, at_least, at_most):
    assert GenerationConfig(**fields).new_tokens(prompt_length=10, max_positions=64) == (at_least, at_most)


def test_default_length_shrinks_to_the_window():
    assert GenerationConfig().new_tokens(prompt_length=10, max_positions=16) == (0, 6)
    assert GenerationConfig().new_tokens(prompt_length=10, max_positions=None) == (0, 20)


def test_max_length_below_the_prompt_is_refused():
    with pytest.raises(ValueError, match="max_length = 8: the prompt alone has 10 tokens"):
        GenerationConfig(max_length=8).new_tokens(prompt_length=10, max_positions=64)


def test_ids_outside_the_vocabulary_are_refused():
    GenerationConfig(eos_token_id=(5, 9)).check_vocabulary(10)
    with pytest.raises(ValueError, match=r"eos_token_id = .* ids 0 to 8"):
        GenerationConfig(eos_token_id=(5, 9)).check_vocabulary(9)


def test_loop_key_forgets_lengths_and_what_greedy_does_not_read():
    one = GenerationConfig(max_new_tokens=5, temperature=0.5, top_k=3)
    two = GenerationConfig(max_length=99, top_p=0.5)
    assert one.loop_key() == two.loop_key()
    sampled = GenerationConfig(do_sample=True, temperature=0.5)
    assert sampled.loop_key() != GenerationConfig(do_sample=True, temperature=0.6).loop_key()
    assert (
        GenerationConfig(eos_token_id=1, min_length=3).loop_key()
        != GenerationConfig(eos_token_id=1).loop_key()
    )
