"""What a training step costs on a mesh, by arithmetic: FLOPs, collectives, a roofline per phase.

Nothing is traced or compiled, so thousands of meshes take seconds. What it takes of memory is `train.step_memory`'s.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import parallel
from parallel.anatomy import Anatomy, Leaf, Stack
from parallel.chips import Topology
from parallel.roofline import Forecast, Phase
from parallel.schedule import Schedule, make_schedule

F32, BF16 = 4, 2
SCORE_BYTES = {"forward": 20.0, "backward": 22.0}
"""Bytes through memory for one attention score: written and read in float32 and, as a probability, in bfloat16."""
STREAM_PASSES = {"forward": 12.0, "backward": 20.0}
"""Times that the activations between layers go through memory in a layer: norms, residuals, activations."""
LANES = 128
"""Of a TPU's registers. Where FSDP leaves shards narrower than that, libtpu 0.0.42 was seen to gather by laying each
into zeros and summing, and to sum gradients whole: an all-reduce each time, of twice the bytes. Gradients it sums whole
too where the mesh has `data` beside `fsdp`, over both at once."""
OPTIMIZER_PASSES = 8
"""Times that a float32 parameter's bytes go through memory in an update, moments and gradient included."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The batch and how it is cut, and what the step computes in.

    Attributes:
        rows: B, of the global batch.
        length: T.
        remat: one of `anatomy.REMATS`.
        microbatches: of a pipeline.
        schedule, virtual_stages: of a pipeline.
        accumulate: slices of the batch.
        width: bytes of an activation.
    """

    rows: int
    length: int
    remat: str = "none"
    microbatches: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    accumulate: int = 1
    width: int = BF16


@dataclasses.dataclass(frozen=True)
class Message:
    """What a step sends over one mesh axis for one purpose.

    Attributes:
        axis: of the mesh.
        kind: as `parallel.collectives.KINDS` has it.
        what: is sent.
        phase: the phase that it is sent in.
        sent: bytes that one chip sends in a step.
    """

    axis: str
    kind: str
    what: str
    phase: str
    sent: float


@dataclasses.dataclass(frozen=True)
class State:
    """What the optimizer keeps: (the parameter that it lies as, or None; elements; bytes of one), for each array."""

    arrays: tuple[tuple[Leaf | None, int, int], ...]

    @classmethod
    def of(cls, anatomy: Anatomy, abstract: Any) -> "State":
        """From an optimizer's abstract state.

        Args:
            anatomy: of the model.
            abstract: `train.abstract_state(model, optimizer).opt_state`.
        """
        owners = {(leaf.path, leaf.shape): leaf for leaf in anatomy.leaves}
        found = []
        for path, array in jax.tree.leaves_with_path(abstract):
            names = tuple(str(key.key) for key in path if hasattr(key, "key"))
            ends = (names[i:] for i in range(len(names)))
            owner = next((owners[end, array.shape] for end in ends if (end, array.shape) in owners), None)
            found.append((owner, array.size, array.dtype.itemsize))
        return cls(tuple(found))


class StepCost:
    """One step on one mesh.

    Args:
        anatomy: of the model.
        state: of the optimizer.
        rules: of the mesh, which may be abstract.
        work: the batch and how it is cut.
        topology: what it runs on.
    """

    def __init__(self, anatomy: Anatomy, state: State, rules: parallel.Rules, work: Work, topology: Topology):
        self.anatomy, self.state, self.rules, self.work, self.topology = anatomy, state, rules, work, topology
        self.mesh = dict(rules.mesh.shape)
        self.shards: dict[str | None, int] = {name: rules.num_shards(name) for name, _ in rules.table}
        self.stages = self.shards["layers"]
        self.passes = work.accumulate * (work.microbatches if self.stages > 1 else 1)
        self.tokens = work.rows * work.length // (self.shards["act_batch"] * self.shards["act_length"])
        """Of a chip in a step."""
        self.pass_tokens = self.tokens / self.passes
        self.split_stream = self.shards["act_stream"] > self.shards["act_length"]

    # --- counts

    @functools.cached_property
    def timetable(self) -> Schedule | None:
        if self.stages == 1:
            return None
        work = self.work
        stacks = len(self.anatomy.stacks)
        return make_schedule(work.schedule, self.stages, work.microbatches, work.virtual_stages, stacks)

    @property
    def stretch(self) -> float:
        """What waiting for other stages makes of the time of layers."""
        if self.timetable is None:
            return 1.0
        chunks = self.timetable.num_chunks
        return (chunks * self.work.microbatches + self.stages - 1) / (chunks * self.work.microbatches)

    def elements(self, leaves: Sequence[Leaf]) -> int:
        """Of parameters, on one chip."""
        return sum(leaf.size_on(self.shards) for leaf in leaves)

    def gathered(self, leaves: Sequence[Leaf]) -> int:
        """Elements of parameters as they are used: split over tensor and stage alone."""
        return self.count(leaves, embed=1)

    def count(self, leaves: Sequence[Leaf], **changes: int) -> int:
        shards = {**self.shards, **changes}
        return sum(leaf.size_on(shards) for leaf in leaves)

    def _products(self, stack: Stack, tokens: float, names: Sequence[str] = ()) -> float:
        """FLOPs of a stack's products with kernels, on one chip."""
        kernels = [k for k in stack.kernels if not names or k.path[-2] in names]
        return 2.0 * self.gathered(kernels) * tokens

    def _attention(self, stack: Stack, tokens: float) -> float:
        """FLOPs of queries with keys and probabilities with values."""
        layers = stack.num_layers / self.stages
        heads = stack.num_heads / self.shards["heads"]
        return 4.0 * layers * stack.num_attentions * heads * stack.head_dim * self.work.length * tokens

    def _scores(self, stack: Stack, tokens: float) -> float:
        """Attention's scores, of all layers."""
        heads = stack.num_heads / self.shards["heads"]
        return stack.num_layers / self.stages * stack.num_attentions * heads * self.work.length * tokens

    def _recomputed(self, stack: Stack) -> tuple[float, float]:
        """What is computed again on the way back: (share of the products' FLOPs, share of attention's)."""
        again, attention = {"none": (0.0, 0.0), "dots": (0.0, 1.0)}.get(self.work.remat, (1.0, 1.0))
        if again:  # the last product of a layer is not needed to go back, unless a norm stands behind it
            unneeded = [] if not stack.norm_first else ["fc_out", "out"] if stack.is_parallel else ["fc_out"]
            if unneeded:
                again -= self._products(stack, 1.0, unneeded) / self._products(stack, 1.0)
        whole = 1.0 if self.stages > 1 else 0.0  # a stage keeps no more than its input
        return again + whole, attention + whole

    # --- time

    def forecast(self) -> Forecast:
        """The step's phases against the roofline."""
        anatomy, work, tokens = self.anatomy, self.work, self.tokens
        messages = self.messages()
        sums: dict[str, dict[str, list[float]]] = {
            direction: {kind: [0.0, 0.0] for kind in ("layers", "attention")}
            for direction in ("forward", "recompute", "backward")
        }
        for stack in anatomy.stacks:
            products, attention = self._products(stack, tokens), self._attention(stack, tokens)
            scores = self._scores(stack, tokens)
            stream = stack.num_layers / self.stages * tokens * stack.hidden * work.width
            stream /= self.shards["act_stream"] // self.shards["act_length"]
            weights = self.gathered(stack.kernels) * work.width * self.passes
            hidden = stack.num_layers / self.stages * tokens * stack.mlp_dim / self.shards["mlp"] * work.width
            moved = {way: weights + stream * STREAM_PASSES[way] + hidden * 4 for way in STREAM_PASSES}
            again, attended = self._recomputed(stack)
            for way, factor, share, score in (
                ("forward", 1.0, 1.0, SCORE_BYTES["forward"]),
                ("recompute", again, attended, SCORE_BYTES["forward"] * attended),
                ("backward", 2.0, 2.0, SCORE_BYTES["backward"]),
            ):
                sums[way]["layers"][0] += products * factor
                sums[way]["layers"][1] += moved["backward" if way == "backward" else "forward"] * min(
                    1.0, factor or 0
                )
                sums[way]["attention"][0] += attention * share
                sums[way]["attention"][1] += scores * score
        phases = [self._ends("embedding, head and loss", messages)]
        for way, parts in sums.items():
            for kind, (flops, hbm) in parts.items():
                if flops:
                    name = f"{kind}, {way}"
                    phases.append(Phase(name, flops, hbm, _by_axis(messages, name), stretch=self.stretch))
        own = self.elements(anatomy.leaves)
        phases.append(
            Phase("optimizer", 12.0 * own, own * F32 * OPTIMIZER_PASSES, _by_axis(messages, "optimizer"))
        )
        total = work.rows * work.length
        model_flops = 3.0 * anatomy.flops_per_token(work.length) * total
        return Forecast(self.topology, self.mesh, phases, model_flops, total)

    def _ends(self, name: str, messages: Sequence["Message"]) -> Phase:
        anatomy, tokens, width = self.anatomy, self.tokens, self.work.width
        kernels = [*anatomy.head_kernels, *([anatomy.table] if anatomy.tied else [])]
        flops = 6.0 * self.gathered(kernels) * tokens
        logits = tokens * anatomy.vocab / self.shards["act_vocab"]
        hbm = 4 * logits * width + 10 * tokens * anatomy.hidden * width
        return Phase(
            name, flops, hbm + self.gathered([anatomy.table, *kernels]) * F32 * 2, _by_axis(messages, name)
        )

    def messages(self) -> list[Message]:
        """What the step sends."""
        found: list[Message] = []
        tokens, width = self.tokens, self.work.width
        fsdp = [axis for axis in self.rules.mesh_axes("embed") if self.mesh[axis] > 1]
        tensor = [axis for axis in self.rules.mesh_axes("heads") if self.mesh[axis] > 1]
        data = [a for a in self.rules.mesh_axes("act_batch") if self.mesh[a] > 1 and a not in fsdp]
        context = [axis for axis in self.rules.mesh_axes("act_length") if self.mesh[axis] > 1]

        narrow = self.anatomy.hidden // self.shards["embed"] < LANES and self.topology.chip.is_tpu

        def add(
            axes: Sequence[str], kind: str, what: str, phase: str, size: float, times: float = 1.0
        ) -> None:
            count = math.prod(self.mesh[axis] for axis in axes)
            kind = "all-reduce" if narrow and axes == fsdp else kind
            if axes and size and times:
                passes = 2 if kind == "all-reduce" else 1
                found.append(
                    Message(axes[-1], kind, what, phase, passes * times * size * (count - 1) / count)
                )

        def add_gradients(what: str, phase: str, size: float) -> None:
            if data and fsdp and self.topology.chip.is_tpu and self.topology.slices == 1:
                add([*data, *fsdp], "all-reduce", what, phase, size)
            else:
                add(fsdp, "reduce-scatter", what, phase, size)
                shards = math.prod(self.mesh[axis] for axis in fsdp)
                add(data, "all-reduce", what, phase, size / shards)

        for stack in self.anatomy.stacks:
            again, attended = self._recomputed(stack)
            layers = stack.num_layers / self.stages
            kernels = self.gathered(stack.kernels) * width * self.passes
            add(fsdp, "all-gather", "parameters", "layers, forward", kernels)
            add(
                fsdp,
                "all-gather",
                "parameters",
                "layers, recompute" if again else "layers, backward",
                kernels,
            )
            add_gradients("gradients", "layers, backward", kernels)
            stream = layers * tokens * stack.hidden * width
            outs, ins = 1 + stack.num_attentions, 1 if stack.is_parallel else 1 + stack.num_attentions
            needed = 0 if stack.is_parallel else outs - 1 + (not stack.norm_first)
            going = ["layers, forward"]
            if self.stages > 1:  # a stage goes forward again from its input
                add(fsdp, "all-gather", "parameters", "layers, recompute", kernels)
                going.append("layers, recompute")
            if self.split_stream:
                for phase in going:
                    add(tensor, "all-gather", "activations", phase, stream, ins)
                    add(tensor, "reduce-scatter", "activations", phase, stream, outs)
                add(
                    tensor,
                    "all-gather",
                    "activations",
                    "layers, recompute" if again else "layers, backward",
                    stream,
                    ins,
                )
                add(
                    tensor, "reduce-scatter", "activations", "layers, recompute", stream, needed * bool(again)
                )
                add(tensor, "all-gather", "gradients of activations", "layers, backward", stream, outs)
                add(tensor, "reduce-scatter", "gradients of activations", "layers, backward", stream, ins)
            else:
                for phase in going:
                    add(tensor, "all-reduce", "activations", phase, stream, outs)
                add(tensor, "all-reduce", "activations", "layers, recompute", stream, needed * bool(again))
                add(tensor, "all-reduce", "gradients of activations", "layers, backward", stream, ins)
            if context:
                size = math.prod(self.mesh[axis] for axis in context)
                keys = (
                    2
                    * layers
                    * tokens
                    * size
                    * stack.num_kv_heads
                    / self.shards["kv"]
                    * stack.head_dim
                    * width
                )
                for way, times in (("forward", 1), ("recompute", attended), ("backward", 2)):
                    add(context, "collective-permute", "keys and values", f"attention, {way}", keys, times)
            if self.stages > 1:
                chunks = self.work.virtual_stages
                passed = (
                    tokens
                    * stack.hidden
                    * width
                    * chunks
                    / self.shards["act_stream"]
                    * self.shards["act_length"]
                )
                for way in ("forward", "backward"):
                    found.append(
                        Message("stage", "collective-permute", "activations", f"layers, {way}", passed)
                    )
        ends, table = "embedding, head and loss", self.anatomy.table
        kernels = self.gathered([table]) * F32 + self.gathered(self.anatomy.head_kernels) * width
        add(fsdp, "all-gather", "tables", ends, kernels * self.passes)
        add_gradients("gradients of tables", ends, kernels * self.passes)
        vocab = [axis for axis in self.rules.mesh_axes("vocab") if self.mesh[axis] > 1]
        add(
            vocab,
            "all-reduce",
            "embeddings and gradients of states",
            ends,
            2 * tokens * self.anatomy.hidden * width,
        )
        return found


def _by_axis(messages: Sequence[Message], phase: str) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for one in messages:
        if one.phase == phase:
            found[one.axis] = found.get(one.axis, 0.0) + one.sent
    return found
