"""Every logits processor, stop string and record of generation against transformers' (torch, eager)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import inference
from inference import GenerationConfig, sampling
from tests.parity.generation import EOS, PAD, VOCAB, assert_same, batch, both, every_kind, every_writer, pair

ENDS = [EOS, 7, 33]
PROCESSORS: list[dict[str, Any]] = [
    dict(repetition_penalty=1.5),
    dict(encoder_repetition_penalty=1.7),
    dict(no_repeat_ngram_size=2),
    dict(encoder_no_repeat_ngram_size=1),
    dict(bad_words_ids=[[20], [33, 7], [5, 6, 8], [EOS]], eos_token_id=EOS),
    dict(sequence_bias={(12,): 3.0, (12, 40): 5.0, (40, 12, 13): -2.0}),
    dict(begin_suppress_tokens=list(range(40)), suppress_tokens=[50, 51]),
    dict(forced_bos_token_id=13, begin_suppress_tokens=list(range(0, 90, 2)), forced_eos_token_id=[3, 4]),
    dict(min_new_tokens=9, eos_token_id=ENDS),
    dict(min_length=17, eos_token_id=ENDS),
    # Few tokens: the penalty multiplies a logit, and its rounding, by 1.3 for each beyond the fourth.
    dict(exponential_decay_length_penalty=(4, 1.3), eos_token_id=EOS, max_new_tokens=10),
    dict(remove_invalid_values=True, renormalize_logits=True, suppress_tokens=[3]),
    dict(
        sequence_bias={(12,): 2.0, (12, 40): 4.0},
        encoder_repetition_penalty=0.8,
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        encoder_no_repeat_ngram_size=2,
        bad_words_ids=[[8], [40, 41]],
        min_new_tokens=5,
        remove_invalid_values=True,
        exponential_decay_length_penalty=(3, 1.1),
        suppress_tokens=[9],
        begin_suppress_tokens=[10, 12],
        renormalize_logits=True,
        eos_token_id=ENDS,
    ),
]


@pytest.mark.parametrize("fields", PROCESSORS, ids=str)
@every_kind()
def test_greedy(name, fields):
    out, want = both(name, **{"max_new_tokens": 20, **fields})
    assert_same(out, want)


@every_writer()
def test_all_of_them_at_once(name):
    out, want = both(name, max_new_tokens=20, **PROCESSORS[-1])
    assert_same(out, want)


@pytest.mark.parametrize("fields", [PROCESSORS[2], PROCESSORS[4], PROCESSORS[5], PROCESSORS[10]], ids=str)
@every_kind()
def test_beams(name, fields):
    out, want = both(name, **{"max_new_tokens": 14, "num_beams": 3, **fields})
    assert_same(out, want)


WARPERS: list[dict[str, Any]] = [
    dict(top_k=0, typical_p=0.4),
    dict(top_k=0, typical_p=0.95),
    dict(top_k=0, epsilon_cutoff=0.02),
    dict(top_k=0, eta_cutoff=0.05),
    dict(
        top_k=40, top_p=0.95, min_p=0.01, typical_p=0.9, epsilon_cutoff=1e-3, eta_cutoff=2e-3, temperature=1.4
    ),
]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("fields", WARPERS, ids=str)
def test_the_distribution_that_is_sampled(fields, num_beams):
    check_distribution("GPTJForCausalLM", num_beams=num_beams, **fields)


@every_writer()
def test_the_distribution_that_every_class_samples(name):
    """Through all processors and all warpers."""
    check_distribution(name, **WARPERS[-1], **PROCESSORS[-1] | dict(min_new_tokens=1))


def check_distribution(name: str, **fields: Any) -> None:
    out, want = both(name, max_new_tokens=1, do_sample=True, **{"eos_token_id": ENDS, **fields})
    theirs = torch.softmax(want.scores[0], dim=-1).numpy()
    np.testing.assert_allclose(jax.nn.softmax(out.scores[0], axis=-1), theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("min_keep", [1, 4])
@pytest.mark.parametrize("size", [50, 5000])
def test_truncations_keep_the_same_tokens(size, min_keep):
    logits = 4 * np.random.default_rng(size).standard_normal((8, size)).astype(np.float32)
    logits[:, ::7] = -np.inf
    warpers: dict[Any, Any] = {
        transformers.TopPLogitsWarper: (sampling.keep_top_p, (0.1, 0.5, 0.9, 0.99)),
        transformers.MinPLogitsWarper: (sampling.keep_min_p, (0.02, 0.3, 0.9)),
        transformers.TypicalLogitsWarper: (sampling.keep_typical, (0.1, 0.5, 0.9, 0.99)),
        transformers.EpsilonLogitsWarper: (sampling.keep_above, (1e-4, 0.01, 0.3)),
        transformers.EtaLogitsWarper: (sampling.keep_eta, (1e-4, 0.01, 0.3)),
    }
    for warper, (ours, values) in warpers.items():
        for value in values:
            want = warper(value, min_tokens_to_keep=min_keep)(None, torch.tensor(logits)).numpy()
            out = np.asarray(ours(jnp.asarray(logits), value, min_keep))
            np.testing.assert_array_equal(out, want, err_msg=f"{warper.__name__}({value})")


@every_kind()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_logits_and_log_probabilities(name, num_beams):
    fields: dict[str, Any] = dict(
        max_new_tokens=9, num_beams=num_beams, output_logits=True, eos_token_id=ENDS
    )
    fields["suppress_tokens"] = [5, 6]
    theirs, ours, params = pair(name)
    ids, mask = batch(name)
    given = dict(return_dict_in_generate=True, output_scores=True, pad_token_id=PAD)
    want: Any = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **given, **fields)
    config = GenerationConfig(**fields, pad_token_id=PAD, output_logprobs=True)
    out = inference.generate(ours, params, ids, mask, config)
    np.testing.assert_array_equal(out.sequences, want.sequences)
    assert out.logits is not None
    logits = np.stack([step.numpy() for step in want.logits])
    np.testing.assert_allclose(out.logits, logits, atol=2e-5, rtol=2e-6)
    own = [torch.log_softmax(step, dim=-1) for step in want.logits]
    beams = None if num_beams == 1 else want.beam_indices
    chosen = theirs.compute_transition_scores(want.sequences, own, beams).numpy()
    new = out.sequences[:, -chosen.shape[1] :]
    real = np.arange(chosen.shape[1]) < (out.lengths - out.sequences.shape[1] + new.shape[1])[:, None]
    assert out.logprobs is not None
    np.testing.assert_allclose(out.logprobs[real], chosen[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_log_probabilities(side):
    theirs, ours, params = pair("BloomForCausalLM")
    ids, mask = batch("BloomForCausalLM")
    if side == "right":
        shift = [-int((row == 0).sum()) for row in mask]
        ids, mask = (np.stack([np.roll(r, s) for r, s in zip(a, shift, strict=True)]) for a in (ids, mask))
    config = GenerationConfig(max_new_tokens=2, output_prompt_logprobs=True, pad_token_id=PAD)
    out = inference.generate(ours, params, ids, mask, config).prompt_logprobs
    assert out is not None
    for row, real in enumerate(mask.astype(bool)):
        prompt = torch.tensor(ids[row, real][None])
        with torch.no_grad():
            own = torch.log_softmax(theirs(prompt).logits[0], dim=-1)
        want = own[:-1].gather(1, prompt[0, 1:, None])[:, 0].numpy()
        places = np.flatnonzero(real)
        np.testing.assert_allclose(out[row, places[1:]], want, atol=2e-5, rtol=0)
        assert np.isnan(np.delete(out[row], places[1:])).all()


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer of as many tokens as the models have."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:80]
    words = letters + [a + b for a in letters[40:57] for b in letters[50:51]]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words[:VOCAB])}, [], unk_token=letters[0]))
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@every_kind()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_strings(name, num_beams, tokenizer):
    length_penalty = -1.0  # beams that a stop string ends score best
    plain, _ = both(name, max_new_tokens=20, num_beams=num_beams, length_penalty=length_penalty)
    texts = tokenizer.convert_ids_to_tokens(plain.sequences[0, -20:].tolist())
    other = tokenizer.convert_ids_to_tokens(plain.sequences[1, -20:].tolist())
    stops = [texts[8] + texts[9][:1], other[5]]
    out, want = both(
        name,
        max_new_tokens=20,
        num_beams=num_beams,
        length_penalty=length_penalty,
        stop_strings=stops,
        tokenizer=tokenizer,
        eos_token_id=EOS,
    )
    assert_same(out, want)
    assert out.lengths.min() < plain.lengths.min()
