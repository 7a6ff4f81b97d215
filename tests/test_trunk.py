"""A trunk's run: what it hands to every layer and what it makes of their results, with a block made up here."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo.layers import stack
from modelzoo.layers.attention import Attention
from modelzoo.layers.cache import begin
from modelzoo.layers.masks import causal_bias
from modelzoo.trunk import Block, Trunk
from tests.zoo import assert_close, random_params, tiny_gptj

D, N, H, L = 24, 3, 8, 2


class CrossBlock(Block):
    """Self-attention, then cross-attention where there is something to attend to."""

    @nn.compact
    def __call__(
        self,
        x_BTD,
        *,
        bias=None,
        source=None,
        cache=None,
        cache_index=None,
        cross_cache=None,
        head_mask=None,
        cross_head_mask=None,
        output_attentions=False,
        deterministic=True,
    ) -> Any:
        attend = Attention(D, N, H, name="attention", **self.projections)
        y, probs, written = attend(
            x_BTD, bias=bias, cache=cache, cache_index=cache_index, head_mask=head_mask
        )
        x_BTD, crossed, cross_probs = x_BTD + y, None, None
        if source is not None or cross_cache is not None or self.is_initializing():
            source = x_BTD if self.is_initializing() else source
            cross = Attention(D, N, H, name="cross_attention", **self.projections)
            y, cross_probs, crossed = cross(
                x_BTD, source_BSD=source, projected=cross_cache, head_mask=cross_head_mask
            )
            x_BTD = x_BTD + y
        shown = (probs, cross_probs) if output_attentions else (None, None)
        return x_BTD, stack.LayerOutput(written, shown[0], crossed if cache is not None else None, shown[1])


class CrossTrunk(Trunk):
    block_class = CrossBlock

    def setup(self) -> None:
        self.layers = stack.parameters(self, "layers", self.block(), L, D)

    def __call__(self, x, source=None, cache=None, **options):
        slots, mask, num_keys, cache = begin(cache, None, x.shape[1])
        shared = dict(bias=causal_bias(mask, slots, num_keys), source=source)
        return self.run(x, shared, cache, **options)


CONFIG = tiny_gptj()
MODEL = CrossTrunk(CONFIG)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, D)), jnp.float32)
SOURCE = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, D)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    shapes = nn.meta.unbox(jax.eval_shape(lambda: MODEL.init(jax.random.key(0), X)["params"]))
    random = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)


def apply(params, *args, model=MODEL, **options):
    rngs = options.pop("rngs", None)
    return model.apply({"params": params}, *args, rngs=rngs, **options)


def test_states_and_attentions_are_one_more_and_one_a_layer(params):
    out = apply(params, X, SOURCE, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == L + 1
    np.testing.assert_array_equal(out.hidden_states[0], X)
    np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)  # there is no final norm
    assert [a.shape for a in out.attentions] == [(2, N, 5, 5)] * L
    assert [a.shape for a in out.cross_attentions] == [(2, N, 5, 7)] * L
    assert out.cache is None
    assert apply(params, X, SOURCE).cross_attentions is None


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_a_cache_keeps_what_the_encoder_said(params, form):
    """Three tokens with the source, then two without it, give the rows of five at once."""
    whole = apply(params, X, SOURCE)
    cache = MODEL.init_cache(2, 8)
    if form == "unstacked":
        params, cache = modelzoo.unstack_layers(params), modelzoo.unstack_layers(cache)
    assert cache.cross is None
    first = apply(params, X[:, :3], SOURCE, cache)
    assert isinstance(first.cache.cross, tuple) == (form == "unstacked")
    second = apply(params, X[:, 3:], None, first.cache)
    got = jnp.concatenate([first.last_hidden_state, second.last_hidden_state], axis=1)
    assert_close(got, whole.last_hidden_state, 2e-6)
    jax.tree.map(np.testing.assert_array_equal, second.cache.cross, first.cache.cross)
    assert int(second.cache.index) == 5


def test_a_filled_cache_changes_its_form_whole(params):
    cache = apply(params, X, SOURCE, MODEL.init_cache(2, 8)).cache
    apart = modelzoo.unstack_layers(cache)
    assert len(apart.layers) == len(apart.cross) == L
    jax.tree.map(np.testing.assert_array_equal, modelzoo.stack_layers(apart), cache)


def test_head_masks_of_self_and_cross_attention(params):
    none = jnp.zeros((L, N))
    out = apply(params, X, SOURCE, cross_head_mask=none, output_attentions=True)
    assert all((probs == 0).all() for probs in out.cross_attentions)
    assert all((probs.sum(-1) > 0.99).all() for probs in out.attentions)
    out = apply(params, X, SOURCE, head_mask=none[0], output_attentions=True)
    assert all((probs == 0).all() for probs in out.attentions)


def test_layer_drop_skips_whole_layers(params):
    model = MODEL.clone(layer_drop=0.5)
    states = set()
    for seed in range(12):
        out = apply(
            params, X, model=model, deterministic=False, output_hidden_states=True,
            rngs={"dropout": jax.random.key(seed)},
        )  # fmt: skip
        states.add(tuple(bool((a == b).all()) for a, b in itertools.pairwise(out.hidden_states)))
    assert states == {(a, b) for a in (True, False) for b in (True, False)}
    kept = apply(params, X, model=model, output_hidden_states=True).hidden_states  # deterministic: none is
    assert not any((a == b).all() for a, b in itertools.pairwise(kept))


def test_the_table_that_a_head_may_be_tied_to():
    model = modelzoo.GPTJModel(CONFIG)
    params = random_params(model)
    table = model.apply({"params": params}, method="embedding_table")
    np.testing.assert_array_equal(table, params["embed"]["embedding"])


def test_a_block_takes_its_trunks_dtypes():
    block = CrossTrunk(CONFIG, jnp.bfloat16, jnp.float16).block()
    assert (block.dtype, block.param_dtype, block.config) == (jnp.bfloat16, jnp.float16, CONFIG)
    assert block.dtypes == dict(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    kernel = block.projections["kernel_init"](jax.random.key(0), (200, 50), jnp.float32)
    assert abs(float(kernel.std()) - CONFIG.initializer_range) < 1e-3
