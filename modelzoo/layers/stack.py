"""A stack of identical blocks: one set of stacked parameters, run as a scan (training) or unrolled (decoding).

A block is a linen module with the signature

    block(x, **shared, **per_layer) -> (x, LayerOutput)

`shared` is the same for every layer (masks, rotary tables), `per_layer` is sliced along its leading axis L (cache,
head mask). Parameters are stacked on axis 0 under one logical axis, "layers". A scan compiles the block once
whatever the depth; but it copies each layer's slice on every step, which halves the speed of decoding, so a decoder
unstacks the parameters once, at load (`unstack_layers`), and the same code then walks over a tuple.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from modelzoo.layers.cache import Cache
from modelzoo.layers.linear import PRODUCT

POLICIES = jax.checkpoint_policies
REMAT_POLICIES = {
    "full": None,  # save block inputs only
    "dots": POLICIES.save_only_these_names(PRODUCT),  # save the results of products with kernels
}


def _save_all_but_layouts(primitive: Any, *_: Any, **__: Any) -> bool:
    """No recomputation, on a mesh: saves everything but arrays that were only laid out or cast anew.

    A parameter that rests in FSDP's shards is gathered where it is used. Saved for the backward pass, the gathered
    parameters of all layers would lie whole on every device; so they are gathered again.
    """
    return primitive.name not in ("sharding_constraint", "convert_element_type")


@struct.dataclass
class LayerOutput:
    """What one block returns beside its activations; None where not asked for.

    Attributes:
        cache: the written LayerCache.
        attentions: [B, N, T, S]; of a whole stack, a tuple of those.
        cross_cache: LayerCache of the encoder's keys and values.
        cross_attentions: as attentions, for cross-attention.
    """

    cache: Any = None
    attentions: Any = None
    cross_cache: Any = None
    cross_attentions: Any = None


def is_unstacked(layers: Any) -> bool:
    """Whether `layers` holds one tree per layer rather than one tree of stacked arrays."""
    return isinstance(layers, (tuple, list))


@dataclasses.dataclass(frozen=True)
class StackRun:
    """The arguments of one `run`, for whoever runs the layers in its place (`run_by`).

    Attributes:
        block: the unbound block.
        layers: its stacked parameters.
        x: [B, T, D].
        shared, per_layer, dropout_rng: as in `run`.
        options: all other arguments.
    """

    block: nn.Module
    layers: Any
    x: jax.Array
    shared: Mapping[str, Any]
    per_layer: Mapping[str, Any]
    dropout_rng: jax.Array | None
    options: Mapping[str, Any]


_RUNNER: contextvars.ContextVar[Callable[[StackRun], jax.Array] | None] = contextvars.ContextVar(
    "runner", default=None
)


@contextlib.contextmanager
def run_by(runner: Callable[[StackRun], jax.Array]) -> Iterator[None]:
    """Has `runner` called in place of every `run` inside.

    This is how a pipeline cuts a model at its stacks, whatever the family: what comes before a stack is traced until
    the runner is called, what comes after it from the runner's result on.

    Args:
        runner: gets the call and returns the activations [B, T, D] after the last layer.
    """
    token = _RUNNER.set(runner)
    try:
        yield
    finally:
        _RUNNER.reset(token)


def num_layers_of(layers: Any) -> int:
    """L of stacked parameters or of a tuple."""
    return len(layers) if is_unstacked(layers) else jax.tree.leaves(layers)[0].shape[0]


def parameters(module: nn.Module, name: str, block: nn.Module, num_layers: int, features: int) -> Any:
    """Declares the stacked parameters of `num_layers` blocks as one parameter `name` of `module`.

    Args:
        module: the trunk; called in its `setup`.
        name: where the stack stands in the parameter tree.
        block: an unbound block (parent=None), callable with x alone.
        num_layers: L.
        features: D.

    Returns:
        The block's parameter tree with a leading axis L on every array, or the tuple that was passed to `apply`.

    Raises:
        ValueError: the parameters passed in are of another number of layers.
    """
    if module.has_variable("params", name):
        layers = nn.meta.unbox(module.get_variable("params", name))
        found = num_layers_of(layers)
        if found != num_layers:
            path = "/".join((*module.path, name))
            raise ValueError(f"parameter {path} holds {found} layers, but the config makes it {num_layers}")
        return layers

    def init_one(rng: jax.Array) -> Any:
        return block.init(rng, jnp.zeros((1, 1, features), getattr(block, "dtype", jnp.float32)))["params"]

    def init_all(rng: jax.Array) -> Any:
        stacked = jax.vmap(init_one)(jax.random.split(rng, num_layers))
        return jax.tree.map(
            lambda box: box.replace(names=("layers", *box.names)),
            stacked,
            is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
        )

    return module.param(name, init_all)


def run(
    block: nn.Module,
    layers: Any,
    x: jax.Array,
    *,
    shared: Mapping[str, Any],
    per_layer: Mapping[str, Any],
    dropout_rng: jax.Array | None = None,
    remat: str = "none",
    scan: bool = True,
    layer_drop: float = 0.0,
    first_layer: int | jax.Array = 0,
    output_hidden_states: bool = False,
    **static: Any,
) -> tuple[jax.Array, tuple[jax.Array, ...] | None, LayerOutput]:
    """Runs every layer in turn.

    Args:
        block: the unbound block.
        layers: its parameters, stacked or as a tuple.
        x: [B, T, D].
        shared: keyword arguments (arrays) that all layers get.
        per_layer: keyword arguments with a leading axis L on every array, or tuples of L trees; or None.
        dropout_rng: folded with the layer's number, so that masks do not depend on the schedule.
        remat: "none", or a key of REMAT_POLICIES: what the backward pass recomputes.
        scan: run stacked parameters as one `lax.scan`; False unrolls them.
        layer_drop: probability of skipping a layer while there is a dropout_rng (Fan et al., 2019, arXiv:1909.11556).
        first_layer: the number of the first of these layers in the whole stack; dropout is folded by the number.
        output_hidden_states: also return the input of every layer.
        static: further keyword arguments, Python values, the same for all layers.

    Returns:
        (x, inputs of the L layers or None, LayerOutput: attentions as a tuple of L; cache in the form it came in).

    Raises:
        ValueError: an unknown remat policy.
    """
    if remat != "none" and remat not in REMAT_POLICIES:
        raise ValueError(f"unknown remat policy {remat!r}: choose from {['none', *REMAT_POLICIES]}")
    if (runner := _RUNNER.get()) is not None:
        options = dict(static, remat=remat, scan=scan, layer_drop=layer_drop)
        return (
            runner(StackRun(block, layers, x, shared, per_layer, dropout_rng, options)),
            None,
            LayerOutput(),
        )
    unstacked = is_unstacked(layers)
    num_layers = num_layers_of(layers)
    first = jnp.asarray(first_layer, jnp.uint32)
    scan = scan and not unstacked and not any(is_unstacked(value) for value in per_layer.values())

    def step(x: jax.Array, layer: tuple[Any, dict[str, Any], jax.Array]) -> Any:
        params, inputs, number = layer
        rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, first + number)
        rngs = None if rng is None else {"dropout": rng}
        y, output = cast(Any, block.apply({"params": params}, x, **shared, **inputs, **static, rngs=rngs))
        if rng is not None and layer_drop > 0.0:
            y = jnp.where(jax.random.bernoulli(jax.random.fold_in(rng, 0), layer_drop), x, y)
        return y, output

    policy = REMAT_POLICIES.get(remat, _save_all_but_layouts)
    if remat != "none" or nn.get_logical_axis_rules():
        # Inside a scan the loop itself keeps the recomputation apart from the forward pass.
        step = jax.checkpoint(step, policy=policy, prevent_cse=not scan)

    if scan:

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, tuple[jax.Array | None, LayerOutput]]:
            y, output = step(x, layer)
            return y, (x if output_hidden_states else None, output)

        numbers = jnp.arange(num_layers, dtype=jnp.uint32)
        x, (inputs, output) = lax.scan(body, x, (layers, dict(per_layer), numbers))
        hidden_states = None if inputs is None else tuple(inputs)
        attentions, cross = (
            None if probs is None else tuple(probs) for probs in (output.attentions, output.cross_attentions)
        )
        return x, hidden_states, LayerOutput(output.cache, attentions, output.cross_cache, cross)

    inputs, outputs = [], []
    for i in range(num_layers):
        inputs.append(x)
        layer = (
            layer_of(layers, i),
            {name: layer_of(value, i) for name, value in per_layer.items()},
            jnp.uint32(i),
        )
        x, output = step(x, layer)
        outputs.append(output)

    def gather(name: str, stacked: bool) -> Any:
        found = tuple(getattr(output, name) for output in outputs)
        if found[0] is None:
            return None
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found) if stacked else found

    stacked = not is_unstacked(per_layer.get("cache"))
    result = LayerOutput(
        gather("cache", stacked),
        gather("attentions", False),
        gather("cross_cache", stacked),
        gather("cross_attentions", False),
    )
    return x, tuple(inputs) if output_hidden_states else None, result


def layer_of(layers: Any, i: int) -> Any:
    """Layer i of a stacked tree or of a tuple of trees."""
    return layers[i] if is_unstacked(layers) else jax.tree.map(lambda a: a[i], layers)


def unstack_layers(tree: Any) -> Any:
    """Turns every stacked `layers` (in a parameter tree or a Cache) into a tuple of one tree per layer."""

    tree = nn.meta.unbox(tree)

    def unstack(layers: Any) -> Any:
        if is_unstacked(layers):
            return layers
        return tuple(layer_of(layers, i) for i in range(jax.tree.leaves(layers)[0].shape[0]))

    return _map_layers(unstack, tree)


def stack_layers(tree: Any) -> Any:
    """The inverse of `unstack_layers`."""

    def stack(layers: Any) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if is_unstacked(layers) else layers

    return _map_layers(stack, tree)


def _map_layers(change: Any, tree: Any) -> Any:
    """Applies `change` to whatever stands under the name `layers`, at any depth; of a Cache also to `cross`."""
    if isinstance(tree, Cache):
        cross = None if tree.cross is None else change(tree.cross)
        return dataclasses.replace(tree, layers=change(tree.layers), cross=cross)
    if not isinstance(tree, Mapping):
        return tree
    return {
        name: change(value) if name == "layers" else _map_layers(change, value)
        for name, value in tree.items()
    }
