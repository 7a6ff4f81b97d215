"""Optimizers by gin name beside AdamW: Adafactor, Lion, Muon and SGD, from optax's parts where these fit.

Adafactor is written out, since what it keeps are means over a parameter's dimensions: a vocabulary that a mesh
pads must not dilute them, layers that are stacked are separate matrices, and an attention kernel [D, N, H] is one
matrix. Muon, from optax.contrib, is told the same matrices.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from train.optim import adamw, decay_mask, global_norm
from train.schedules import check_ranges

__all__ = ["adafactor", "lion", "muon", "sgd"]

Path = tuple[Any, ...]
Dims = tuple[int, ...]
Shapes = Mapping[Path, tuple[int, ...]]


class ByShape(optax.GradientTransformation):
    """A transformation that has to know the parameters' true shapes; `bind` tells it.

    Attributes:
        make: {path: true shape} -> the transformation; a path that is not there has its array's shape.
    """

    make: Callable[[Shapes], optax.GradientTransformation]

    @classmethod
    def of(cls, make: Callable[[Shapes], optax.GradientTransformation]) -> "ByShape":
        """Unbound, it takes the arrays' own shapes."""
        whole = cls(*make({}))
        whole.make = make
        return whole

    def bind(self, shapes: Shapes) -> optax.GradientTransformation:
        """The transformation for parameters of these true shapes."""
        return self.make(shapes)


def matrix_dims(path: Path, rank: int) -> tuple[Dims, Dims] | None:
    """The dimensions of a parameter that a matrix multiplies by, and those that it gives; None if it is no matrix.

    Args:
        path: in the parameter tree. A stack of layers has its dimension first, which is neither.
        rank: number of dimensions.
    """
    names = [getattr(key, "key", None) for key in path]
    first = int("layers" in names)
    if names[-1] not in ("kernel", "embedding") or rank - first < 2:
        return None
    num_in = rank - first - 1 if names[-2:-1] == ["out"] else 1
    return tuple(range(first, first + num_in)), tuple(range(first + num_in, rank))


def _clipped(clip_norm: float | None, *rest: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(*([] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]), *rest)


