"""What a training step takes of a chip's memory, by arithmetic, class by class.

Parameters and optimizer state follow from shapes and shards. What a layer keeps for its backward pass follows from
what JAX saves under each policy. What lives while a layer or the head is being computed is the compiler's to say: the
factors below describe what libtpu 0.0.42 was seen to allocate, and tests/planned.json holds them to that.
"""

from collections.abc import Mapping, Sequence

from parallel.anatomy import Leaf, Stack
from parallel.plan_page import PADDING
from train.step_cost import F32, LANES, StepCost

IN_LAYERS = {
    "inner": 10.5,  # what stands between the products of a layer, in the step's dtype
    "stream": 14.0,  # what stands between layers, whole, in the step's dtype
    "kept": 4.6,  # what one layer keeps
    "kernels": 1.0,  # of one layer, gathered
    "logits": 0.26,
}
"""Copies that live at once beside what is kept, while a layer is computed."""

AT_ENDS = {"table": 1.43, "logits": 0.63}
"""Those of the embedding's gathered table in float32, and of the logits, when no layer runs."""

ALWAYS = {"casts": 1.7, "state": 0.48}
"""Those of the shards of all layers' kernels in the step's dtype, and of the optimizer's state.

The factors are fitted to the training steps of tests/planned.json. Where there is room the compiler leaves gaps, so
these are more than a layer needs."""

TWINS = 0.8
"""Of what a stack keeps, held once more where another stack keeps arrays of the same shapes: an encoder's and a
decoder's loops are then given one array of zeros to write to, which has to be copied. MVP with 12 and 12 layers is
seen to pay it, with 12 and 2 or 2 and 12 not."""

PADDING_CHIPS = ("v5e",)
"""Where the compiler was seen to lay an MLP's second kernel out in rows, each shard's columns padded to a register."""

SUMMED = 3.0
"""Gradients of its layers that a chip holds where microbatches or slices of the batch add theirs up: the sum, what is
added to it, and both together."""


def memory_of(cost: StepCost) -> dict[str, int]:
    """Bytes on one chip by class: parameters, optimizer state, gradients, saved activations, temporaries, padding."""
    layers = [leaf for stack in cost.anatomy.stacks for leaf in stack.leaves]
    adds_up = cost.timetable is not None or cost.work.accumulate > 1
    found = {
        "parameters": cost.elements(cost.anatomy.leaves) * F32,
        "optimizer state": _state(cost),
        "gradients": _laid(cost, layers) * F32 * (SUMMED if adds_up else 1),
        "saved activations": _saved(cost),
        "temporaries": _working(cost) + TWINS * _twins(cost),
    }
    kept = [(leaf, F32) for leaf in cost.anatomy.leaves]
    kept += [(leaf, width) for leaf, _, width in cost.state.arrays if leaf is not None]
    padding = sum((_laid(cost, [leaf]) - leaf.size_on(cost.shards)) * width for leaf, width in kept)
    if padding:
        found[PADDING] = padding
    return {name: int(size) for name, size in found.items()}


def _state(cost: StepCost) -> float:
    return sum(
        (size if leaf is None else leaf.size_on(cost.shards)) * width
        for leaf, size, width in cost.state.arrays
    )


def _laid(cost: StepCost, leaves: Sequence[Leaf]) -> float:
    """Elements of parameters on one chip, as they lie in its memory."""
    total = 0.0
    for leaf in leaves:
        size, columns = leaf.size_on(cost.shards), leaf.shape[-1] / cost.shards["embed"]
        if cost.topology.chip.name in PADDING_CHIPS and leaf.names[-2:] == ("mlp", "embed"):
            size *= -(-columns // LANES) * LANES / columns
        total += size
    return total


def _stream_shards(cost: StepCost) -> int:
    """Over how many chips of one sequence the activations between layers are split."""
    return cost.shards["act_stream"] // cost.shards["act_length"]


def _saved(cost: StepCost) -> float:
    total, tokens = 0.0, cost.pass_tokens
    for stack in cost.anatomy.stacks:
        total += _saved_of_stack(cost, stack)
        if cost.timetable is not None:
            entering = tokens * stack.hidden * cost.work.width / _stream_shards(cost)
            total += entering * cost.timetable.num_in_flight * cost.work.virtual_stages
    return total


def _saved_of_stack(cost: StepCost, stack: Stack) -> float:
    return stack.num_layers / cost.stages * saved_of_layer(cost, stack) * cost.pass_tokens


def _twins(cost: StepCost) -> float:
    """Bytes that stacks keep in arrays of the same shapes as another one's, the largest stack not counted."""
    kept: dict[tuple[int, int], list[float]] = {}
    for stack in cost.anatomy.stacks:
        kept.setdefault((stack.num_layers, stack.hidden), []).append(_saved_of_stack(cost, stack))
    return sum(sum(sizes) - max(sizes) for sizes in kept.values())


def saved_of_layer(cost: StepCost, stack: Stack) -> float:
    """Bytes that a layer keeps of each token for its backward pass."""
    width, between = cost.work.width, stack.hidden / _stream_shards(cost)
    inner = stack.num_heads / cost.shards["heads"] * stack.head_dim
    hidden = stack.mlp_dim / cost.shards["mlp"]
    if cost.work.remat == "full":
        return between * width
    if cost.work.remat == "dots":
        # What a product's result is not needed for, going back, is not kept: the last one before a residual.
        added = 0 if stack.is_parallel else stack.num_attentions + (not stack.norm_first)
        projected = inner + 2 * stack.num_kv_heads / cost.shards["kv"] * stack.head_dim
        kept = between * (1 + added) + projected * stack.num_attentions + stack.mlp_inputs * hidden
        return kept * width
    scores = stack.num_attentions * stack.num_heads / cost.shards["heads"] * cost.work.length
    kept = 2 * between + 4 * inner * stack.num_attentions + 6 * hidden
    kept = kept * width + 3 * stack.num_norms * between * F32
    return kept + scores * (F32 + width)


def _working(cost: StepCost) -> float:
    """What lives while a layer or the head computes, beside what is kept for later."""
    anatomy, tokens, width = cost.anatomy, cost.pass_tokens, cost.work.width
    logits = tokens * anatomy.vocab / cost.shards["act_vocab"] * width
    layer = {"stream": tokens * anatomy.hidden * width, "logits": logits}
    for stack in anatomy.stacks:  # they run one after another
        heads = stack.num_heads / cost.shards["heads"]
        head_dim = -(-stack.head_dim // LANES) * LANES if cost.topology.chip.is_tpu else stack.head_dim
        inner = heads * head_dim + stack.mlp_dim / cost.shards["mlp"]
        layers = stack.num_layers / cost.stages
        for name, size in (
            ("inner", tokens * inner * width),
            ("kept", tokens * saved_of_layer(cost, stack)),
            ("kernels", cost.gathered(stack.kernels) / layers * width),
        ):
            layer[name] = max(layer.get(name, 0.0), size)
    ends = {"table": cost.gathered([anatomy.table]) * F32, "logits": logits}
    casts = sum(_laid(cost, stack.kernels) for stack in anatomy.stacks) * width * (width < F32)
    always = {"casts": casts, "state": _state(cost)}
    return _weighed(ALWAYS, always) + max(_weighed(IN_LAYERS, layer), _weighed(AT_ENDS, ends))


def _weighed(factors: Mapping[str, float], sizes: Mapping[str, float]) -> float:
    return sum(factors[name] * size for name, size in sizes.items())
