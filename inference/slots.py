"""The engine's programs: one cache of R slots, into which single prompts are read while all rows decode.

A row's tokens stand at the slots 0, 1, ... of its part of the cache: a slot is a position, and what lies behind a row's
newest token, left by an earlier request or by padding, is hidden by causality alone. Rows that are idle compute too,
and write into the slot behind their last token, which nobody reads.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

import modelzoo
import parallel
from inference.forward import few_rows_options
from inference.row_sampling import Chosen, RowParams, choose_rows, with_logprobs
from modelzoo.axes import constrain
from modelzoo.layers.cache import Cache

FEW = 33
"""Up to so many tokens in one call, the ids of a chunk with the one that follows, `few_rows_options` pays."""


class SlotState(struct.PyTreeNode):
    """What lives on the devices from step to step; donated to every program.

    Attributes:
        layers: a tuple of L LayerCache with arrays [R, K, S, ...].
        tokens: int32 [R], each row's newest token, which the model has not read yet.
        seen: bool [R, V], tokens of prompt and output; kept up for rows that have a penalty.
        counts: int32 [R, V], how often the row generated each token.
    """

    layers: Any
    tokens: jax.Array
    seen: jax.Array
    counts: jax.Array

    @property
    def num_slots(self) -> int:
        """S, the tokens that a row can hold at present."""
        return jax.tree.leaves(self.layers)[0].shape[2]


class Where(struct.PyTreeNode):
    """What the host says about every row at a step.

    Attributes:
        index: int32 [R], tokens that the cache holds of it: the position of the next.
        step: int32 [R], tokens that it has generated.
        active: bool [R], whether it is generating.
    """

    index: Any
    step: Any
    active: Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs for one model on one mesh.

    Attributes:
        model: a causal language model.
        rules: of the mesh, or None.
    """

    model: modelzoo.Model
    rules: parallel.Rules | None = None

    def init(self, params: Any, num_rows: int, num_slots: int) -> SlotState:
        """An empty state of R rows with S slots."""
        with parallel.use(self.rules):
            return _init(self, num_rows, num_slots, params)

    def resize(self, state: SlotState, num_slots: int) -> SlotState:
        """The same state with room for more or fewer tokens a row."""
        with parallel.use(self.rules):
            return _resize(self, num_slots, state)

    def copy(self, state: SlotState, source: int, target: int) -> SlotState:
        """Copies all keys and values of one row to another."""
        with parallel.use(self.rules):
            return _copy(self, state, jnp.int32(source), jnp.int32(target))

    def remember(self, state: SlotState, row: int, seen: Any) -> SlotState:
        """Sets what a row's penalties know: the prompt's tokens, bool [V], and no output."""
        with parallel.use(self.rules):
            row_seen = jnp.pad(seen, (0, state.seen.shape[1] - len(seen)))
            told, counts = _remember(self, state.seen, state.counts, jnp.int32(row), row_seen)
            return state.replace(seen=told, counts=counts)

    def read(
        self, params: Any, state: SlotState, row_params: RowParams, ids: Any, place: Any, score: bool = False
    ) -> tuple[SlotState, Chosen, Chosen | None]:
        """Reads a chunk of one row's prompt, and chooses the token after it.

        Args:
            params: prepared.
            state: is donated.
            row_params: of all rows.
            ids: int32 [T + 1], the chunk, filled up to T, and behind the last of its tokens the one that follows.
            place: int32 [4]: the row, the slot of the chunk's first token, how many of its tokens are real, and whether
                it is the prompt's last chunk.
            score: also say how probable each token of the prompt was.

        Returns:
            (state, the row's next token as a batch of one, log-probabilities [T] of ids[1:] or None).
        """
        with parallel.use(self.rules):
            return _read(len(ids) <= FEW)(self, score, params, state, row_params, ids, place)

    def decode(
        self, params: Any, state: SlotState, row_params: RowParams, where: Where
    ) -> tuple[SlotState, Chosen]:
        """Every active row reads its newest token and chooses the next."""
        with parallel.use(self.rules):
            return _decode(len(where.index) <= FEW)(self, params, state, row_params, where)

    def constrained(self, state: SlotState) -> SlotState:
        """The state where it lies on the mesh, the same before and after every program."""

        def rows(a: jax.Array) -> jax.Array:
            return constrain(a, "act_batch", *(None,) * (a.ndim - 1))

        def heads(a: jax.Array) -> jax.Array:
            return constrain(a, "act_batch", "act_heads", *(None,) * (a.ndim - 2))

        return SlotState(
            jax.tree.map(heads, state.layers), rows(state.tokens), rows(state.seen), rows(state.counts)
        )

    def apply(self, params: Any, ids: jax.Array, positions: jax.Array, cache: Cache, **options: Any) -> Any:
        """The model; ALiBi counts positions for itself."""
        if "position_ids" in modelzoo.input_names(self.model):
            options["position_ids"] = positions
        return self.model.apply({"params": params}, input_ids=ids, cache=cache, **options)

    def cache(self, layers: Any, index: jax.Array) -> Cache:
        """A cache whose every slot is real: causality hides those behind the queries."""
        num_rows, _, num_slots = jax.tree.leaves(layers)[0].shape[:3]
        return Cache(layers, index, jnp.ones((num_rows, num_slots), bool))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(programs: Programs, num_rows: int, num_slots: int, params: Any) -> SlotState:
    layers = modelzoo.unstack_layers(programs.model.init_cache(num_rows, num_slots)).layers
    ids = jnp.zeros((num_rows, 1), jnp.int32)
    # The mesh may have padded the vocabulary.
    logits = jax.eval_shape(
        lambda: programs.apply(params, ids, ids, programs.cache(layers, jnp.int32(0))).logits
    )
    shape = (num_rows, logits.shape[-1])
    state = SlotState(
        layers, jnp.zeros(num_rows, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)
    )
    return programs.constrained(state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _resize(programs: Programs, num_slots: int, state: SlotState) -> SlotState:
    more = num_slots - state.num_slots

    def resize(a: jax.Array) -> jax.Array:
        return (
            jnp.pad(a, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (a.ndim - 3))
            if more > 0
            else a[:, :, :num_slots]
        )

    return programs.constrained(state.replace(layers=jax.tree.map(resize, state.layers)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _copy(programs: Programs, state: SlotState, source: jax.Array, target: jax.Array) -> SlotState:
    def copy(a: jax.Array) -> jax.Array:
        row = lax.dynamic_slice_in_dim(a, source, 1, axis=0)
        return lax.dynamic_update_slice_in_dim(a, row, target, axis=0)

    return programs.constrained(state.replace(layers=jax.tree.map(copy, state.layers)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _remember(
    programs: Programs, seen: jax.Array, counts: jax.Array, row: jax.Array, row_seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    changed = (seen.at[row].set(row_seen), counts.at[row].set(0))
    return constrain(changed[0], "act_batch", None), constrain(changed[1], "act_batch", None)


@functools.cache
def _read(few: bool) -> Any:
    """`_read_chunk`, compiled for few or many tokens."""
    options = few_rows_options() if few else None
    return jax.jit(_read_chunk, static_argnums=(0, 1), donate_argnums=3, compiler_options=options)


def _read_chunk(
    programs: Programs,
    score: bool,
    params: Any,
    state: SlotState,
    row_params: RowParams,
    ids: jax.Array,
    place: jax.Array,
) -> tuple[SlotState, Chosen, Chosen | None]:
    row, start, count, is_last = place
    length = len(ids) - 1
    # A mesh that splits the batch computes one row as often as it has pieces.
    copies = 1 if programs.rules is None else programs.rules.num_shards("act_batch")

    def take(a: jax.Array) -> jax.Array:
        return jnp.repeat(lax.dynamic_slice_in_dim(a, row, 1, axis=0), copies, axis=0)

    def put(a: jax.Array, written: jax.Array) -> jax.Array:
        new = lax.dynamic_slice_in_dim(written[:1], start, length, axis=2)
        return lax.dynamic_update_slice(a, new, (row, 0, start, *(0,) * (a.ndim - 3)))

    positions = (start + jnp.arange(length, dtype=jnp.int32))[None]
    out = programs.apply(
        params,
        jnp.repeat(ids[None, :length], copies, axis=0),
        positions,
        programs.cache(jax.tree.map(take, state.layers), start),
        logits_to_keep=0 if score else (count - 1)[None],
    )
    logits = out.logits[0].astype(jnp.float32)
    last = lax.dynamic_slice_in_dim(logits, count - 1 if score else 0, 1, axis=0)
    own = row_params.only(row)
    seen = lax.dynamic_slice_in_dim(state.seen, row, 1, axis=0)
    chosen = choose_rows(last, own, seen, jnp.zeros(seen.shape, jnp.int32), jnp.zeros(1, jnp.int32))
    state = SlotState(
        jax.tree.map(put, state.layers, out.cache.layers),
        state.tokens.at[row].set(chosen.token[0]),
        # What a chunk before the last chooses is not generated.
        state.seen.at[row, chosen.token[0]].max(is_last > 0),
        state.counts.at[row, chosen.token[0]].add(is_last),
    )
    scored = with_logprobs(logits, ids[1:], jnp.maximum(own.num_logprobs, 0)) if score else None
    return programs.constrained(state), chosen, scored


@functools.cache
def _decode(few: bool) -> Any:
    """`_decode_step`, compiled for few or many rows."""
    options = few_rows_options() if few else None
    return jax.jit(_decode_step, static_argnums=0, donate_argnums=2, compiler_options=options)


def _decode_step(
    programs: Programs, params: Any, state: SlotState, row_params: RowParams, where: Where
) -> tuple[SlotState, Chosen]:
    out = programs.apply(
        params, state.tokens[:, None], where.index[:, None], programs.cache(state.layers, where.index)
    )
    chosen = choose_rows(out.logits[:, -1], row_params, state.seen, state.counts, where.step)
    rows = jnp.arange(len(state.tokens))
    state = SlotState(
        out.cache.layers,
        jnp.where(where.active, chosen.token, state.tokens),
        state.seen.at[rows, chosen.token].max(where.active),
        state.counts.at[rows, chosen.token].add(where.active.astype(jnp.int32)),
    )
    return programs.constrained(state), chosen
