"""A draft model: the same tokens without sampling, the same distribution with, and as few passes as it is good."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
import parallel
from inference import GenerationConfig, decode, drafting
from tests import zoo

LEFT = np.array([[3, 4, 5, 6, 3, 4], [0, 0, 9, 8, 9, 8], [0, 7, 1, 1, 5, 9]])


def small(family: str, seed: int = 0, scale: float = 0.3, **fields: Any):
    """(model, prepared parameters) of a family."""
    if family == "mvp":
        sizes = dict(max_position_embeddings=64, decoder_layers=1, encoder_layers=1, forced_eos_token_id=None)
        model = modelzoo.MvpForConditionalGeneration(zoo.tiny_mvp(**sizes))
    elif family == "bloom":
        sizes: Any = dict(vocab_size=37, hidden_size=24, n_layer=1, n_head=3, tie_word_embeddings=False)
        model = modelzoo.BloomForCausalLM(modelzoo.BloomConfig(**sizes))
    else:
        model = modelzoo.GPTJForCausalLM(zoo.tiny_gptj(**(dict(n_positions=96, n_layer=1) | fields)))
    return model, inference.prepare(model, zoo.random_params(model, seed, scale))


def near(model, params, amount=0.05):
    """A draft: the same model, a little off."""
    noise = zoo.random_params(model, 9, amount)
    return model, jax.tree.map(lambda a, b: a + b, params, inference.prepare(model, noise))


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gptj", dict()),
        ("mvp", dict(num_draft_tokens=3)),
        long(
            "gptj",
            dict(repetition_penalty=1.2, no_repeat_ngram_size=3, output_logprobs=True, output_scores=True),
        ),
        long(
            "gptj", dict(max_new_tokens=90, eos_token_id=None, num_draft_tokens=7)
        ),  # up to the window's end
        long("bloom", dict(min_new_tokens=5, num_draft_tokens=1)),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_the_plain_loop(family, fields, monkeypatch):
    model, params = small(family)
    draft = near(model, params)
    fields = dict(max_new_tokens=40, eos_token_id=2, pad_token_id=0) | fields
    mine = {name: value for name, value in fields.items() if name != "num_draft_tokens"}
    plain = inference.generate(model, params, LEFT, LEFT > 0, GenerationConfig(**mine))
    monkeypatch.setattr(decode, "FIRST_SLOTS", 32)  # a cache that grows on the way
    out = inference.generate(model, params, LEFT, LEFT > 0, GenerationConfig(**fields), draft=draft)
    np.testing.assert_array_equal(out.sequences, plain.sequences)
    np.testing.assert_array_equal(out.lengths, plain.lengths)
    assert (out.num_accepted <= out.num_guessed).all()
    assert 0 < out.num_accepted.sum() < out.num_guessed.sum()
    if "output_logprobs" in fields:
        np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=2e-6, rtol=0)
        for row, count in enumerate(out.lengths - LEFT.shape[1]):
            np.testing.assert_allclose(out.scores[:count, row], plain.scores[:count, row], atol=1e-5, rtol=0)


def test_the_model_itself_is_a_draft_that_is_always_right():
    model, params = small("gptj")
    config = GenerationConfig(max_new_tokens=26, num_draft_tokens=4, do_sample=True, top_k=0)
    out = inference.generate(model, params, LEFT, LEFT > 0, config, draft=(model, params))
    assert out.num_passes == 5  # 1 by the prefill, then 5 a pass
    assert out.num_guessed.tolist() == out.num_accepted.tolist() == [20, 20, 20]


def chi_square(found, probabilities):
    """Of counts against what they should be, over cells that are expected 5 times or more; (value, cells)."""
    wanted = len(found) * probabilities
    counts = np.bincount(found, minlength=len(wanted))
    often = wanted >= 5
    rare = [(counts[~often].sum(), wanted[~often].sum())] if wanted[~often].sum() >= 5 else []
    pairs = [*zip(counts[often], wanted[often], strict=True), *rare]
    return sum((count - want) ** 2 / want for count, want in pairs), len(pairs)


@pytest.mark.parametrize("fields", [dict(top_k=3, temperature=1.7), long(dict(top_k=0))], ids=str)
def test_samples_have_the_models_own_distribution(fields):
    """All texts of 3 tokens over a vocabulary of 5, by enumeration. A draft's own samples would fail by far."""
    model, params = small("gptj", vocab_size=5, n_positions=16, eos_token_id=1)
    draft = near(model, params, 0.2)
    texts = np.array(list(itertools.product(range(5), repeat=3)))

    def probabilities(model, params):
        prompt = np.tile([[3, 4, 4]], (len(texts), 1))
        out: Any = model.apply({"params": params}, input_ids=jnp.asarray(np.concatenate([prompt, texts], 1)))
        logits = out.logits[:, 2:5] / fields.get("temperature", 1.0)
        if fields["top_k"]:
            logits = jnp.where(logits < jnp.sort(logits)[..., -fields["top_k"], None], -np.inf, logits)
        probs = np.asarray(jax.nn.softmax(logits, axis=-1))
        return np.take_along_axis(probs, texts[..., None], axis=2)[..., 0].prod(axis=1)

    num = 6000
    many = dict(num_return_sequences=num, do_sample=True, max_new_tokens=3, num_draft_tokens=2)
    config = GenerationConfig(**fields, **many)
    out = inference.generate(model, params, [[3, 4, 4]], config=config, draft=draft, rng=jax.random.key(3))
    assert 0.2 < out.num_accepted.sum() / out.num_guessed.sum() < 0.95
    found = out.sequences[:, 3:] @ [25, 5, 1]
    value, cells = chi_square(found, probabilities(model, params))
    # Mean cells - 1, deviation sqrt(2 (cells - 1)).
    assert value < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5
    value, cells = chi_square(found, probabilities(*draft))
    assert value > 20 * cells


