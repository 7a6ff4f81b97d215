"""One training step on two meshes, tensor by tensor: what `python -m train.equivalence` measures.

How a difference is scaled. The largest absolute difference of a tensor is divided by the tensor's largest element on
the reference: rounding errors of a sum grow with its largest terms, so an element that nearly cancels says nothing
on its own. Some tensors cancel whole: a key's bias shifts all scores of a query alike, softmax does not see it, and
its gradient is rounding alone on every mesh. A tensor that is smaller, on the reference, than the tolerance times
its module's largest is therefore zero as far as float32 can tell, and is measured by its module's largest element
(the kernel beside the bias is a sum over the same terms); a module that is zero, by the largest of all. A value
that appears there on one mesh alone is still found.

How parameters are updated. By the AdamW of training, but with eps = 1e-3: at 1e-8 the first update is the
gradient's sign, and the sign of a zero is the sign of its rounding.

How they start. As initialised, but constant tensors (biases of zero, scales of one) are drawn around their value: a
bias of zero hides that it is added twice.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import modelzoo
import parallel
from modelzoo.layers import stack
from parallel.layouts import describe
from train.optim import adamw
from train.state import init_state
from train.step import has_dropout, make_train_step

LOSS_TOLERANCE = 1e-6
TENSOR_TOLERANCE = 1e-5
OUTPUT_TOLERANCE = 2e-6
"""Of a module's output, relative to its largest element: the contract of a forward pass."""

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """Where and how a step is run.

    Attributes:
        rules: None is one device.
        schedule, virtual_stages: of the pipeline; without stages they have no effect.
    """

    rules: parallel.Rules | None = None
    schedule: str = "1f1b"
    virtual_stages: int | None = None

    @property
    def num_stages(self) -> int:
        return 1 if self.rules is None else self.rules.num_shards("layers")

    @property
    def label(self) -> str:
        """Such as "stage=2,tensor=2, 1f1b"."""
        mesh = describe(self.rules)
        return f"{mesh}, {self.schedule}" if self.num_stages > 1 else mesh


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all cases compute.

    Attributes:
        model: of a task with a loss.
        params: the canonical parameters that every case starts from, host arrays.
        batch: of every step.
        microbatches: M of a pipeline; what has no stages takes as many slices where there is dropout, whose masks
            belong to a slice.
        seed: of dropout.
        num_steps: steps to take.
    """

    model: Any
    params: Any
    batch: Arrays
    microbatches: int = 1
    seed: int = 0
    num_steps: int = 1


class Result(NamedTuple):
    """A case's losses, one a step, and after the last step its gradients and updated parameters by name."""

    losses: list[float]
    gradients: Arrays
    params: Arrays


class Difference(NamedTuple):
    """How far a loss, a gradient or an updated parameter is from the reference's, and how far it may be."""

    kind: str
    name: str
    value: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.value <= self.tolerance


class _Recorded(NamedTuple):
    gradients: Any
    inner: Any


def make_problem(model: Any, batch: Arrays, *, seed: int = 0, **options: int) -> Problem:
    """A problem whose parameters are the model's initial ones with constant tensors shaken.

    Args:
        model: of a task with a loss.
        batch: its inputs and labels.
        seed: of parameters and dropout.
        options: further fields of `Problem`.
    """
    random = np.random.default_rng(seed)

    def shaken(a: jax.Array) -> np.ndarray:
        values = np.array(a)
        if values.size and values.min() == values.max():
            values += random.normal(0.0, 0.1, values.shape).astype(values.dtype)
        return values

    params = jax.tree.map(shaken, parallel.init_params(model, jax.random.key(seed)))
    return Problem(model, params, batch, seed=seed, **options)


def run_case(problem: Problem, case: Case) -> Result:
    """Takes the problem's steps.

    Raises:
        ValueError: model, batch and mesh do not go together.
    """
    model, slices = problem.model, problem.microbatches
    pipelined = case.num_stages > 1
    optimizer = _recording(adamw(learning_rate=1e-2, eps=1e-3))
    step = make_train_step(
        model,
        optimizer,
        rules=case.rules,
        microbatches=slices if pipelined else None,
        schedule=case.schedule,
        virtual_stages=case.virtual_stages if pipelined else None,
        accumulate=1 if pipelined or not has_dropout(model) else slices,
    )
    rng = jax.random.key(problem.seed)
    state = init_state(model, optimizer, rules=case.rules, rng=rng, params=problem.params)
    losses = []
    for _ in range(problem.num_steps):
        state, metrics = step(state, problem.batch)
        losses.append(float(metrics["loss"]))
    shapes = {name: leaf.shape for name, leaf in _by_name(modelzoo.abstract_params(model)).items()}

    def unpadded(tree: Any) -> Arrays:
        found = {name: leaf for name, leaf in _by_name(tree).items() if name in shapes}
        return {name: np.asarray(leaf)[tuple(map(slice, shapes[name]))] for name, leaf in found.items()}

    return Result(losses, unpadded(_recorded(state.opt_state)), unpadded(state.params))


def compare(reference: Result, found: Result) -> list[Difference]:
    """Every tensor's difference, the worst first (by the share of its tolerance that it takes); losses lead."""
    losses = [
        Difference("loss", f"step {i + 1}", _relative(a, b, abs(a)), LOSS_TOLERANCE)
        for i, (a, b) in enumerate(zip(reference.losses, found.losses, strict=True))
    ]
    tensors = []
    for kind, mine, theirs in (
        ("gradient", reference.gradients, found.gradients),
        ("parameter", reference.params, found.params),
    ):
        scales = _scales(mine, TENSOR_TOLERANCE)
        tensors += [
            Difference(kind, name, _relative(mine[name], theirs[name], scales[name]), TENSOR_TOLERANCE)
            for name in mine
        ]
    return losses + sorted(tensors, key=lambda one: -one.value)


