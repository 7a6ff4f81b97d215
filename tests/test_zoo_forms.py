"""What every class owes, whatever it computes: its size, its beginnings, dropout, bfloat16, a mesh."""

import dataclasses
import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from modelzoo import registry
from modelzoo.model import CHOICE_TASKS
from tests.stored import CLASSES, stored, together
from tests.zoo import COUNTS, TINY, assert_close, quick_jit, random_params

RATE = 0.3
ROWS = 64
every_class = pytest.mark.parametrize("name", CLASSES)
PRESETS = [(preset, family) for family in registry.FAMILIES.values() for preset in family.presets]


def tiny(name: str) -> Any:
    """A class under its family's tiny preset."""
    return registry.get_model_class(name)(modelzoo.get_config(TINY[CLASSES[name].model_type]))


@functools.partial(quick_jit, static_argnums=(0, 3))
def run(model: Any, params: Any, inputs: Any, deterministic: bool, rng: Any) -> Any:
    flags = dict(output_attentions=True, output_hidden_states=True, deterministic=deterministic)
    return model.apply({"params": params}, **inputs, **flags, rngs={"dropout": rng})


def first_inputs(name: str) -> dict[str, Any]:
    return together(next(iter(stored(name)[0].answers.values()))["inputs"])


@pytest.mark.parametrize(("preset", "family"), PRESETS, ids=lambda value: getattr(value, "model_type", value))
def test_parameter_counts(preset, family):
    """As transformers counts on its meta device (tests/parity/test_presets.py holds the record to it)."""
    recorded = json.loads(COUNTS.read_text(encoding="utf-8"))[preset]
    config = modelzoo.get_config(preset)
    assert {cls.__name__: modelzoo.num_params(cls(config)) for cls in family.classes} == recorded


def test_counts_that_are_published():
    recorded = json.loads(COUNTS.read_text(encoding="utf-8"))
    assert recorded["gpt-j-6b"]["GPTJForCausalLM"] == 6_050_882_784
    assert recorded["bloom-176b"]["BloomForCausalLM"] == 176_247_271_424


@every_class
def test_initial_parameters(name, rng):
    """Norms are the identity, biases zero, everything else normal with the config's spread."""
    model = tiny(name)
    ids = jnp.zeros((1, 1, 1) if model.task in CHOICE_TASKS else (1, 1), jnp.int32)
    params = nn.meta.unbox(quick_jit(model.init)(rng, input_ids=ids)["params"])
    kinds = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        onto_residual = "layers" in jax.tree_util.keystr(path) and path[-2].key in ("out", "fc_out")
        std = model.config.residual_std if onto_residual else model.config.initializer_std
        kind, where, leaf = path[-1].key, jax.tree_util.keystr(path), np.asarray(leaf)
        kinds.add(kind)
        if kind == "scale" or "bias" in kind:
            assert (leaf == (kind == "scale")).all(), where
            continue
        drawn = leaf[leaf != 0]  # the padding token's row is zero
        assert drawn.size > 0.9 * leaf.size, where
        noise = std / np.sqrt(drawn.size)
        assert abs(drawn.mean()) < 6 * noise, f"{where}: mean {drawn.mean()}"
        assert abs(drawn.std() - std) < 6 * noise, f"{where}: spread {drawn.std()}, not {std}"
        within = (np.abs(drawn) < std).mean()  # 0.683 of a normal, 0.577 of a uniform distribution
        assert abs(within - 0.683) < 6 * 0.47 / np.sqrt(drawn.size), where
    assert {"scale", "bias", "kernel"} <= kinds


def dropping(model: Any, which: str = "") -> Any:
    """The model with every rate of dropout of that name at RATE, and the others at 0."""
    fields = [f.name for f in dataclasses.fields(model.config) if "drop" in f.name and "layer" not in f.name]
    assert fields
    rates = {field: RATE if which in field else 0.0 for field in fields}
    return model.clone(config=dataclasses.replace(model.config, **rates))


