"""Parameters laid out for decoding: one tree per layer, on the mesh, perhaps in int8.

prepared = inference.prepare(model, params, quantize="int8")
"""

from typing import Any, cast

import jax
import jax.numpy as jnp

import modelzoo
import parallel
from modelzoo import heads, quantizing
from modelzoo.layers.quantized import Quantized, is_quantized
from parallel.host import keep_freed_memory


def prepare(
    model: modelzoo.Model, params: Any, rules: parallel.Rules | None = None, quantize: str | None = None
) -> Any:
    """Lays parameters out for decoding; `generate` does it at every call to parameters that are not.

    A decode step over stacked layers would copy each layer's slice before it reads it, at half the speed.
    While this runs both forms exist, so let go of the stacked one; `modelzoo.from_hf(..., unstack=True)` and
    `quantize=` read files into this form at once.

    Args:
        model: their model.
        params: the canonical tree, or with layers unstacked.
        rules: of the mesh to place them on, or None.
        quantize: "int8" turns kernels, and a table that the head is tied to, into int8 (`modelzoo.quantizing`).

    Returns:
        The same tree with `layers` as a tuple, on the mesh if there is one; on a CPU a head that is tied to the
        embedding table gets a transposed copy of it (`modelzoo.heads.untie`). Prepared parameters come back as they
        are.

    Raises:
        ValueError: the tree is not the model's, or the mesh does not divide it; an unknown `quantize`.
    """
    quantizing.check_kind(quantize)
    if jax.default_backend() == "cpu":  # the temporaries of every step would be mapped anew
        keep_freed_memory()
    copy, params = _take_head_copy(model, params)
    if rules is not None:
        params = _shard(params, model, rules)
        copy = copy if _is_on(copy, rules) else None
    params = modelzoo.unstack_layers(params)
    if quantize is not None:
        params = quantizing.quantize_params(model, params)
        copy = None if copy is None or is_quantized(copy) else quantizing.quantize_array(copy, (0,))
    if copy is not None:
        return dict(params, lm_head=dict(params.get("lm_head", {}), kernel=copy))
    if quantizing.tied_table(model) is not None and jax.default_backend() == "cpu":
        return heads.untie(params, cast(Any, model).trunk_class.table_path)
    return params


def _shard(params: Any, model: modelzoo.Model, rules: parallel.Rules) -> Any:
    """`parallel.shard_params`, also for parameters in int8: the scales follow the values."""

    def values_of(leaf: Any) -> Any:
        return leaf.values if is_quantized(leaf) else leaf

    placed = parallel.shard_params(jax.tree.map(values_of, params, is_leaf=is_quantized), model, rules)

    def join(leaf: Any, value: jax.Array) -> Any:
        if not is_quantized(leaf):
            return value
        shared = tuple(i for i, dim in enumerate(leaf.scale.shape) if dim == 1)
        target = [1 if i in shared else dim for i, dim in enumerate(value.shape)]
        padding = [(0, want - have) for have, want in zip(leaf.scale.shape, target, strict=True)]
        scale = jnp.pad(leaf.scale, padding, constant_values=1) if any(map(any, padding)) else leaf.scale
        sharding = quantizing.scale_sharding(cast(Any, value.sharding), value.ndim, shared)
        return Quantized(value, jax.device_put(scale, sharding))

    return jax.tree.map(join, params, placed, is_leaf=is_quantized)


def _is_on(copy: Any, rules: parallel.Rules) -> bool:
    """Whether a head's copy was made of a table on this mesh."""
    return all(getattr(array.sharding, "mesh", None) == rules.mesh for array in jax.tree.leaves(copy))


def _take_head_copy(model: modelzoo.Model, params: Any) -> tuple[Any, Any]:
    """The transposed table of a tied head, if the parameters were prepared and hold one, and the tree without it."""
    head = params.get("lm_head", {})
    if not getattr(model.config, "tie_word_embeddings", False) or "kernel" not in head:
        return None, params
    rest = {name: value for name, value in head.items() if name != "kernel"}
    others = {name: value for name, value in params.items() if name != "lm_head"}
    return head["kernel"], dict(others, lm_head=rest) if rest else others
