"""Text from a model: prompts are checked and bucketed, read once, and continued in one compiled loop.

    prepared = inference.prepare(model, params)             # once: decoding wants one tree per layer
    out = inference.generate(model, prepared, ids, config=inference.GenerationConfig(max_new_tokens=64))

Decoder-only models and encoder-decoders, greedy, sampled and with beams: one loop (`inference.loop`). It compiles once
per batch size, prompt bucket and number of cache slots (`inference.prompts`), and per config without its lengths. Row i
draws from keys of its own, so what it samples does not depend on the rows beside it.
"""

from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import modelzoo
import parallel
from inference import loop, processors, stopping
from inference.drafting import check_draft
from inference.generation_config import GenerationConfig
from inference.preparing import prepare
from inference.prompts import GenerateOutput, Prompts, bucket_length, prepare_prompts, prepare_sources
from inference.results import copies, read_output, read_tokens
from modelzoo import registry

FIRST_SLOTS = 256
"""Of a cache that grows; it doubles when it is full. Attention reads all of its slots at every step."""
BY_SLOT = "unshifted_lm"
"""The task of MVP's decoder alone, whose positions are the slots that tokens stand in, padding included."""
SEQ2SEQ = "seq2seq_lm"
"""The task of a model with an encoder that generates."""
WRITING = ("causal_lm", BY_SLOT, SEQ2SEQ)
"""The tasks of models that generate."""


def generate(
    model: modelzoo.Model,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    config: GenerationConfig = GenerationConfig(),
    mesh: Mesh | None = None,
    rng: jax.Array | None = None,
    rules: parallel.Rules | None = None,
    tokenizer: Any = None,
    draft: tuple[modelzoo.Model, Any] | None = None,
    decoder_input_ids: Any = None,
) -> GenerateOutput:
    """Continues a batch of prompts, or writes what an encoder-decoder makes of its input.

    Args:
        model: a causal language model of the zoo, or an encoder-decoder with a language-model head.
        params: its parameters: canonical, or from `prepare`, which repeated calls should do once themselves.
        input_ids: integers [B, T]: lists, numpy or jax arrays. An encoder-decoder's encoder reads them.
        attention_mask: [B, T], non-zero where a token is real: left- or right-padded rows, or None (see
            `prompts.prepare_prompts`).
        config: how to choose tokens and when to stop.
        mesh: decode on this mesh; the batch is filled up to what its data axes divide, and cut again.
        rng: PRNG key of do_sample; None is jax.random.key(0), so the same call gives the same tokens.
        rules: the mesh's sharding rules, when they are not the default ones.
        tokenizer: of the tokens, a tokenizers.Tokenizer or a transformers tokenizer; stop_strings need it.
        draft: (model, params) of a smaller model of the same vocabulary, which guesses tokens that this one then
            checks many at a time (`inference.drafting`): the same tokens without sampling, the same distribution with.
        decoder_input_ids: integers [B, T], what an encoder-decoder's output begins with; None is its start token,
            which is put before them where they have none. Each new length compiles.

    Returns:
        Sequences, their lengths and what else the config asks for.

    Raises:
        ValueError: prompts, config or draft do not fit the model, or the model the mesh.
    """
    given = (input_ids, attention_mask, decoder_input_ids)
    run = _start(model, params, given, config, mesh, rng, rules, tokenizer, draft, grows=True)
    run.proceed(run.prompts.max_new)
    return run.output()


