"""`python -m parallel.explain`: where every parameter and activation of a model lies on a mesh, and why.

The rules (`parallel.rules`) name mesh axes for logical axes; this page says what came of it, tensor by tensor: logical
axes, PartitionSpec, bytes on one device, and for every dimension the rule that cut it or left it whole. Nothing is
allocated and nothing compiled, so a model of any size and a mesh of any number of devices will do.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import modelzoo
from parallel.terminal import model_of, rules_of, simulate_devices, user_errors

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec

    from parallel.rules import Names, Rules

MOMENTS = 2 * 4
"""Bytes of AdamW's state for every element of a parameter: two float32 moments."""

EXAMPLES = """\
Says where every parameter and activation of a model lies on a mesh: logical axes,
PartitionSpec, bytes on one device, and for every dimension the rule that cut it or left
it whole; then the bytes of parameters and AdamW against an even share. Nothing is
allocated, and the devices are simulated.

examples:
  python -m parallel.explain tiny-gptj stage=2,fsdp=2,tensor=2
  python -m parallel.explain gpt-j-6b fsdp=16,tensor=4 --rows 64 --length 2048
  python -m parallel.explain bloom-176b stage=10,fsdp=8,tensor=4"""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one tensor lies.

    Attributes:
        path: its name; of an activation, the module that makes it.
        shape: as it is laid out, vocabularies padded.
        dtype: of its elements.
        names: its logical axes.
        spec: what the rules make of them.
        shard_shape: of the part on one device.
        reasons: what decided each dimension.
        count: how many such activations a forward pass makes.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    names: "Names"
    spec: "PartitionSpec"
    shard_shape: tuple[int, ...]
    reasons: tuple[str, ...]
    count: int = 1

    @property
    def size(self) -> int:
        """Elements on one device."""
        return math.prod(self.shard_shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_device(self) -> int:
        return self.size * self.dtype.itemsize


def explain_parameters(model: "modelzoo.Model", rules: "Rules") -> list[Placement]:
    """Where every parameter lies.

    Raises:
        ValueError: as `parallel.param_shardings`.
    """
    import jax  # here and below, not above: `--help` should answer at once

    from parallel.shard import abstract_sharded_params

    placed = jax.tree.leaves_with_path(abstract_sharded_params(model, rules))
    true_shapes = [leaf.shape for leaf in jax.tree.leaves(modelzoo.abstract_params(model))]
    names = jax.tree.leaves(modelzoo.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    return [
        _place(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.dtype, axes, shape, rules)
        for (path, leaf), axes, shape in zip(placed, names, true_shapes, strict=True)
    ]


def explain_activations(model: "modelzoo.Model", rules: "Rules", rows: int, length: int) -> list[Placement]:
    """Where every activation lies that the model lays on the mesh by name, in the order of a forward pass.

    Args:
        model: any model of the zoo.
        rules: of a mesh.
        rows: B of the batch.
        length: T.

    Raises:
        ValueError: the mesh does not divide one of them, or the model does not take the length.
    """
    found: dict[tuple[Any, ...], int] = {}
    for path, leaf, names, times in _constraints(model, rules, rows, length):
        key = (path, leaf.shape, leaf.dtype, names)
        found[key] = found.get(key, 0) + times
    return [
        _place(path, dtype, names, shape, rules, count)
        for (path, shape, dtype, names), count in found.items()
    ]


def _place(
    path: str, dtype: Any, names: "Names", true_shape: tuple[int, ...], rules: "Rules", count: int = 1
) -> Placement:
    import numpy as np

    from parallel.rules import PADDED_AXES

    padded = PADDED_AXES | {f"act_{name}" for name in PADDED_AXES}
    shards = [rules.num_shards(name) for name in names]
    is_padded = [name in padded for name in names]
    shape = tuple(
        -(-dim // n) * n if pads else dim for dim, n, pads in zip(true_shape, shards, is_padded, strict=True)
    )
    try:
        spec = rules.spec(names, shape)
    except ValueError as error:
        raise ValueError(f"{path} {shape}: {error}") from None
    shard_shape = tuple(dim // n for dim, n in zip(shape, shards, strict=True))
    reasons = tuple(_reason(*each, rules) for each in zip(names, true_shape, shape, strict=True))
    return Placement(path, shape, np.dtype(dtype), names, spec, shard_shape, reasons, count)


def _reason(name: str | None, true_dim: int, dim: int, rules: "Rules") -> str:
    """What decided a dimension, such as "heads 4 over tensor=2"."""
    if name is None:
        return f"{dim} whole (no logical name)"
    padded = f" (padded from {true_dim})" if dim != true_dim else ""
    axes = rules.mesh_axes(name)
    if not axes:
        return f"{name} {dim} whole (its rule names no mesh axis)"
    if rules.num_shards(name) == 1:
        return f"{name} {dim} whole ({' x '.join(f'{axis}=1' for axis in axes)})"
    cuts = " x ".join(f"{axis}={rules.mesh.shape[axis]}" for axis in axes if rules.mesh.shape[axis] > 1)
    return f"{name} {dim}{padded} over {cuts}"


# --- activations: what a forward pass asks for


def _constraints(
    model: "modelzoo.Model", rules: "Rules", rows: int, length: int
) -> Iterator[tuple[str, Any, "Names", int]]:
    """(path, shape and dtype, logical names, how often) of every activation that is laid out by name.

    The pass is traced under rules that lay every logical axis on a mesh axis of its own name: the specs in the trace
    are then the names.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from jax.sharding import AbstractMesh, AxisType

    from modelzoo.axes import PARAMETER_AXES
    from modelzoo.model import CHOICE_TASKS
    from parallel.mesh import MESH_AXES

    logical = [name for name, _ in rules.table if name not in PARAMETER_AXES]
    axes = (*logical, *MESH_AXES)
    mesh = AbstractMesh((1,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    inputs = {"input_ids": ids}
    if "decoder_input_ids" in modelzoo.input_names(model):
        inputs["decoder_input_ids"] = ids
    if model.task in CHOICE_TASKS:
        inputs = {"input_ids": jax.ShapeDtypeStruct((rows, 2, length), jnp.int32)}
    table = [(name, name if name in logical else None) for name, _ in rules.table]
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(table):
        run = jax.make_jaxpr(lambda params, inputs: model.apply({"params": params}, **inputs))
        closed = run(modelzoo.abstract_params(model), inputs)
    for stack, leaf, spec, times in _walk(closed.jaxpr, ()):
        names: Names = tuple(spec) + (None,) * (leaf.ndim - len(spec))
        if names and names[0] == "act_batch":  # the others are parameters, laid out for their use
            yield _module_path(stack), leaf, names, times


def _walk(
    jaxpr: Any, outer: tuple[str, ...], times: int = 1
) -> Iterator[tuple[tuple[str, ...], Any, Any, int]]:
    import jax

    for equation in jaxpr.eqns:
        here = (*outer, str(equation.source_info.name_stack))
        if equation.primitive.name == "sharding_constraint":
            yield here, equation.outvars[0].aval, equation.params["sharding"].spec, times
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _walk(getattr(value, "jaxpr", value), here, times * turns)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _module_path(stack: tuple[str, ...]) -> str:
    """A parameter's kind of path from the name stacks of the scopes around an operation."""
    outside, *inside = (
        [part for part in names.split("/") if part and "." not in part] for names in stack if names
    )
    path = outside[1:]  # without the model's class
    for parts in inside:
        path += ["layers", *parts[1:]]  # without the block's
    return "/".join(path)


# --- the page


def page(model: Any, rules: "Rules", rows: int, length: int) -> Iterator[str]:
    """The explanation, line by line.

    Raises:
        ValueError: as `explain_parameters` and `explain_activations`.
    """
    parameters = explain_parameters(model, rules)
    activations = explain_activations(model, rules, rows, length)
    sizes = [f"{axis}={size}" for axis, size in rules.mesh.shape.items() if size > 1]
    devices = rules.mesh.size
    yield f"{type(model).__name__} on {','.join(sizes) or 'one device'}: {devices} devices"
    yield "\nparameters"
    for one in parameters:
        yield from _lines(one)
    yield f"\nactivations of a batch [{rows}, {length}], as the model names them"
    for one in activations:
        yield from _lines(one)
    yield ""
    yield from _totals(parameters, devices)


def _lines(one: Placement) -> Iterator[str]:
    times = f" x {one.count}" if one.count > 1 else ""
    share = f"{_bytes(one.bytes_per_device)} per device of {_bytes(one.num_bytes)}"
    axes = ", ".join(name or "-" for name in one.names)
    yield f"  {one.path}{times}  {one.dtype} {list(one.shape)}  ({axes})  {_spec(one.spec)}  {share}"
    yield f"      {'; '.join(one.reasons)}"


def _spec(spec: "PartitionSpec") -> str:
    return f"P({', '.join(map(repr, spec))})"


def _totals(parameters: Sequence[Placement], devices: int) -> Iterator[str]:
    size = sum(one.num_bytes for one in parameters)
    here = sum(one.bytes_per_device for one in parameters)
    state = size + sum(math.prod(one.shape) * MOMENTS for one in parameters)
    state_here = here + sum(one.size * MOMENTS for one in parameters)
    yield "totals per device"
    for name, whole, part in (
        ("parameters", size, here),
        ("parameters and AdamW", state, state_here),
    ):
        even = whole / devices
        yield (
            f"  {name:21} {_bytes(part):>10} of {_bytes(whole)}; 1/{devices} would be {_bytes(even)}: "
            f"{part / even - 1:+.1%}"
        )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A preset, such as gpt-j-6b or tiny-gptj."""
    mesh: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MESH")]
    """The mesh, such as "stage=2,fsdp=2,tensor=2"; one axis may be -1, what the others leave of --devices."""
    model_class: str | None = None
    """Such as GPTJForSequenceClassification. By default the class that the family is pretrained as."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD=VALUE")] = ()
    """A field of the config to change, such as n_layer=4; give several."""
    rows: int | None = None
    """Rows of the batch. By default one for each of its shards."""
    length: int | None = None
    """Tokens of a row. By default what the model takes, at most 2048."""
    devices: int = 8
    """Devices to simulate for a mesh with a -1."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags and prints the page.

    Args:
        args: the flags; None are those of the command line.
    """
    flags = tyro.cli(
        Flags,
        prog="python -m parallel.explain",
        args=args,
        description=EXAMPLES,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    with user_errors():
        from parallel.layouts import parse_layout

        for name in ("rows", "length"):
            value = getattr(flags, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: it is at least 1")
        sizes = parse_layout(flags.mesh).sizes.values()
        simulate_devices(flags.devices if -1 in sizes else max(1, math.prod(sizes)))
        rules = rules_of(flags.mesh)
        if rules is None:
            raise ValueError("the mesh is empty: write it as fsdp=2,tensor=2")
        model = model_of(flags.model, flags.model_class, flags.set)
        rows = flags.rows or rules.num_shards("act_batch")
        length = flags.length or min(model.config.max_positions or 2048, 2048)
        lines = list(page(model, rules, rows, length))  # an error comes before the first line
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
