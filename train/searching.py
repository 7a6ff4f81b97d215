"""`python -m train.plan --search`: every mesh, policy and schedule that divides, by arithmetic; the best compiled."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from rich.console import Group as Stacked
from rich.table import Table

import parallel
from parallel import topology as places
from parallel.anatomy import REMATS
from parallel.chips import GIB
from parallel.plan_page import Plan
from parallel.schedule import SCHEDULES
from train.planning import Choice, Planner, open_experiment
from train.step_cost import StepCost, Work
from train.step_memory import memory_of

MARGIN = 0.95
"""Share of a chip's memory that arithmetic may fill: it may be a few percent off."""
MOST_SLICES = 8
"""Slices of a batch, at most."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to lay out the step.

    Attributes:
        choice: as the planner takes it.
        seconds: predicted, all messages overlapping; `seconds_apart`: none.
        seconds_apart: predicted, no message overlapping with anything.
        utilisation: model FLOPs utilisation of `seconds`.
        held: bytes on one chip, by arithmetic.
        limit: what limits it.
    """

    choice: Choice
    seconds: float
    seconds_apart: float
    utilisation: float
    held: int
    limit: str

    @property
    def rank(self) -> float:
        """What candidates are sorted by: halfway between all messages overlapping and none."""
        return (self.seconds + self.seconds_apart) / 2


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a search found.

    Attributes:
        planner: of the search.
        best: those that fit, the fastest first.
        plans: of the first few, compiled.
        num_tried, num_fitting: candidates.
        smallest: the one that takes least memory, of all.
        seconds: that ranking took.
    """

    planner: Planner
    best: Sequence[Candidate]
    plans: Sequence[Plan]
    num_tried: int
    num_fitting: int
    smallest: Candidate | None
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether any candidate does."""
        return bool(self.best) and all(plan.fits for plan in self.plans[:1])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "topology": str(self.planner.topology),
            "fits": self.fits,
            "num_tried": self.num_tried,
            "num_fitting": self.num_fitting,
            "ranking_seconds": self.seconds,
            "ranked": [
                dataclasses.asdict(one) | {"gin": one.choice.gin()} | self._compiled(i)
                for i, one in enumerate(self.best)
            ],
        }

    def _compiled(self, i: int) -> dict[str, Any]:
        if i >= len(self.plans):
            return {}
        found = self.plans[i].to_dict()
        names = (
            "fits",
            "argument_size_in_bytes",
            "temp_size_in_bytes",
            "analytic_memory_error",
            "compile_seconds",
        )
        return {name: found[name] for name in names if name in found}

    def __rich__(self) -> Stacked:
        return Stacked(*self._parts())

    def _parts(self) -> Iterator[Any]:
        topology, anatomy = self.planner.topology, self.planner.anatomy
        hbm = topology.chip.hbm_bytes
        yield (
            f"{anatomy.num_params:,} parameters on {topology} ({topology.size} chips): {self.num_tried} layouts tried "
            f"by arithmetic in {self.seconds:.1f} s, {self.num_fitting} fit {MARGIN:.0%} of {hbm / GIB:.2f} GiB"
        )
        if not self.best:
            if self.smallest is not None:
                need = self.smallest
                yield f"the least that any needs is {need.held / GIB:.1f} GiB a chip: {describe(need.choice)}"
            return
        table = Table(title="ranked by predicted time (a model, not a measurement)", title_justify="left")
        for name in ("", "mesh", "remat", "pipeline"):
            table.add_column(name, overflow="fold")
        for name in ("s a step", "no overlap", "MFU", "GiB by arithmetic", "by the compiler", "limited by"):
            table.add_column(name, justify="right")
        for i, one in enumerate(self.best):
            choice = one.choice
            figures = (
                f"{one.seconds:.3g}",
                f"{one.seconds_apart:.3g}",
                f"{one.utilisation:.1%}",
                f"{one.held / GIB:.2f}",
            )
            table.add_row(
                str(i + 1),
                choice.layout,
                _remat(choice),
                _pipeline(choice),
                *figures,
                self._figure(i),
                one.limit,
            )
        yield table
        for plan in self.plans:
            if plan.without:
                yield f"{plan.layout}: {plan.without}"
        yield "\nthe first one's lines for a gin file:"
        yield "\n".join(self.best[0].choice.gin())

    def _figure(self, i: int) -> str:
        if i >= len(self.plans):
            return ""
        plan = self.plans[i]
        if plan.compiled is None:
            return "-"
        return f"{plan.compiled.total / GIB:.2f} ({plan.predicted_bytes / plan.compiled.total - 1:+.1%})"


