"""Low-rank adapters as the folders of the peft library: adapter_config.json and adapter_model.safetensors.

A folder holds, for each adapted linear layer of transformers' model, lora_A [r, in] and lora_B [out, r], and whole
tensors of the modules that trained beside them. Which of our parameters those are says the family's weight table. A
layer of theirs that fuses several of ours (BLOOM's query_key_value) has one adapter of their ranks together, its
lora_B zero where one's rank meets another's output: the same function. https://github.com/huggingface/peft
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file
from safetensors.numpy import save_file

from modelzoo import hf_files, hf_match, placing, registry
from modelzoo import weights as tables
from modelzoo.axes import LAYERS, num_inputs
from modelzoo.model import Model, abstract_params, logical_axes, trainable, tuned, untuned
from modelzoo.tuning import KERNEL, LORA, Lora, Tuning

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _WEIGHT = "base_model.model.", ".weight"
_TASKS = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}
"""peft's names of tasks; it knows no others."""


def write_adapter(model: Model, params: Any, path: str | os.PathLike[str], base: str | None = None) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(transformers_model, folder)` opens.

    Args:
        model: with adapters (`modelzoo.tuned`).
        params: its canonical tree, at true or padded vocabulary size, held in full by this process.
        path: the folder, made where it does not exist.
        base: what the adapter belongs to, a folder or a hub id, to be noted in it.

    Raises:
        ValueError: the model has no adapters, or peft has no such: what trains beside them is in a layer that has one.
        OSError: the folder cannot be written.
    """
    lora = None if model.tuning is None else model.tuning.lora
    if lora is None:
        raise ValueError(f"{type(model).__name__} has no adapters to write: its tuning has no lora")
    layout = _Layout(model)
    leaves, trains = tables.flatten(nn.meta.unbox(params)), tables.flatten(trainable(model))
    saved = {layout.module(t.name) for t in layout.tensors if any(trains[path] for path in t.paths)}
    tensors: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for tensor in layout.tensors:
        module = layout.module(tensor.name)
        factors = [(i, *_factors(leaves, path, tensor.layer)) for i, path in enumerate(tensor.paths)]
        factors = [(i, a, b) for i, a, b in factors if a is not None]
        if factors and module in saved:
            raise ValueError(
                f"{module}: it has an adapter, and its other parameters train too, which a peft adapter cannot hold: "
                "export merged weights"
            )
        if factors:
            counts[module] = len(factors)
            names = (f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight")
            tensors |= zip(names, layout.joined(tensor, factors), strict=True)
        elif module in saved:
            parts = [(leaves[path], tensor.layer) for path in tensor.paths]
            tensors[_PREFIX + tensor.name] = placing.gather_tensor(tensor, parts, np.dtype(np.float32))
    common = max(counts.values(), key=list(counts.values()).count)
    others = {module: count for module, count in counts.items() if count != common}
    config = {
        "peft_type": "LORA",
        "task_type": _TASKS.get(model.task),
        "base_model_name_or_path": base,
        "r": common * lora.rank,
        "lora_alpha": common * lora.alpha,
        "rank_pattern": {module: count * lora.rank for module, count in others.items()},
        "alpha_pattern": {module: count * lora.alpha for module, count in others.items()},
        "lora_dropout": lora.dropout,
        "target_modules": layout.short(set(counts)),
        "modules_to_save": layout.roots(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }
    if jax.process_index():
        return
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        save_file(tensors, folder / f".{WEIGHTS}", metadata={"format": "pt"})
        os.replace(folder / f".{WEIGHTS}", folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write to {folder}: {getattr(error, 'strerror', None) or error}") from None


def read_adapter(model: Model, params: Any, path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Adds a peft adapter to a model: what peft wrote, or `write_adapter`.

    Args:
        model: of the class that the adapter was made for, or with the same trunk.
        params: its canonical tree, sharded or not.
        path: the adapter's folder.

    Returns:
        (model with adapters, params with them), to train on or for `tuning.merge`. Adapters of several ranks are
        filled up with zeros to the largest, and layers without one have zeros.

    Raises:
        OSError: there is no adapter, or a file is damaged.
        ValueError: it is no LoRA of linear layers, or belongs to another model.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        raise OSError(f"{folder}: no peft adapter, as it has no {CONFIG}")
    config = hf_files.read_json(folder / CONFIG)
    _check_kind(folder, config)
    try:
        stored = {name: np.asarray(value, np.float32) for name, value in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    layout = _Layout(model)
    leaves = tables.flatten(nn.meta.unbox(params))
    found = _sort(folder, layout, {name.removeprefix(_PREFIX): value for name, value in stored.items()})
    adapted = {
        path: tensor for tensor in layout.tensors if tensor.name in found.factors for path in tensor.paths
    }
    if not adapted:
        raise ValueError(f"{folder}: it adapts no layer of {type(model).__name__}")
    rank = max(len(a) for a, _ in found.factors.values())
    scale = float(config["lora_alpha"]) / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    names = tuple("/".join(path).replace(".", r"\.") for path in adapted)
    lora = Lora(
        rank=rank, alpha=scale * rank, targets=names, dropout=float(config.get("lora_dropout") or 0.0)
    )
    model = tuned(model, Tuning(lora=lora))
    shapes = tables.flatten(abstract_params(model))
    new = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items() if LORA in path}
    for (*_, part), array in new.items():
        if part in ("scale", "dropout"):
            array[...] = lora.scale if part == "scale" else lora.dropout
    for tensor in layout.tensors:
        if tensor.name in found.factors:
            a, b = found.factors[tensor.name]
            b = b * (_scale(config, layout.module(tensor.name), len(a)) / scale)
            layout.spread(tensor, a, b, new)
    leaves |= new
    for tensor in layout.tensors:
        if tensor.name in found.whole:
            _replace(leaves, tensor, found.whole[tensor.name])
    return model, tables.unflatten(leaves)


class _Found(NamedTuple):
    """What a folder holds by the names of transformers' tensors: pairs (lora_A, lora_B), and whole tensors."""

    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    whole: dict[str, np.ndarray]


def _sort(folder: Path, layout: "_Layout", stored: Mapping[str, np.ndarray]) -> _Found:
    known = {name: tensor for tensor in layout.tensors for name in tensor.names}
    found = _Found({}, {})
    for name, value in stored.items():
        for mark in (".lora_A.weight", ".lora_B.weight"):
            if name.endswith(mark):
                module = name.removesuffix(mark)
                other = stored.get(f"{module}.lora_{'B' if 'A' in mark else 'A'}.weight")
                tensor = known.get(module + _WEIGHT)
                if tensor is None or other is None:
                    raise ValueError(f"{folder}: {name} belongs to no linear layer of the model")
                pair = (value, other) if "A" in mark else (other, value)
                if (pair[1].shape[0], pair[0].shape[1]) != tensor.shape or len(pair[0]) != pair[1].shape[1]:
                    raise ValueError(
                        f"{folder}: {module} is adapted by {pair[1].shape} x {pair[0].shape}, and is {tensor.shape}"
                    )
                found.factors[tensor.name] = pair
                break
        else:
            if name not in known or value.shape != known[name].shape:
                raise ValueError(f"{folder}: {name} {value.shape} is no tensor of the model")
            found.whole[known[name].name] = value
    return found


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type = {kind!r}: LORA alone is read")
    for name in ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters"):
        if config.get(name):
            raise ValueError(f"{folder / CONFIG}: {name} = {config[name]!r}: plain LoRA alone is read")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{folder / CONFIG}: {name} = {value!r}: it is a number above 0")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{folder / CONFIG}: bias = {config['bias']!r}: 'none' alone is read")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of one layer's adapter, which patterns may set apart."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _replace(leaves: dict[tables.Path, Any], tensor: tables.StoredTensor, value: np.ndarray) -> None:
    """Puts a whole tensor in the place of a parameter, or of a layer of it."""
    value = value.reshape([tensor.sizes[axis] for axis in tensor.file_axes])
    order = [*([tensor.fused] if tensor.fused else []), *tensor.axes]
    value = value.transpose([tensor.file_axes.index(axis) for axis in order])
    for i, path in enumerate(tensor.paths):
        part = value[i] if tensor.fused else value
        old = leaves[path]
        new = np.array(jax.device_get(old))
        new[(*((tensor.layer,) if tensor.layer is not None else ()), *map(slice, part.shape))] = part
        sharding = getattr(old, "sharding", None)
        leaves[path] = new if sharding is None else jax.device_put(new, sharding)


def _factors(leaves: Mapping[tables.Path, Any], path: tables.Path, layer: int | None) -> Any:
    """(a, b) of one layer of a kernel, float32; (None, None) where it has no adapter."""
    if path[-1] != KERNEL or (*path[:-1], LORA, "a") not in leaves:
        return None, None
    pair = (np.asarray(leaves[*path[:-1], LORA, name], np.float32) for name in ("a", "b"))
    return tuple(array if layer is None else array[layer] for array in pair)


class _Layout:
    """Where transformers' linear layers stand among a model's kernels."""

    def __init__(self, model: Model):
        plain = untuned(model)
        hf_match.check_knobs(plain.config)
        family = registry.get_family(plain.config.model_type)
        self.tensors = tables.bind(family.weights, tables.flatten(abstract_params(plain)))
        self._axes = tables.flatten(logical_axes(plain))

    @staticmethod
    def module(tensor: str) -> str:
        """The module that owns a tensor."""
        return tensor.rpartition(".")[0]

    def short(self, modules: set[str]) -> list[str]:
        """Names that peft takes for exactly these modules: their ends where the model has no others that end so."""
        everything = {self.module(tensor.name) for tensor in self.tensors}
        found = set()
        for module in modules:
            parts = module.split(".")
            ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
            found.add(
                next(
                    end
                    for end in ends
                    if {m for m in everything if m == end or m.endswith("." + end)} <= modules
                )
            )
        return sorted(found)

    def roots(self, modules: set[str]) -> list[str]:
        """The modules that hold these and no others: what peft copies whole."""
        everything = {self.module(tensor.name) for tensor in self.tensors}
        found = set()
        for module in modules:
            parts = module.split(".")
            starts = [".".join(parts[: i + 1]) for i in range(len(parts))]
            found.add(
                next(
                    start
                    for start in starts
                    if {m for m in everything if m == start or m.startswith(start + ".")} <= modules
                )
            )
        return sorted(found)

    def _split(self, tensor: tables.StoredTensor) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The axes of a kernel's inputs, and of its outputs."""
        axes = self._axes[tensor.paths[0]]
        count = num_inputs(axes[1:] if axes[0] == LAYERS else axes)
        return tensor.axes[:count], tensor.axes[count:]

    def joined(self, tensor: tables.StoredTensor, factors: Any) -> tuple[np.ndarray, np.ndarray]:
        """lora_A and lora_B of a linear layer.

        Args:
            tensor: its weight.
            factors: (which of the tensor's parameters, a, b) of those that have an adapter.
        """
        inputs, outputs = self._split(tensor)
        rank = factors[0][1].shape[-1]
        rows, columns = tensor.groups
        whole = np.zeros([*(tensor.sizes[axis] for axis in rows), rank * len(factors)], np.float32)
        parts = []
        for place, (which, a, b) in enumerate(factors):
            a = a[tuple(slice(tensor.sizes[axis]) for axis in inputs)]
            parts.append(a.transpose([*map(inputs.index, columns), len(inputs)]).reshape(-1, rank))
            kept = [axis for axis in rows if axis != tensor.fused]
            b = b.transpose([*(1 + outputs.index(axis) for axis in kept), 0])
            b = b[tuple(slice(tensor.sizes[axis]) for axis in kept)]
            whole[self._rows(tensor, which, slice(place * rank, (place + 1) * rank))] = b
        return np.concatenate(parts, axis=1).T.copy(), whole.reshape(-1, whole.shape[-1])

    def spread(self, tensor: tables.StoredTensor, a: np.ndarray, b: np.ndarray, into: dict[Any, Any]) -> None:
        """Writes lora_A and lora_B into the adapters of a tensor's parameters: the inverse of `joined`."""
        inputs, outputs = self._split(tensor)
        rows, columns = tensor.groups
        rank = len(a)
        a = a.T.reshape([*(tensor.sizes[axis] for axis in columns), rank])
        a = a.transpose([*map(columns.index, inputs), len(columns)])
        b = b.reshape([*(tensor.sizes[axis] for axis in rows), rank])
        kept = [axis for axis in rows if axis != tensor.fused]
        for which, path in enumerate(tensor.paths):
            part = b[self._rows(tensor, which, slice(None))]
            part = part.transpose([len(kept), *map(kept.index, outputs)])
            at = () if tensor.layer is None else (tensor.layer,)
            into[*path[:-1], LORA, "a"][(*at, ..., slice(rank))] = a
            into[*path[:-1], LORA, "b"][(*at, slice(rank))] = part

    @staticmethod
    def _rows(tensor: tables.StoredTensor, which: int, rank: slice) -> tuple[Any, ...]:
        """Of lora_B by its axes, the rows of one parameter."""
        return (*(which if axis == tensor.fused else slice(None) for axis in tensor.groups[0]), rank)