def module_outputs(problem: Problem, rules: parallel.Rules | None) -> list[tuple[str, np.ndarray]]:
    """What every module returns in a forward pass without dropout, in the order in which they finish.

    Layers are run one by one, and named by number: trunk/layers[1]/mlp/fc_in.
    """
    model, names = problem.model, []
    inputs = {name: a for name, a in problem.batch.items() if name in modelzoo.input_names(model)}
    params = problem.params
    if rules is not None:
        params = parallel.shard_params(params, model, rules)
        inputs = jax.device_put(inputs, parallel.batch_sharding(rules))

    def traced(params: Any, inputs: Any) -> list[jax.Array]:
        names.clear()
        values: list[jax.Array] = []
        outer: list[tuple[str, ...]] = [()]
        layer: list[tuple[str, ...]] = [()]

        def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            path = (*layer[-1], *context.module.path)
            outer.append(path)
            result = call(*args, **kwargs)
            outer.pop()
            for leaf in jax.tree.leaves(result):
                if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating):
                    names.append("/".join(path) or type(model).__name__)
                    values.append(leaf)
            return result

        def one_by_one(call: stack.StackRun) -> jax.Array:
            options = {k: v for k, v in call.options.items() if k not in ("remat", "scan", "layer_drop")}
            x, trunk = call.x, outer[-1]
            for i in range(stack.num_layers_of(call.layers)):
                weights, sliced = jax.tree.map(lambda a, i=i: a[i], (call.layers, dict(call.per_layer)))
                layer.append((*trunk, f"layers[{i}]"))
                x, _ = call.block.apply({"params": weights}, x, **call.shared, **sliced, **options)  # type: ignore
                layer.pop()
            return x

        with nn.intercept_methods(record), stack.run_by(one_by_one):
            model.apply({"params": params}, **inputs, deterministic=True)
        return values

    with parallel.use(rules):
        values = jax.jit(traced)(params, inputs)
    return [(name, np.asarray(value)) for name, value in zip(names, values, strict=True)]


def first_parting(
    reference: Sequence[tuple[str, np.ndarray]], found: Sequence[tuple[str, np.ndarray]]
) -> tuple[str, float] | None:
    """The first module whose outputs differ beyond tolerance, and by how much; None where all agree."""
    for (name, mine), (other, theirs) in zip(reference, found, strict=True):
        assert name == other, f"{name} on the reference, {other} on the mesh"
        cut = tuple(slice(min(a, b)) for a, b in zip(mine.shape, theirs.shape, strict=True))  # padded logits
        mine, theirs = mine[cut], theirs[cut]
        largest = np.max(np.abs(mine), initial=0.0, where=np.isfinite(mine))
        difference = _relative(mine, theirs, largest)
        if difference > OUTPUT_TOLERANCE:
            return name, difference
    return None


def first_parting_back(names: Sequence[str], reference: Result, found: Result) -> str | None:
    """The module, of the last to finish forward the first, whose parameters' gradients differ beyond tolerance.

    Args:
        names: of modules in the order of a forward pass, as `module_outputs` gives them.
        reference, found: of the same problem.
    """
    scales = _scales(reference.gradients, TENSOR_TOLERANCE)
    for name in reversed(names):
        module, layer = re.sub(r"\[\d+\]", "", name), re.search(r"\[(\d+)\]", name)
        part = slice(None) if layer is None else int(layer[1])
        for tensor, mine in reference.gradients.items():
            if tensor.rpartition("/")[0] == module:
                theirs = found.gradients[tensor]
                if _relative(mine[part], theirs[part], scales[tensor]) > TENSOR_TOLERANCE:
                    return name
    return None


def _relative(mine: Any, theirs: Any, scale: float) -> float:
    """The largest difference over a scale; infinite where one is NaN."""
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(mine == theirs, 0.0, np.abs(mine - theirs))
    largest = float(np.max(apart, initial=0.0))
    if math.isnan(largest) or (scale == 0.0 and largest > 0.0):
        return math.inf
    return largest / scale if largest else 0.0


def _scales(tensors: Mapping[str, np.ndarray], tolerance: float) -> dict[str, float]:
    """What every tensor's difference is measured by; see the module's docstring."""
    own = {name: float(np.max(np.abs(a), initial=0.0)) for name, a in tensors.items()}
    modules: dict[str, float] = {}
    for name, largest in own.items():
        module = name.rpartition("/")[0]
        modules[module] = max(modules.get(module, 0.0), largest)
    of_all = max(own.values(), default=0.0)
    scales = {}
    for name, largest in own.items():
        module = modules[name.rpartition("/")[0]] or of_all
        scales[name] = largest if largest >= tolerance * module else module
    return scales


def _recording(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that keeps the gradients it was given, in its state."""

    def init(params: Any) -> _Recorded:
        return _Recorded(jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _Recorded]:
        changes, after = inner.update(updates, state.inner, params)
        return changes, _Recorded(updates, after)

    return optax.GradientTransformation(init, update)


def _recorded(opt_state: Any) -> Any:
    """The gradients in the state of `_recording`, wherever it stands."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _Recorded))
    return next(node.gradients for node in found if isinstance(node, _Recorded))


def _by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
