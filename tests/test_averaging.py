"""The moving average of parameters: its numbers, and that it holds what trains alone."""

import jax
import jax.numpy as jnp
import numpy as np

import modelzoo
from tests.zoo import assert_close, assert_equal, random_params, tiny_gptj
from train import averaging
from train.trained import Trained

MODEL = modelzoo.GPTJForCausalLM(tiny_gptj(n_layer=1))


class HeadOnly(modelzoo.GPTJForCausalLM):
    def is_frozen(self, path):
        return path[0] != "lm_head"


def test_numbers():
    mean, values = {"w": jnp.float32(1.0)}, [2.0, 4.0, 8.0, 16.0]
    want = 1.0
    for step, value in enumerate(values):
        mean = averaging.after_step(mean, {"w": jnp.float32(value)}, jnp.int32(step), 0.25)
        keep = min(0.25, (1 + step) / (10 + step))
        want = keep * want + (1 - keep) * value
        np.testing.assert_allclose(mean["w"], want, rtol=1e-6)
    late = averaging.after_step(mean, {"w": jnp.float32(0.0)}, jnp.int32(10**6), 0.999)
    np.testing.assert_allclose(late["w"], 0.999 * mean["w"], rtol=1e-6)


def test_what_is_frozen_has_no_average():
    model = HeadOnly(tiny_gptj(n_layer=1))
    params, later = random_params(model), random_params(model, 1)
    mean = averaging.new_average(Trained(model), params)
    assert len(jax.tree.leaves(mean)) == len(jax.tree.leaves(params["lm_head"]))
    mean = averaging.after_step(mean, later, jnp.int32(0), 0.999)
    whole = averaging.averaged(later, mean)
    assert_equal(whole["trunk"], later["trunk"])
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, params["lm_head"], later["lm_head"])
    assert_close(whole["lm_head"], expected, 1e-6)
    assert averaging.averaged(params, None) is params


def test_it_is_float32_and_a_copy():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), random_params(MODEL))
    mean = averaging.new_average(Trained(MODEL), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(mean)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(averaging.averaged(params, mean))} == {
        jnp.dtype(jnp.bfloat16)
    }
