"""Pipeline schedules as one SPMD program: the gradient of a forward pass whose layers lie on the stages of a mesh.

A scan walks over the ticks of a `schedule.Schedule`; there are three of them, since at first no microbatch goes back
and at last none goes forward. In a tick every stage runs its layers on the microbatch that is its turn, inside a
`shard_map` that is manual over the stages alone, and passes the result to its neighbour. Going back it runs them again
from their input, which is all that was kept. What stands outside the layers (embedding, head, loss) belongs to no
stage: it is computed between, by all devices together, its vocabulary cut over stages as well.

The pass is taken apart by `parallel.cutting`: no architecture knows of stages, and this file of no architecture. An
encoder-decoder has two stacks and so at least two chunks a stage.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from parallel import stages
from parallel.cutting import Cut, Forward, Pieces, take_apart
from parallel.schedule import Schedule, check_layers, make_schedule
from parallel.stages import STAGE

WHOLE, BY_STAGE, BY_LAYER = PartitionSpec(), PartitionSpec(STAGE), PartitionSpec(None, STAGE)


def value_and_grad(
    forward: Forward,
    params: Any,
    batch: Any,
    rng: jax.Array,
    *,
    shardings: Any,
    schedule: str = "1f1b",
    virtual_stages: int = 1,
) -> tuple[Any, Any]:
    """The loss of a batch and its gradient, by a pipeline. To be traced under `parallel.use`.

    Args:
        forward: (params, microbatch, rng) -> (its share of the loss, float32 []; a tree of float32 sums to report).
            The shares of all microbatches add up to the loss.
        params: the canonical tree, layers stacked.
        batch: dict of arrays [M, B / M, ...].
        rng: microbatch m gets fold_in(rng, m).
        shardings: NamedSharding of every parameter, layers over the stages.
        schedule: one of `schedule.SCHEDULES`.
        virtual_stages: chunks of each stack that a stage holds; "interleaved" has more than one.

    Returns:
        ((loss, sums), gradient as params).

    Raises:
        ValueError: the stages do not divide the layers, or the schedule does not fit.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    num_stages, num_microbatches = mesh.shape[STAGE], jax.tree.leaves(batch)[0].shape[0]
    pieces = take_apart(forward, params, jax.tree.map(lambda a: a[0], batch), rng)
    for cut in pieces.cuts:
        check_layers(cut.num_layers, num_stages, virtual_stages)
    timetable = make_schedule(schedule, num_stages, num_microbatches, virtual_stages, len(pieces.cuts))
    return _Pipeline(pieces, timetable, virtual_stages, mesh, batch, rng, shardings)(params)


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    pieces: Pieces
    timetable: Schedule
    virtual: int
    mesh: Any
    batch: Any
    rng: jax.Array
    shardings: Any

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return self.pieces.cuts

    @property
    def num_stages(self) -> int:
        return self.timetable.num_stages

    def __call__(self, params: Any) -> tuple[Any, Any]:
        rest = self.pieces.without_layers(params)
        cut = functools.partial(stages.cut, virtual=self.virtual, num_stages=self.num_stages)
        layers = self._pin(tuple(map(cut, self.pieces.layers(params))))
        zeros, keep = functools.partial(jax.tree.map, jnp.zeros_like), self.timetable.num_in_flight
        examples = [self._carried(i, rest, 0, self._no_activations(i - 1)) for i in range(len(self.cuts))]
        per_stage = [[jnp.zeros((self.num_stages, *a.shape), a.dtype) for a in leaves] for leaves in examples]
        _, sums = jax.eval_shape(self._loss, rest, self._no_activations(len(self.cuts) - 1), jnp.int32(0))
        carry = {
            "passed": per_stage,
            "passed_back": per_stage,
            "kept": [
                [jnp.zeros((self.num_stages, self.virtual, keep, *a.shape), a.dtype) for a in leaves]
                for leaves in examples
            ],
            "arrived": [
                jnp.zeros(
                    (self.timetable.num_waiting((i + 1) * self.virtual - 1), *leaves[0].shape),
                    leaves[0].dtype,
                )
                for i, leaves in enumerate(examples)
            ],
            "turned": [zeros(leaves) for leaves in examples],
            "layers": self._pin(zeros(layers)),
            "rest": zeros(rest),
            "sums": (jnp.float32(0), jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), sums)),
        }
        first, last = self.timetable.first_backward, self.timetable.num_forward_ticks
        end = self.timetable.num_ticks
        phases = (
            (0, min(first, last), True, False),
            (first, last, True, True),
            (max(first, last), end, False, True),
        )
        for start, end, goes, returns in phases:
            if end > start:
                body = functools.partial(self._tick, rest, layers, goes, returns)
                carry, _ = lax.scan(body, carry, jnp.arange(start, end, dtype=jnp.int32))
        grads = self.pieces.join(carry["rest"], tuple(map(stages.join, carry["layers"])))
        return carry["sums"], grads

    def _tick(
        self, rest: Any, layers: Any, goes: bool, returns: bool, carry: dict[str, Any], tick: jax.Array
    ) -> tuple[dict[str, Any], None]:
        carry = dict(carry)
        if goes:
            with jax.named_scope("pipeline_forward"):
                self._go(rest, layers, carry, tick)
        if returns:
            with jax.named_scope("pipeline_backward"):
                self._return(rest, layers, carry, tick)
        return carry, None

    # --- forward

    def _go(self, rest: Any, layers: Any, carry: dict[str, Any], tick: jax.Array) -> None:
        entry, exit = (self.timetable.forward(tick, s) for s in (0, self.num_stages - 1))
        entering = []
        for i in range(len(self.cuts)):
            waiting = None if i == 0 else self._fetch(carry["arrived"][i - 1], entry.microbatch)
            make = functools.partial(self._carried, i, rest, entry.microbatch, waiting)
            zeros = functools.partial(jax.tree.map, jnp.zeros_like, carry["turned"][i])
            entering.append(self._if(self._is_at(entry, i * self.virtual), make, zeros))
        others = self._others(rest, self.timetable.forward, tick)

        def body(layers: Any, passed: Any, kept: Any, others: Any, entering: Any) -> Any:
            layers, (passed, kept, others) = stages.inner(layers, 1), stages.inner((passed, kept, others), 0)
            stage = lax.axis_index(STAGE)
            slot = self.timetable.forward(tick, stage)
            place = _clip(slot.microbatch, self.timetable.num_microbatches) % self.timetable.num_in_flight

            def run(i: int) -> Any:
                chunk = slot.chunk - i * self.virtual
                enters = (stage == 0) & (chunk == 0)
                given = [jnp.where(enters, a, b) for a, b in zip(entering[i], passed[i], strict=True)]
                now_kept = [
                    stages.put(a, jnp.where(slot.live, x, a[chunk, place]), chunk, place)
                    for a, x in zip(kept[i], given, strict=True)
                ]
                result = self.cuts[i].run(
                    stages.pick(layers[i], chunk), tuple(given), others[i], self._first_layer(i, chunk, stage)
                )
                return _set(passed, i, list(result)), _set(kept, i, now_kept)

            passed, kept = self._choose(slot.chunk, run)
            leaving = [
                self._from_one(
                    passed[i][0],
                    stage == self.num_stages - 1,
                    self._is_at(exit, (i + 1) * self.virtual - 1),
                )
                for i in range(len(self.cuts))
            ]
            passed = jax.tree.map(
                lambda a: lax.ppermute(
                    a, STAGE, stages.neighbours(self.num_stages, 1, self.timetable.num_chunks > 1)
                ),
                passed,
            )
            return jax.tree.map(lambda a: a[None], (passed, kept)), leaving

        (carry["passed"], carry["kept"]), leaving = jax.shard_map(
            body,
            mesh=self.mesh.abstract_mesh,
            in_specs=(BY_LAYER, BY_STAGE, BY_STAGE, BY_STAGE, WHOLE),
            out_specs=(BY_STAGE, WHOLE),
            axis_names={STAGE},
            check_vma=False,
        )(layers, carry["passed"], carry["kept"], others, entering)
        carry["arrived"] = [
            self._store(waiting, leaving[i], exit.microbatch, self._is_at(exit, (i + 1) * self.virtual - 1))
            for i, waiting in enumerate(carry["arrived"])
        ]

    # --- backward

    def _return(self, rest: Any, layers: Any, carry: dict[str, Any], tick: jax.Array) -> None:
        entry, exit = (self.timetable.backward(tick, s) for s in (self.num_stages - 1, 0))
        turning = []
        for i in range(len(self.cuts)):
            is_here = self._is_at(entry, (i + 1) * self.virtual - 1)
            arrived = self._fetch(carry["arrived"][i], entry.microbatch)
            if i == len(self.cuts) - 1:
                carry["rest"], carry["sums"], d_y = self._turn_at_loss(
                    rest, carry["rest"], carry["sums"], arrived, entry.microbatch, is_here
                )
            else:
                carry["rest"], d_y = self._pull_joint(
                    i + 1, rest, carry["rest"], arrived, carry["turned"][i + 1], entry.microbatch, is_here
                )
            turning.append([d_y, *(jnp.zeros_like(a) for a in carry["turned"][i][1:])])
        others = self._others(rest, self.timetable.backward, tick)

        def body(layers: Any, passed: Any, kept: Any, others: Any, turning: Any, grads: Any) -> Any:
            layers, grads = stages.inner(layers, 1), stages.inner(grads, 1)
            passed, kept, others = stages.inner((passed, kept, others), 0)
            stage = lax.axis_index(STAGE)
            slot = self.timetable.backward(tick, stage)
            place = _clip(slot.microbatch, self.timetable.num_microbatches) % self.timetable.num_in_flight

            def run(i: int) -> Any:
                chunk = slot.chunk - i * self.virtual
                turns = (stage == self.num_stages - 1) & (chunk == self.virtual - 1)
                given = tuple(jnp.where(turns, a, b) for a, b in zip(turning[i], passed[i], strict=True))
                first = self._first_layer(i, chunk, stage)

                def again(layers: Any, carried: Any) -> Any:
                    return self.cuts[i].run(layers, carried, others[i], first)

                _, pull = jax.vjp(
                    again, stages.pick(layers[i], chunk), tuple(a[chunk, place] for a in kept[i])
                )
                d_layers, d_carried = pull(given)
                d_layers = stages.pin_inside(d_layers, self.pieces.layers(self.shardings)[i])
                added = jax.tree.map(
                    lambda g, d: g.at[chunk].add(jnp.where(slot.live, d, 0).astype(g.dtype)),
                    grads[i],
                    d_layers,
                )
                return _set(passed, i, list(d_carried)), _set(grads, i, added)

            passed, grads = self._choose(slot.chunk, run)
            leaving = [
                [self._from_one(a, stage == 0, self._is_at(exit, i * self.virtual)) for a in passed[i]]
                for i in range(len(self.cuts))
            ]
            passed = jax.tree.map(
                lambda a: lax.ppermute(
                    a, STAGE, stages.neighbours(self.num_stages, -1, self.timetable.num_chunks > 1)
                ),
                passed,
            )
            return jax.tree.map(lambda a: a[None], passed), leaving, jax.tree.map(lambda a: a[:, None], grads)

        carry["passed_back"], leaving, grads = jax.shard_map(
            body,
            mesh=self.mesh.abstract_mesh,
            in_specs=(BY_LAYER, BY_STAGE, BY_STAGE, BY_STAGE, WHOLE, BY_LAYER),
            out_specs=(BY_STAGE, WHOLE, BY_LAYER),
            axis_names={STAGE},
            check_vma=False,
        )(layers, carry["passed_back"], carry["kept"], others, turning, carry["layers"])
        carry["layers"], carry["turned"] = self._pin(grads), leaving
        carry["rest"], _ = self._pull_joint(
            0, rest, carry["rest"], None, leaving[0], exit.microbatch, self._is_at(exit, 0)
        )

    def _turn_at_loss(
        self, rest: Any, grads: Any, sums: Any, y: jax.Array, m: jax.Array, is_here: jax.Array
    ) -> Any:
        def pull(grads: Any, sums: Any) -> Any:
            (loss, more), (d_rest, d_y) = jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True)(
                rest, y, m
            )
            return _add(grads, d_rest), _add(sums, (loss, more)), d_y

        return self._if(is_here, pull, lambda grads, sums: (grads, sums, jnp.zeros_like(y)), grads, sums)

    def _pull_joint(
        self, i: int, rest: Any, grads: Any, before: Any, d_carried: Any, m: jax.Array, is_here: jax.Array
    ) -> Any:
        """Takes the gradient of what entered stack i back to the parameters and to what stack i - 1 returned."""

        def pull(grads: Any) -> Any:
            _, back = jax.vjp(lambda rest, before: self._carried(i, rest, m, before), rest, before)
            d_rest, d_before = back(d_carried)
            return _add(grads, d_rest), d_before

        return self._if(is_here, pull, lambda grads: (grads, jax.tree.map(jnp.zeros_like, before)), grads)

    # --- pieces of the pass

    def _carried(self, i: int, rest: Any, m: Any, before: jax.Array | None) -> list[jax.Array]:
        """What microbatch m brings into stack i."""
        return list(self.cuts[i].split(self._joint(i, rest, m, before))[0])

    def _joint(self, i: int, rest: Any, m: Any, before: jax.Array | None) -> Any:
        m = _clip(jnp.asarray(m, jnp.int32), self.timetable.num_microbatches)
        microbatch = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, m, keepdims=False), self.batch)
        return self.pieces.joint(i, rest, microbatch, jax.random.fold_in(self.rng, m), before)

    def _loss(self, rest: Any, y: jax.Array, m: jax.Array) -> tuple[jax.Array, Any]:
        return self._joint(len(self.cuts), rest, m, y)

    def _no_activations(self, i: int) -> jax.Array | None:
        """Zeros in the shape of what stack i returns."""
        if i < 0:
            return None
        before = self._no_activations(i - 1)
        rest = self.pieces.without_layers(self.pieces.params)
        shapes = jax.eval_shape(lambda rest: self._carried(i, rest, 0, before), rest)
        return jnp.zeros(shapes[0].shape, shapes[0].dtype)

    def _others(self, rest: Any, direction: Callable[..., Any], tick: jax.Array) -> Any:
        """What every stage computes from its own microbatch: masks, position tables, PRNG keys."""

        def of(stage: jax.Array) -> Any:
            m = direction(tick, stage).microbatch
            return [
                self.cuts[i].split(self._joint(i, rest, m, self._no_activations(i - 1)))[1]
                for i in range(len(self.cuts))
            ]

        return jax.vmap(of, spmd_axis_name=STAGE)(jnp.arange(self.num_stages, dtype=jnp.int32))

    # --- places

    def _pin(self, layers: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(stages.pin, layers, self.pieces.layers(self.shardings)))

    def _is_at(self, slot: Any, chunk: int) -> Any:
        return slot.live & (slot.chunk == chunk)

    @property
    def _branches(self) -> bool:
        """Whether to branch round work that is not there. With one chunk a stage there is next to none of it.

        XLA's CPU backend may take the collectives of a branch and those beside it in another order on every device, and
        hang; so it computes both sides and selects.
        """
        return self.timetable.num_chunks > 1 and self.mesh.devices.flat[0].platform != "cpu"

    def _if(
        self, condition: jax.Array, make: Callable[..., Any], otherwise: Callable[..., Any], *given: Any
    ) -> Any:
        """`make(*given)` or `otherwise(*given)`; the same on every device."""
        if self._branches:
            return lax.cond(condition, make, otherwise, *given)
        return jax.tree.map(functools.partial(jnp.where, condition), make(*given), otherwise(*given))

    def _choose(self, chunk: jax.Array, run: Callable[[int], Any]) -> Any:
        """Runs the stack that a chunk belongs to: a real branch, each stage its own."""
        if len(self.cuts) == 1:
            return run(0)
        branches = [functools.partial(run, i) for i in range(len(self.cuts))]
        if self._branches:
            return lax.switch(chunk // self.virtual, branches)
        results = [branch() for branch in branches]
        return jax.tree.map(lambda *each: lax.select_n(chunk // self.virtual, *each), *results)

    def _from_one(self, a: jax.Array, is_the_one: jax.Array, is_time: jax.Array) -> jax.Array:
        """What one stage holds, for all of them."""
        return self._if(
            is_time, lambda: lax.psum(jnp.where(is_the_one, a, 0), STAGE), lambda: jnp.zeros_like(a)
        )

    def _first_layer(self, i: int, chunk: jax.Array, stage: jax.Array) -> jax.Array:
        count = self.cuts[i].num_layers // (self.num_stages * self.virtual)
        return (chunk * self.num_stages + stage) * count

    def _fetch(self, ring: jax.Array, m: jax.Array) -> jax.Array:
        place = _clip(m, self.timetable.num_microbatches) % ring.shape[0]
        return lax.dynamic_index_in_dim(ring, place, keepdims=False)

    def _store(self, ring: jax.Array, value: jax.Array, m: jax.Array, is_here: jax.Array) -> jax.Array:
        place = _clip(m, self.timetable.num_microbatches) % ring.shape[0]
        value = jnp.where(is_here, value, self._fetch(ring, m))
        return lax.dynamic_update_index_in_dim(ring, value, place, 0)


def _clip(m: Any, count: int) -> Any:
    """A microbatch's number, also where there is none."""
    return jnp.clip(m, 0, count - 1)


def _set(items: list[Any], i: int, value: Any) -> list[Any]:
    return [value if j == i else item for j, item in enumerate(items)]


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)
