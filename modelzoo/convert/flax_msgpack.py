"""Hugging Face's Flax checkpoints: flax_model.msgpack, whole or in parts.

transformers named Flax's parameters after PyTorch's, so that only the last word of a name and the order of a
kernel's two dimensions differ (transformers 4.57, modeling_flax_pytorch_utils.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelzoo import hf_files
from modelzoo.convert.checkpoint import Checkpoint, Tensor
from modelzoo.convert.msgpack_files import read_flax_header
from modelzoo.convert.torch_bin import config_beside

FLAX = "flax_model.msgpack"


def read_flax(path: Path, config: Mapping[str, Any] | None, scratch: Path) -> Checkpoint:
    """Reads a Flax model that transformers saved.

    Args:
        path: a folder with flax_model.msgpack, or with its index and parts; or such a file.
        config: the config.json; None takes the one beside the weights.
        scratch: not needed.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is corrupt, or holds what no such model has.
    """
    del scratch
    folder = path if path.is_dir() else path.parent
    hf_config = dict(config_beside(folder, config))
    if path.is_dir() or path.name == FLAX + hf_files.INDEX:
        arrays = hf_files.find_tensors(folder, {FLAX: read_flax_header})
    else:
        arrays = read_flax_header(path)
    if arrays and all(name.startswith("params/") for name in arrays):
        arrays = {name.removeprefix("params/"): array for name, array in arrays.items()}
    tensors = dict(_as_torch(path, name, array) for name, array in arrays.items())
    return Checkpoint(hf_config, tensors, folder)


def _as_torch(path: Path, name: str, array: Tensor) -> tuple[str, Tensor]:
    """The name and the layout that PyTorch's model has."""
    *modules, last = name.split("/")
    if last == "kernel":
        if len(array.shape) != 2:
            raise ValueError(
                f"{path}: the kernel {name} has shape {list(array.shape)}; only matrices are read"
            )
        array = array.transposed
    return ".".join(
        [*modules, {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(last, last)]
    ), array
