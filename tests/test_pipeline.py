"""Pipelines of every family and schedule against the same pass on one device, microbatch by microbatch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from parallel import pipeline
from tests.hlo import collectives, compile_anew
from tests.zoo import assert_close_relative, quick_jit, random_params
from train import losses

V, T = 67, 8
CAUSAL = dict(vocab_size=V, pad_token_id=3)
MODELS: dict[str, Any] = {
    "gptj": lambda: modelzoo.GPTJForCausalLM(
        modelzoo.get_config("tiny-gptj", **CAUSAL, n_layer=4, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    ),
    "bloom": lambda: modelzoo.BloomForCausalLM(modelzoo.get_config("tiny-bloom", **CAUSAL, n_layer=4)),
    "roberta": lambda: modelzoo.RobertaForMaskedLM(
        modelzoo.get_config("tiny-roberta", vocab_size=V, num_hidden_layers=4)
    ),
    "megatron_bert": lambda: modelzoo.MegatronBertForPreTraining(
        modelzoo.get_config("tiny-megatron-bert", vocab_size=V, num_hidden_layers=4)
    ),
    "mvp": lambda: modelzoo.MvpForConditionalGeneration(
        modelzoo.get_config("tiny-mvp", vocab_size=V, encoder_layers=4, decoder_layers=4, use_prompt=True)
    ),
}


def rules_of(**axes):
    count = int(np.prod(list(axes.values())))
    return parallel.make_rules(parallel.make_mesh(**axes, devices=jax.devices()[:count]))


def batch_of(microbatches, rows=4):
    random = np.random.default_rng(0)
    ids = random.integers(4, V, (microbatches, rows, T)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[:, 0, :3] = 0
    labels = np.where(random.random(ids.shape) < 0.3, -100, ids).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return batch | {"next_sentence_label": random.integers(0, 2, (microbatches, rows)).astype(np.int32)}


def forward_of(model, batch):
    """A pass of one microbatch, whose shares add up to the loss of the batch."""
    names = modelzoo.input_names(model)
    whole = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)
    counts = losses.label_counts(model, whole)

    def forward(params, piece, rng):
        inputs = {name: value for name, value in piece.items() if name in names}
        out = model.apply({"params": params}, **inputs, deterministic=False, rngs={"dropout": rng})
        found = losses.terms(model, out, piece)
        return losses.total(found, counts), {term.name: term.sum for term in found}

    return forward


KEY = jax.random.key(1)


@functools.cache
def reference(family, microbatches):
    model = MODELS[family]()
    params, batch = random_params(model, scale=0.1), batch_of(microbatches)
    forward = forward_of(model, batch)

    def total(params):
        def body(sums, piece):
            m, piece = piece
            return jax.tree.map(jnp.add, sums, forward(params, piece, jax.random.fold_in(KEY, m))), None

        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype),
            jax.eval_shape(forward, params, jax.tree.map(lambda a: a[0], batch), KEY),
        )
        return jax.lax.scan(body, zeros, (jnp.arange(microbatches), batch))[0]

    (loss, sums), grads = quick_jit(jax.value_and_grad(total, has_aux=True))(params)
    return model, params, batch, forward, (loss, sums), grads


@pytest.mark.parametrize(
    ("family", "schedule", "virtual_stages", "microbatches", "axes"),
    [
        ("gptj", "1f1b", 1, 6, dict(stage=2, data=2, tensor=2)),
        pytest.param("gptj", "interleaved", 2, 6, dict(stage=2, tensor=2), marks=pytest.mark.long),
        pytest.param("bloom", "1f1b", 1, 4, dict(stage=2, tensor=2), marks=pytest.mark.long),
        pytest.param("roberta", "gpipe", 1, 4, dict(stage=4, data=2), marks=pytest.mark.long),
        pytest.param("megatron_bert", "1f1b", 1, 4, dict(stage=2, fsdp=2, tensor=2), marks=pytest.mark.long),
        pytest.param("mvp", "1f1b", 1, 4, dict(stage=2, fsdp=2), marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_pipeline_is_the_sum_of_its_microbatches(family, schedule, virtual_stages, microbatches, axes):
    """Loss and gradients, with dropout, padding, tied tables, cross-attention and prompts where the family has them."""
    model, params, batch, forward, (loss, sums), expected = reference(family, microbatches)
    rules = rules_of(**axes)
    with parallel.use(rules):
        run = quick_jit(
            functools.partial(
                pipeline.value_and_grad,
                forward,
                shardings=parallel.param_shardings(model, rules),
                schedule=schedule,
                virtual_stages=virtual_stages,
            )
        )
        (found, found_sums), grads = run(
            parallel.shard_params(params, model, rules), jax.device_put(batch), KEY
        )
    assert float(found) == pytest.approx(float(loss), rel=1e-6)
    assert jax.tree.map(float, found_sums) == pytest.approx(jax.tree.map(float, sums), rel=1e-6)
    grads = parallel.unpad_params(grads, model)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert_close_relative(*map(without_key_biases, (grads, expected)), 1e-5)


def without_key_biases(tree):
    """A key's bias changes no softmax: its gradient is zero, and what is found there is rounding alone."""
    if not isinstance(tree, dict):
        return tree
    return {
        name: {"kernel": sub["kernel"]} if name == "key" else without_key_biases(sub)
        for name, sub in tree.items()
    }


@pytest.mark.long
def test_no_stage_holds_another_ones_layers():
    """Nor the whole table, nor does anything as large as a layer's kernel move between stages."""
    model, _, batch, forward, *_ = reference("gptj", 6)
    rules = rules_of(stage=4)
    shardings = parallel.param_shardings(model, rules)
    with parallel.use(rules):
        run = jax.jit(functools.partial(pipeline.value_and_grad, forward, shardings=shardings))
        abstract = parallel.abstract_sharded_params(model, rules)
        compiled, _ = compile_anew(run.lower(abstract, batch, KEY))
    activation = 4 * T * 64
    large = [one for one in collectives(compiled) if one.size > activation]
    assert not large, large


@pytest.mark.long
def test_a_stage_holds_its_gradients_in_shards():
    """No array of a whole stage's layers, uncut by FSDP, is ever made."""
    model, _, batch, forward, *_ = reference("gptj", 4)
    rules = rules_of(stage=2, fsdp=2)
    run = functools.partial(
        pipeline.value_and_grad, forward, shardings=parallel.param_shardings(model, rules)
    )
    with parallel.use(rules):
        abstract = parallel.abstract_sharded_params(model, rules)
        compiled, _ = compile_anew(jax.jit(run).lower(abstract, batch, KEY))
    hidden, inner = model.config.n_embd, 4 * model.config.n_embd
    text = compiled.as_text()
    assert f"f32[2,{hidden // 2},{inner}]" in text
    assert f"f32[2,{hidden},{inner}]" not in text
