"""The attention of a mesh that splits the sequence: which way it goes, what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from modelzoo.layers.attention import AttentionCall, attend
from parallel.context import make_attend
from tests.zoo import quick_jit, tiny_gptj

IDS = jnp.arange(16).reshape(2, 8) % 7


def make_rules(**variants):
    return parallel.make_rules(parallel.make_mesh(context=2, devices=jax.devices()[:2]), **variants)


def test_a_mesh_that_does_not_split_the_sequence_attends_as_ever():
    assert make_attend(parallel.make_mesh(tensor=8), ("context",), "ring") is attend


@pytest.mark.parametrize(("kind", "moves"), [("ring", "collective-permute"), ("all-gather", "all-gather")])
def test_either_kind_is_the_model(kind, moves):
    """Logits and attentions, by the collective that the kind is named for."""
    model: Any = modelzoo.GPTJForCausalLM(tiny_gptj(n_layer=1))
    params = parallel.init_params(model, jax.random.key(0))

    def run(params):
        return model.apply({"params": params}, IDS, output_attentions=True)

    expected, rules = quick_jit(run)(params), make_rules(context_attention=kind)
    with parallel.use(rules):
        found = quick_jit(run)(params)
        text = quick_jit(lambda p: model.apply({"params": p}, IDS).logits).lower(params).compile().as_text()
    np.testing.assert_allclose(found.logits, expected.logits, atol=2e-6)
    np.testing.assert_allclose(found.attentions[0], expected.attentions[0], atol=2e-6)
    assert text is not None
    assert moves in text
    assert kind != "ring" or "all-gather" not in text  # nobody asked for probabilities


def test_prompts_are_gathered():
    """Keys and values before all others; two numbers decide where a query looks."""
    q = k = jnp.ones((1, 1, 4, 2))
    v, prefix = jnp.zeros((1, 1, 4, 2)), (jnp.ones((1, 2, 2)), jnp.ones((1, 2, 2)))
    call = AttentionCall(q, k, v, prefix=prefix)
    with parallel.use(make_rules()):
        y, _ = quick_jit(lambda: make_attend(make_rules().mesh, ("context",), "ring")(call))()
    np.testing.assert_allclose(y, np.full((1, 1, 4, 2), 2 / 6), atol=1e-6)


def test_no_cache():
    model: Any = modelzoo.GPTJForCausalLM(tiny_gptj(n_layer=1))
    params, cache = parallel.init_params(model, jax.random.key(0)), model.init_cache(2, 8)
    with (
        parallel.use(make_rules()),
        pytest.raises(ValueError, match=r"context=2 splits the sequence, and a decoder's cache .* context=1"),
    ):
        jax.eval_shape(lambda p: model.apply({"params": p}, IDS, cache=cache), params)


def test_a_length_that_the_mesh_does_not_divide():
    model: Any = modelzoo.GPTJForCausalLM(tiny_gptj(n_layer=1))
    params = parallel.init_params(model, jax.random.key(0))
    with (
        parallel.use(make_rules()),
        pytest.raises(
            ValueError,
            match=r"a sequence of 7 tokens .* 2 shards of mesh context=2: .* 1 of them; or pad the sequence to 8",
        ),
    ):
        jax.eval_shape(lambda p: model.apply({"params": p}, IDS[:, :7]), params)
