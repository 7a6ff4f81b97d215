"""Which parameters train: freezing by name, and low-rank adapters beside kernels.

An adapter stands in the tree beside the kernel that it adapts, and `layers.linear` computes with whatever stands there:

    query/kernel [D, N, H]   query/lora/a [D, r]   query/lora/b [r, N, H]   query/lora/scale []   (dropout [])

so that a tree with adapters is complete in itself: y = x · kernel + scale · (x · a) · b. Training starts at b = 0, and
so at what the model was. `merge` folds the adapters into their kernels. LoRA: Hu et al., 2021, arXiv:2106.09685.
"""

import dataclasses
import difflib
import functools
import math
import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelzoo import weights as tables
from modelzoo.axes import LAYERS, num_inputs

LORA, KERNEL = "lora", "kernel"
FACTORS = ("a", "b")
"""What of an adapter trains; its scale and its dropout are settings that it carries along."""

Patterns = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: all else is frozen but a head that is no language model's.

    Attributes:
        rank: r, of every adapter.
        alpha: an adapter's part is scaled by alpha / rank.
        targets: regular expressions of the kernels to adapt.
        dropout: probability of dropping an element of what an adapter reads.
        also: regular expressions of what trains beside the adapters; None is a head other than a language model's.
    """

    rank: int
    alpha: float
    targets: Patterns
    dropout: float = 0.0
    also: Patterns | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "also"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, _patterns(f"lora.{name}", given))
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.rank < 1:
            raise ValueError(f"lora.rank = {self.rank}: it is at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha = {self.alpha}: it is above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout}: it is a probability below 1")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Which of a model's parameters train.

    Attributes:
        freeze: regular expressions of those that do not.
        tune: regular expressions of the only ones that do; empty is all.
        lora: adapters, which then train in their place.
    """

    freeze: Patterns = ()
    tune: Patterns = ()
    lora: Lora | None = None

    def __post_init__(self) -> None:
        for name in ("freeze", "tune"):
            object.__setattr__(self, name, _patterns(f"Tuning.{name}", getattr(self, name)))
        if self.lora is not None and self.tune:
            raise ValueError(
                f"Tuning.tune = {self.tune[0]!r}: with lora the adapters train; lora.also names what trains beside them"
            )

    def trains(self, path: tables.Path, is_head: bool) -> bool:
        """Whether the parameter at a path does, as far as these settings say.

        Args:
            path: of the tree with adapters.
            is_head: whether it belongs to a head other than a language model's.
        """
        name = "/".join(path)
        if _matches(self.freeze, name):
            return False
        if self.lora is None:
            return not self.tune or _matches(self.tune, name)
        if is_adapter(path):
            return path[-1] in FACTORS
        return is_head if self.lora.also is None else _matches(self.lora.also, name)


def check(tuning: Tuning, shapes: Mapping[tables.Path, Any], axes: Mapping[tables.Path, Any]) -> None:
    """Checks that every pattern matches something, and that the adapters fit.

    Args:
        tuning: the settings.
        shapes: the parameters without adapters, flattened.
        axes: their logical axes.

    Raises:
        ValueError: a pattern that matches nothing, with the nearest paths; a rank larger than a kernel; a target that
            is frozen.
    """
    for name in ("freeze", "tune"):
        for pattern in getattr(tuning, name):
            _find(f"Tuning.{name}", pattern, shapes, "parameter")
    if tuning.lora is None:
        return
    for pattern in tuning.lora.also or ():
        _find("lora.also", pattern, shapes, "parameter")
    for path in targets(tuning.lora, shapes):
        inputs, outputs = split_shape(axes[path], shapes[path].shape)
        fits = min(math.prod(inputs), math.prod(outputs))
        if tuning.lora.rank > fits:
            raise ValueError(
                f"lora.rank = {tuning.lora.rank}: {'/'.join(path)} is of {math.prod(inputs)} x {math.prod(outputs)}, "
                f"so an adapter of it has a rank of {fits} at most"
            )
        adapter = (*path[:-1], LORA, FACTORS[0])
        for pattern in tuning.freeze:
            if any(re.fullmatch(pattern, "/".join(frozen)) for frozen in (path, adapter)):
                raise ValueError(
                    f"Tuning.freeze = {pattern!r}: it freezes {'/'.join(path)}, which lora.targets adapts; with lora "
                    "all kernels are frozen already"
                )


def targets(lora: Lora, paths: Iterable[tables.Path]) -> list[tables.Path]:
    """The kernels that are adapted, of those at `paths`.

    Raises:
        ValueError: a pattern matches none of them.
    """
    kernels = [path for path in paths if path[-1] == KERNEL]
    found = {path for pattern in lora.targets for path in _find("lora.targets", pattern, kernels, "kernel")}
    return [path for path in kernels if path in found]


