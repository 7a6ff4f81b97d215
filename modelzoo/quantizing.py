"""Which parameters become int8, and turning them: kernels of the stacks and of the LM head, and tables tied to a head.

Everything else is a small part of what a decode step reads (biases, norms, the rows of an untied table that are
looked up), or decides over few outputs, and stays as it is.
"""

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from modelzoo import weights as tables
from modelzoo.axes import LAYERS, num_inputs
from modelzoo.layers.quantized import Quantized, is_quantized, quantize
from modelzoo.layers.stack import is_unstacked
from modelzoo.model import LM_TASKS, Model, logical_axes
from modelzoo.placing import mesh_of

KINDS = ("int8",)
STACK, HEAD = "layers", "lm_head"


def check_kind(kind: str | None) -> None:
    """Refuses a `quantize` argument that names no kind.

    Raises:
        ValueError: it is neither None nor one of KINDS.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"quantize = {kind!r}: pass {' or '.join(map(repr, KINDS))}, or None")


def shared_dims(model: Model) -> dict[tables.Path, tuple[int, ...]]:
    """The parameters that become int8, each with the dimensions (of one layer) that share a scale.

    Those are a kernel's inputs.
    """
    found: dict[tables.Path, tuple[int, ...]] = {}
    table = tied_table(model)
    for path, axes in tables.flatten(logical_axes(model)).items():
        names = axes[1:] if axes[0] == LAYERS else axes
        if path[-1] == "kernel" and (STACK in path or path[0] == HEAD):
            found[path] = tuple(range(num_inputs(names)))
        elif path == table:
            found[path] = (1,)
    return found


def tied_table(model: Model) -> tables.Path | None:
    """Where the embedding table stands that the model's LM head is tied to, if it is."""
    if model.task not in LM_TASKS or not getattr(model.config, "tie_word_embeddings", False):
        return None
    return (tables.TRUNK, *cast(Any, model).trunk_class.table_path)


def quantize_params(model: Model, params: Any) -> Any:
    """The parameters with those in int8 that decoding reads most of, one after the other.

    Args:
        model: their model.
        params: the canonical tree, or with layers unstacked, sharded or not; what is quantized already stays.

    Returns:
        The same tree with `Quantized` leaves.
    """
    shared = shared_dims(model)

    def walk(node: Any, path: tables.Path, stacked: bool) -> Any:
        if isinstance(node, Mapping):
            return {name: walk(sub, (*path, name), stacked or name == STACK) for name, sub in node.items()}
        if is_unstacked(node):
            return tuple(walk(sub, path, False) for sub in node)
        if path not in shared or is_quantized(node):
            return node
        return quantize_array(node, tuple(dim + stacked for dim in shared[path]))

    return walk(params, (), False)


def quantize_array(array: Any, shared: tuple[int, ...]) -> Quantized:
    """`quantize` where the array lies: the values like it, the scales like their outputs; of a shape, the shapes."""
    if isinstance(array, Tracer):
        return quantize(array, shared)
    sharding = getattr(array, "sharding", None)
    if isinstance(array, jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(lambda array: quantize(array, shared), array)
        if isinstance(sharding, NamedSharding):
            at = sharding, scale_sharding(sharding, array.ndim, shared)
            shapes = Quantized(shapes.values.update(sharding=at[0]), shapes.scale.update(sharding=at[1]))
        return shapes
    if not isinstance(sharding, NamedSharding):
        device = jax.local_devices()[0] if sharding is None else next(iter(sharding.device_set))
        with jax.set_mesh(mesh_of(device)):  # not what the caller may have set
            return _quantizer(shared, SingleDeviceSharding(device))(array)
    out: Any = Quantized(cast(Any, sharding), cast(Any, scale_sharding(sharding, array.ndim, shared)))
    with jax.set_mesh(cast(Any, sharding.mesh)):
        return _quantizer(shared, out)(array)


def scale_sharding(sharding: NamedSharding, rank: int, shared: tuple[int, ...]) -> NamedSharding:
    """Where the scales of an array lie that lies at `sharding`."""
    entries = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    spec = PartitionSpec(*(None if i in shared else entry for i, entry in enumerate(entries)))
    return NamedSharding(cast(Any, sharding.mesh), spec)


@functools.lru_cache(maxsize=256)
def _quantizer(shared: tuple[int, ...], out: Any) -> Any:
    return jax.jit(lambda array: quantize(array, shared), out_shardings=out)
