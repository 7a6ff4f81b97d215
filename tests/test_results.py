"""What is read from a loop's last state."""

import jax.numpy as jnp
import numpy as np

from inference import GenerationConfig, results, speculative
from inference.loop import DecodeState
from inference.processors import History
from inference.prompts import prepare_prompts

IDS = [[5, 6, 7], [8, 9, 4]]


def finished(**fields):
    """The state after rows of 2 and 3 new tokens, one row more than was asked for."""
    tokens = np.zeros((3, 22), np.int32)
    tokens[:2, 16:19] = [[11, 2, 0], [12, 13, 14]]
    zero = jnp.int32(0)
    history = History(jnp.int32(3), zero, zero, tokens=jnp.asarray(tokens), end=jnp.int32(19))
    names = ("positions", "rngs", "cache", "source_mask", "scores", "logits", "logprobs", "beams")
    rest = dict.fromkeys(names) | dict(finished=jnp.ones(3, bool), num_new=jnp.array([2, 3, 3])) | fields
    return DecodeState(history=history, **rest)


def test_rows_are_cut_to_what_was_asked_for_and_padded():
    config = GenerationConfig(max_new_tokens=5, eos_token_id=2, pad_token_id=1)
    prompts = prepare_prompts(IDS, None, config, 40, None)
    records = dict(scores=jnp.ones((16, 3, 48)), logprobs=jnp.full((3, 16), -0.5))
    tally = speculative.Tally(jnp.int32(2), jnp.array([4, 3, 9]), jnp.array([1, 0, 9]))
    state = finished(**records, tally=tally)
    out = results.read_output(state, prompts, config, 40, None)
    assert out.sequences.tolist() == [[5, 6, 7, 11, 2, 1], [8, 9, 4, 12, 13, 14]]
    assert out.lengths.tolist() == [5, 6]
    assert out.scores.shape == (3, 2, 40)
    assert out.logprobs.tolist() == [[-0.5, -0.5, 0], [-0.5] * 3]
    assert (out.num_passes, out.num_guessed.tolist(), out.num_accepted.tolist()) == (2, [4, 3], [1, 0])
    assert results.read_tokens(state, prompts, config)[:, :3].tolist() == [[11, 2, 0], [12, 13, 14]]


def test_what_was_not_asked_for_is_none():
    config = GenerationConfig(max_new_tokens=5)
    prompts = prepare_prompts(IDS[:1], None, config, 40, None)
    out = results.read_output(finished(), prompts, config, 40, None)
    assert out.sequences.tolist() == [[5, 6, 7, 11, 2]]
    assert (out.scores, out.logprobs, out.prompt_logprobs, out.num_passes) == (None,) * 4
    assert results.copies(GenerationConfig(num_beams=4, num_return_sequences=2)) == 4
