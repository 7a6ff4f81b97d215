import statistics

import jax.numpy as jnp
import pytest

import modelzoo
import parallel
from benchmarks.plans import Decoding, errors
from inference.decode_cost import DecodeCost, Request
from parallel import topology as places
from parallel.chips import parse_topology


def cost(preset="bloom-176b", topology="v5p:2x2x2", sizes=None, **request):
    model = modelzoo.get_model_class("BloomForCausalLM" if "bloom" in preset else "GPTJForCausalLM")
    chips = parse_topology(topology)
    rules = parallel.make_rules(places.abstract_mesh(chips, sizes or {"tensor": chips.size})).for_decoding()
    given = dict(rows=1, prompt=1024, slots=2048) | request
    return DecodeCost(model(modelzoo.get_config(preset), jnp.bfloat16), rules, Request(**given), chips)


def test_memory_is_close_to_the_compiler():
    found = {name: error for name, error, _ in errors(Decoding)}
    assert len(found) >= 3
    assert statistics.median(map(abs, found.values())) <= 0.05, found
    assert max(map(abs, found.values())) <= 0.15, found
    assert min(found.values()) >= -0.05, found


def test_parameters_and_cache_by_shards():
    memory = cost().memory()
    assert memory["parameters"] == pytest.approx(2 * 176.25e9 / 8, rel=1e-3)
    assert memory["cache"] == 2 * 70 * 2048 * 14336 * 2 / 8


def test_int8_is_half():
    assert cost(quantize="int8").memory()["parameters"] == pytest.approx(176.25e9 / 8, rel=2e-3)
    assert cost(cache_width=1).memory()["cache"] == pytest.approx(cost().memory()["cache"] / 2, rel=0.04)


def test_one_row_reads_every_weight_at_the_memorys_bandwidth():
    step = cost("gpt-j-6b", "v5e:1x1").step()
    read = 2 * (6.05e9 - 50400 * 4096) + 2 * 28 * 2048 * 4096 * 2
    assert step.seconds == pytest.approx(read / 819e9, rel=0.01)
    assert "bandwidth" in step.limit()


def test_rows_share_the_weights():
    one, many = cost().step(), cost(rows=64).step()
    assert many.tokens_per_second > 10 * one.tokens_per_second
    assert many.seconds > one.seconds


def test_a_prefill_is_limited_by_compute():
    assert "matrix units" in cost(rows=8).prefill().limit()
