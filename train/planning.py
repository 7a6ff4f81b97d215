"""A training step planned on chips that are not here: what arithmetic says, and what the TPU compiler makes of it.

The step that is compiled is the one that would run: the same gin files, `Experiment` and `make_train_step`. Parameters
and batch are shapes alone, so nothing is allocated.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import modelzoo
import parallel
from parallel import topology as places
from parallel.anatomy import REMATS, Anatomy, anatomy_of
from parallel.chips import Topology
from parallel.flops import count_flops
from parallel.hlo import Program
from parallel.layouts import describe, parse_layout
from parallel.plan_page import Compiled, Plan, Sent
from parallel.report import OTHERS, inspect_program, kept_by_loops
from parallel.schedule import SCHEDULES
from train import losses
from train.experiment import Experiment
from train.random_batch import draw_batch
from train.state import abstract_state
from train.step_cost import State, StepCost, Work
from train.step_memory import memory_of

STAND_INS = {
    "train.workdir": "'planned'",
    "train.num_steps": "1000",
    "data.path": "'stdlib'",
    "data.tokenizer": "None",
}
"""Settings that a plan does not depend on, where a file requires them."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What of an experiment a plan sets anew; None leaves what the gin files say.

    Attributes:
        layout: mesh and variants of its rules, as `parallel.layouts` reads them.
        microbatches, schedule, virtual_stages, remat, accumulate: as in `run_settings.Run`.
    """

    layout: str | None = None
    microbatches: int | None = None
    schedule: str | None = None
    virtual_stages: int | None = None
    remat: str | None = None
    accumulate: int | None = None

    def gin(self) -> list[str]:
        """As lines of a gin file.

        Raises:
            ValueError: no such layout, schedule or policy.
        """
        lines = []
        if self.layout is not None:
            layout = parse_layout(self.layout)
            lines += [f"mesh.{axis} = {layout.sizes.get(axis, 1)}" for axis in parallel.MESH_AXES]
            lines += [
                f"rules.{name} = {value!r}"
                for name, value in ({"sequence": False} | dict(layout.variants)).items()
            ]
        for name, known in (("schedule", SCHEDULES), ("remat", REMATS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name} {value!r} is unknown: choose from {', '.join(known)}")
        names = ("microbatches", "schedule", "virtual_stages", "remat", "accumulate")
        return lines + [
            f"train.{name} = {getattr(self, name)!r}" for name in names if getattr(self, name) is not None
        ]


def open_experiment(
    gin_files: Sequence[str], gin_params: Sequence[str], choice: Choice = Choice()
) -> Experiment:
    """The experiment of some gin files, with what a plan does not depend on filled in.

    Raises:
        ValueError, OSError: as `Experiment`.
    """
    params = [*gin_params, *(line.replace(" = ", "=", 1) for line in choice.gin())]
    given = {param.partition("=")[0].strip() for param in params}
    while True:
        try:
            return Experiment(gin_files, params)
        except ValueError as error:
            key = str(error).split(" ", 1)[0]
            if key not in STAND_INS or key in given:
                raise
            given.add(key)
            params.append(f"{key}={STAND_INS[key]}")


def abstract_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch as the run's data gives it."""
    run, model = experiment.run, experiment.model
    rows, length = run.global_batch_size, run.sequence_length

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    if experiment.task is not None:
        drawn = draw_batch(model, 2, length)
        return {name: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype) for name, a in drawn.items()}
    batch = {"input_ids": ints(rows, length)}
    for part in losses.objective(model):
        batch[part.labels] = ints(rows, length) if part.name == "lm" else ints(rows)
    if model.task in ("pretraining", "next_sentence"):
        batch |= {"attention_mask": ints(rows, length), "token_type_ids": ints(rows, length)}
    if model.task == "seq2seq_lm":
        batch |= {"attention_mask": ints(rows, length)}
    if experiment.data.get("packing") == "documents":
        batch |= {"segment_ids": ints(rows, length)}
    return batch


