"""Tasks: which of the trunk's results each one reads, with a trunk made up here."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo import heads, tasks
from modelzoo.layers.embed import Embed, embed_inputs
from modelzoo.outputs import BaseModelOutput
from modelzoo.trunk import Trunk
from tests.zoo import tiny_gptj

D, V, C = 24, 37, 3


class Bag(Trunk):
    """Embeddings and, if it is to have one, a pooler; nothing between."""

    add_pooling_layer: bool = True

    def setup(self) -> None:
        self.embed = Embed(V, D)
        if self.add_pooling_layer:
            self.pooler = heads.Pooler(D)

    def __call__(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, deterministic=True
    ) -> BaseModelOutput:
        x = embed_inputs(self.embed, input_ids, inputs_embeds)
        x = x if attention_mask is None else x * attention_mask[..., None]
        return BaseModelOutput(x, self.pooler(x) if self.add_pooling_layer else None, hidden_states=(x,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(modelzoo.GPTJConfig):
    drop: float = 0.0
    tied: bool = False

    @property
    def head_dropout(self) -> float:
        return self.drop


CONFIG = Config(
    **{f.name: getattr(tiny_gptj(num_labels=C), f.name) for f in dataclasses.fields(modelzoo.GPTJConfig)}
)
IDS = jnp.asarray(np.random.default_rng(0).integers(4, V, (2, 5)), jnp.int32)


def of(task):
    """A family's class of a task, with the trunk above."""
    return type(task.__name__, (task,), {"trunk_class": Bag, "__module__": __name__})


def build(task, **config):
    model: Any = of(task)(dataclasses.replace(CONFIG, **config))
    shapes = nn.meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), IDS[:1, :1])["params"]))
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
    return model, params, params["trunk"]["embed"]["embedding"]


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def pooled(params, x):
    return np.tanh(dense(params["trunk"]["pooler"]["dense"], x[:, 0]))


@pytest.mark.parametrize("task", [tasks.MaskedLM, tasks.CausalLM])
def test_language_models(task):
    model, params, table = build(task)
    assert set(params) == {"trunk", "lm_head"}
    assert "pooler" not in params["trunk"]  # a task that reads none has none
    out = model.apply({"params": params}, IDS)
    np.testing.assert_allclose(out.logits, table[IDS] @ params["lm_head"]["kernel"], atol=1e-5)
    assert out.hidden_states[0].shape == (2, 5, D)


def test_logits_to_keep():
    model, params, _ = build(tasks.CausalLM)
    whole = model.apply({"params": params}, IDS).logits
    kept = model.apply({"params": params}, IDS, logits_to_keep=2).logits
    np.testing.assert_allclose(kept, whole[:, -2:], atol=1e-6)
    assert "logits_to_keep" in modelzoo.input_names(model)
    assert "logits_to_keep" not in modelzoo.input_names(of(tasks.MaskedLM))


def test_classification_by_the_last_token():
    model, params, table = build(tasks.LastTokenClassification)
    ids = IDS.at[0, 3:].set(CONFIG.pad_token_id)
    out = model.apply({"params": params}, ids)
    expected = np.stack([table[IDS[0, 2]], table[IDS[1, 4]]]) @ params["score"]["kernel"]
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)


def test_classification_by_the_first_token():
    model, params, table = build(tasks.FirstTokenClassification)
    head = params["classifier"]
    expected = dense(head["out"], np.tanh(dense(head["dense"], table[IDS[:, 0]])))
    np.testing.assert_allclose(model.apply({"params": params}, IDS).logits, expected, atol=1e-5)


def test_classification_by_the_pooler():
    model, params, table = build(tasks.PooledClassification)
    expected = dense(params["classifier"], pooled(params, table[IDS]))
    np.testing.assert_allclose(model.apply({"params": params}, IDS).logits, expected, atol=1e-5)


def test_classification_of_tokens():
    model, params, table = build(tasks.TokenClassification)
    expected = dense(params["classifier"], table[IDS])
    assert expected.shape == (2, 5, C)
    np.testing.assert_allclose(model.apply({"params": params}, IDS).logits, expected, atol=1e-5)


def test_answers():
    model, params, table = build(tasks.QuestionAnswering)
    out, expected = model.apply({"params": params}, IDS), dense(params["qa_outputs"], table[IDS])
    np.testing.assert_allclose(out.start_logits, expected[..., 0], atol=1e-5)
    np.testing.assert_allclose(out.end_logits, expected[..., 1], atol=1e-5)


@pytest.mark.parametrize("by_embeds", [False, True])
def test_choices_are_rows_of_their_own(by_embeds):
    model, params, table = build(tasks.MultipleChoice)
    ids = jnp.asarray(np.random.default_rng(2).integers(4, V, (2, 4, 5)), jnp.int32)
    mask = jnp.asarray(np.random.default_rng(3).integers(0, 2, (2, 4, 5)), jnp.float32)
    inputs = {"inputs_embeds": table[ids]} if by_embeds else {"input_ids": ids}
    out = model.apply({"params": params}, attention_mask=mask, **inputs)
    rows = (table[ids] * mask[..., None]).reshape(8, 5, D)
    expected = dense(params["classifier"], pooled(params, rows)).reshape(2, 4)
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)
    assert out.hidden_states[0].shape == (8, 5, D)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.apply({"params": params}, attention_mask=mask)


def test_next_sentence_and_pretraining_read_the_same():
    model, params, table = build(tasks.PreTraining)
    out = model.apply({"params": params}, IDS)
    relation = dense(params["seq_relationship"], pooled(params, table[IDS]))
    np.testing.assert_allclose(out.seq_relationship_logits, relation, atol=1e-5)
    np.testing.assert_allclose(out.prediction_logits, table[IDS] @ params["lm_head"]["kernel"], atol=1e-5)
    alone = of(tasks.NextSentencePrediction)(CONFIG)
    rest = {name: value for name, value in params.items() if name != "lm_head"}
    np.testing.assert_allclose(alone.apply({"params": rest}, IDS).logits, relation, atol=1e-5)


@pytest.mark.parametrize(
    "task",
    [
        tasks.FirstTokenClassification,
        tasks.PooledClassification,
        tasks.TokenClassification,
        tasks.MultipleChoice,
    ],
)
def test_dropout_before_the_classifier(task):
    model, params, _ = build(task, drop=0.5)
    ids = IDS[:, None] if task is tasks.MultipleChoice else IDS
    plain = model.apply({"params": params}, ids).logits
    rngs = {"dropout": jax.random.key(0)}
    dropped = model.apply({"params": params}, ids, deterministic=False, rngs=rngs).logits
    assert np.abs(dropped - plain).max() > 1e-3
    np.testing.assert_array_equal(plain, model.apply({"params": params}, ids, rngs=rngs).logits)
