"""The engine's programs with tiny GPT-J and BLOOM: every request gets the tokens that `generate` gives it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
import parallel
from inference import slots
from inference.engine import Engine
from inference.requests import SamplingParams
from inference.row_sampling import with_logprobs

MODELS = {"gptj": modelzoo.GPTJForCausalLM, "bloom": modelzoo.BloomForCausalLM}
NUM_NEW = 12


def real(name, **knobs: Any):
    config = modelzoo.get_config(f"tiny-{name}", vocab_size=97, initializer_range=0.12, n_layer=1, **knobs)
    model = MODELS[name](config)
    return model, inference.prepare(model, parallel.init_params(model, jax.random.key(7)))


def prompts(seed):
    random = np.random.default_rng(seed)
    return [random.integers(5, 97, length).tolist() for length in (3, 40, 21)]


def generated(model, params, rows, **fields: Any):
    """New tokens of each, in one call."""
    ids = np.array([[0] * (40 - len(row)) + row for row in rows])
    config = inference.GenerationConfig(max_new_tokens=NUM_NEW, **fields)
    out = inference.generate(model, params, ids, ids > 0, config, rng=jax.random.key(5))
    return out.sequences[:, 40:].tolist()


DRAWN = dict(temperature=1.5, top_k=20, top_p=0.9)


@pytest.fixture
def greedy(monkeypatch):
    """No sampling, which is most of what is compiled."""

    def most_probable(logits, params, seen, counts, step):
        return with_logprobs(logits, logits.argmax(-1).astype(np.int32), params.num_logprobs)

    monkeypatch.setattr("inference.slots.choose_rows", most_probable)


def test_tokens_equal_those_of_generate_and_nothing_compiles_late():
    """Greedy, sampled and penalised requests side by side."""
    model, params = real("gptj")
    engine = Engine(model, params, num_rows=3, max_length=56)
    assert engine.warm_up() > 0
    programs: Any = (slots._read(True), slots._decode(True), slots._copy, slots._resize, slots._remember)
    before = [program._cache_size() for program in programs]
    kinds: list[dict[str, Any]] = [{}, DRAWN, dict(repetition_penalty=1.3)]
    asked = [
        [
            engine.submit(
                row,
                SamplingParams(max_new_tokens=NUM_NEW, seed=5, sample=i, **kind),
            )
            for i, row in enumerate(prompts(seed))
        ]
        for seed, kind in enumerate(kinds)
    ]
    list(engine.run())
    assert [program._cache_size() for program in programs] == before
    for seed, kind in enumerate(kinds):
        fields = dict(kind, do_sample=True) if "temperature" in kind else kind
        want = generated(model, params, prompts(seed), **fields)
        assert [request.output for request in asked[seed]] == want, kind


@pytest.mark.usefixtures("greedy")
def test_tokens_of_a_cache_in_int8_equal_those_of_generate():
    """A cache that grows, rows that take a prefix over, prompts in several chunks."""
    model, params = real("gptj")
    model = model.clone(cache_dtype=jnp.int8)
    engine = Engine(model, params, num_rows=2, max_length=56)
    layer = engine._state.layers[0]
    assert layer.key.values.dtype == layer.value.values.dtype == jnp.int8
    rows = [*prompts(0), prompts(0)[1]]
    asked = [engine.submit(row, SamplingParams(max_new_tokens=NUM_NEW)) for row in rows]
    list(engine.run())
    want = generated(model, params, prompts(0))
    assert [request.output for request in asked] == [*want, want[1]]
    assert asked[3].cached_tokens > 0


@pytest.mark.long
@pytest.mark.usefixtures("greedy")
def test_tokens_on_a_mesh_equal_those_of_generate_on_one_device():
    model, params = real("bloom")
    # Rules that lay training's residual stream over the tensor axis too: a step of one token cannot.
    mesh = parallel.make_mesh(tensor=2, data=2, devices=jax.devices()[:4])
    rules = parallel.make_rules(mesh, sequence=True)
    engine = Engine(model, params, num_rows=2, max_length=56, rules=rules)
    asked = [engine.submit(row, SamplingParams(max_new_tokens=NUM_NEW)) for row in prompts(0)]
    list(engine.run())
    assert [request.output for request in asked] == generated(model, params, prompts(0))


@pytest.mark.long
@pytest.mark.usefixtures("greedy")
@pytest.mark.parametrize(
    ("name", "window"), [("gptj", dict(n_positions=56)), ("bloom", dict(max_position_embeddings=56))]
)
def test_tokens_of_learned_positions_and_grouped_heads_equal_those_of_generate(name, window):
    """To the table's last row, on a mesh that gives each device one head of keys and values."""
    knobs = dict(position="learned", norm="rms", qk_norm=True, num_key_value_heads=2, **window)
    model, params = real(name, activation_function="swiglu", **knobs)
    rules = parallel.make_rules(parallel.make_mesh(tensor=2, devices=jax.devices()[:2]))
    engine = Engine(model, params, num_rows=2, rules=rules)
    assert engine._state.layers[0].key.shape[1] == 2
    num_new = SamplingParams(max_new_tokens=16), SamplingParams(max_new_tokens=NUM_NEW)
    asked = [engine.submit(row, num_new[len(row) < 40]) for row in prompts(0)]
    list(engine.run())
    wanted = generated(model, params, prompts(0))
    assert [request.output[:NUM_NEW] for request in asked] == wanted
    assert len(asked[1].output) == 56 - 40
    whole = jnp.asarray([prompts(0)[1] + asked[1].output[:-1]])
    logits = model.apply({"params": params}, input_ids=whole).logits[0, 39:]
    assert logits.argmax(-1).tolist() == asked[1].output
