"""Takes a forward pass apart at its stacks of layers, whatever the model: joints, and runs of layers.

A forward pass that runs k stacks one after another is k + 1 joints with the stacks between them:

    joint 0 -> stack 0 -> joint 1 -> stack 1 -> ... -> joint k, the loss

Joint i maps (parameters outside the stacks, a microbatch, its PRNG key, what stack i - 1 returned) to what stack i is
given. Nothing is asked of a model but that its layers go through `modelzoo.layers.stack.run`: joint i is the pass
traced up to its i-th run, with the result of the (i-1)-th put in place of running it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from modelzoo.layers import stack

Forward = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
"""(parameters, microbatch, PRNG key) -> (its share of the loss, float32 []; a tree of sums to report)."""


class _Reached(Exception):
    """Ends a trace; no error."""

    def __init__(self, call: stack.StackRun):
        self.call = call


@dataclasses.dataclass(frozen=True)
class Cut:
    """One stack of a pass.

    Attributes:
        path: where its layers stand in the parameter tree.
        num_layers: L.
        block, options: what every layer is run with.
        treedef: of the run's arguments: (x, shared, per_layer, dropout_rng).
        carried: of every leaf of those, whether it depends on parameters or on an earlier stack, and so takes a
            gradient. Such leaves travel with the activations; the others every stage computes from the microbatch.
    """

    path: tuple[str, ...]
    num_layers: int
    block: Any
    options: Mapping[str, Any]
    treedef: Any
    carried: tuple[bool, ...]

    def split(self, arguments: Any) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """The run's arguments as (carried leaves, the others)."""
        leaves = jax.tree.leaves(arguments)
        pairs = list(zip(leaves, self.carried, strict=True))
        return tuple(leaf for leaf, is_in in pairs if is_in), tuple(
            leaf for leaf, is_in in pairs if not is_in
        )

    def run(
        self,
        layers: Any,
        carried: tuple[jax.Array, ...],
        others: tuple[jax.Array, ...],
        first_layer: jax.Array,
    ) -> tuple[jax.Array, ...]:
        """Runs some of the layers, those from number `first_layer` on.

        Returns:
            The carried leaves with new activations, which are the first of them.
        """
        mine, theirs = iter(carried), iter(others)
        leaves = [next(mine) if is_in else next(theirs) for is_in in self.carried]
        x, shared, per_layer, rng = jax.tree.unflatten(self.treedef, leaves)
        count = stack.num_layers_of(layers)
        per_layer = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first_layer, count), per_layer)
        y, _, _ = stack.run(
            self.block,
            layers,
            x,
            shared=shared,
            per_layer=per_layer,
            dropout_rng=rng,
            first_layer=first_layer,
            **self.options,
        )
        return (y, *carried[1:])


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A forward pass taken apart; made by `take_apart`.

    Attributes:
        cuts: its stacks in turn.
    """

    forward: Forward
    params: Any
    cuts: tuple[Cut, ...]

    def joint(self, index: int, rest: Any, microbatch: Any, rng: jax.Array, before: jax.Array | None) -> Any:
        """What comes before stack `index`, or after the last.

        Args:
            index: 0 ... k.
            rest: the parameters outside the stacks (`without_layers`).
            microbatch, rng: as `forward` takes them.
            before: what stack index - 1 returned; None for the first joint.

        Returns:
            The arguments of the stack's run, or, for joint k, what `forward` returns.
        """
        count = iter(range(len(self.cuts)))

        def runner(call: stack.StackRun) -> jax.Array:
            i = next(count)
            if i == index:
                raise _Reached(call)
            assert before is not None
            # A joint reads only the stack before it (`take_apart` has seen to that).
            return before if i == index - 1 else jnp.zeros(call.x.shape, call.x.dtype)

        try:
            with stack.run_by(runner):
                return self.forward(self._with_layers(rest), microbatch, rng)
        except _Reached as reached:
            return _arguments(reached.call)

    def without_layers(self, params: Any) -> Any:
        """The parameters outside the stacks: the same tree with None for the layers."""
        for cut in self.cuts:
            params = _replaced(params, cut.path, None)
        return params

    def layers(self, params: Any) -> tuple[Any, ...]:
        """The stacked parameters of every stack."""
        return tuple(_at(params, cut.path) for cut in self.cuts)

    def join(self, rest: Any, layers: tuple[Any, ...]) -> Any:
        """The inverse of `without_layers` and `layers`."""
        for cut, tree in zip(self.cuts, layers, strict=True):
            rest = _replaced(rest, cut.path, tree)
        return rest

    def _with_layers(self, rest: Any) -> Any:
        # A joint looks at the layers' shapes alone; what it is given is never computed.
        shapes = self.layers(self.params)
        return self.join(rest, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def take_apart(forward: Forward, params: Any, microbatch: Any, rng: jax.Array) -> Pieces:
    """Finds the stacks of a forward pass by tracing it.

    Args:
        forward: the pass.
        params, microbatch, rng: its arguments, abstract or not.

    Raises:
        ValueError: there is no stack, or one reads more than the stack before it and the microbatch.
    """
    found: list[tuple[tuple[str, ...], stack.StackRun]] = []

    def traced(params: Any, microbatch: Any, rng: jax.Array, befores: tuple[jax.Array, ...]) -> Any:
        found.clear()
        by_identity = {id(jax.tree.leaves(_at(params, path))[0]): path for path in _layer_paths(params)}

        def runner(call: stack.StackRun) -> jax.Array:
            found.append((by_identity[id(jax.tree.leaves(call.layers)[0])], call))
            i = len(found) - 1
            return befores[i] if i < len(befores) else jnp.zeros(call.x.shape, call.x.dtype)

        with stack.run_by(runner):
            forward(params, microbatch, rng)
        return tuple(_arguments(call) for _, call in found)

    def shape_of(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

    params, microbatch, rng = shape_of(params), shape_of(microbatch), shape_of(rng)
    calls = jax.eval_shape(functools.partial(traced, befores=()), params, microbatch, rng)
    if not calls:
        raise ValueError("a pipeline cuts a model at its stack of layers, and this one has none")
    befores = tuple(call[0] for call in calls)
    closed = jax.make_jaxpr(traced)(params, microbatch, rng, befores)
    num_params, num_batch = len(jax.tree.leaves(params)), len(jax.tree.leaves((microbatch, rng)))
    sources = [{"params"}] * num_params + [set()] * num_batch + [{i} for i in range(len(befores))]
    depends = iter(_dependencies(closed.jaxpr, sources))
    cuts = []
    for i, ((path, call), arguments) in enumerate(zip(found, calls, strict=True)):
        of_leaves = [next(depends) for _ in jax.tree.leaves(arguments)]
        if any(j != i - 1 for on in of_leaves for j in on - {"params"}):
            raise ValueError(f"stack {'/'.join(path)} reads a stack that is not the one before it")
        carried = (True, *(bool(on) for on in of_leaves[1:]))
        num_layers, treedef = stack.num_layers_of(call.layers), jax.tree.structure(arguments)
        cuts.append(Cut(path, num_layers, call.block, call.options, treedef, carried))
    return Pieces(forward, params, tuple(cuts))


def _arguments(call: stack.StackRun) -> Any:
    return call.x, dict(call.shared), dict(call.per_layer), call.dropout_rng


def _dependencies(jaxpr: Any, sources: list[set[Any]]) -> list[set[Any]]:
    """Which inputs every output may depend on: an equation's results on all that it reads."""
    on = dict(zip(jaxpr.invars, sources, strict=True))

    def of(variable: Any) -> set[Any]:
        return on.get(variable, set()) if not hasattr(variable, "val") else set()

    for equation in jaxpr.eqns:
        reads = set().union(*(of(variable) for variable in equation.invars))
        on.update(dict.fromkeys(equation.outvars, reads))
    return [of(variable) for variable in jaxpr.outvars]


def _layer_paths(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where stacked layers stand in a parameter tree."""
    if not isinstance(tree, Mapping):
        return []
    found = [(*path, "layers")] if "layers" in tree else []
    return found + [
        deeper
        for name, sub in tree.items()
        if name != "layers"
        for deeper in _layer_paths(sub, (*path, name))
    ]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    return dict(tree, **{name: _replaced(tree[name], tuple(rest), value) if rest else value})
