"""The compiled loop: prefill and the first token in one program, all other tokens in a second, a while loop.

Both know no architecture (`inference.forward`), and neither greedy decoding from sampling from beams: what chooses is
picked from the config when they are traced. The state is donated from call to call.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

import modelzoo
import parallel
from inference import beam, drafting, forward, group_beam, sampling, speculative, stopping
from inference.forward import carried, decode_step, encode, few_rows_options, loaded, map_rows, prefill
from inference.generation_config import GenerationConfig
from inference.speculative import newest


class DecodeState(struct.PyTreeNode):
    """Everything the loop carries.

    Attributes:
        history: the tokens, and what the logits processors look at; slot `history.end - 1` holds each row's newest
            token, which the model has not read yet.
        positions: int32 [B], the newest token's position.
        finished: bool [B].
        num_new: int32 [B], tokens of each row until it finished.
        rngs: keys [B], or [prompts] for beams, or None where nothing is drawn.
        cache: of all tokens before the newest.
        source_mask: bool [B, P], of an encoder-decoder's encoder, or None.
        scores, logits: float32 [steps, B, V], processed and as the model gave them, or None.
        logprobs: float32 [B, steps], the model's own, of each chosen token, or None (beams have theirs).
        beams: of a beam search, or None.
        draft_cache: of a model that guesses, or None.
        tally: of guesses, or None; with one, rows go on each at its own pace: step, end and index are [B].
    """

    history: sampling.History
    positions: jax.Array
    finished: jax.Array
    num_new: jax.Array
    rngs: jax.Array | None
    cache: modelzoo.Cache
    source_mask: jax.Array | None
    scores: jax.Array | None
    logits: jax.Array | None
    logprobs: jax.Array | None
    beams: beam.Beams | None
    draft_cache: modelzoo.Cache | None = None
    tally: speculative.Tally | None = None

    @property
    def is_over(self) -> jax.Array:
        """bool [], whether no row goes on."""
        return self.finished.all() if self.beams is None else ~self.beams.goes_on


class Batch(struct.PyTreeNode):
    """What a generation starts from; p prompts, of which each becomes `num_copies` rows.

    Attributes:
        input_ids, attention_mask: [p, T], what the decoder reads first, every row ending at the last slot.
        source_ids, source_mask: [p, P], an encoder-decoder's input, or None.
        history: of the prompts; its tokens are input_ids.
        finished: bool [p], rows that only fill the batch up.
        rngs: as the state's.
        stop_table: of stop strings, or None.
    """

    input_ids: jax.Array
    attention_mask: jax.Array
    source_ids: jax.Array | None
    source_mask: jax.Array | None
    history: sampling.History
    finished: jax.Array
    rngs: jax.Array | None
    stop_table: jax.Array | None


@functools.partial(
    jax.jit,
    static_argnames=("model", "config", "num_copies", "num_slots", "num_steps", "rules", "draft_model"),
)
def begin(
    model: modelzoo.Model,
    params: Any,
    batch: Batch,
    *,
    config: GenerationConfig,
    num_copies: int,
    num_slots: int,
    num_steps: int,
    rules: parallel.Rules | None,
    draft_model: modelzoo.Model | None = None,
    draft_params: Any = None,
) -> tuple[DecodeState, jax.Array | None]:
    """Prefill and the first token.

    Args:
        model, params: of the generation, layers unstacked.
        batch: checked prompts.
        config: its `loop_key`.
        num_copies: rows of each prompt: beams, or samples.
        num_slots: S, of the cache.
        num_steps: new tokens at most, or more.
        rules: in force; only so that another mesh is another program.
        draft_model, draft_params: of a model that guesses, or None.

    Returns:
        (the state, the prompts' log-probabilities float32 [p, T - 1] if asked for).
    """
    prompt_logprobs = None
    if batch.source_ids is not None:
        assert batch.source_mask is not None
        logits, positions, cache = encode(
            model, params, batch.source_ids, batch.source_mask, batch.input_ids, num_slots
        )
    elif config.output_prompt_logprobs:
        all_logits, positions, cache = prefill(
            model, params, batch.input_ids, batch.attention_mask, num_slots, all_logits=True
        )
        own = jax.nn.log_softmax(all_logits[:, :-1].astype(jnp.float32), axis=-1)
        prompt_logprobs = jnp.take_along_axis(own, batch.input_ids[:, 1:, None], axis=2)[..., 0]
        logits = all_logits[:, -1]
    else:
        logits, positions, cache = prefill(model, params, batch.input_ids, batch.attention_mask, num_slots)

    draft_cache = None
    if draft_model is not None and batch.source_ids is not None:
        assert batch.source_mask is not None
        source = (batch.source_ids, batch.source_mask, batch.input_ids)
        _, _, draft_cache = encode(draft_model, draft_params, *source, num_slots)
    elif draft_model is not None:
        prompt = (batch.input_ids, batch.attention_mask)
        _, _, draft_cache = prefill(draft_model, draft_params, *prompt, num_slots)

    def copy(rows: jax.Array) -> jax.Array:
        return jnp.repeat(rows, num_copies, axis=0) if num_copies > 1 else rows

    logits = copy(logits)
    (num_rows, vocab), history = logits.shape, batch.history
    assert history.tokens is not None
    unused = ((0, 0), (0, num_slots - history.tokens.shape[1]))
    history = history.replace(tokens=jnp.pad(history.tokens, unused, constant_values=config.fill_id))
    for name in ("seen", "counts"):  # the mesh may have padded the vocabulary
        value = getattr(history, name)
        if value is not None:
            history = history.replace(**{name: jnp.pad(value, ((0, 0), (0, vocab - value.shape[1])))})
    history = history.take(jnp.arange(num_rows) // num_copies) if num_copies > 1 else history

    def record(wanted: bool | None, *shape: int) -> jax.Array | None:
        return jnp.zeros(shape, jnp.float32) if wanted else None

    has_beams = config.num_beams > 1
    state = DecodeState(
        history=history,
        positions=copy(positions),
        finished=copy(batch.finished),
        num_new=jnp.zeros((num_rows,), jnp.int32),
        rngs=batch.rngs,
        cache=map_rows(cache, copy),
        source_mask=None if batch.source_mask is None else copy(batch.source_mask),
        scores=record(config.output_scores, num_steps, num_rows, vocab),
        logits=record(config.output_logits, num_steps, num_rows, vocab),
        logprobs=record(config.output_logprobs and not has_beams, num_rows, num_steps),
        beams=beam.start(history, num_rows // num_copies, num_steps, config) if has_beams else None,
        draft_cache=None if draft_cache is None else map_rows(draft_cache, copy),
    )
    state = append(state, logits, batch.stop_table, config)
    return speculative.by_row(state) if config.num_guesses else state, prompt_logprobs


@functools.cache
def proceed_program() -> Any:
    """`proceed`, compiled for the backend there is: made when it is first asked for, so that importing starts none."""
    return jax.jit(
        proceed,
        static_argnames=("model", "config", "rules", "draft_model"),
        donate_argnames=("state",),
        compiler_options=few_rows_options(),
    )


def proceed(
    model: modelzoo.Model,
    params: Any,
    state: DecodeState,
    until: jax.Array,
    stop_table: jax.Array | None,
    *,
    config: GenerationConfig,
    rules: parallel.Rules | None,
    draft_model: modelzoo.Model | None = None,
    draft_params: Any = None,
) -> DecodeState:
    """Decodes until `until` tokens are generated, or no row goes on."""
    # What the encoder left in the cache never changes: the loop reads it from outside.
    cross, source_mask = state.cache.cross, state.source_mask

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.history.step < until) & ~state.is_over

    def body(state: DecodeState) -> DecodeState:
        token_B = newest(state.history)
        cache = dataclasses.replace(loaded(state.cache), cross=cross)
        logits, cache = decode_step(model, params, token_B, state.positions, cache, source_mask)
        state = state.replace(cache=dataclasses.replace(cache, cross=None), positions=state.positions + 1)
        state = append(state, logits, stop_table, config)
        return state.replace(cache=carried(state.cache))

    own = dataclasses.replace(carried(state.cache), cross=None)
    state, drafted = state.replace(cache=own, source_mask=None), state.draft_cache
    if drafted is not None:
        state = state.replace(draft_cache=dataclasses.replace(carried(drafted), cross=None))
    if config.num_guesses:
        guesser: speculative.Guesser = speculative.Lookup(config)
        if draft_model is not None:
            assert drafted is not None
            guesser = drafting.Draft(draft_model, draft_params, config, drafted.cross, source_mask)
        state = speculative.proceed(
            model,
            params,
            state,
            until,
            guesser=guesser,
            num_guesses=config.num_guesses,
            append=lambda state, logits, *how: append(state, logits, stop_table, config, *how),
            cross=cross,
            source_mask=source_mask,
        )
    else:
        state = lax.while_loop(unfinished, body, state)
    if drafted is not None:
        assert state.draft_cache is not None
        drafted = dataclasses.replace(loaded(state.draft_cache), cross=drafted.cross)
    cache = dataclasses.replace(loaded(state.cache), cross=cross)
    return state.replace(cache=cache, draft_cache=drafted, source_mask=source_mask)


@functools.partial(jax.jit, static_argnames=("model", "num_slots", "fill_id", "draft_model"))
def grow(
    model: modelzoo.Model,
    state: DecodeState,
    num_slots: int,
    fill_id: int,
    draft_model: modelzoo.Model | None = None,
) -> DecodeState:
    """The same state with room for more tokens.

    Attention reads every slot, used or not, so a long generation begins with a short cache.

    Args:
        model: of the generation.
        state: between two calls of `proceed`.
        num_slots: of the cache from now on.
        fill_id: stands in slots of tokens that are not generated yet.
        draft_model: that guesses, or None.
    """
    have = state.cache.mask.shape[1]

    def pad(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.pad(array, [(0, new - old) for old, new in zip(array.shape, like.shape, strict=True)])

    def pad_text(tokens: jax.Array) -> jax.Array:
        unused = [(0, 0)] * (tokens.ndim - 1) + [(0, num_slots - have)]
        return jnp.pad(tokens, unused, constant_values=fill_id)

    def widen(model: modelzoo.Model, cache: modelzoo.Cache) -> modelzoo.Cache:
        larger = jax.eval_shape(lambda: forward.new_cache(model, cache.mask.shape[0], num_slots))
        layers = jax.tree.map(pad, cache.layers, larger.layers)
        return dataclasses.replace(cache, layers=layers, mask=pad(cache.mask, larger.mask))

    cache, draft_cache = widen(model, state.cache), state.draft_cache
    if draft_model is not None:
        assert draft_cache is not None
        draft_cache = widen(draft_model, draft_cache)
    history, beams = state.history, state.beams
    assert history.tokens is not None
    if beams is not None:
        beams = beams.replace(ended=beams.ended.replace(tokens=pad_text(beams.ended.tokens)))
    history = history.replace(tokens=pad_text(history.tokens))
    return state.replace(cache=cache, draft_cache=draft_cache, history=history, beams=beams)


def append(
    state: DecodeState,
    logits: jax.Array,
    stop_table: jax.Array | None,
    config: GenerationConfig,
    active: jax.Array | None = None,
    choose: Callable[[jax.Array, jax.Array | None], jax.Array] | None = None,
) -> DecodeState:
    """Chooses each row's next token from the logits [B, V] and writes it down.

    With beams, rows also change places: their cache, whole and with its batch dimension, goes along.

    Args:
        state: of the loop.
        logits: of the next tokens.
        stop_table: of stop strings, or None.
        config: of the generation.
        active: bool [B], the rows that take a token, none of them finished, where rows go on at their own pace;
            None is all.
        choose: takes tokens [B] of processed logits and keys [B]; None is `sampling.choose`.
    """
    with jax.named_scope("choose"):
        step, rngs = state.history.step, None
        if state.rngs is not None:
            rngs = jax.vmap(jax.random.fold_in, in_axes=(0, 0 if step.ndim else None))(state.rngs, step)
        state = state.replace(logits=_record(state.logits, logits, step, active))
        if config.num_beams > 1:
            return _append_beams(state, logits, rngs, stop_table, config)
        processed = sampling.process_logits(logits, state.history, config)
        token_B = sampling.choose(processed, rngs, config) if choose is None else choose(processed, rngs)
        token_B = jnp.where(state.finished, config.fill_id, token_B)
        taking = ~state.finished if active is None else active
        ends = jnp.isin(token_B, jnp.asarray(config.eos_ids, jnp.int32))
        history = state.history.append(token_B, active)
        if stop_table is not None:
            states, completes = stopping.step(stop_table, history.stop_states, token_B)
            assert history.stop_states is not None
            states = jnp.where(taking, states, history.stop_states)
            history, ends = history.replace(stop_states=states), ends | completes
        logprobs = state.logprobs
        if logprobs is not None:
            own = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
            chosen = jnp.take_along_axis(own, token_B[:, None], axis=1)
            logprobs = _record(logprobs.T[..., None], chosen, step, active)[..., 0].T
        return state.replace(
            finished=state.finished | (ends & taking),
            num_new=state.num_new + taking.astype(jnp.int32),
            history=history,
            scores=_record(state.scores, processed, step, active),
            logprobs=logprobs,
        )


def _append_beams(
    state: DecodeState,
    logits: jax.Array,
    rngs: jax.Array | None,
    stop_table: jax.Array | None,
    config: GenerationConfig,
) -> DecodeState:
    assert state.beams is not None
    shape = state.beams.scores.shape
    if config.num_beam_groups > 1:
        beams, moves, processed = group_beam.advance(state.beams, state.history, logits, config)
    else:
        beams, moves, processed = beam.advance(state.beams, state.history, logits, rngs, stop_table, config)

    def move(rows: jax.Array) -> jax.Array:
        return beam.take(rows.reshape(*shape, *rows.shape[1:]), moves.parents).reshape(rows.shape)

    parents = moves.parents + jnp.arange(shape[0], dtype=jnp.int32)[:, None] * shape[1]
    history, token_B = state.history.take(parents.reshape(-1)), moves.tokens.reshape(-1)
    if stop_table is not None:
        states, _ = stopping.step(stop_table, history.stop_states, token_B)
        history = history.replace(stop_states=states)
    # Rows of one prompt read the same encoder, so only their own tokens change places.
    own = map_rows(dataclasses.replace(state.cache, cross=None), move)
    return state.replace(
        beams=beams,
        history=history.append(token_B),
        cache=dataclasses.replace(own, cross=state.cache.cross),
        scores=_record(state.scores, processed, state.history.step),
    )


def _record(record: Any, values: jax.Array, step: jax.Array, active: jax.Array | None = None) -> Any:
    """Writes one step's values [B, V] into [steps, B, V] or None; of active rows alone, each at a step of its own."""
    if record is None:
        return None
    if active is not None:
        at = jnp.where(active, step, record.shape[0])  # past the end, where it is dropped
        return record.at[at, jnp.arange(len(values))].set(values.astype(record.dtype), mode="drop")
    return lax.dynamic_update_slice(record, values[None].astype(record.dtype), (step, 0, 0))