def _check(name: str, rate: Any, weight_decay: float, clip_norm: float | None, *more: Any) -> None:
    check_ranges(
        name,
        ("learning_rate", rate, callable(rate) or rate >= 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
        ("clip_norm", clip_norm, clip_norm is None or clip_norm > 0),
        *more,
    )


def lion(
    *,
    learning_rate: float | optax.Schedule = 1e-4,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Lion (Chen et al., 2023, arXiv:2302.06675): the sign of a running mean; half of AdamW's state.

    Args:
        learning_rate: a number, or a schedule: step -> rate; three to ten times lower than AdamW's.
        b1: weight of the running mean against the gradient in a step.
        b2: decay of the running mean.
        weight_decay: share of a parameter that is subtracted per unit of learning rate; biases and norms are spared.
        clip_norm: gradients of a larger global norm are scaled down to it; None leaves them.

    Raises:
        ValueError: a number out of range.
    """
    more = (("b1", b1, 0 <= b1 < 1), ("b2", b2, 0 <= b2 < 1))
    _check("lion", learning_rate, weight_decay, clip_norm, *more)
    options: dict[str, Any] = dict(b1=b1, b2=b2, mu_dtype=jnp.float32)
    return _clipped(
        clip_norm, optax.lion(learning_rate, weight_decay=weight_decay, mask=decay_mask, **options)
    )


def sgd(
    *,
    learning_rate: float | optax.Schedule = 1e-2,
    momentum: float | None = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum; decay is decoupled and scaled by the learning rate.

    Args:
        learning_rate: a number, or a schedule: step -> rate.
        momentum: decay of the running sum of gradients; None keeps none, and no state.
        nesterov: look ahead along the momentum.
        weight_decay: share of a parameter that is subtracted per unit of learning rate; biases and norms are spared.
        clip_norm: gradients of a larger global norm are scaled down to it; None leaves them.

    Raises:
        ValueError: a number out of range.
    """
    more = ("momentum", momentum, momentum is None or 0 <= momentum < 1)
    _check("sgd", learning_rate, weight_decay, clip_norm, more)
    trace = [] if momentum is None else [optax.trace(momentum, nesterov, accumulator_dtype=jnp.float32)]
    decay = [optax.add_decayed_weights(weight_decay, decay_mask)] if weight_decay else []
    return _clipped(clip_norm, *trace, *decay, optax.scale_by_learning_rate(learning_rate))


def muon(
    *,
    learning_rate: float | optax.Schedule = 3e-4,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    consistent_rms: float | None = 0.2,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    rest_learning_rate: float | optax.Schedule | None = None,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) on the layers' matrices, AdamW on all else: embeddings, heads, biases, norms.

    An attention kernel [D, N, H] is the matrix [D, N * H] that it multiplies by.

    Args:
        learning_rate: a number, or a schedule: step -> rate.
        momentum: decay of the running mean of the matrices' gradients.
        nesterov: look ahead along the momentum.
        ns_steps: Newton-Schulz iterations.
        consistent_rms: scales a matrix's update to this root mean square (Liu et al., 2025, arXiv:2502.16982): 0.2 is
            about AdamW's, so that both take one learning rate. None scales by the root of outputs over inputs.
        weight_decay: share of a parameter that is subtracted per unit of learning rate; biases and norms are spared.
        b1: AdamW's decay of the gradients' running mean.
        b2: AdamW's decay of their running mean square.
        eps: added to the norm of a matrix, and by AdamW to the root of the mean square.
        rest_learning_rate: AdamW's; None is `learning_rate`.
        clip_norm: gradients of a larger global norm are scaled down to it; None leaves them.

    Raises:
        ValueError: a number out of range.
    """
    rest_rate = learning_rate if rest_learning_rate is None else rest_learning_rate
    _check(
        "muon",
        learning_rate,
        weight_decay,
        clip_norm,
        ("momentum", momentum, 0 <= momentum < 1),
        ("ns_steps", ns_steps, ns_steps >= 1),
        ("consistent_rms", consistent_rms, consistent_rms is None or consistent_rms > 0),
        ("b1", b1, 0 <= b1 < 1),
        ("b2", b2, 0 <= b2 < 1),
        ("eps", eps, eps > 0),
        ("rest_learning_rate", rest_rate, callable(rest_rate) or rest_rate >= 0),
    )

    def layers_matrix(path: Path, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        found = matrix_dims(path, leaf.ndim)
        in_layers = any(getattr(key, "key", None) == "layers" for key in path)
        return contrib.MuonDimensionNumbers(*found) if found and in_layers else None

    def dims(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(layers_matrix, params)

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "rest" if layers_matrix(path, leaf) is None else "matrices", params
        )

    matrices = contrib.muon(
        learning_rate,
        ns_steps=ns_steps,
        beta=momentum,
        eps=eps,
        weight_decay=weight_decay,
        mu_dtype=jnp.float32,
        nesterov=nesterov,
        muon_weight_dimension_numbers=dims,
        consistent_rms=consistent_rms,
    )
    rest = adamw(learning_rate=rest_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip_norm=None)
    return _clipped(clip_norm, optax.partition({"matrices": matrices, "rest": rest}, labels))


class FactoredState(NamedTuple):
    """Adafactor's state, float32.

    Attributes:
        count: int32 [], updates made.
        row, col: of matrices, running means of the squared gradient over what the matrix gives and over what it
            multiplies by; these dimensions have size 1. None elsewhere.
        full: of all else, the running mean itself. None for matrices.
        momentum: running mean of the updates, or None.
    """

    count: Any
    row: Any
    col: Any
    full: Any
    momentum: Any


def adafactor(
    *,
    learning_rate: float | optax.Schedule = 1e-3,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    clip_threshold: float | None = 1.0,
    scale_by_size: bool = True,
    least_size: float = 1e-3,
    momentum: float | None = None,
    min_factored: int = 128,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235): a matrix's second moments as one row and one column.

    As optax's, with each layer of a stack a parameter of its own; decay is decoupled and scaled by the learning rate.

    Args:
        learning_rate: a number, or a schedule: step -> rate; relative to a parameter's size if `scale_by_size`.
        decay_rate: the running mean of squares decays by 1 - step ** -decay_rate.
        eps: added to the squared gradients.
        clip_threshold: an update of a larger root mean square is scaled down to it; None leaves it.
        scale_by_size: multiply a parameter's update by its root mean square.
        least_size: the least root mean square that counts for it, as of what starts at zero.
        momentum: decay of a running mean of the updates, which takes memory; None keeps none.
        min_factored: a matrix with a side shorter than this keeps its second moments whole.
        weight_decay: share of a parameter that is subtracted per unit of learning rate; biases and norms are spared.
        clip_norm: gradients of a larger global norm are scaled down to it; None leaves them.

    Raises:
        ValueError: a number out of range.
    """
    _check(
        "adafactor",
        learning_rate,
        weight_decay,
        clip_norm,
        ("decay_rate", decay_rate, 0 < decay_rate < 1),
        ("eps", eps, eps > 0),
        ("clip_threshold", clip_threshold, clip_threshold is None or clip_threshold > 0),
        ("least_size", least_size, least_size > 0),
        ("momentum", momentum, momentum is None or 0 <= momentum < 1),
        ("min_factored", min_factored, min_factored >= 1),
    )

    def make(shapes: Shapes) -> optax.GradientTransformation:
        def true_shape(path: Path, leaf: Any) -> tuple[int, ...]:
            return shapes.get(path, leaf.shape)

        def factored(path: Path, leaf: Any) -> tuple[Dims, Dims] | None:
            dims, shape = matrix_dims(path, leaf.ndim), true_shape(path, leaf)
            if dims is None or min(_size(shape, side) for side in dims) < min_factored:
                return None
            return dims

        def init(params: Any) -> FactoredState:
            def kept(which: int) -> Any:
                """Zeros for rows (0), columns (1) or whole moments (2)."""

                def zeros(path: Path, leaf: Any) -> Any:
                    dims = factored(path, leaf)
                    if (dims is None) != (which == 2):
                        return None
                    gone = () if dims is None else dims[1 - which]
                    return jnp.zeros(
                        [1 if d in gone else size for d, size in enumerate(leaf.shape)], jnp.float32
                    )

                return jax.tree_util.tree_map_with_path(zeros, params)

            still = (
                None if momentum is None else jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            )
            return FactoredState(jnp.zeros([], jnp.int32), kept(0), kept(1), kept(2), still)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
            assert params is not None, "adafactor scales by the parameters, so it needs them"
            decay = 1.0 - (state.count + 1).astype(jnp.float32) ** -decay_rate
            rate = jnp.asarray(
                learning_rate(state.count) if callable(learning_rate) else learning_rate, jnp.float32
            )
            scale = (
                jnp.float32(1)
                if clip_norm is None
                else clip_norm / jnp.maximum(global_norm(updates), clip_norm)
            )

            def one(
                path: Path, g: Any, row: Any, col: Any, full: Any, mean: Any, p: Any, decays: bool
            ) -> Any:
                shape, dims = true_shape(path, g), factored(path, g)
                layer = tuple(range(int(any(getattr(key, "key", None) == "layers" for key in path)), g.ndim))
                g, p = g.astype(jnp.float32) * scale, p.astype(jnp.float32)
                squares = jnp.square(g) + eps
                if dims is None:
                    full = decay * full + (1 - decay) * squares
                    change = g * jax.lax.rsqrt(full)
                else:
                    row = decay * row + (1 - decay) * _mean(squares, dims[1], shape)
                    col = decay * col + (1 - decay) * _mean(squares, dims[0], shape)
                    change = g * jax.lax.rsqrt(row / _mean(row, dims[0], shape)) * jax.lax.rsqrt(col)
                if clip_threshold is not None:
                    change /= jnp.maximum(1.0, _rms(change, layer, shape) / clip_threshold)
                change *= rate
                if scale_by_size:
                    change *= jnp.maximum(_rms(p, layer, shape), least_size)
                if momentum is not None:
                    change = mean = momentum * mean + (1 - momentum) * change
                if decays and weight_decay:
                    change += rate * weight_decay * p
                return _Part(-change, row, col, full, mean)

            trees = (updates, state.row, state.col, state.full, state.momentum, params, decay_mask(params))
            if momentum is None:
                trees = (*trees[:4], jax.tree.map(lambda _: None, updates), *trees[5:])
            parts = jax.tree_util.tree_map_with_path(one, *trees)

            def gathered(name: str) -> Any:
                return jax.tree.map(
                    lambda part: getattr(part, name), parts, is_leaf=lambda x: isinstance(x, _Part)
                )

            still = None if momentum is None else gathered("momentum")
            state = FactoredState(state.count + 1, gathered("row"), gathered("col"), gathered("full"), still)
            return gathered("change"), state

        return optax.GradientTransformation(init, update)

    return ByShape.of(make)


class _Part(NamedTuple):
    """What Adafactor has of one parameter."""

    change: Any
    row: Any
    col: Any
    full: Any
    momentum: Any


def _size(shape: tuple[int, ...], dims: Dims) -> int:
    return math.prod(shape[d] for d in dims)


def _mean(x: jax.Array, dims: Dims, shape: tuple[int, ...]) -> jax.Array:
    """The mean over some dimensions, of which only as much counts as the true shape has; the rest is zero."""
    count = float(_size(shape, dims))  # of a large table more than int32 holds
    return jnp.sum(x, dims, keepdims=True) / count


def _rms(x: jax.Array, dims: Dims, shape: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(_mean(jnp.square(x), dims, shape))
