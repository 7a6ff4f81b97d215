"""What generating text costs on a mesh, by arithmetic: memory of a chip, rooflines of decode step and prefill.

A decode step reads every weight and every cached key and value once for one token of each row, so the memory's
bandwidth is its roof; a prefill multiplies many tokens with each weight, as a forward pass of training does.
"""

import dataclasses
import math
from collections.abc import Sequence

import parallel
from modelzoo import quantizing
from modelzoo.model import Model
from parallel.anatomy import Anatomy, Leaf, Stack, anatomy_of
from parallel.chips import Topology
from parallel.roofline import Forecast, Phase

SCALE_BYTES = 4
"""Of the float32 scale that an int8 array's shared dimensions have."""
SCORE_BYTES = 20.0
"""Bytes through memory for one score of a prefill's attention."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is generated.

    Attributes:
        rows: B, sequences at once.
        prompt: tokens of each prompt.
        slots: S of the cache: prompt and new tokens.
        width: bytes of a parameter and of an activation.
        quantize: "int8" or None.
        cache_width: bytes of a cached key's or value's element.
    """

    rows: int
    prompt: int
    slots: int
    width: int = 2
    quantize: str | None = None
    cache_width: int = 2


class DecodeCost:
    """One model, one mesh, one request.

    Args:
        model: an LM of the zoo.
        rules: of the mesh, which may be abstract; for decoding.
        request: what is generated.
        topology: what it runs on.
    """

    def __init__(self, model: Model, rules: parallel.Rules, request: Request, topology: Topology):
        self.anatomy: Anatomy = anatomy_of(model)
        self.rules, self.request, self.topology = rules, request, topology
        self.mesh = dict(rules.mesh.shape)
        self.shards: dict[str | None, int] = {name: rules.num_shards(name) for name, _ in rules.table}
        self.rows = request.rows / self.shards["act_batch"]
        self._shared = quantizing.shared_dims(model) if request.quantize else {}

    def held(self, leaf: Leaf, **changes: int) -> float:
        """Bytes of a parameter on one chip."""
        size = leaf.size_on({**self.shards, **changes})
        if leaf.path not in self._shared:
            return size * self.request.width
        stacked = "layers" in leaf.names
        inputs = math.prod(leaf.shape[dim + stacked] for dim in self._shared[leaf.path])
        outputs = leaf.size // inputs / (leaf.size / size)
        return size + outputs * SCALE_BYTES

    @property
    def generating(self) -> Sequence[Stack]:
        """The stacks that run at every step: not an encoder."""
        return [stack for stack in self.anatomy.stacks if stack.path[-1] != "encoder"]

    def cache_bytes(self) -> float:
        """Keys and values on one chip."""
        request, total = self.request, 0.0
        for stack in self.generating:
            per_slot = 2 * stack.num_layers * stack.num_kv_heads / self.shards["kv"]
            per_slot *= stack.head_dim * request.cache_width + (
                SCALE_BYTES if request.cache_width == 1 else 0
            )
            total += self.rows * (request.slots + (stack.num_attentions - 1) * request.prompt) * per_slot
        return total

    def memory(self) -> dict[str, int]:
        """Bytes on one chip by class."""
        request, vocab = self.request, self.anatomy.vocab / self.shards["act_vocab"]
        weights = max(self.held(leaf, embed=1) for leaf in self.anatomy.leaves if leaf.path[-1] == "kernel")
        layers = max(stack.num_layers for stack in self.anatomy.stacks)
        stream = self.rows * request.prompt * self.anatomy.hidden * request.width
        scores = max(
            self.rows * stack.num_heads / self.shards["heads"] * request.prompt * request.slots
            for stack in self.anatomy.stacks
        )
        hidden = max(stack.mlp_dim / self.shards["mlp"] for stack in self.anatomy.stacks)
        working = 1.5 * scores * 4 + 6 * stream + 2 * self.rows * request.prompt * hidden * request.width
        working += 4 * self.rows * vocab * 4
        if self.shards["embed"] > 1:
            working += 2 * weights / layers
        return {
            "parameters": int(sum(self.held(leaf) for leaf in self.anatomy.leaves)),
            "cache": int(self.cache_bytes()),
            "temporaries": int(working),
        }

    def step(self) -> Forecast:
        """One token of every row."""
        request, phases = self.request, []
        kernels = [leaf for stack in self.generating for leaf in stack.kernels]
        reads = sum(self.held(leaf, embed=1) for leaf in kernels)
        used = sum(leaf.size_on({**self.shards, "embed": 1}) for leaf in kernels)
        phases.append(self._phase("layers' products", 2.0 * used * self.rows, reads, 1, len(kernels) > 0))
        cached = self.cache_bytes()
        attention = sum(
            4.0
            * s.num_layers
            * s.num_attentions
            * s.num_heads
            / self.shards["heads"]
            * s.head_dim
            * request.slots
            for s in self.generating
        )
        phases.append(Phase("attention over the cache", attention * self.rows, cached))
        table = [self.anatomy.table] if self.anatomy.tied else []
        head = [*self.anatomy.head_kernels, *table]
        flops = 2.0 * sum(leaf.size_on({**self.shards, "embed": 1}) for leaf in head) * self.rows
        logits = self.rows * self.anatomy.vocab / self.shards["act_vocab"]
        phases.append(Phase("head", flops, sum(self.held(leaf, embed=1) for leaf in head) + 12 * logits))
        model_flops = self.anatomy.flops_per_token(request.slots) * request.rows
        return Forecast(self.topology, self.mesh, phases, model_flops, request.rows)

    def prefill(self) -> Forecast:
        """All prompts."""
        request, tokens = self.request, self.rows * self.request.prompt
        kernels = [leaf for stack in self.anatomy.stacks for leaf in stack.kernels]
        used = sum(leaf.size_on({**self.shards, "embed": 1}) for leaf in kernels)
        reads = (
            sum(self.held(leaf, embed=1) for leaf in kernels)
            + 10 * tokens * self.anatomy.hidden * request.width
        )
        phases = [self._phase("prefill: layers' products", 2.0 * used * tokens, reads, request.prompt, True)]
        pairs = sum(
            s.num_layers * s.num_attentions * s.num_heads / self.shards["heads"] for s in self.anatomy.stacks
        )
        width = self.anatomy.stacks[-1].head_dim
        scores = pairs * tokens * request.prompt
        phases.append(
            Phase("prefill: attention", 4.0 * scores * width, scores * SCORE_BYTES + self.cache_bytes())
        )
        model_flops = self.anatomy.flops_per_token(request.prompt) * request.rows * request.prompt
        return Forecast(self.topology, self.mesh, phases, model_flops, request.rows * request.prompt)

    def _phase(self, name: str, flops: float, reads: float, length: int, sends: bool) -> Phase:
        network, hops = {}, 0.0
        for axis in self.rules.mesh_axes("heads"):
            if (count := self.mesh[axis]) > 1 and sends:
                outs = sum(s.num_layers * (1 + s.num_attentions) for s in self.generating)
                size = outs * self.rows * length * self.anatomy.hidden * self.request.width
                network[axis] = 2 * size * (count - 1) / count
                hops += 2.0 * outs * self.topology.hops(count)
        for axis in self.rules.mesh_axes("embed"):
            if (count := self.mesh[axis]) > 1 and sends:
                gathered = sum(
                    self.held(leaf, embed=1) for stack in self.generating for leaf in stack.kernels
                )
                network[axis] = network.get(axis, 0.0) + gathered * (count - 1) / count
        return Phase(name, flops, reads, network, hops=hops)
