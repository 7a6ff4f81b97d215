"""The decode loop: prefill once, then one compiled while loop that owns the cache.

    prepared = inference.prepare(model, params)             # once: decoding wants one tree per layer
    out = inference.generate(model, prepared, ids, config=inference.GenerationConfig(max_new_tokens=64))

The loop knows no architecture: it calls `model.apply` with a cache and reads logits and the cache back. It
compiles once per batch size, prompt bucket and number of cache slots (`inference.prompts`), and per config
without its lengths. Row i draws from keys of its own, so what it samples does not depend on the rows
beside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh

import modelzoo
import parallel
from inference import sampling
from inference.generation_config import GenerationConfig
from inference.prompts import GenerateOutput, Prompts, prepare_prompts
from modelzoo import heads


class DecodeState(struct.PyTreeNode):
    """Everything the loop carries; donated from call to call.

    Attributes:
        tokens: int32 [B, S], prompt and new tokens; `cache.index` is the slot of the newest one, which the
            model has not read yet.
        positions: int32 [B], the newest token's position.
        finished: bool [B].
        rngs: keys [B], or None when greedy.
        history: what the logits processors look at.
        cache: of all tokens before the newest.
        scores: float32 [steps, B, V], or None.
    """

    tokens: jax.Array
    positions: jax.Array
    finished: jax.Array
    rngs: jax.Array | None
    history: sampling.History
    cache: modelzoo.Cache
    scores: jax.Array | None


def generate(
    model: modelzoo.Model,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    config: GenerationConfig = GenerationConfig(),
    mesh: Mesh | None = None,
    rng: jax.Array | None = None,
    rules: parallel.Rules | None = None,
) -> GenerateOutput:
    """Continues a batch of prompts.

    Args:
        model: a causal language model of the zoo.
        params: its parameters: canonical, or from `prepare`, which repeated calls should do once themselves.
        input_ids: integers [B, T]: lists, numpy or jax arrays.
        attention_mask: [B, T], non-zero where a token is real: left- or right-padded rows, or None (see
            `prompts.prepare_prompts`).
        config: how to choose tokens and when to stop.
        mesh: decode on this mesh; the batch is filled up to what its data axes divide, and cut again.
        rng: PRNG key of do_sample; None is jax.random.key(0), so the same call gives the same tokens.
        rules: the mesh's sharding rules, when they are not the default ones.

    Returns:
        Sequences, their lengths and, if asked for, scores.

    Raises:
        ValueError: prompts or config do not fit the model, or the model the mesh.
    """
    state, run, prompts = _start(model, params, input_ids, attention_mask, config, mesh, rng, rules)
    state = run(state, prompts.max_new)
    steps, num_rows, bucket = int(state.history.step), len(prompts.given), prompts.input_ids.shape[1]
    new_tokens = np.asarray(state.tokens)[:num_rows, bucket : bucket + steps]
    scores = None
    if state.scores is not None:
        scores = np.asarray(state.scores)[:steps, :num_rows, : model.config.vocab_size]
    return prompts.output(new_tokens, scores, config)


def stream(
    model: modelzoo.Model,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    config: GenerationConfig = GenerationConfig(),
    mesh: Mesh | None = None,
    rng: jax.Array | None = None,
    rules: parallel.Rules | None = None,
    chunk_size: int = 4,
) -> Iterator[np.ndarray]:
    """Yields the tokens that `generate` would return while they are made.

    Both programs are compiled before the first yield, so the time between yields is decoding alone.

    Args:
        chunk_size: steps per call of the compiled loop.
        All others: as `generate`.

    Yields:
        int32 [B, n], the next n new tokens of every row (pad_token_id where a row is finished): 1 from the
        prefill, then up to `chunk_size`.

    Raises:
        ValueError: as `generate`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: it is at least 1 step")
    state, run, prompts = _start(model, params, input_ids, attention_mask, config, mesh, rng, rules)
    state = run(state, 0)  # takes no step: compiles the loop
    num_rows, bucket = len(prompts.given), prompts.input_ids.shape[1]
    shown = 0
    while True:
        steps = int(state.history.step)
        yield np.asarray(state.tokens)[:num_rows, bucket + shown : bucket + steps]
        shown = steps
        if steps == prompts.max_new or bool(jnp.all(state.finished)):
            return
        state = run(state, min(steps + chunk_size, prompts.max_new))