def stream(
    model: modelzoo.Model,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    config: GenerationConfig = GenerationConfig(),
    mesh: Mesh | None = None,
    rng: jax.Array | None = None,
    rules: parallel.Rules | None = None,
    tokenizer: Any = None,
    draft: tuple[modelzoo.Model, Any] | None = None,
    decoder_input_ids: Any = None,
    chunk_size: int = 4,
) -> Generator[np.ndarray, None, GenerateOutput]:
    """Yields the tokens that `generate` would return while they are made.

    Both programs are compiled before the first yield, so the time between yields is decoding alone.

    Args:
        chunk_size: tokens per call of the compiled loop; guesses do not reach past it.
        All others: as `generate`.

    Yields:
        int32 [B, n], the next n new tokens of every row (pad_token_id where a row is finished): 1 from the
        prefill, then up to `chunk_size`.

    Returns:
        What `generate` would have returned, as the value of the generator.

    Raises:
        ValueError: as `generate`; beams, of which none is certain before the end.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: it is at least 1 step")
    if config.num_beams > 1:
        raise ValueError(f"num_beams = {config.num_beams}: beams cannot be streamed, use generate")
    given = (input_ids, attention_mask, decoder_input_ids)
    run = _start(model, params, given, config, mesh, rng, rules, tokenizer, draft)
    run.proceed(0)  # takes no step: compiles the loop
    shown = 0
    while True:
        steps = run.num_steps
        yield run.new_tokens()[:, shown:steps]
        shown = steps
        if steps == run.prompts.max_new or run.is_over:
            return run.output()
        run.proceed(min(steps + chunk_size, run.prompts.max_new))


class _Run:
    """One generation under way: its state, what continues it, and how its results are read.

    Attributes:
        prompts: as they were checked.
        config: with the model's special tokens.
    """

    def __init__(
        self,
        prompts: Prompts,
        config: GenerationConfig,
        vocab_size: int,
        started: tuple[loop.DecodeState, jax.Array | None],
        proceed: Callable[[loop.DecodeState, int], loop.DecodeState],
        grow: Callable[[loop.DecodeState], loop.DecodeState],
    ):
        self.prompts, self.config = prompts, config
        self._vocab_size, self._proceed, self._grow = vocab_size, proceed, grow
        self._state, self._prompt_logprobs = started

    def proceed(self, until: int) -> None:
        """Decodes until so many tokens, or until all rows have finished."""
        while True:
            room = self._state.cache.mask.shape[1] - self.prompts.input_ids.shape[1]
            if until > room:  # it will grow: guesses need not stop at its end
                room = max(1, room - self.config.num_guesses)
            self._state = self._proceed(self._state, min(until, room))
            if until <= room or self.is_over:
                return
            self._state = self._grow(self._state)

    @property
    def num_steps(self) -> int:
        """Tokens generated so far."""
        return int(np.max(self._state.history.step))

    @property
    def is_over(self) -> bool:
        """Whether no row goes on."""
        return bool(self._state.is_over)

    def new_tokens(self) -> np.ndarray:
        """int32 [R, S - T], the slots after the prompt."""
        return read_tokens(self._state, self.prompts, self.config)

    def output(self) -> GenerateOutput:
        """The results, on the host."""
        return read_output(self._state, self.prompts, self.config, self._vocab_size, self._prompt_logprobs)


def _start(
    model: modelzoo.Model,
    params: Any,
    given: tuple[Any, Any, Any],
    config: GenerationConfig,
    mesh: Mesh | None,
    rng: jax.Array | None,
    rules: parallel.Rules | None,
    tokenizer: Any,
    draft: tuple[modelzoo.Model, Any] | None,
    grows: bool = False,
) -> _Run:
    """Checks a request and prefills it, into a cache that grows or into one of the final length."""
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"config is a {type(config).__name__}: pass inference.GenerationConfig(...)")
    has_encoder = model.task == SEQ2SEQ
    if model.task not in WRITING:
        others = registry.relatives(type(model), WRITING)
        raise ValueError(f"{type(model).__name__} does not generate text: take {others}")
    if config.stop_strings and config.num_beam_groups > 1:
        raise ValueError("stop_strings do not end groups of beams: set num_beam_groups to 1")
    config = config.for_model(model.config, has_encoder)
    vocab_size, window = model.config.vocab_size, model.config.max_positions
    input_ids, attention_mask, decoder_input_ids = given
    if decoder_input_ids is not None and not has_encoder:
        raise ValueError(
            f"decoder_input_ids: {type(model).__name__} has no encoder, its text goes into input_ids"
        )

    def check(window: int | None) -> Prompts:
        rows = (input_ids, attention_mask, config, vocab_size, window)
        if has_encoder:
            return prepare_sources(*rows, decoder_input_ids)
        return prepare_prompts(*rows, in_place=model.task == BY_SLOT)

    prompts = check(window)
    config = check_draft(model, draft, config, prompts.num_tokens)
    if draft is not None and draft[0].config.max_positions is not None:
        window = min(draft[0].config.max_positions, window or draft[0].config.max_positions)
        prompts = check(window)
    rules = _rules(mesh, rules)
    stop_table = None
    if config.stop_strings:
        stop_table = stopping.make_table(tokenizer, config.stop_strings, vocab_size)
    params = prepare(model, params, rules)
    drafting: dict[str, Any] = {}
    if draft is not None:
        drafting = dict(draft_model=draft[0], draft_params=prepare(*draft, rules))

    num_fill = 0 if rules is None else -len(prompts.given) % rules.num_shards("act_batch")
    batch = _batch(prompts, config, vocab_size, has_encoder, rng, rules, num_fill, stop_table)
    static: dict[str, Any] = dict(model=model, config=config.loop_key(), rules=rules)

    def proceed(state: loop.DecodeState, until: int) -> loop.DecodeState:
        with parallel.use(rules):
            return loop.proceed_program()(
                params=params,
                state=state,
                until=jnp.int32(until),
                stop_table=batch.stop_table,
                **static,
                **drafting,
            )

    def grow(state: loop.DecodeState) -> loop.DecodeState:
        wider = min(num_slots, 2 * state.cache.mask.shape[1])
        with parallel.use(rules):
            return loop.grow(model, state, wider, config.fill_id, drafting.get("draft_model"))

    num_slots = _num_slots(prompts, config, window)
    first_slots = (
        max(FIRST_SLOTS, bucket_length(prompts.input_ids.shape[1] + FIRST_SLOTS // 4)) if grows else num_slots
    )
    with parallel.use(rules):
        started = loop.begin(
            params=params,
            batch=batch,
            num_copies=copies(config),
            num_slots=min(num_slots, first_slots),
            num_steps=bucket_length(prompts.max_new) if _records(config) else 0,
            **static,
            **drafting,
        )
    return _Run(prompts, config, vocab_size, started, proceed, grow)


def _num_slots(prompts: Prompts, config: GenerationConfig, window: int | None) -> int:
    """The cache's slots, with room for guesses where the window leaves it."""
    if not config.num_guesses:
        return prompts.num_slots
    wanted = bucket_length(prompts.input_ids.shape[1] + prompts.max_new + config.num_guesses)
    return wanted if window is None else min(wanted, window)


