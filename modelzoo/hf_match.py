"""Whether a checkpoint fits a model, and parameters a file: all disagreements, before a byte is moved."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelzoo import placing, registry
from modelzoo import weights as tables
from modelzoo.config import ModelConfig
from modelzoo.layers.quantized import is_quantized
from modelzoo.model import Model, logical_axes
from modelzoo.tensor_files import TensorRef

logger = logging.getLogger("modelzoo.hf")


def choose_class(
    hf_config: Mapping[str, Any], model_class: type[Model] | str | None
) -> tuple[registry.Family, type[Model]]:
    """Decides what a config.json describes.

    Args:
        hf_config: its contents.
        model_class: the class wanted, or its name; None takes the one that it names, or without one the bare
            trunk.

    Returns:
        (family, class to load).

    Raises:
        ValueError: the model_type or the architecture is unknown, or is not of `model_class`'s family.
    """
    known = {cls: family for family in registry.FAMILIES.values() for cls in family.classes}
    by_name = {cls.__name__: cls for cls in known}
    architectures = hf_config.get("architectures") or []
    named = [by_name[name] for name in architectures if name in by_name]
    model_type = hf_config.get("model_type")
    if model_type is not None:
        family = registry.get_family(model_type)
    elif named:
        family = known[named[0]]
    else:
        raise ValueError(
            f"names neither a known model_type nor a known architecture: flaxtron has {sorted(by_name)}"
        )

    if model_class is not None:
        chosen = registry.get_model_class(model_class) if isinstance(model_class, str) else model_class
        if chosen not in family.classes:
            raise ValueError(f"a {family.model_type} checkpoint, which {chosen.__name__} does not read")
        return family, chosen
    if not architectures:
        return family, family.classes[0]
    for cls in named:
        if cls in family.classes:
            return family, cls
    classes = [cls.__name__ for cls in family.classes]
    raise ValueError(
        f"unknown architecture {architectures[0]!r}: for {family.model_type} flaxtron has {classes}"
    )


def check_knobs(config: ModelConfig) -> None:
    """Refuses a config that transformers has no class for.

    Raises:
        ValueError: names the first of its knobs that are on.
    """
    if on := config.knobs_on:
        first, value = next(iter(on.items()))
        others = f" (nor with {', '.join(list(on)[1:])})" if len(on) > 1 else ""
        raise ValueError(
            f"{type(config).__name__}.{first} = {value!r}: Hugging Face has no such model{others}, so no files of it: "
            "keep it in flaxtron's own checkpoints, which hold the knobs that are on"
        )


def trunk_options(family: registry.Family, model_class: type[Model], names: Iterable[str]) -> dict[str, Any]:
    """The fields of a bare trunk that a checkpoint decides, so that nothing in it is random.

    A trunk of a family with poolers is loaded without one where the checkpoint has none: such are language models, and
    trunks that were saved so. (A class whose head reads the pooler creates it, as it does its head.)

    Args:
        family: the checkpoint's.
        model_class: the class to load.
        names: of the checkpoint's tensors.
    """
    if model_class is not family.classes[0] or not hasattr(model_class, "add_pooling_layer"):
        return {}
    table = family.weights
    poolers = [weight.source.removeprefix(table.prefix) for weight in table.weights if weight.optional]
    found = any(table.rename(name).endswith(pooler) for name in names for pooler in poolers)
    if not found:
        logger.warning("%s without a pooler, which the checkpoint does not have", model_class.__name__)
    return {"add_pooling_layer": found}


def match_tensors(
    folder: Path,
    model_class: type[Model],
    table: tables.WeightTable,
    shapes: Mapping[tables.Path, jax.ShapeDtypeStruct],
    refs: Mapping[str, TensorRef],
    other_class: bool,
) -> tuple[dict[tables.Path, list[placing.Source]], list[tables.Path]]:
    """Finds every parameter's tensors in a checkpoint; reads none.

    Args:
        folder: the checkpoint's, for messages.
        model_class: the class to load.
        table: its family's names.
        shapes: its parameters, flattened.
        refs: what the checkpoint holds.
        other_class: the checkpoint is of another class, so that a head may be absent.

    Returns:
        (the tensors of each parameter, the parameters of heads that the checkpoint does not have).

    Raises:
        ValueError: names all tensors that are missing, unexpected or of another shape or kind.
    """
    left = {table.rename(name): ref for name, ref in refs.items() if not table.ignores(name)}
    tensors = tables.bind(table, shapes)
    sources: dict[tables.Path, list[placing.Source]] = {}
    missing: list[tables.StoredTensor] = []
    found_heads: set[str] = set()
    misshapen: list[str] = []
    mistyped: list[str] = []
    copies = {name for tensor in tensors for name in tensor.copies}
    for tensor in tensors:
        name = next((name for name in (*tensor.names, *tensor.copies) if name in left), None)
        if name is None:
            missing.append(tensor)
            continue
        ref = left.pop(name) if name in tensor.names else left[name]
        found_heads.add(tensor.part)
        if ref.shape != tensor.shape:
            misshapen.append(f"{name} is {list(ref.shape)}, where the config makes it {list(tensor.shape)}")
        elif not jnp.issubdtype(ref.dtype, jnp.floating):
            mistyped.append(f"{name} holds {ref.dtype}, where floating-point numbers belong")
        for part, path in enumerate(tensor.paths):
            sources.setdefault(path, []).append(placing.Source(tensor, ref, part))

    new = [t for t in missing if other_class and t.in_head and t.part not in found_heads]
    absent = [tensor.name for tensor in missing if tensor not in new]
    left = {name: ref for name, ref in left.items() if name not in copies}
    others = [name for name in left if tables.is_other_head(table, shapes, name)]
    unexpected = [name for name in left if name not in others]
    problems = {
        "missing": absent,
        "unexpected": unexpected,
        "wrong-shaped": misshapen,
        "wrong-typed": mistyped,
    }
    _raise_misfit(folder, model_class, problems)
    if others:
        logger.warning("%s: %s leaves out %s", folder, model_class.__name__, ", ".join(others))
    if new:
        logger.warning(
            "%s: has no head for %s; newly initialised, to be trained: %s",
            *(folder, model_class.__name__, ", ".join(tensor.name for tensor in new)),
        )
    return sources, [path for tensor in new for path in tensor.paths]


def _raise_misfit(folder: Path, model_class: type[Model], problems: Mapping[str, list[str]]) -> None:
    """Raises one error for all tensors that do not fit: a first line that sums them up, then each of them."""
    if not any(problems.values()):
        return
    first = "; ".join(f"{len(found)} {kind}, such as {found[0]}" for kind, found in problems.items() if found)
    every = "".join(f"\n  {kind}: {name}" for kind, found in problems.items() for name in found)
    raise ValueError(
        f"{folder}: its tensors are not those of {model_class.__name__} under its config.json: {first}{every}"
    )


def stored_dtype(refs: list[TensorRef], param_dtype: Any) -> np.dtype:
    """The dtype that a parameter of these tensors gets.

    Raises:
        ValueError: they are of a dtype that is for storage alone, and `param_dtype` is None.
    """
    if param_dtype is not None:
        return np.dtype(param_dtype)
    # JAX has 64-bit numbers switched off.
    found = {np.dtype(np.float32) if ref.dtype == np.float64 else ref.dtype for ref in refs}
    with jax.numpy_dtype_promotion("standard"):
        dtype = np.dtype(jnp.result_type(*found))
    if dtype.itemsize < 2:
        raise ValueError(f"{refs[0].file}: stores {dtype}, which is not to compute with: pass param_dtype")
    return dtype


def rounded_dtype(ref: TensorRef) -> np.dtype:
    """The dtype to read a tensor in that is rounded to int8: the file's own, or float32 where JAX has no such."""
    return ref.dtype if ref.dtype.itemsize in (2, 4) else np.dtype(np.float32)


