"""What a generation has given, read from its last state to the host."""

from typing import Any

import jax
import numpy as np

from inference.generation_config import GenerationConfig
from inference.loop import DecodeState
from inference.prompts import GenerateOutput, Prompts


def copies(config: GenerationConfig) -> int:
    """Rows that the loop holds for each prompt."""
    return config.num_beams if config.num_beams > 1 else config.num_return_sequences


def read_tokens(state: DecodeState, prompts: Prompts, config: GenerationConfig) -> np.ndarray:
    """int32 [R, S - T], the slots after the prompts of the rows that were asked for."""
    assert state.history.tokens is not None
    num_rows = len(prompts.given) * copies(config)
    return np.asarray(state.history.tokens)[:num_rows, prompts.input_ids.shape[1] :]


def read_output(
    state: DecodeState,
    prompts: Prompts,
    config: GenerationConfig,
    vocab_size: int,
    prompt_logprobs: jax.Array | None,
) -> GenerateOutput:
    """The results.

    Args:
        state: of the loop, at the end.
        prompts: that it began with.
        config: of the generation.
        vocab_size: without padding.
        prompt_logprobs: float32 [p, T - 1], or None.
    """
    num_rows, steps = len(prompts.given) * copies(config), int(np.max(state.history.step))
    records: dict[str, Any] = {}
    for name in ("scores", "logits"):
        record = getattr(state, name)
        if record is not None:
            records[name] = np.asarray(record)[:steps, :num_rows, :vocab_size]
    if prompt_logprobs is not None:
        records["prompt_logprobs"] = prompts.as_given(np.asarray(prompt_logprobs)[: len(prompts.given)])
    if state.beams is not None:
        return _best_beams(state, prompts, config, records)
    num_new = np.asarray(state.num_new)[:num_rows]
    sequences, lengths = prompts.sequences(read_tokens(state, prompts, config), num_new, config.fill_id)
    if state.logprobs is not None:
        logprobs = np.asarray(state.logprobs)[:num_rows, : num_new.max()]
        records["logprobs"] = np.where(np.arange(num_new.max()) < num_new[:, None], logprobs, 0)
    if state.tally is not None:
        records["num_passes"] = int(state.tally.passes)
        records["num_guessed"] = np.asarray(state.tally.checked)[:num_rows]
        records["num_accepted"] = np.asarray(state.tally.accepted)[:num_rows]
    return GenerateOutput(sequences, lengths, **records)


def _best_beams(
    state: DecodeState, prompts: Prompts, config: GenerationConfig, records: dict[str, Any]
) -> GenerateOutput:
    """The best hypotheses of each prompt."""
    assert state.beams is not None
    num_prompts, num_kept = len(prompts.given), config.num_return_sequences
    ended: Any = jax.tree.map(lambda leaf: np.asarray(leaf)[:num_prompts], state.beams.ended)
    best = np.argsort(-ended.scores, axis=1, kind="stable")[:, :num_kept]
    ended = jax.tree.map(lambda leaf: leaf[np.arange(num_prompts)[:, None], best], ended)
    ended = jax.tree.map(lambda leaf: leaf.reshape(num_prompts * num_kept, *leaf.shape[2:]), ended)
    new_tokens = ended.tokens[:, prompts.input_ids.shape[1] :]
    fill = config.fill_id
    if config.num_beam_groups == 1 and config.eos_ids:
        # transformers' search takes a pad_token_id of 0 for none
        fill = config.pad_token_id or config.eos_ids[0]
    sequences, lengths = prompts.sequences(new_tokens, ended.lengths, fill)
    steps = int(ended.lengths.max())
    if config.output_logprobs:
        records["logprobs"] = ended.logprobs[:, :steps]
    return GenerateOutput(
        sequences,
        lengths,
        sequences_scores=ended.scores,
        beam_indices=ended.indices[:, :steps],
        **records,
    )
