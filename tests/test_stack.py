"""Stacks of blocks: scanned, unrolled and unstacked do the same, in order, with each layer's own inputs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from modelzoo.layers import stack
from modelzoo.layers.linear import Linear, dropout_layer
from modelzoo.layers.stack import LayerOutput, stack_layers, unstack_layers
from tests.zoo import assert_close, max_difference

L, B, T, D = 4, 2, 3, 5


class Block(nn.Module):
    """y = 0.5 x + tanh(x · kernel) · gain + shift, dropped; the "cache" counts its calls, "attentions" are the gain."""

    dtype: Any = jnp.float32
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, *, shift=None, gain=None, cache=None, deterministic=True, show=False):
        init = nn.initializers.normal(1.0)
        y = jnp.tanh(Linear((D,), (D,), ("embed", "mlp"), False, init, self.dtype, name="fc")(x))
        y = dropout_layer(self.rate)(y, deterministic=deterministic)
        y = 0.5 * x + (y if gain is None else y * gain) + (0.0 if shift is None else shift)
        return y, LayerOutput(None if cache is None else cache + 1, gain if show else None)


class Trunk(nn.Module):
    block: Any = Block(parent=None)

    def setup(self):
        self.layers = stack.parameters(self, "layers", self.block, L, D)

    def __call__(self, x):
        return self.layers


def make_layers(seed=0):
    kernel = np.random.default_rng(seed).normal(size=(L, D, D)).astype(np.float32)
    return {"fc": {"kernel": jnp.asarray(kernel)}}


X = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), jnp.float32)
GAIN = jnp.asarray(np.random.default_rng(2).normal(size=(L, B, T, D)), jnp.float32)
SHIFT = jnp.asarray(np.random.default_rng(3).normal(size=D), jnp.float32)
FORMS = {
    "scanned": (make_layers(), dict(scan=True)),
    "unrolled": (make_layers(), dict(scan=False)),
    "unstacked": (stack.unstack_layers({"layers": make_layers()})["layers"], dict(scan=True)),
}


def run(layers, shared=None, per_layer=None, block=None, **kwargs):
    block = block or Block(parent=None)
    return stack.run(block, layers, X, shared=shared or {}, per_layer=per_layer or {}, **kwargs)


def by_hand():
    x, inputs = np.asarray(X, np.float64), []
    for kernel, gain in zip(make_layers()["fc"]["kernel"], GAIN, strict=True):
        inputs.append(x)
        x = 0.5 * x + np.tanh(x @ np.asarray(kernel, np.float64)) * np.asarray(gain) + np.asarray(SHIFT)
    return x, inputs


@pytest.mark.parametrize(("layers", "how"), FORMS.values(), ids=FORMS)
def test_layers_run_in_order_with_their_own_inputs(layers, how):
    x, hidden_states, output = run(
        layers, dict(shift=SHIFT), dict(gain=GAIN, cache=None), output_hidden_states=True, show=True, **how
    )
    expected, inputs = by_hand()
    np.testing.assert_allclose(x, expected, atol=1e-5)
    assert isinstance(hidden_states, tuple)
    assert len(hidden_states) == L  # each layer's input; the caller adds the last output
    for state, want in zip(hidden_states, inputs, strict=True):
        np.testing.assert_allclose(state, want, atol=1e-5)
    assert isinstance(output.attentions, tuple)
    np.testing.assert_array_equal(jnp.stack(output.attentions), GAIN)
    assert output.cache is None


@pytest.mark.parametrize(("layers", "how"), FORMS.values(), ids=FORMS)
def test_nothing_is_returned_that_was_not_asked_for(layers, how):
    _, hidden_states, output = run(layers, **how)
    assert (hidden_states, output) == (None, LayerOutput())


@pytest.mark.parametrize(("layers", "how"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_a_cache_comes_back_in_the_form_it_came_in(layers, how, form):
    numbers = jnp.arange(10, 10 + L)
    cache = numbers if form == "stacked" else tuple(numbers)
    cache = run(layers, per_layer=dict(cache=cache), **how)[2].cache
    assert isinstance(cache, tuple) == (form == "unstacked")
    assert [int(number) for number in cache] == [11, 12, 13, 14]


@pytest.mark.parametrize("remat", ["none", *stack.REMAT_POLICIES])
@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_no_number(remat, scan):
    def loss(layers, x, **how):
        block = Block(parent=None, rate=0.3)
        rng = jax.random.key(7)
        y, _, _ = stack.run(
            block,
            layers,
            x,
            shared={},
            per_layer=dict(gain=GAIN),
            dropout_rng=rng,
            deterministic=False,
            **how,
        )
        return jnp.sum(y**2)

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    expected = jax.jit(lambda p, x: grad(p, x))(make_layers(), X)
    got = jax.jit(lambda p, x: grad(p, x, remat=remat, scan=scan))(make_layers(), X)
    assert_close(got, expected, 2e-4)  # of a loss of some hundreds


def test_remat_recomputes():
    """The policies do what they are called: how many times a block's product runs in forward and backward."""

    def products(remat):
        def loss(layers):
            return jnp.sum(run(layers, remat=remat, scan=False)[0])

        return count_products(jax.make_jaxpr(jax.grad(loss))(make_layers()).jaxpr)

    def count_products(jaxpr):
        inner = sum(count_products(sub) for e in jaxpr.eqns for sub in jaxprs_in_params(e.params))
        return inner + sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)

    backward = 2 * L  # by the kernel and by x, whose own gradient is dropped in the first layer
    assert products("none") in (L + backward, L + backward - 1)
    assert products("dots") == products("none")
    assert products("full") > products("dots")


