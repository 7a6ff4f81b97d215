"""The decode loop, with a fake model whose every token is known in advance and with a tiny GPT-J."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
import parallel
from inference import GenerationConfig
from tests import zoo
from tests.fake_lm import VOCAB, FakeLM, expected

PROMPTS = ([5, 6, 7, 8], [9], [1, 2])
LEFT = np.array([[5, 6, 7, 8], [0, 0, 0, 9], [0, 0, 1, 2]])
RIGHT = np.array([[5, 6, 7, 8], [9, 0, 0, 0], [1, 2, 0, 0]])


def run_fake(ids, mask=None, **fields: Any):
    config = GenerationConfig(**{"max_new_tokens": 12, **fields})
    return inference.generate(FakeLM(), {}, ids, mask, config)


def test_left_padded_rows_each_continue_their_own_prompt():
    out = run_fake(LEFT, LEFT > 0)
    continued = [[*row, *expected(prompt, 12)] for row, prompt in zip(LEFT.tolist(), PROMPTS, strict=True)]
    assert out.sequences.tolist() == continued
    assert out.lengths.tolist() == [16, 16, 16]
    assert out.scores is None


def test_right_padded_rows_continue_without_a_gap():
    out = run_fake(RIGHT, RIGHT > 0, pad_token_id=0)
    for row, length, prompt in zip(out.sequences.tolist(), out.lengths, PROMPTS, strict=True):
        assert row[:length] == [*prompt, *expected(prompt, 12)]
        assert row[length:] == [0] * (16 - length)


@pytest.mark.parametrize("ids", [LEFT, RIGHT])
def test_rows_stop_at_their_own_end(ids):
    news = [expected(prompt, 12) for prompt in PROMPTS]
    ends = (news[0][2], news[1][5])
    counts = [next((i + 1 for i, token in enumerate(new) if token in ends), 12) for new in news]
    assert len(set(counts)) > 1
    assert max(counts[:2]) < 12
    out = run_fake(ids[:2], ids[:2] > 0, eos_token_id=list(ends), pad_token_id=0)
    for row, length, new, count in zip(out.sequences.tolist(), out.lengths, news, counts):  # noqa: B905
        assert row[length - count : length] == new[:count]
        assert set(row[length:]) <= {0}
    if ids is LEFT:  # cut to the longest row: the loop stopped when the last one did
        assert out.sequences.shape == (2, 4 + max(counts[:2]))
        assert out.lengths.tolist() == [4 + count for count in counts[:2]]


def test_a_row_without_eos_never_stops_and_pad_defaults_to_eos():
    new = expected([9], 12)
    assert run_fake([[9]]).sequences.tolist() == [[9, *new]]
    out = run_fake([[9], [8]], eos_token_id=new[1])
    assert out.sequences[0, out.lengths[0] :].tolist() == [new[1]] * (out.sequences.shape[1] - 3)


def test_lengths_rule_over_eos():
    new = expected([9], 12)
    out = run_fake([[9]], eos_token_id=new[0], min_new_tokens=3, max_new_tokens=5)
    assert out.lengths[0] >= 4
    assert new[0] not in out.sequences[0, 1:4]
    assert run_fake([[9]], min_length=4, eos_token_id=new[0], max_new_tokens=5).lengths[0] >= 4
    assert run_fake([[9]], max_length=7, max_new_tokens=None).sequences.tolist() == [[9, *new[:6]]]
    assert run_fake([[9]], forced_eos_token_id=44).sequences[0, -1] == 44


def test_scores_are_the_processed_logits_of_each_step():
    out = run_fake([[9], [4]], output_scores=True, suppress_tokens=(7,), max_new_tokens=5)
    assert out.scores is not None
    assert out.scores.shape == (5, 2, VOCAB)
    assert np.isneginf(out.scores[:, :, 7]).all()
    np.testing.assert_array_equal(out.scores.argmax(-1).T, out.sequences[:, 1:])


def test_stream_yields_what_generate_returns():
    config = GenerationConfig(max_new_tokens=11, eos_token_id=expected([9], 8)[7], pad_token_id=0)
    ids, mask = LEFT[1:], LEFT[1:] > 0
    chunks = list(inference.stream(FakeLM(), {}, ids, mask, config, chunk_size=3))
    assert [chunk.shape[1] for chunk in chunks][:3] == [1, 3, 3]
    whole = inference.generate(FakeLM(), {}, ids, mask, config)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole.sequences[:, 4:])
    with pytest.raises(ValueError, match="chunk_size = 0"):
        next(inference.stream(FakeLM(), {}, ids, mask, config, chunk_size=0))


def test_samples_are_reproducible_and_independent_of_their_neighbours():
    config = GenerationConfig(do_sample=True, temperature=20.0, max_new_tokens=10, pad_token_id=0)

    def run(ids, seed):
        out = inference.generate(FakeLM(), {}, ids, np.asarray(ids) > 0, config, rng=jax.random.key(seed))
        return out.sequences[:, 4:].tolist()

    assert run(LEFT, 0) == run(LEFT, 0) != run(LEFT, 1)
    assert run(LEFT[:1], 0) == run(LEFT, 0)[:1]
    legacy = inference.generate(FakeLM(), {}, LEFT, LEFT > 0, config, rng=jax.random.PRNGKey(0))
    default = inference.generate(FakeLM(), {}, LEFT, LEFT > 0, config)
    assert legacy.sequences.tolist() == default.sequences.tolist()
    assert legacy.sequences[:, 4:].tolist() == run(LEFT, 0)


def test_several_samples_of_a_prompt_stand_together_and_differ():
    config = GenerationConfig(do_sample=True, temperature=20.0, num_return_sequences=3, max_new_tokens=8)
    out = inference.generate(FakeLM(), {}, [[5, 6], [7, 8]], config=config, rng=jax.random.key(3))
    assert out.sequences[:, :2].tolist() == [[5, 6]] * 3 + [[7, 8]] * 3
    assert len({tuple(row) for row in out.sequences[:, 2:].tolist()}) == 6


def test_a_streams_beams_and_texts_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="beams cannot be streamed"):
        next(inference.stream(FakeLM(), {}, [[1]], config=GenerationConfig(num_beams=2)))
    with pytest.raises(ValueError, match="pass the tokenizer"):
        run_fake([[1]], stop_strings="x")
    with pytest.raises(ValueError, match="do not end groups"):
        run_fake([[1]], stop_strings="x", num_beams=2, num_beam_groups=2, diversity_penalty=1.0)


def test_penalties_count_what_was_generated():
    out = run_fake([[9]], frequency_penalty=100.0, presence_penalty=100.0, max_new_tokens=VOCAB)
    assert sorted(out.sequences[0, 1:].tolist()) == list(range(VOCAB))


@pytest.fixture(scope="module")
def mvp():
    model = modelzoo.MvpForConditionalGeneration(zoo.tiny_mvp(max_position_embeddings=24))
    return model, inference.prepare(model, zoo.random_params(model, scale=0.3))


SOURCES = np.array([[3, 4, 5, 6, 7], [8, 9, 1, 1, 1]])


def test_an_encoder_decoder_writes_after_its_start_token(mvp):
    model, params = mvp
    config = GenerationConfig(max_new_tokens=7, pad_token_id=1)
    out = inference.generate(model, params, SOURCES, SOURCES != 1, config)
    assert out.sequences[:, 0].tolist() == [9, 9]
    assert out.sequences[:, -1].tolist() == [2, 2]  # the config's forced_eos_token_id
    ids, mask = jnp.asarray(SOURCES), jnp.asarray(SOURCES != 1)
    whole: Any = zoo.quick_jit(model.apply)(
        {"params": params}, ids, None, attention_mask=mask, decoder_input_ids=out.sequences
    )
    np.testing.assert_array_equal(out.sequences[:, 1:-1], np.argmax(whole.logits, axis=-1)[:, :-2])
    with pytest.raises(ValueError, match="past the encoder's 24 positions"):
        inference.generate(model, params, np.full((1, 25), 5), config=config)
    with pytest.raises(ValueError, match="max_new_tokens to 23 or less"):
        inference.generate(model, params, SOURCES, config=GenerationConfig(max_new_tokens=24))


def test_an_output_goes_on_from_what_it_is_begun_with(mvp):
    model, params = mvp
    config = GenerationConfig(max_new_tokens=8, pad_token_id=1)
    whole = inference.generate(model, params, SOURCES, SOURCES != 1, config)
    rest = GenerationConfig(max_new_tokens=5, pad_token_id=1)
    begun = whole.sequences[:, 1:4]  # without the start token, which is put before
    out = inference.generate(model, params, SOURCES, SOURCES != 1, rest, decoder_input_ids=begun)
    np.testing.assert_array_equal(out.sequences, whole.sequences)
    with pytest.raises(ValueError, match="decoder_input_ids: FakeLM has no encoder"):
        inference.generate(FakeLM(), {}, [[1]], decoder_input_ids=[[1]])


@pytest.mark.long
def test_beams_on_a_mesh_are_those_without(mvp):
    model, params = mvp
    config = GenerationConfig(max_new_tokens=6, num_beams=2, eos_token_id=2)
    sources = np.concatenate([SOURCES, SOURCES[:1] + 10])
    mesh = parallel.make_mesh(data=2, devices=jax.devices()[:2])
    alone, sharded = (
        inference.generate(model, params, sources, sources != 1, config, mesh=where) for where in (None, mesh)
    )
    np.testing.assert_array_equal(sharded.sequences, alone.sequences)


def test_beams_come_best_first_with_scores_of_their_own(mvp):
    _, params = mvp
    unforced = zoo.tiny_mvp(max_position_embeddings=24, forced_eos_token_id=None)
    model = modelzoo.MvpForConditionalGeneration(unforced)
    config = GenerationConfig(
        max_new_tokens=9,
        num_beams=4,
        num_return_sequences=3,
        eos_token_id=2,
        length_penalty=0.5,
        output_logprobs=True,
    )
    out = inference.generate(model, params, SOURCES, SOURCES != 1, config)
    assert out.sequences.shape[0] == 6
    assert out.logprobs is not None
    assert out.sequences_scores is not None
    num_new = out.lengths - 1
    np.testing.assert_allclose(out.sequences_scores, out.logprobs.sum(1) / num_new**0.5, rtol=1e-5)
    assert (np.diff(out.sequences_scores.reshape(2, 3)) <= 0).all()


def test_models_and_meshes_that_do_not_fit_are_refused():
    classifier = modelzoo.GPTJForSequenceClassification(modelzoo.get_config("tiny-gptj"))
    with pytest.raises(ValueError, match=r"^GPTJForSequenceClassification does not generate"):
        inference.generate(classifier, {}, [[1]])
    mesh, other = (parallel.make_mesh(data=n, devices=jax.devices()[:n]) for n in (1, 2))
    with pytest.raises(ValueError, match="two meshes"):
        inference.generate(FakeLM(), {}, [[1]], mesh=mesh, rules=parallel.make_rules(other))
    with pytest.raises(ValueError, match=r"^config is a dict: pass inference.GenerationConfig"):
        inference.generate(FakeLM(), {}, [[1]], config=cast(Any, {"max_new_tokens": 2}))


@pytest.fixture(scope="module")
def gptj():
    """A GPT-J with a vocabulary that no mesh divides, and logits at unit scale."""
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=97, initializer_range=0.12))
    return model, parallel.init_params(model, jax.random.key(7))


RAGGED = np.array([[11, 12, 13, 14, 15, 16], [0, 0, 0, 21, 22, 23], [0, 31, 32, 33, 34, 35]])


def test_prepared_parameters_give_the_same_and_pass_through(gptj):
    model, params = gptj
    prepared = inference.prepare(model, params)
    assert isinstance(prepared["trunk"]["layers"], tuple)
    again = inference.prepare(model, prepared)
    assert jax.tree.leaves(again)[0] is jax.tree.leaves(prepared)[0]
    config = GenerationConfig(max_new_tokens=6)
    one, two = (inference.generate(model, p, RAGGED, RAGGED > 0, config) for p in (params, prepared))
    np.testing.assert_array_equal(one.sequences, two.sequences)
    assert len(set(one.sequences[:, 6:].ravel().tolist())) > 6  # not one token over and over


def test_padding_side_and_bucket_do_not_change_tokens(gptj):
    model, params = gptj
    right = np.array([np.roll(row, -int((row == 0).sum())) for row in RAGGED])
    config = GenerationConfig(max_new_tokens=8, repetition_penalty=1.2)
    left = inference.generate(model, params, RAGGED, RAGGED > 0, config)
    out = inference.generate(model, params, right, right > 0, config)
    for row in range(3):
        assert left.sequences[row, 6:].tolist() == out.sequences[row, : out.lengths[row]].tolist()[-8:]


@pytest.mark.parametrize(
    ("axes", "sample"),
    [
        (dict(tensor=4, data=2), False),
        pytest.param(dict(data=2, fsdp=2, tensor=2), False, marks=pytest.mark.long),
        (dict(data=2, fsdp=2, tensor=2), True),
        pytest.param(dict(fsdp=8), False, marks=pytest.mark.long),
    ],
    ids=["tensor,data", "data,fsdp,tensor", "data,fsdp,tensor-sample", "fsdp"],
)
def test_sharded_tokens_equal_unsharded(gptj, axes, sample):
    model, params = gptj
    config = GenerationConfig(
        max_new_tokens=8, repetition_penalty=1.2, do_sample=sample, top_p=0.9, eos_token_id=3, pad_token_id=0
    )
    alone = inference.generate(model, params, RAGGED, RAGGED > 0, config)
    sharded = inference.generate(model, params, RAGGED, RAGGED > 0, config, mesh=parallel.make_mesh(**axes))
    np.testing.assert_array_equal(sharded.sequences, alone.sequences)
    np.testing.assert_array_equal(sharded.lengths, alone.lengths)


def test_padded_vocabulary_is_never_sampled(gptj):
    model, params = gptj
    config = GenerationConfig(
        max_new_tokens=16,
        do_sample=True,
        temperature=1e6,
        top_k=0,
        num_return_sequences=16,
        output_scores=True,
    )
    out = inference.generate(model, params, [[1]], config=config, mesh=parallel.make_mesh(tensor=4, data=2))
    assert out.scores is not None
    assert out.sequences.max() < 97
    assert out.scores.shape == (16, 16, 97)
    assert len(np.unique(out.sequences)) > 70  # all but uniform over 97 ids
