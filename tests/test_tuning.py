"""Which parameters train, and low-rank adapters: what they compute, and what merging leaves of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo import tuning
from modelzoo.layers.linear import Linear
from modelzoo.model import describe_tuning, new_params
from tests.zoo import (
    assert_close,
    leaves_by_name,
    max_difference,
    quick_jit,
    random_params,
    tiny_gptj,
    tiny_mvp,
)

IDS = np.random.default_rng(0).integers(3, 37, (2, 7)).astype(np.int32)
GPTJ = modelzoo.GPTJForCausalLM(tiny_gptj())
CLASSIFIER = modelzoo.RobertaForSequenceClassification(
    modelzoo.get_config(
        "tiny-roberta", num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=12
    )
)
MVP = modelzoo.MvpForConditionalGeneration(tiny_mvp())


def lora(**fields):
    return modelzoo.Lora(**dict(dict(rank=3, alpha=6.0, targets=".*kernel"), **fields))


def tuned(model, **fields):
    return modelzoo.tuned(model, modelzoo.Tuning(**fields))


def trained(model):
    return {name for name, trains in leaves_by_name(modelzoo.trainable(model)).items() if trains}


@pytest.mark.parametrize("model", [GPTJ, MVP], ids=["gptj", "mvp"])
def test_merged_is_what_was_adapted(model):
    adapted = tuned(model, lora=lora())
    params = random_params(adapted, scale=0.1)

    @quick_jit
    def logits(params):
        return model.apply({"params": params}, input_ids=IDS).logits

    merged = tuning.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(modelzoo.abstract_params(model))
    assert_close(logits(merged), logits(params), 2e-6)
    plain = {name: leaf for name, leaf in leaves_by_name(params).items() if "/lora/" not in name}
    assert max_difference(list(leaves_by_name(merged).values()), list(plain.values())) > 1e-3
    by_layer = tuning.merge(modelzoo.unstack_layers(params))
    assert_close(modelzoo.stack_layers(by_layer), merged, 0.0)


def test_a_new_adapter_adds_nothing():
    adapted = tuned(GPTJ, lora=lora(dropout=0.25))
    params = jax.tree.map(
        lambda box: box.value, new_params(adapted, jax.random.key(0)), is_leaf=lambda x: hasattr(x, "names")
    )
    found, plain = leaves_by_name(params), leaves_by_name(tuning.merge(params))
    for name, leaf in plain.items():
        np.testing.assert_array_equal(leaf, found[name])
    a = np.asarray(found["trunk/layers/attention/out/lora/a"])
    assert a.shape == (2, 3, 8, 3)
    bound = 24**-0.5  # peft's: uniform within 1 / sqrt(inputs)
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(found["trunk/layers/attention/out/lora/scale"], [2.0, 2.0])
    np.testing.assert_array_equal(found["trunk/layers/attention/out/lora/dropout"], [0.25, 0.25])


def test_dropout_is_of_the_adapters_part_alone():
    layer, x = Linear((6,), (4,), ("embed", "mlp"), use_bias=False), jnp.ones((1, 6))
    kernel = jnp.ones((6, 4))
    adapter = {"a": jnp.eye(6)[:, :4], "b": jnp.eye(4), "scale": jnp.float32(2)}

    def run(dropout, seed):
        params = {"kernel": kernel, "lora": adapter | {"dropout": jnp.float32(dropout)}}
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return layer.apply({"params": params}, x, rngs=rngs)[0]

    np.testing.assert_allclose(run(0.25, None), [8.0] * 4)  # 6 of the kernel, 2 of the adapter
    drawn = jax.vmap(lambda seed: run(0.25, seed))(jnp.arange(400)) - 6
    np.testing.assert_allclose(np.unique(np.round(drawn, 5)), [0, np.float32(8 / 3).round(5)], rtol=1e-5)
    assert abs(float((drawn == 0).mean()) - 0.25) < 4 * (0.25 * 0.75 / 1600) ** 0.5


def test_what_trains():
    heads = {
        name
        for name in leaves_by_name(modelzoo.abstract_params(CLASSIFIER))
        if name.startswith("classifier/")
    }
    adapters = {f"trunk/layers/attention/query/lora/{name}" for name in "ab"}
    query = ".*query/kernel"
    assert heads
    assert trained(tuned(CLASSIFIER, lora=lora(targets=query))) == adapters | heads
    assert trained(tuned(CLASSIFIER, lora=lora(targets=query), freeze="classifier/dense/.*")) == adapters | {
        name for name in heads if "out" in name
    }
    norms = trained(tuned(CLASSIFIER, lora=lora(targets=query, also=".*norm/scale"))) - adapters
    assert norms
    assert all(name.endswith("norm/scale") for name in norms)
    assert trained(tuned(GPTJ, lora=lora(targets=query))) == adapters
    assert trained(tuned(GPTJ, tune=".*/bias")) == {name for name in trained(GPTJ) if name.endswith("/bias")}
    assert trained(tuned(GPTJ, freeze=("trunk/layers/.*", ".*embedding"))) == {
        *("lm_head/bias", "lm_head/kernel", "trunk/final_norm/bias", "trunk/final_norm/scale")
    }
    prompts = tuned(MVP, tune=".*_prompt/.*")
    assert trained(prompts) == trained(MVP.set_lightweight_tuning())
    assert modelzoo.untuned(prompts) == MVP


def test_a_line_says_how_many():
    assert describe_tuning(GPTJ) is None
    count = 2 * 2 * 3 * (24 + 24)
    line = describe_tuning(tuned(GPTJ, lora=lora(targets=".*(query|value)/kernel")))
    assert line.startswith(f"{count:,} of ")
    assert line.endswith("by LoRA of rank 3 on 4 kernels")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(rank=0), "lora.rank = 0: it is at least 1"),
        (lambda: lora(alpha=0), "lora.alpha = 0.0: it is above 0"),
        (lambda: lora(dropout=1.0), "lora.dropout = 1.0: it is a probability below 1"),
        (lambda: lora(targets="("), r"lora.targets = '\(': no regular expression"),
        (lambda: tuned(GPTJ, lora=lora(rank=25)), "lora.rank = 25: .* is of 24 x 37, .* rank of 24 at most"),
        (
            lambda: tuned(GPTJ, lora=lora(targets=".*/atention/query.*")),
            "matches no kernel; the nearest are .*query/k",
        ),
        (lambda: tuned(GPTJ, lora=lora(targets=".*bias")), "lora.targets = '.*bias' matches no kernel"),
        (lambda: tuned(GPTJ, lora=lora(also="x")), "lora.also = 'x' matches no parameter"),
        (
            lambda: tuned(GPTJ, freeze="layers/norm/.*"),
            "freeze = .* matches no parameter; .* trunk/layers/norm/",
        ),
        (lambda: tuned(GPTJ, tune="x"), "tune = 'x' matches no parameter"),
        (lambda: tuned(GPTJ, freeze=".*"), "nothing is left to train"),
        (
            lambda: tuned(GPTJ, lora=lora(), freeze="trunk/.*"),
            "it freezes trunk/.*kernel, which lora.targets adapts",
        ),
        (lambda: tuned(GPTJ, lora=lora(), tune=".*"), "lora.also names what trains beside"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