def prepare(model: modelzoo.Model, params: Any, rules: parallel.Rules | None = None) -> Any:
    """Lays parameters out for decoding; `generate` does it at every call to parameters that are not.

    A decode step over stacked layers would copy each layer's slice before it reads it, at half the speed.
    While this runs both forms exist, so let go of the stacked one.

    Args:
        model: their model.
        params: the canonical tree.
        rules: of the mesh to place them on, or None.

    Returns:
        The same tree with `layers` as a tuple, on the mesh if there is one; on a CPU a head that is tied to the
        embedding table gets a transposed copy of it (`modelzoo.heads.untie`). Prepared parameters come back as they
        are.

    Raises:
        ValueError: the tree is not the model's, or the mesh does not divide it.
    """
    copy, params = _take_head_copy(model, params)
    if rules is not None:
        params = parallel.shard_params(params, model, rules)
    params = modelzoo.unstack_layers(params)
    if copy is not None:
        return dict(params, lm_head=dict(params.get("lm_head", {}), kernel=copy))
    if getattr(model.config, "tie_word_embeddings", False) and jax.default_backend() == "cpu":
        return heads.untie(params, cast(Any, model).trunk_class.table_path)
    return params


def _take_head_copy(model: modelzoo.Model, params: Any) -> tuple[Any, Any]:
    """The transposed table of a tied head, if the parameters were prepared and hold one, and the tree without it."""
    head = params.get("lm_head", {})
    if not getattr(model.config, "tie_word_embeddings", False) or "kernel" not in head:
        return None, params
    rest = {name: value for name, value in head.items() if name != "kernel"}
    others = {name: value for name, value in params.items() if name != "lm_head"}
    return head["kernel"], dict(others, lm_head=rest) if rest else others


def prefill(
    model: modelzoo.Model, params: Any, input_ids: jax.Array, attention_mask: jax.Array, num_slots: int
) -> tuple[jax.Array, jax.Array, modelzoo.Cache]:
    """Reads the prompts into a new cache.

    Args:
        model, params: of the generation, layers unstacked.
        input_ids: int32 [B, T], every row ending at the last slot.
        attention_mask: bool [B, T].
        num_slots: S.

    Returns:
        (logits [B, V] of the next token, its position [B], the cache).
    """
    count_BT = jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32)
    cache = modelzoo.unstack_layers(model.init_cache(input_ids.shape[0], num_slots))
    with jax.named_scope("prefill"):
        out: Any = model.apply(
            {"params": params},
            input_ids=input_ids,
            attention_mask=attention_mask,
            # transformers gives padding position 1
            **_positions(model, jnp.where(attention_mask, count_BT - 1, 1)),
            cache=cache,
            logits_to_keep=1,
        )
    return out.logits[:, -1], count_BT[:, -1], out.cache


def decode_step(
    model: modelzoo.Model, params: Any, token_B: jax.Array, positions_B: jax.Array, cache: modelzoo.Cache
) -> tuple[jax.Array, modelzoo.Cache]:
    """Reads one token of each row.

    Returns:
        (logits [B, V] of the next token, the cache).
    """
    with jax.named_scope("decode_step"):
        out: Any = model.apply(
            {"params": params},
            input_ids=token_B[:, None],
            **_positions(model, positions_B[:, None]),
            cache=cache,
        )
    return out.logits[:, -1], out.cache


def _positions(model: modelzoo.Model, positions_BT: jax.Array) -> dict[str, Any]:
    """position_ids, for a model that takes them: ALiBi counts for itself."""
    return {"position_ids": positions_BT} if "position_ids" in modelzoo.input_names(model) else {}


def _append(state: DecodeState, logits: jax.Array, config: GenerationConfig) -> DecodeState:
    """Chooses each row's next token from the logits and writes it down."""
    with jax.named_scope("choose"):
        logits = sampling.process_logits(logits, state.history, config)
        step, rngs, scores = state.history.step, None, state.scores
        if state.rngs is not None:
            rngs = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.rngs, step)
        token_B = jnp.where(state.finished, config.fill_id, sampling.choose(logits, rngs, config))
        if scores is not None:
            scores = lax.dynamic_update_slice(scores, logits[None], (step, 0, 0))
        finished = state.finished | jnp.isin(token_B, jnp.asarray(config.eos_ids, jnp.int32))
        return state.replace(
            tokens=lax.dynamic_update_slice(state.tokens, token_B[:, None], (0, state.cache.index)),
            finished=finished,
            history=state.history.append(token_B),
            scores=scores,
        )


@functools.partial(jax.jit, static_argnames=("model", "config", "num_slots", "num_scores", "rules"))
def _begin(
    model: modelzoo.Model,
    params: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    finished: jax.Array,
    rngs: jax.Array | None,
    history: sampling.History,
    *,
    config: GenerationConfig,
    num_slots: int,
    num_scores: int,
    rules: parallel.Rules | None,
) -> DecodeState:
    """Prefill and the first token."""
    logits, positions, cache = prefill(model, params, input_ids, attention_mask, num_slots)
    unused = ((0, 0), (0, num_slots - input_ids.shape[1]))
    tokens = jnp.pad(input_ids, unused, constant_values=config.fill_id)
    scores = jnp.zeros((num_scores, *logits.shape), jnp.float32) if num_scores else None
    if history.seen is not None:  # the mesh may have padded the vocabulary
        padding = logits.shape[1] - history.seen.shape[1]
        history = history.replace(seen=jnp.pad(history.seen, ((0, 0), (0, padding))))
    return _append(DecodeState(tokens, positions, finished, rngs, history, cache, scores), logits, config)