class Planner:
    """Plans the steps of one model on one topology.

    Args:
        experiment: of which model, batch and optimizer are taken.
        topology: of the chips.
    """

    def __init__(self, experiment: Experiment, topology: Topology):
        self.experiment, self.topology = experiment, topology
        self.anatomy: Anatomy = anatomy_of(experiment.model)
        state = abstract_state(experiment.model, experiment.optimizer, options=experiment.options)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        self.state = State.of(
            self.anatomy,
            {name: tree for name, tree in fields.items() if name not in ("params", "rng", "step")},
        )

    def cost(self, experiment: Experiment | None = None) -> StepCost:
        """The arithmetic of the experiment's mesh, or of another's with the same model.

        Raises:
            ValueError: the mesh does not fit the topology, the model or the batch.
        """
        experiment = experiment or self.experiment
        run = experiment.run
        mesh = places.abstract_mesh(self.topology, experiment.settings.bound("mesh"))
        rules = experiment.make_rules(mesh=mesh)
        stages, shards = rules.num_shards("layers"), rules.num_shards("act_batch")
        rows = run.global_batch_size // run.accumulate
        microbatches = run.microbatches or usual_microbatches(rows // shards, stages)
        if stages > 1 and rows % (microbatches * shards):
            raise ValueError(
                f"microbatches={microbatches} do not divide a batch of {rows} rows over {shards} shards (mesh data x "
                "fsdp)"
            )
        virtual = run.virtual_stages or (2 if run.schedule == "interleaved" else 1)
        for stack in self.anatomy.stacks:
            parallel.schedule.check_layers(stack.num_layers, stages, virtual)
        work = Work(
            run.global_batch_size,
            run.sequence_length,
            run.remat,
            microbatches,
            run.schedule,
            virtual,
            run.accumulate,
            jnp.dtype(run.dtype).itemsize,
        )
        return StepCost(self.anatomy, self.state, rules, work, self.topology)

    def plan(self, compile: bool = True, experiment: Experiment | None = None) -> Plan:
        """The plan of the experiment's mesh, or of another's with the same model.

        Args:
            compile: ask the TPU compiler, if there is one.
            experiment: None is the planner's own.

        Raises:
            ValueError: the mesh does not fit the topology, the model or the batch.
        """
        experiment = experiment or self.experiment
        cost, run = self.cost(experiment), experiment.run
        why = places.why_not_compiled(self.topology) if compile else ""
        compiled = None if why or not compile else compile_step(experiment, self.topology)
        if isinstance(compiled, str):
            compiled, why = None, compiled
        config = f"{type(experiment.model).__name__}, {modelzoo.num_params(experiment.model):,} parameters"
        how = f"{run.global_batch_size} x {run.sequence_length} tokens a step, {run.dtype}, remat {run.remat}"
        if run.accumulate > 1:
            how += f", {run.accumulate} slices"
        if cost.stages > 1:
            how += f", {run.schedule}, {cost.work.microbatches} microbatches"
        waiting = {
            "layers": cost.stretch,
            "attention": cost.stretch,
        }  # a stage that waits computes on nothing
        sent = [
            Sent(
                one.kind,
                (one.axis,),
                None,
                one.sent * waiting.get(one.phase.partition(",")[0], 1.0),
                f"{one.what}: {one.phase}",
            )
            for one in cost.messages()
        ]
        return Plan(
            title=f"training step of {config}: {how}",
            layout=describe(cost.rules),
            forecast=cost.forecast(),
            memory=memory_of(cost),
            messages=sent,
            compiled=compiled,
            without=why,
        )


def usual_microbatches(rows: int, stages: int) -> int:
    """The microbatches that `make_train_step` takes where none are asked for."""
    fits = [m for m in range(1, rows + 1) if rows % m == 0 and m <= 4 * stages]
    return max([m for m in fits if m % stages == 0] or fits)


def compile_step(experiment: Experiment, topology: Topology) -> Compiled | str:
    """What the TPU compiler makes of an experiment's step.

    Args:
        experiment: with the mesh to compile for.
        topology: of TPUs; libtpu is installed.

    Returns:
        Its figures, or why there are none: the step does not fit, by how much.

    Raises:
        ValueError: the compiler knows no such topology.
    """
    begun = time.perf_counter()
    rules = experiment.make_rules(places.tpu_devices(topology))
    state = abstract_state(experiment.model, experiment.optimizer, rules=rules, options=experiment.options)
    lowered = experiment.make_step(rules).lower(state, abstract_batch(experiment))
    try:
        program: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return f"The compiler finds no way to fit it: {reason}"
    report, memory = inspect_program(program, rules.mesh), program.memory_analysis()
    assert report.memory is not None
    text = Program(program.as_text())
    return Compiled(
        arguments={name: size for name, size in report.memory.arguments.items() if name != OTHERS},
        flops=count_flops(text),
        kept=kept_by_loops(text),
        sent=[
            Sent(
                g.kind,
                g.axes,
                g.count,
                g.bytes_sent,
                f"{g.module.removeprefix('forward/')} {g.phase}".strip(),
                g.crosses,
            )
            for g in report.grouped()
        ],
        seconds=time.perf_counter() - begun,
        compiler=places.compiler(),
        peak_memory_in_bytes=getattr(memory, "peak_memory_in_bytes", 0),
        **{
            f"{name}_size_in_bytes": getattr(memory, f"{name}_size_in_bytes")
            for name in ("argument", "temp", "output", "alias", "generated_code")
        },
    )