class Search:
    """Looks for the best layout of an experiment.

    Args:
        planner: of the experiment; what it says of mesh, remat and schedule is set aside.
        gin_files, gin_params: it was opened from.
    """

    def __init__(self, planner: Planner, gin_files: Sequence[str], gin_params: Sequence[str]):
        self.planner, self._opened = planner, (gin_files, gin_params)

    def run(self, top: int = 10, compile: int = 0) -> Ranking:
        """Ranks all candidates and compiles the first few.

        Args:
            top: how many to keep.
            compile: how many of them to compile.
        """
        begun = time.perf_counter()
        found = list(self.candidates())
        room = MARGIN * self.planner.topology.chip.hbm_bytes
        fitting = sorted((one for one in found if one.held <= room), key=lambda one: one.rank)
        seconds = time.perf_counter() - begun
        best, plans = fitting[: max(top, compile)], []
        for one in best[:compile]:
            plans.append(self.planner.plan(experiment=open_experiment(*self._opened, one.choice)))
        smallest = min(found, key=lambda one: one.held, default=None)
        return Ranking(self.planner, best, plans, len(found), len(fitting), smallest, seconds)

    def candidates(self) -> Iterator[Candidate]:
        """All ways that divide, those that do not fit included."""
        planner, run = self.planner, self.planner.experiment.run
        for layout, rules in self._layouts():
            stages, shards = rules.num_shards("layers"), rules.num_shards("act_batch")
            for remat, cut in itertools.product(REMATS, self._cuts(stages, run.global_batch_size // shards)):
                microbatches, schedule, virtual, accumulate = cut
                work = Work(
                    *(
                        run.global_batch_size,
                        run.sequence_length,
                        remat,
                        microbatches,
                        schedule,
                        virtual,
                        accumulate,
                    ),
                    width=jnp.dtype(run.dtype).itemsize,
                )
                cost = StepCost(planner.anatomy, planner.state, rules, work, planner.topology)
                pipeline = (
                    (microbatches, schedule, virtual if virtual > 1 else None)
                    if stages > 1
                    else (None, None, None)
                )
                choice = Choice(layout, *pipeline, remat, accumulate)
                forecast = cost.forecast()
                shares = forecast.shares()
                yield Candidate(
                    choice,
                    forecast.seconds,
                    forecast.seconds_apart,
                    forecast.utilisation(),
                    sum(memory_of(cost).values()),
                    max(shares, key=shares.__getitem__),
                )

    def _layouts(self) -> Iterator[tuple[str, parallel.Rules]]:
        """Meshes that divide the model and the batch, with and without a split sequence."""
        planner, run = self.planner, self.planner.experiment.run
        for sizes in factorings(planner.topology.size, len(parallel.MESH_AXES)):
            mesh_sizes: dict[str, int] = dict(zip(parallel.MESH_AXES, sizes, strict=True))
            stage, data, fsdp, context, tensor = sizes
            if run.global_batch_size % (data * fsdp) or run.sequence_length % (context * tensor):
                continue
            if any(stack.num_heads % tensor or stack.num_layers % stage for stack in planner.anatomy.stacks):
                continue
            if context > 1 and run.sequence_length // context < 1024:
                continue  # too short to be worth a ring
            mesh: Any = places.abstract_mesh(planner.topology, mesh_sizes)
            for sequence in (False, True) if tensor > 1 else (False,):
                rules = parallel.make_rules(mesh, sequence=sequence)
                try:
                    parallel.param_shardings(planner.experiment.model, rules)
                except ValueError:
                    continue
                words = [f"{axis}={size}" for axis, size in mesh_sizes.items() if size > 1]
                yield ",".join([*words, *["sequence"] * sequence]) or "data=1", rules

    def _cuts(self, stages: int, rows: int) -> Iterator[tuple[int, str, int, int]]:
        """(microbatches, schedule, virtual stages, slices) that divide so many rows of a shard."""
        if stages == 1:
            for count in places.divisors(rows):
                if count <= MOST_SLICES:
                    yield 1, "1f1b", 1, count
            return
        layers = [stack.num_layers for stack in self.planner.anatomy.stacks]
        several = len(layers) > 1
        for count, schedule in itertools.product(places.divisors(rows), SCHEDULES):
            virtual = 2 if schedule == "interleaved" else 1
            if count < stages or count > 16 * stages or any(n % (stages * virtual) for n in layers):
                continue
            if (several or virtual > 1) and count % stages:
                continue
            yield count, schedule, virtual, 1


def factorings(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many, in order."""
    if parts == 1:
        yield (count,)
        return
    for first in places.divisors(count):
        for rest in factorings(count // first, parts - 1):
            yield first, *rest


def describe(choice: Choice) -> str:
    """A choice in words."""
    return ", ".join(filter(None, (choice.layout, f"remat {_remat(choice)}", _pipeline(choice))))


def _remat(choice: Choice) -> str:
    slices = f", {choice.accumulate} slices" if (choice.accumulate or 1) > 1 else ""
    return f"{choice.remat}{slices}"


def _pipeline(choice: Choice) -> str:
    return "" if choice.schedule is None else f"{choice.schedule}, {choice.microbatches} microbatches"
