"""Parameters with logical axes, and the one linear layer: a contraction over trailing dimensions.

A kernel keeps the shape that its meaning gives it ([D, N, H] for a query projection), so that a mesh axis can
be laid on heads without a reshape. Kernels are stored [in..., out...]: on a CPU the contraction of a short
activation with a kernel in that order runs at the memory's read bandwidth, and the transposed order does not. A kernel
passed to `apply` may be in int8 (`layers.quantized`).
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from modelzoo.axes import gather_parameter
from modelzoo.layers.quantized import Quantized, is_quantized

Initializer = Callable[..., jax.Array]

PRODUCT = "product"
"""The name under which remat policies know the result of a product with a kernel."""


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: Any,
    use_dtype: Any = None,
) -> jax.Array:
    """Declares a parameter of `module`, or takes the one that was passed to `apply`.

    A "vocab" dimension may be larger than `shape` says: the mesh layer pads vocabularies to what it divides,
    and the layer computes with the rows that it is given. A parameter may be `Quantized`: it comes back as such.

    Args:
        module: the module that owns it.
        name: its name in the parameter tree.
        init: initializer (rng, shape, dtype) -> array.
        shape: its canonical shape.
        axes: one logical axis name, or None, per dimension.
        dtype: the dtype it is created in.
        use_dtype: the dtype it is used in; None leaves it. Cast first, a parameter in bfloat16 use is gathered as such,
            in half the bytes.

    Returns:
        The parameter, without a metadata box, laid out for its use.

    Raises:
        ValueError: the parameter passed in has another shape.
    """
    if not module.has_variable("params", name):
        value = module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
        return value if use_dtype is None else value.astype(use_dtype)
    value: Any = nn.meta.unbox(module.get_variable("params", name))
    fits = value.ndim == len(shape) and all(
        have == want or (axis == "vocab" and have > want)
        for have, want, axis in zip(value.shape, shape, axes, strict=True)
    )
    if not fits:
        path = "/".join((*module.path, name))
        raise ValueError(f"parameter {path} has shape {tuple(value.shape)}, but the config makes it {shape}")
    if is_quantized(value):
        per_scale = tuple(
            axis if dim > 1 else None for axis, dim in zip(axes, value.scale.shape, strict=True)
        )
        gathered = gather_parameter(value.values, axes), gather_parameter(value.scale, per_scale)
        return cast(Any, Quantized(*gathered))
    return gather_parameter(value if use_dtype is None else value.astype(use_dtype), axes)


def sum_leading(x: jax.Array, rank: int) -> jax.Array:
    """Sums over all but the last `rank` dimensions: how the gradient of a broadcast parameter adds up.

    XLA's CPU backend reduces leading dimensions up to 80 times slower than it multiplies by a row of ones, so there
    it does that.
    """
    leading = tuple(range(x.ndim - rank))

    def by_product(x: jax.Array) -> jax.Array:
        ones = jnp.ones(x.shape[: x.ndim - rank], x.dtype)
        summed = lax.dot_general(ones, x, ((leading, leading), ((), ())), preferred_element_type=jnp.float32)
        return summed.astype(x.dtype)

    def by_reduction(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=leading, dtype=jnp.float32).astype(x.dtype)

    return lax.platform_dependent(x, cpu=by_product, default=by_reduction)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias, the bias broadcast over y's leading dimensions."""
    return y + jnp.broadcast_to(bias, y.shape)


def _add_bias_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_bias(y, bias), bias