@pytest.mark.long
def test_a_sample_depends_on_its_text_and_key_alone():
    """Not on how many tokens are guessed, on the rows beside it, or on where a stream is cut."""
    model, params = small("gptj")
    draft = near(model, params, 0.2)
    fields: dict[str, Any] = dict(do_sample=True, temperature=1.5, top_p=0.9, max_new_tokens=20)

    def run(rows, **more):
        config = GenerationConfig(**fields, **more)
        return inference.generate(
            model, params, LEFT[:rows], LEFT[:rows] > 0, config, rng=jax.random.key(7), draft=draft
        )

    one, other = run(3), run(3, num_draft_tokens=1)
    np.testing.assert_array_equal(one.sequences, other.sequences)
    assert one.num_passes < other.num_passes
    np.testing.assert_array_equal(run(1).sequences, one.sequences[:1])


@pytest.mark.long
def test_a_stream_yields_the_samples_of_generate():
    model, params = small("gptj")
    draft = near(model, params, 0.2)
    fields: dict[str, Any] = dict(do_sample=True, temperature=1.5, top_p=0.9, max_new_tokens=20)
    whole = inference.generate(
        model, params, LEFT, LEFT > 0, GenerationConfig(**fields), rng=jax.random.key(7), draft=draft
    )
    parts = inference.stream(
        model, params, LEFT, LEFT > 0, GenerationConfig(**fields), rng=jax.random.key(7), draft=draft
    )
    np.testing.assert_array_equal(np.concatenate(list(parts), axis=1), whole.sequences[:, 6:])


@pytest.mark.long
def test_drafts_on_a_mesh_give_the_same_tokens():
    model, params = small("gptj", n_head=4, n_inner=32)
    draft = near(model, params)
    config = GenerationConfig(max_new_tokens=20, eos_token_id=2, pad_token_id=0)
    mesh = parallel.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    alone, sharded = (
        inference.generate(model, params, LEFT, LEFT > 0, config, mesh=where, draft=draft)
        for where in (None, mesh)
    )
    np.testing.assert_array_equal(sharded.sequences, alone.sequences)
    np.testing.assert_array_equal(sharded.num_accepted, alone.num_accepted)


def test_what_is_drawn_follows_the_wanted_distribution():
    """One token, many times, from distributions that hardly overlap."""
    drafted = jnp.log(jnp.array([0.7, 0.2, 0.1, 0.0]))
    wanted = jnp.log(jnp.array([0.1, 0.3, 0.0, 0.6]))
    num = 20_000
    keys = jax.random.split(jax.random.key(0), num)
    guesses = jax.random.categorical(jax.random.key(1), drafted, shape=(num,)).astype(jnp.int32)
    rows = [jnp.broadcast_to(x, (num, 4)) for x in (drafted, wanted)]
    found = np.asarray(drafting.reject_or_take(guesses, *rows, keys))
    value, cells = chi_square(found, np.array([0.1, 0.3, 0.0, 0.6]))
    assert value < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5
    assert not (found == 2).any()
    equal = drafting.reject_or_take(guesses, rows[0], rows[0], keys)
    np.testing.assert_array_equal(equal, guesses)


@pytest.mark.parametrize(
    ("draft", "fields", "error"),
    [
        (None, dict(num_draft_tokens=3), "num_draft_tokens = 3: there is no draft model"),
        ("model", {}, r"draft is \(model, params\)"),
        (dict(vocab_size=41), {}, "a vocabulary of 41 tokens and the model one of 37"),
        (dict(n_positions=16), {}, "the draft has 16 positions, and prompt and new tokens take 26"),
        (dict(), dict(num_beams=2), "num_beams = 2: beams are not guessed"),
        (dict(), dict(prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens = 2: guesses come from it or"),
        ("mvp", {}, "the draft is a MvpForConditionalGeneration, whose task is seq2seq_lm"),
    ],
    ids=str,
)
def test_drafts_that_do_not_fit_are_refused(draft, fields, error):
    model, params = small("gptj")
    if isinstance(draft, dict):
        draft = (modelzoo.GPTJForCausalLM(zoo.tiny_gptj(**draft)), {})
    elif draft == "mvp":
        draft = (modelzoo.MvpForConditionalGeneration(zoo.tiny_mvp()), {})
    with pytest.raises(ValueError, match=error):
        inference.generate(model, params, LEFT, config=GenerationConfig(**fields), draft=draft)