@every_class
def test_dropout(name, rng):
    """Off when deterministic, where the rates do not reach the program; else on, and decided by the key alone."""
    one, inputs = stored(name)[0], first_inputs(name)
    model = dropping(one.model)
    programs = [run.lower(each, one.params, inputs, True, rng).as_text() for each in (model, one.model)]
    assert programs[0] == programs[1]
    exact = run(one.model, one.params, inputs, True, rng)
    first, again, other = (
        run(model, one.params, inputs, False, key) for key in (rng, rng, jax.random.fold_in(rng, 1))
    )
    assert_close(again, first, 0.0)
    for kept, compared in ((first, exact), (first, other)):
        pairs = zip(jax.tree.leaves(kept), jax.tree.leaves(compared), strict=True)
        changes = [bool(jnp.abs(a - b).max() > 0) for a, b in pairs]
        assert changes[0], "the first field is what the class is for"
        assert sum(changes) > len(changes) / 2


def check_dropped(kept: Any, exact: Any) -> None:
    """Zeros as often as RATE says, the rest grown by 1 / (1 - RATE)."""
    ratio = np.asarray(kept / exact)[np.abs(exact) > 1e-4]
    hit = ratio == 0
    assert ratio.size > 5000
    assert abs(hit.mean() - RATE) < 6 * np.sqrt(RATE * (1 - RATE) / ratio.size)
    np.testing.assert_allclose(ratio[~hit], 1 / (1 - RATE), rtol=2e-2)


@pytest.mark.parametrize("name", [family.classes[0].__name__ for family in registry.FAMILIES.values()])
def test_dropout_keeps_the_expectation(name, rng):
    """Of attention weights, and of the embeddings where a family drops them, over many equal rows."""
    one = stored(name)[0]
    inputs = {"input_ids": jnp.tile(first_inputs(name)["input_ids"][:1], (ROWS, 1))}
    exact = run(one.model, one.params, inputs, True, rng)
    attentions, hidden = "attentions", "hidden_states"
    if not hasattr(exact, attentions):
        attentions, hidden = "encoder_attentions", "encoder_hidden_states"
    kept = run(dropping(one.model, "att"), one.params, inputs, False, rng)
    check_dropped(getattr(kept, attentions)[0], getattr(exact, attentions)[0])
    kept = run(dropping(one.model), one.params, inputs, False, rng)
    if jnp.abs(getattr(kept, hidden)[0] - getattr(exact, hidden)[0]).max() > 0:
        check_dropped(getattr(kept, hidden)[0], getattr(exact, hidden)[0])


@every_class
def test_bfloat16(name, rng):
    """Every output is bfloat16, finite, and the float32 one but for rounding."""
    one, inputs = stored(name)[0], first_inputs(name)
    exact = run(one.model, one.params, inputs, True, rng)
    out = run(one.model.clone(dtype=jnp.bfloat16), one.params, inputs, True, rng)
    for have, want in zip(jax.tree.leaves(out), jax.tree.leaves(exact), strict=True):
        assert have.dtype == jnp.bfloat16
        assert np.isfinite(have.astype(jnp.float32)).all()
        error = jnp.abs(have.astype(jnp.float32) - want)
        assert jnp.sqrt(jnp.mean(error**2)) <= 0.1 * jnp.sqrt(jnp.mean(want**2))


ON_A_MESH = [cls.__name__ for family in registry.FAMILIES.values() for cls in family.classes[:2]]


@pytest.mark.parametrize("name", ON_A_MESH)
def test_on_a_mesh(name, rng):
    """Rows, features and heads over eight devices: the same outputs to 2e-6."""
    model = tiny(name)
    params = random_params(model, scale=0.1)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (8, 12)).astype(np.int32)
    expected = run(model, params, {"input_ids": ids}, True, rng)
    rules = parallel.make_rules(parallel.make_mesh(data=2, fsdp=2, tensor=2))
    placed = parallel.shard_params(params, model, rules)
    with parallel.use(rules):
        out = jax.jit(lambda p, ids: model.apply({"params": p}, ids))(
            placed, jax.device_put(ids, parallel.batch_sharding(rules))
        )
    field = "logits" if model.task != "base" else "last_hidden_state"
    have, want = getattr(out, field), getattr(expected, field)
    assert_close(have[..., : want.shape[-1]], want, 2e-6 * max(1.0, float(jnp.abs(want).max())))
