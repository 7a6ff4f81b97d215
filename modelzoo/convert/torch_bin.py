"""PyTorch's pytorch_model.bin, whole, in parts or alone beside a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelzoo import hf_files
from modelzoo.convert.checkpoint import Checkpoint, stored
from modelzoo.unpickle import read_torch_header


def read_torch(path: Path, config: Mapping[str, Any] | None, scratch: Path) -> Checkpoint:
    """Reads a state dict that `torch.save` wrote under Hugging Face names.

    Args:
        path: a folder with pytorch_model.bin, or with its index and parts; or such a file.
        config: the config.json; None takes the one beside the weights.
        scratch: not needed.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is corrupt, or names something that is not on the allow-list of `unpickle`.
    """
    del scratch
    folder = path if path.is_dir() else path.parent
    hf_config = dict(config_beside(folder, config))
    if path.is_dir() or path.name == hf_files.TORCH + hf_files.INDEX:
        refs = hf_files.find_tensors(folder, {hf_files.TORCH: read_torch_header})
    else:
        refs = read_torch_header(path)
    tensors = {name: stored(name, ref) for name, ref in refs.items()}
    return Checkpoint(hf_config, tensors, folder)


def config_beside(folder: Path, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The config that was passed, or the one that lies beside the weights.

    Raises:
        OSError: there is none.
    """
    if config is not None:
        return config
    if not (folder / hf_files.CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder}: no {hf_files.CONFIG} beside the weights: pass --config config.json"
        )
    return hf_files.read_json(folder / hf_files.CONFIG)