def with_adapters(boxed: Any, lora: Lora, rng: jax.Array) -> Any:
    """A tree with new adapters, whose product is zero: `a` is drawn as peft draws it, `b` is zero.

    Args:
        boxed: new parameters in boxes that name their axes (flax's LogicallyPartitioned).
        lora: the settings.
        rng: PRNG key.
    """
    leaves = tables.flatten(boxed)
    for path in targets(lora, list(leaves)):
        box, where = leaves[path], (*path[:-1], LORA)
        layers, dtype = box.names[: box.names[0] == LAYERS], box.value.dtype
        count = box.value.shape[: len(layers)]
        inputs, outputs = split_shape(box.names, box.value.shape)
        in_axes = box.names[len(layers) : len(layers) + len(inputs)]
        out_axes = box.names[len(layers) + len(inputs) :]
        key = jax.random.fold_in(rng, zlib.crc32("/".join(path).encode()))
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(key, (*count, *inputs, lora.rank), dtype, -bound, bound)
        leaves[*where, "a"] = box.replace(value=a, names=(*layers, *in_axes, None))
        b = jnp.zeros((*count, lora.rank, *outputs), dtype)
        leaves[*where, "b"] = box.replace(value=b, names=(*layers, None, *out_axes))
        settings = {"scale": lora.scale} | ({"dropout": lora.dropout} if lora.dropout else {})
        for name, value in settings.items():
            leaves[*where, name] = box.replace(value=jnp.full(count, value, jnp.float32), names=layers)
    return tables.unflatten(leaves)


def split_shape(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The sizes of one layer's kernel: (its inputs, its outputs)."""
    stacked = axes[0] == LAYERS
    axes, shape = axes[stacked:], shape[stacked:]
    return shape[: num_inputs(axes)], shape[num_inputs(axes) :]


def is_adapter(path: tables.Path) -> bool:
    """Whether a path is that of a part of an adapter."""
    return len(path) > 1 and path[-2] == LORA


def adapted(params: Any, inside: bool = False) -> Any:
    """Which leaves `merge` reads: the tree with a bool at each; a tuple is a leaf."""
    if not isinstance(params, Mapping):
        return inside
    return {
        name: adapted(sub, inside or name == LORA or (name == KERNEL and LORA in params))
        for name, sub in params.items()
    }


def merge(params: Any, dtype: Any = None) -> Any:
    """The parameters with every adapter folded into its kernel, the sum taken in float32.

    Args:
        params: a tree, layers stacked or as tuples. The arrays of it stay.
        dtype: of the merged kernels; None is each one's own.
    """
    if isinstance(params, (tuple, list)):
        return tuple(merge(layer, dtype) for layer in params)
    if not isinstance(params, Mapping):
        return params
    if LORA not in params:
        return {name: merge(sub, dtype) for name, sub in params.items()}
    kernel, adapter = params[KERNEL], params[LORA]
    sharding = getattr(kernel, "sharding", None)
    factors = (adapter[name] for name in (*FACTORS, "scale"))
    merged = _adder(np.dtype(dtype or kernel.dtype), sharding)(kernel, *factors)
    return {name: sub for name, sub in params.items() if name != LORA} | {KERNEL: merged}


@functools.lru_cache(maxsize=64)
def _adder(dtype: np.dtype, sharding: Any) -> Any:
    return jax.jit(functools.partial(_add, dtype=dtype), out_shardings=sharding)


def _add(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """kernel + scale · a · b, where the kernel lies."""

    def one(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
        product = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision="highest")
        return (kernel.astype(jnp.float32) + scale.astype(jnp.float32) * product).astype(dtype)

    return (
        one(kernel, a, b, scale) if a.ndim + b.ndim - 2 == kernel.ndim else jax.vmap(one)(kernel, a, b, scale)
    )


def describe(tuning: Tuning, num_trained: int, num_all: int, num_adapters: int) -> str:
    """A line on what trains.

    Args:
        tuning: the settings.
        num_trained, num_all: parameters that do, and all.
        num_adapters: kernels with an adapter, a stack's layers counted each.
    """
    how = ""
    if tuning.lora is not None:
        how = f", by LoRA of rank {tuning.lora.rank} on {num_adapters} kernels"
    return f"{num_trained:,} of {num_all:,} parameters train ({num_trained / num_all:.2%}){how}"


def _patterns(name: str, given: Patterns) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} = {pattern!r}: no regular expression: {error}") from None
    return patterns


def _matches(patterns: Collection[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _find(setting: str, pattern: str, paths: Iterable[tables.Path], what: str) -> list[tables.Path]:
    names = {"/".join(path): path for path in paths}
    found = [path for name, path in names.items() if re.fullmatch(pattern, name)]
    if not found:
        plain = re.sub(r"\\.|[\^$.*+?()|\[\]{}]", "", pattern)
        nearest = difflib.get_close_matches(plain, names, n=3, cutoff=0.0)
        raise ValueError(f"{setting} = {pattern!r} matches no {what}; the nearest are {', '.join(nearest)}")
    return found
