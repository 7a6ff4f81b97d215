"""inference/planning.py: the page's arithmetic held to compiled programs, here by the CPU's compiler."""

import functools

import jax
import pytest

import modelzoo
from inference.planning import Planner
from parallel import topology as places
from parallel.chips import CHIPS, Topology, parse_topology

FOUR = Topology(CHIPS["v5e"], (2, 2))
MODEL = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", n_positions=32))


@functools.cache
def planned(quantize):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "why_not_compiled", lambda topology: "")
        patch.setattr(places, "tpu_devices", lambda topology: jax.devices()[:4])
        planner = Planner(MODEL, dtype="float32", rows=4, prompt=16, new=16, quantize=quantize)
        return planner.plan(FOUR, "data=2,tensor=2")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_parameters_and_cache_are_those_of_the_compiled_step(quantize):
    plan = planned(quantize)
    compiled = plan.compiled
    assert compiled is not None
    # The step has no use for nothing of the model; the cache also has a mask and an index.
    assert compiled.arguments["parameters"] == pytest.approx(plan.memory["parameters"], rel=0.01)
    assert compiled.arguments["cache"] == pytest.approx(plan.memory["cache"], rel=0.01)
    assert compiled.flops == pytest.approx(plan.forecast.hardware_flops, rel=0.05)


def test_the_page_says_what_is_planned():
    plan = planned("int8")
    assert "parameters in float32, kernels in int8: 4 rows, 16 tokens of prompt, 32 slots" in plan.title
    assert plan.layout == "data=2,tensor=2"
    assert {name for name, _ in plan.figures} >= {"prefill, predicted", "cache"}


@pytest.mark.parametrize(
    ("topology", "rows", "mesh"),
    [
        ("v5p:2x2x2", 1, {"tensor": 8}),
        ("v5e:4x8", 1, {"tensor": 16, "data": 2}),
        ("v5e:4x8", 4, {"tensor": 16, "data": 2}),
    ],
)
def test_heads_take_all_chips_that_they_divide_over(topology, rows, mesh):
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("gpt-j-6b"))
    plan = Planner(model, rows=rows).plan(parse_topology(topology), compile=False)
    assert {axis: size for axis, size in plan.forecast.mesh.items() if size > 1} == mesh


def test_what_does_not_generate_is_refused():
    with pytest.raises(ValueError, match="is no causal language model"):
        Planner(modelzoo.RobertaForMaskedLM(modelzoo.get_config("tiny-roberta")))
    with pytest.raises(ValueError, match="past the model's 32 positions"):
        Planner(MODEL, prompt=20, new=20)


def test_rows_are_filled_up_to_what_the_mesh_divides():
    plan = Planner(MODEL, prompt=8, new=8, rows=3).plan(FOUR, "data=2,tensor=2", compile=False)
    assert ": 4 rows" in plan.title
