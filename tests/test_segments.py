"""Rows of packed documents: in every family each document gives what it gives alone, under every kind of mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import modelzoo
import parallel
import train
from modelzoo.layers.position import count_in_segments, segment_positions
from tests.zoo import assert_close, assert_close_relative, quick_jit, random_params, tiny_gptj, tiny_mvp

SEGMENTS = np.array([[1] * 6 + [2] * 6 + [0] * 2, [1] * 2 + [2] * 6 + [3] * 6])
PLACES = [(0, 0), (0, 6), (1, 2), (1, 8)]
"""Where documents of six tokens stand: (row, first token)."""
IDS = np.random.default_rng(0).integers(3, 30, SEGMENTS.shape)

SIZES = dict(vocab_size=37, hidden_size=24)
BERT = dict(num_hidden_layers=2, num_attention_heads=3, intermediate_size=31, max_position_embeddings=32)
BERT |= dict(SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
MODELS = {
    "gptj": modelzoo.GPTJForCausalLM(tiny_gptj()),
    "bloom": modelzoo.BloomForCausalLM(modelzoo.BloomConfig(**SIZES, n_layer=2, n_head=3)),
    "roberta": modelzoo.RobertaForMaskedLM(modelzoo.RobertaConfig(**BERT, pad_token_id=1)),
    "megatron_bert": modelzoo.MegatronBertForCausalLM(
        modelzoo.MegatronBertConfig(**BERT, is_decoder=True, position_embedding_type="relative_key")
    ),
    "mvp_decoder": modelzoo.MvpForCausalLM(tiny_mvp()),
    "mvp": modelzoo.MvpForConditionalGeneration(tiny_mvp()),
}


def alone(array):
    """[4, 6] of [2, 14]: each document of six tokens in a row of its own."""
    return jnp.stack([array[row, first : first + 6] for row, first in PLACES])


QUICK = ("gptj", "bloom")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_document_is_the_document_alone(name):
    model = MODELS[name]
    params = random_params(model)
    inputs, segments = {"input_ids": IDS}, {"segment_ids": SEGMENTS}
    if name == "mvp":
        inputs |= {"decoder_input_ids": IDS + 3}
        segments |= {"decoder_segment_ids": SEGMENTS}
    weight = np.random.default_rng(1).normal(size=(4, 6, 37)).astype(np.float32) / 40

    def packed(params):
        logits = alone(model.apply({"params": params}, **inputs, **segments).logits)
        return jnp.sum(logits * weight), logits

    def single(params):
        logits = model.apply(
            {"params": params}, **{key: alone(value) for key, value in inputs.items()}
        ).logits
        return jnp.sum(logits * weight), logits

    found, expected = (quick_jit(jax.grad(each, has_aux=True))(params) for each in (packed, single))
    assert_close(found[1], expected[1], 2e-6)
    rounding = jax.tree.map(
        lambda gradient: jnp.abs(gradient).max() < 1e-6, expected[0]
    )  # as of a key's bias
    gradients = (
        jax.tree.map(lambda none, g: jnp.where(none, 0.0, g), rounding, tree)
        for tree in (found[0], expected[0])
    )
    assert_close_relative(*gradients, 1e-5)


def step_on(**mesh):
    """The loss and the new parameters of one step on packed rows."""
    model = modelzoo.GPTJForCausalLM(tiny_gptj(n_head=4, vocab_size=40))
    ids = np.tile(np.concatenate([IDS, IDS[:, :2]], axis=1), (2, 1)).astype(np.int32)
    segments = np.concatenate([SEGMENTS, np.full((2, 2), 4)], axis=1)
    segments = np.concatenate([segments, segments[:, ::-1]]).astype(np.int32)
    batch = {"input_ids": ids, "labels": np.where(segments > 0, ids, -100), "segment_ids": segments}
    rules = None
    if mesh:
        count = int(np.prod(list(mesh.values())))
        rules = parallel.make_rules(parallel.make_mesh(**mesh, devices=jax.devices()[:count]))
    optimizer = optax.sgd(1.0)
    state = train.init_state(model, optimizer, rules=rules, rng=jax.random.key(0))
    state, metrics = train.make_train_step(model, optimizer, rules=rules)(state, batch)
    return metrics["loss"], jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def on_one_device():
    return step_on()


@pytest.mark.long
@pytest.mark.parametrize("mesh", [dict(context=2), dict(stage=2, context=2, data=2)], ids=str)
def test_a_mesh_packs_as_one_device_does(mesh, on_one_device):
    loss, params = step_on(**mesh)

    assert float(loss) == pytest.approx(float(on_one_device[0]), rel=1e-6)
    assert_close(params, on_one_device[1], 2e-6)


def test_places_start_anew():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 3]])
    real = jnp.array([[1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 1]])

    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]
    assert count_in_segments(real, segments).tolist() == [[1, 1, 2, 1, 2, 0], [0, 0, 1, 2, 2, 1]]
    assert count_in_segments(real, None).tolist() == [[1, 1, 2, 3, 4, 4], [0, 0, 1, 2, 2, 3]]


def test_segments_that_do_not_fit_are_named():
    ids = jnp.zeros((2, 4), jnp.int32)

    def call(name, **inputs):
        model = MODELS[name]
        cache = {"cache": model.init_cache(2, 4)} if inputs.pop("cached", False) else {}
        params = modelzoo.abstract_params(model)
        jax.eval_shape(
            lambda params: model.apply({"params": params}, input_ids=ids, **inputs, **cache), params
        )

    with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 3\): it is \[batch, 4\]"):
        call("gptj", segment_ids=ids[:, :3])
    with pytest.raises(ValueError, match="segment_ids are for rows of packed documents"):
        call("gptj", segment_ids=ids, cached=True)
    with pytest.raises(ValueError, match="pass decoder_input_ids with segment_ids"):
        call("mvp", segment_ids=ids)
    with pytest.raises(ValueError, match="go together: pass both or none"):
        call("mvp", segment_ids=ids, decoder_input_ids=ids)
