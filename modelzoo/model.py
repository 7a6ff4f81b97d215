"""What every model class has in common: its fields, its cache, and its parameters without allocating them."""

import functools
import inspect
from typing import Any, ClassVar, TypedDict, cast, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo import tuning as tunings
from modelzoo import weights as tables
from modelzoo.layers.cache import Cache, init_cache


class StackOptions(TypedDict, total=False):
    """Keyword arguments that every trunk takes.

    Attributes:
        output_attentions, output_hidden_states: also return those of every layer.
        deterministic: no dropout (True). False needs rngs={"dropout": rng}.
    """

    output_attentions: bool
    output_hidden_states: bool
    deterministic: bool


class Model(nn.Module):
    """Base of all model classes.

    Attributes:
        config: the family's config.
        dtype: computation dtype.
        param_dtype: dtype that parameters are created in.
        remat: what the backward pass recomputes: "none", or a key of `layers.stack.REMAT_POLICIES`.
        scan_layers: run stacked layers as one scan; False unrolls them (the same numbers, a longer compile).
        cache_dtype: dtype of the cache of incremental decoding; None is `dtype`, and jnp.int8 half of bfloat16's bytes.
        tuning: which parameters train, and which adapters there are (`tuned`); None is the class's own choice.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    scan_layers: bool = True
    cache_dtype: Any = None
    tuning: tunings.Tuning | None = None

    task: ClassVar[str] = "base"
    """What `train.loss` computes from the outputs."""

    def is_frozen(self, path: tuple[str, ...]) -> bool:
        """Whether training leaves the parameter at this path of the tree as it is."""
        return False

    def build(self, model_class: type["Model"], **fields: Any) -> Any:
        """Another class of the same family with this one's fields; a submodule when built in `setup`."""
        return model_class(self.config, self.dtype, self.param_dtype, self.remat, self.scan_layers, **fields)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> Cache:
        """An empty cache for `apply(..., cache=...)`.

        Args:
            batch_size: B.
            max_length: S, prompt and new tokens together.
            dtype: of keys and values; None is `cache_dtype`, or else the computation dtype.

        Raises:
            ValueError: max_length is past the model's positions.
        """
        limit = self.config.max_positions
        if limit is not None and max_length > limit:
            raise ValueError(f"max_length {max_length} is past the {limit} positions of the model")
        heads, width = self.config.cache_heads
        return init_cache(
            self.config.num_layers,
            batch_size,
            max_length,
            heads,
            width,
            dtype or self.cache_dtype or self.dtype,
        )


@functools.lru_cache(maxsize=64)
def _abstract_init(model: Any) -> Any:
    rng = jax.eval_shape(lambda: jax.random.key(0))
    # Shapes do not depend on a mesh that may be in force around the caller, and this one row divides over none.
    with nn.logical_axis_rules(()):
        return jax.eval_shape(lambda rng: new_params(model, rng), rng)


def new_params(model: Model, rng: jax.Array) -> Any:
    """New parameters, adapters included, in boxes that name their axes. To be traced, with no mesh's rules in force.

    Args:
        model: any model of the zoo.
        rng: PRNG key.
    """
    params = model.init(rng, input_ids=jnp.zeros((1, 1), jnp.int32))["params"]
    lora = model.tuning.lora if model.tuning is not None else None
    return params if lora is None else tunings.with_adapters(params, lora, rng)


def abstract_params(model: Model) -> Any:
    """Shapes and dtypes of a model's parameters, nothing allocated.

    Returns:
        The canonical parameter tree (layers stacked, vocabulary at its true size) of jax.ShapeDtypeStruct.
    """
    # Unboxing would lay the shapes, as if they were arrays, on a mesh in force.
    with nn.logical_axis_rules(()):
        return nn.meta.unbox(_abstract_init(cast(Any, model)))


def logical_axes(model: Model) -> Any:
    """The logical axis names of a model's parameters: the canonical tree with a tuple of names at each leaf."""
    return jax.tree.map(
        lambda box: tuple(box.names),
        _abstract_init(cast(Any, model)),
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )


def input_names(model: Model | type[Model]) -> frozenset[str]:
    """The keyword arguments that a model takes: a batch may hold more (labels), and `apply` gets these."""
    names = set()
    for name, parameter in inspect.signature(model.__call__).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            options = get_args(parameter.annotation)  # of Unpack[StackOptions]; a task's are its trunk's
            names |= set(options[0].__annotations__) if options else input_names(cast(Any, model).trunk_class)
        elif name != "self":
            names.add(name)
    return frozenset(names)


def trainable(model: Model) -> Any:
    """Which parameters training changes: the canonical tree with a bool at each leaf."""

    def trains(path: Any, _: Any) -> bool:
        names = tuple(key.key for key in path)
        tuning = model.tuning
        return not model.is_frozen(names) and (tuning is None or tuning.trains(names, _in_head(model, names)))

    return jax.tree_util.tree_map_with_path(trains, abstract_params(model))


LM_TASKS = frozenset({"causal_lm", "double_heads", "masked_lm", "pretraining", "seq2seq_lm", "unshifted_lm"})
"""Tasks with an LM head."""
CHOICE_TASKS = frozenset({"double_heads", "multiple_choice"})
"""Tasks whose inputs are [B, C, T], C choices of each row."""


def _in_head(model: Model, path: tables.Path) -> bool:
    """Whether a parameter is of a head that is no language model's; a pooler belongs to the head that reads it."""
    if model.task == "base" or model.task in LM_TASKS:
        return path[0] == "choice_head"
    return path[0] != tables.TRUNK or path[1] == "pooler"


def tuned(model: Any, tuning: tunings.Tuning) -> Any:
    """A model of which other parameters train, and which may have adapters.

    Args:
        model: any model of the zoo.
        tuning: the settings.

    Raises:
        ValueError: they do not fit the model, or nothing is left to train.
    """
    plain = untuned(model)
    tunings.check(tuning, tables.flatten(abstract_params(plain)), tables.flatten(logical_axes(plain)))
    model = plain.clone(tuning=tuning)
    if not any(jax.tree.leaves(trainable(model))):
        raise ValueError(f"Tuning.freeze = {tuning.freeze!r}: nothing is left to train")
    return model


def untuned(model: Any) -> Any:
    """The model without adapters, of which its class says what trains."""
    return model if model.tuning is None else model.clone(tuning=None)


def describe_tuning(model: Model) -> str | None:
    """A line on what trains of a model with a tuning of its own, else None."""
    if model.tuning is None:
        return None
    shapes, trains = (tables.flatten(tree) for tree in (abstract_params(model), trainable(model)))
    trained = sum(shapes[path].size for path in shapes if trains[path])
    scales = [shapes[path] for path in shapes if tunings.is_adapter(path) and path[-1] == "scale"]
    return tunings.describe(model.tuning, trained, num_params(model), sum(scale.size for scale in scales))


def num_params(model: Model) -> int:
    """The number of parameters at the true vocabulary size."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