def check_params(
    model: Model,
    shapes: Mapping[tables.Path, jax.ShapeDtypeStruct],
    leaves: Mapping[tables.Path, Mapping[int | None, Any]],
) -> None:
    """Checks that parameters can be written as a model's.

    Args:
        model: the model.
        shapes: its parameters, flattened.
        leaves: what was passed, by path and layer; layer None is a stacked array, or one that no stack holds.

    Raises:
        ValueError: names every parameter that is missing, unexpected, of another shape or on other processes.
    """
    wrong = [f"{'.'.join(path)} is missing" for path in shapes if path not in leaves]
    wrong += [f"{'.'.join(path)} is not a parameter of it" for path in leaves if path not in shapes]
    narrow: dict[str, None] = {}
    axes = tables.flatten(logical_axes(model))
    for path, held in leaves.items():
        if path not in shapes:
            continue
        want = shapes[path].shape
        if None not in held and sorted(held, key=str) != sorted(range(want[0]), key=str):
            wrong.append(f"{'.'.join(path)} has {len(held)} layers of {want[0]}")
        for layer, array in held.items():
            names, dims = (axes[path], want) if layer is None else (axes[path][1:], want[1:])
            # A mesh may have padded the vocabulary.
            fits = len(array.shape) == len(dims) and all(
                have == dim or (name == "vocab" and have > dim)
                for have, dim, name in zip(array.shape, dims, names, strict=True)
            )
            if not fits:
                wrong.append(f"{'.'.join(path)} is {list(array.shape)}, not {list(dims)}")
            elif is_quantized(array):
                narrow.setdefault(".".join(path))
            elif isinstance(array, jax.Array) and not array.is_fully_addressable:
                wrong.append(f"{'.'.join(path)} is spread over processes: gather it first")
    if narrow:
        wrong.append(
            f"{len(narrow)} are in int8, such as {next(iter(narrow))}: write the parameters that they were made of"
        )
    if wrong:
        raise ValueError(f"these are not parameters of {type(model).__name__} to write: {'; '.join(wrong)}")