@functools.partial(jax.jit, static_argnames=("model", "config", "rules"), donate_argnames=("state",))
def _continue(
    model: modelzoo.Model,
    params: Any,
    state: DecodeState,
    until: jax.Array,
    *,
    config: GenerationConfig,
    rules: parallel.Rules | None,
) -> DecodeState:
    """Decodes until `until` tokens are generated, or all rows are finished."""

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.history.step < until) & ~jnp.all(state.finished)

    def body(state: DecodeState) -> DecodeState:
        token_B = lax.dynamic_slice_in_dim(state.tokens, state.cache.index, 1, axis=1)[:, 0]
        logits, cache = decode_step(model, params, token_B, state.positions, _loaded(state.cache))
        state = state.replace(cache=_carried(cache), positions=state.positions + 1)
        return _append(state, logits, config)

    state = lax.while_loop(unfinished, body, state.replace(cache=_carried(state.cache)))
    return state.replace(cache=_loaded(state.cache))


def _carried(cache: modelzoo.Cache) -> modelzoo.Cache:
    """A cache as the loop carries it: one of a single row without its batch dimension.

    XLA drops a dimension of 1 before it multiplies. While the loop carries it all the same, XLA on a CPU copies the
    whole cache four times in every step; `LayerCache.write` has its part in this.
    """
    if cache.mask.shape[0] > 1:
        return cache
    return dataclasses.replace(cache, layers=jax.tree.map(lambda slots: slots[0], cache.layers))


def _loaded(cache: modelzoo.Cache) -> modelzoo.Cache:
    """The inverse of `_carried`."""
    if cache.mask.shape[0] > 1:
        return cache
    return dataclasses.replace(cache, layers=jax.tree.map(lambda slots: slots[None], cache.layers))


def _start(
    model: modelzoo.Model,
    params: Any,
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    mesh: Mesh | None,
    rng: jax.Array | None,
    rules: parallel.Rules | None,
) -> tuple[DecodeState, Callable[[DecodeState, int], DecodeState], Prompts]:
    """Checks a request and prefills it.

    Returns:
        (the state after the first token, what continues a state until so many tokens, the prompts).
    """
    if model.task != "causal_lm":
        raise ValueError(f"{type(model).__name__} does not generate text: take the family's ...ForCausalLM")
    vocab_size = model.config.vocab_size
    prompts = prepare_prompts(input_ids, attention_mask, config, vocab_size, model.config.max_positions)
    rules = _rules(mesh, rules)
    params = prepare(model, params, rules)

    num_rows = len(prompts.given)
    num_fill = 0 if rules is None else -num_rows % rules.num_shards("act_batch")

    def place(rows: Any) -> jax.Array:
        """On the devices, with as many more rows (copies of the first) as make the mesh divide the batch."""
        rows = jnp.asarray(rows)
        if num_fill:
            rows = jnp.concatenate([rows, jnp.repeat(rows[:1], num_fill, axis=0)])
        return rows if rules is None else jax.device_put(rows, parallel.batch_sharding(rules))

    rngs = None
    if config.do_sample:
        rng = jax.random.key(0) if rng is None else rng
        rng = rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(rng)
        rngs = place(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(num_rows)))
    history = sampling.History(
        step=jnp.int32(0),
        min_new=jnp.int32(prompts.min_new),
        max_new=jnp.int32(prompts.max_new),
        seen=place(prompts.seen(vocab_size)) if config.repetition_penalty != 1.0 else None,
    )
    static = dict(model=model, config=config.loop_key(), rules=rules)

    def run(state: DecodeState, until: int) -> DecodeState:
        with parallel.use(rules):
            return _continue(params=params, state=state, until=jnp.int32(until), **static)

    with parallel.use(rules):
        state = _begin(
            params=params,
            input_ids=place(prompts.input_ids.astype(np.int32)),
            attention_mask=place(prompts.attention_mask),
            finished=jnp.arange(num_rows + num_fill) >= num_rows,
            rngs=rngs,
            history=history,
            num_slots=prompts.num_slots,
            num_scores=prompts.max_new if config.output_scores else 0,
            **static,
        )
    return state, run, prompts


def _rules(mesh: Mesh | None, rules: parallel.Rules | None) -> parallel.Rules | None:
    if mesh is None:
        return rules
    if rules is not None and rules.mesh != mesh:
        raise ValueError("mesh and rules.mesh are two meshes: pass one of them, or the same")
    return rules or parallel.make_rules(mesh)