def _add_bias_backward(bias: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return grad, sum_leading(grad, bias.ndim)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(x: jax.Array, kernel: jax.Array, num_in: int) -> jax.Array:
    """Contracts the last `num_in` dimensions of x with the first of the kernel: [..., in] · [in, out] -> [..., out].

    Its own backward pass, since autodiff forms the kernel's gradient as [out, in] and transposes it: XLA's CPU
    backend then transposes the activations' gradient instead, and computes all that led to it in that slow order.
    """
    return lax.dot_general(x, kernel, ((_last(x, num_in), tuple(range(num_in))), ((), ())))


def _last(x: jax.Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


def _contract_forward(
    x: jax.Array, kernel: jax.Array, num_in: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return contract(x, kernel, num_in), (x, kernel)


def _contract_backward(
    num_in: int, saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    num_out, leading = kernel.ndim - num_in, tuple(range(x.ndim - num_in))
    d_x = lax.dot_general(grad, kernel, ((_last(grad, num_out), _last(kernel, num_out)), ((), ())))
    d_kernel = lax.dot_general(x, grad, ((leading, leading), ((), ())))
    return d_x, d_kernel


contract.defvjp(_contract_forward, _contract_backward)


Multiply = Callable[[jax.Array, jax.Array, int], jax.Array]

_CONTRACT = cast(Multiply, contract)
_MULTIPLY: contextvars.ContextVar[Multiply] = contextvars.ContextVar("multiply", default=_CONTRACT)
_OF_LAYERS = frozenset({"heads", "kv", "mlp"})


@contextlib.contextmanager
def multiply_by(multiply: Multiply) -> Iterator[None]:
    """Has `multiply` called in place of `contract` for the kernels of attention and MLPs in all that is traced inside.

    This is how training computes them in fewer bits. Heads and adapters are multiplied as ever.

    Args:
        multiply: (x, kernel, number of dimensions to contract) -> their product, differentiable.
    """
    token = _MULTIPLY.set(multiply)
    try:
        yield
    finally:
        _MULTIPLY.reset(token)


def product(x: jax.Array, kernel: Any, num_in: int, multiply: Multiply = _CONTRACT) -> jax.Array:
    """`multiply` by the name that remat policies know, of a kernel that may be `Quantized`."""
    if not is_quantized(kernel):
        return checkpoint_name(multiply(x, kernel, num_in), PRODUCT)
    values, scale = kernel.values.astype(x.dtype), kernel.scale.reshape(kernel.scale.shape[num_in:])
    inputs = (_last(x, num_in), tuple(range(num_in)))
    y = lax.dot_general(x, values, (inputs, ((), ())), preferred_element_type=jnp.float32)
    return checkpoint_name((y * scale).astype(x.dtype), PRODUCT)


class Dropout(nn.Dropout):
    """linen's, whose mask is drawn apart from what it is laid on: the same numbers.

    Left to itself XLA draws the mask anew inside everything that reads it. A TPU's compiler then takes several times as
    long, most of it over copies of the generator's rounds.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool | None = None, rng: Any = None) -> jax.Array:
        if self.rate == 0.0 or deterministic:
            return inputs
        if self.rate == 1.0:
            return jnp.zeros_like(inputs)
        keep = 1.0 - self.rate
        key = self.make_rng(self.rng_collection) if rng is None else rng
        mask = lax.optimization_barrier(jax.random.bernoulli(key, keep, inputs.shape))
        return lax.select(mask, inputs / jnp.asarray(keep, inputs.dtype), jnp.zeros_like(inputs))


def dropout_layer(rate: float) -> Dropout:
    """Dropout of one probability; identity when its call says `deterministic`."""
    return Dropout(rate, rng_collection="dropout")


class Adapter(nn.Module):
    """A low-rank addition to what a kernel makes, of parameters passed in: scale * (x · a) · b (`modelzoo.tuning`).

    Attributes:
        inputs, outputs, axes: of the kernel.
        dtype: computation dtype.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num_in, rank = len(self.inputs), self.get_variable("params", "a").shape[-1]

        def given(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
            return parameter(self, name, nn.initializers.zeros, shape, axes, self.dtype, self.dtype)

        a = given("a", (*self.inputs, rank), (*self.axes[:num_in], None))
        b = given("b", (rank, *self.outputs), (None, *self.axes[num_in:]))
        if self.has_variable("params", "dropout") and self.has_rng("dropout"):
            kept = 1 - given("dropout", (), ())
            drawn = jax.random.bernoulli(self.make_rng("dropout"), kept.astype(jnp.float32), x.shape)
            x = jnp.where(drawn, x / kept, jnp.zeros_like(x))
        return given("scale", (), ()) * product(product(x, a, num_in), b, 1)


def add_adapter(
    module: nn.Module,
    x: jax.Array,
    y: jax.Array,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> jax.Array:
    """What a kernel makes of x, y, with what its adapter adds, if one stands beside it in the parameters.

    Args:
        module: that owns the kernel.
        x, y: [..., inputs] and [..., outputs].
        inputs, outputs, axes: of the kernel.
    """
    if not module.has_variable("params", "lora"):
        return y
    return y + Adapter(inputs, outputs, axes, y.dtype, name="lora", parent=module)(x)


class Linear(nn.Module):
    """y = x · kernel + bias, contracting the last `len(inputs)` dimensions of x.

    Attributes:
        inputs: sizes of the contracted dimensions.
        outputs: sizes of the dimensions that replace them.
        axes: logical names of the kernel's dimensions, inputs first.
        use_bias: adds a bias of shape `outputs`.
        kernel_init: initializer of the kernel, called with the kernel's own shape.
        dtype: computation dtype.
        param_dtype: dtype the parameters are created in.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num_in = len(self.inputs)
        shape, dtypes = (*self.inputs, *self.outputs), (self.param_dtype, self.dtype)
        kernel = parameter(self, "kernel", self.kernel_init, shape, self.axes, *dtypes)
        x = x.astype(self.dtype)
        multiply = _MULTIPLY.get() if _OF_LAYERS.intersection(self.axes) else _CONTRACT
        y = product(x, kernel, num_in, multiply)
        y = add_adapter(self, x, y, self.inputs, self.outputs, self.axes)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.outputs, self.axes[num_in:], *dtypes)
            y = add_bias(y, bias)
        return y