def _records(config: GenerationConfig) -> bool:
    """Whether the loop keeps something of every step."""
    wanted = (config.output_scores, config.output_logits, config.output_logprobs)
    return config.num_beams > 1 or any(wanted)


def _batch(
    prompts: Prompts,
    config: GenerationConfig,
    vocab_size: int,
    has_encoder: bool,
    rng: jax.Array | None,
    rules: parallel.Rules | None,
    num_fill: int,
    stop_table: np.ndarray | None,
) -> loop.Batch:
    """The prompts on the devices, with `num_fill` more (copies of the first) that make the mesh divide the batch."""

    def place(rows: Any) -> jax.Array:
        rows = jnp.asarray(rows)
        if num_fill:
            rows = jnp.concatenate([rows, jnp.repeat(rows[:1], num_fill, axis=0)])
        return rows if rules is None else jax.device_put(rows, parallel.batch_sharding(rules))

    num_prompts, rngs = len(prompts.given), None
    if config.do_sample:
        rng = jax.random.key(0) if rng is None else rng
        rng = rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(rng)
        # One key a row; beams are drawn together. Rows that fill the batch up come last, whatever they draw.
        per_prompt = 1 if config.num_beams > 1 else config.num_return_sequences
        numbers = jnp.arange((num_prompts + num_fill) * per_prompt)
        rngs = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, numbers)
        rngs = rngs if rules is None else jax.device_put(rngs, parallel.batch_sharding(rules))
    input_ids = place(prompts.input_ids.astype(np.int32))
    source_ids = place(prompts.source_ids.astype(np.int32))
    asks_source = config.encoder_repetition_penalty != 1.0 or config.encoder_no_repeat_ngram_size
    asks_source = asks_source or (has_encoder and config.prompt_lookup_num_tokens)
    counts = config.frequency_penalty or config.presence_penalty
    states = None
    if stop_table is not None:
        # A text may begin in the prompt.
        rows = zip(prompts.given, prompts.given_mask, strict=True)
        states = place(np.array([stopping.run(stop_table, row[real]) for row, real in rows], np.int32))
    history = processors.History(
        step=jnp.int32(0),
        min_new=jnp.int32(prompts.min_new),
        max_new=jnp.int32(prompts.max_new),
        seen=place(prompts.seen(vocab_size)) if config.repetition_penalty != 1.0 else None,
        counts=place(np.zeros((num_prompts, vocab_size), np.int32)) if counts else None,
        prompt_length=jnp.int32(prompts.given.shape[1]),
        tokens=input_ids,
        first=place(prompts.first),
        end=jnp.int32(input_ids.shape[1]),
        source=source_ids if asks_source else None,
        source_real=place(prompts.source_mask) if asks_source else None,
        stop_states=states,
        vocab_size=vocab_size,
    )
    return loop.Batch(
        input_ids=input_ids,
        attention_mask=place(prompts.attention_mask),
        source_ids=source_ids if has_encoder else None,
        source_mask=place(prompts.source_real) if has_encoder else None,
        history=history,
        finished=jnp.arange(num_prompts + num_fill) >= num_prompts,
        rngs=rngs,
        stop_table=None if stop_table is None else jnp.asarray(stop_table),
    )


def _rules(mesh: Mesh | None, rules: parallel.Rules | None) -> parallel.Rules | None:
    if mesh is not None and rules is not None and rules.mesh != mesh:
        raise ValueError("mesh and rules.mesh are two meshes: pass one of them, or the same")
    if rules is None and mesh is not None:
        rules = parallel.make_rules(mesh)
    return None if rules is None else rules.for_decoding()
