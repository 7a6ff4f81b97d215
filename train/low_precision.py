"""Products with kernels in eight bits, forward and backward, through qwix (https://github.com/google/qwix).

What is multiplied is attention's and the MLPs' kernels; parameters, their gradients and the optimizer stay as they are,
and so do embeddings, heads, norms and attention's own products. Every row of what is contracted has a scale of its own,
its largest element's, taken anew in each step: nothing is calibrated and nothing is kept.

    int8   the product and the gradient of its input in int8; the kernel's gradient, a sum over all tokens that eight
           bits would harm, in the step's dtype (Wortsman et al., 2023, arXiv:2304.13013)
    fp8    all three, activations and kernels in e4m3, gradients in e5m2 (Micikevicius et al., 2022, arXiv:2209.05433)
"""

import functools
import importlib
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from modelzoo.layers.linear import Multiply


class Kind(NamedTuple):
    """Types of what is multiplied: values, gradients, and gradients where a kernel's is taken (None: as they come)."""

    values: Any
    grads: Any
    kernel_grads: Any


KINDS = {
    "int8": Kind(jnp.int8, jnp.int8, None),
    "fp8": Kind(jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e5m2),
}


def multiplication(kind: str) -> Multiply:
    """What to give to `modelzoo.layers.linear.multiply_by`.

    Args:
        kind: one of KINDS.

    Raises:
        ValueError: it is none, or qwix is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"train.quantize = {kind!r}: choose from {', '.join(map(repr, KINDS))}, or None")
    try:
        qwix = importlib.import_module("qwix")
    except ImportError:
        raise ValueError(
            f"train.quantize = {kind!r}: the package qwix is not installed: pip install 'flaxtron[quantize]'"
        ) from None
    return _multiplication(kind, qwix)


@functools.cache
def _multiplication(kind: str, qwix: Any) -> Multiply:
    types = KINDS[kind]

    def dot(a: jax.Array, b: jax.Array, over: Any, a_type: Any, b_type: Any) -> jax.Array:
        """The contraction over dimensions of a and of b, a scale for every row of what is left of each."""

        def rows(x: jax.Array, dims: tuple[int, ...], qtype: Any) -> Any:
            kept = [dim for dim in range(x.ndim) if dim not in dims]
            return qwix.quantize(x, qtype, channelwise_axes=kept, scale_dtype=jnp.float32)

        with jax.numpy_dtype_promotion("standard"):  # qwix is not strict
            parts = rows(a, over[0], a_type), rows(b, over[1], b_type)
            return qwix.dot_general(*parts, (over, ((), ()))).astype(a.dtype)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def multiply(x: jax.Array, kernel: jax.Array, num_in: int) -> jax.Array:
        inputs = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
        return dot(x, kernel, inputs, types.values, types.values)

    def forward(x: jax.Array, kernel: jax.Array, num_in: int) -> Any:
        return multiply(x, kernel, num_in), (x, kernel)

    def backward(num_in: int, saved: Any, grad: jax.Array) -> Any:
        x, kernel = saved
        leading = tuple(range(x.ndim - num_in))
        outputs = tuple(range(len(leading), grad.ndim)), tuple(range(num_in, kernel.ndim))
        d_x = dot(grad, kernel, outputs, types.grads, types.values)
        if types.kernel_grads is None:
            d_kernel = jax.lax.dot_general(x, grad, ((leading, leading), ((), ())))
        else:
            d_kernel = dot(x, grad, (leading, leading), types.values, types.kernel_grads)
        return d_x, d_kernel

    multiply.defvjp(forward, backward)
    return cast(Any, multiply)
