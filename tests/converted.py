"""Running the converter in tests, and reading what it wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from modelzoo import hf_files
from modelzoo.convert import convert_checkpoint
from modelzoo.convert.checkpoint import Checkpoint, stored


def convert(
    kind: str, source: Path, folder: Path, config: dict[str, Any] | None = None, **options: Any
) -> Checkpoint:
    """Converts; a config is passed as a file."""
    if config is None:
        return convert_checkpoint(kind, source, folder, **options)
    file = folder.parent / "given.json"
    file.write_text(json.dumps(config))
    try:
        return convert_checkpoint(kind, source, folder, file, **options)
    finally:
        file.unlink()


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder, by name."""
    return {name: stored(name, ref).read() for name, ref in hf_files.find_tensors(folder).items()}


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    return json.loads((folder / "config.json").read_text())