def test_an_unknown_policy_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown remat policy 'ful': choose from \['none', 'full', 'dots'\]"
    ):
        run(make_layers(), remat="ful")


def test_dropout_differs_by_layer_and_not_by_schedule():
    block = Block(parent=None, rate=0.5)
    ones = dict(fc=dict(kernel=jnp.full((L, D, D), 3.0)))

    def mask(layers, seed=0, **how: Any):
        states: Any = run(
            layers,
            block=block,
            dropout_rng=jax.random.key(seed),
            deterministic=False,
            output_hidden_states=True,
            **how,
        )[1]
        steps = [np.asarray(after - 0.5 * before) for before, after in zip(states, states[1:], strict=False)]
        return np.stack([step != 0 for step in steps])

    scanned = mask(ones)
    assert 0.3 < scanned.mean() < 0.7
    assert all((a != b).any() for a, b in zip(scanned, scanned[1:], strict=False))
    hows: list[dict[str, Any]] = [dict(scan=False), dict(remat="full"), dict(scan=False, remat="dots")]
    for how in hows:
        np.testing.assert_array_equal(mask(ones, **how), scanned)
    np.testing.assert_array_equal(mask(unstack_layers({"layers": ones})["layers"]), scanned)
    assert (mask(ones, seed=1) != scanned).any()


def test_parameters_are_stacked_and_each_layer_is_its_own():
    trunk: Any = Trunk()
    params = trunk.init(jax.random.key(0), X)["params"]
    assert params["layers"]["fc"]["kernel"].names == ("layers", "embed", "mlp")
    kernel = params["layers"]["fc"]["kernel"].value
    assert kernel.shape == (L, D, D)
    assert all(float(jnp.abs(a - b).max()) > 0.1 for a, b in zip(kernel, kernel[1:], strict=False))
    again = trunk.apply({"params": nn.meta.unbox(params)}, X)
    np.testing.assert_array_equal(again["fc"]["kernel"], kernel)


def test_parameters_of_a_bfloat16_block():
    """The block is traced with an input of its own dtype; under strict promotion no other would do."""

    class Adds(Block):
        @nn.compact
        def __call__(self, x):
            return x + Linear((D,), (D,), ("embed", "mlp"), dtype=self.dtype)(x), LayerOutput()

    made = jax.eval_shape(lambda: Trunk(Adds(jnp.bfloat16, parent=None)).init(jax.random.key(0), X))
    assert made["params"]["layers"]["Linear_0"]["kernel"].value.dtype == jnp.float32


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_another_number_of_layers_is_refused(form):
    layers = jax.tree.map(lambda a: a[:3], make_layers())
    tree = {"layers": layers} if form == "stacked" else unstack_layers({"layers": layers})
    with pytest.raises(ValueError, match="parameter layers holds 3 layers, but the config makes it 4"):
        Trunk().apply({"params": tree}, X)


def test_unstack_and_stack_are_inverse_at_any_depth():
    tree = {
        "trunk": {"layers": make_layers(), "norm": jnp.ones(D)},
        "encoder": {"layers": make_layers(1)},
        "head": X,
    }
    apart = unstack_layers(tree)
    assert isinstance(apart["trunk"]["layers"], tuple)
    assert len(apart["encoder"]["layers"]) == L
    np.testing.assert_array_equal(
        apart["trunk"]["layers"][2]["fc"]["kernel"], make_layers()["fc"]["kernel"][2]
    )
    assert apart["head"] is X
    assert jax.tree.structure(stack_layers(apart)) == jax.tree.structure(tree)
    assert max_difference(stack_layers(apart), tree) == 0
    assert jax.tree.structure(unstack_layers(apart)) == jax.tree.structure(apart)
    assert jax.tree.structure(stack_layers(tree)) == jax.tree.structure(tree)


def test_unstack_takes_boxes_off():
    apart = unstack_layers(Trunk().init(jax.random.key(0), X)["params"])
    assert isinstance(apart["layers"][0]["fc"]["kernel"], jax.Array)
