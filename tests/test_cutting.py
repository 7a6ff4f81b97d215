"""A pass taken apart at its stacks and put together again is the same pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo.layers import stack
from parallel.cutting import take_apart
from tests.zoo import assert_close, random_params, vector_jit

KEY = jax.random.key(1)
IDS = np.random.default_rng(0).integers(4, 67, (2, 8)).astype(np.int32)
BATCH = {"input_ids": IDS, "attention_mask": np.where(np.arange(8) < [[8], [5]], 1, 0)}
GPTJ = modelzoo.GPTJForCausalLM(
    modelzoo.get_config("tiny-gptj", vocab_size=67, n_layer=4, resid_pdrop=0.1, embd_pdrop=0.1)
)
MVP = modelzoo.MvpForConditionalGeneration(
    modelzoo.get_config("tiny-mvp", vocab_size=67, use_prompt=True, dropout=0.1)
)


def forward_of(model):
    def forward(params, batch, rng):
        out = model.apply({"params": params}, **batch, deterministic=False, rngs={"dropout": rng})
        return jnp.mean(jnp.square(out.logits)), {"sum": out.logits.sum()}

    return forward


@pytest.mark.parametrize("model", [GPTJ, MVP], ids=["one stack", "two stacks"])
def test_joints_and_stacks_are_the_pass(model):
    """The stacks are run in two halves, so that dropout must know the layers' numbers."""
    params, forward = random_params(model, scale=0.1), forward_of(model)
    pieces = take_apart(forward, params, BATCH, KEY)

    @vector_jit
    def by_pieces(params):
        rest, before = pieces.without_layers(params), None
        for i, (cut, layers) in enumerate(zip(pieces.cuts, pieces.layers(params), strict=True)):
            carried, others = cut.split(pieces.joint(i, rest, BATCH, KEY, before))
            half = cut.num_layers // 2
            for first in (0, half):
                some = jax.tree.map(
                    functools.partial(jax.lax.slice_in_dim, start_index=first, limit_index=first + half),
                    layers,
                )
                carried = cut.run(some, carried, others, jnp.int32(first))
            before = carried[0]
        return pieces.joint(len(pieces.cuts), rest, BATCH, KEY, before)

    assert_close(by_pieces(params), vector_jit(forward)(params, BATCH, KEY), 1e-5)


def test_parameters_are_parted_and_joined():
    params = random_params(MVP)
    pieces = take_apart(forward_of(MVP), params, BATCH, KEY)
    rest, layers = pieces.without_layers(params), pieces.layers(params)
    assert rest["trunk"]["encoder"]["layers"] is None
    assert params["trunk"]["encoder"]["layers"] is layers[0]  # the caller's tree is left as it was
    jax.tree.map(np.testing.assert_array_equal, pieces.join(rest, layers), params)


def test_what_travels_with_the_activations_is_what_takes_a_gradient():
    encoder, decoder = take_apart(forward_of(MVP), random_params(MVP), BATCH, KEY).cuts
    assert encoder.path[-2:] == ("encoder", "layers")
    assert decoder.path[-2:] == ("decoder", "layers")
    # activations and prompts; in the decoder also the encoder's states and the prompts of cross-attention
    assert (sum(encoder.carried), sum(decoder.carried)) == (2, 4)
    (trunk,) = take_apart(forward_of(GPTJ), random_params(GPTJ), BATCH, KEY).cuts
    assert sum(trunk.carried) == 1
    assert len(trunk.carried) > 3  # bias, sine, cosine, key: every stage makes its own


def test_a_model_without_a_stack_is_refused():
    with pytest.raises(ValueError, match="has none"):
        take_apart(lambda params, piece, rng: (params["w"].sum(), {}), {"w": jnp.ones(3)}, {}, KEY)


def test_a_stack_that_reads_one_before_the_last_is_refused():
    block = modelzoo.GPTJModel(GPTJ.config).block()
    layers = random_params(GPTJ)["trunk"]["layers"]

    def forward(params, piece, rng):
        run = stack.run
        one, _, _ = run(block, params["a"]["layers"], piece["x"], shared={}, per_layer={})
        two, _, _ = run(block, params["b"]["layers"], one, shared={}, per_layer={})
        three, _, _ = run(block, params["c"]["layers"], one + two, shared={}, per_layer={})
        return three.sum(), {}

    params = {name: {"layers": jax.tree.map(jnp.array, layers)} for name in "abc"}
    with pytest.raises(ValueError, match="stack c/layers reads a stack that is not the one before it"):
        take_apart(forward, params, {"x": jnp.ones((1, 3, 64))}, KEY)
