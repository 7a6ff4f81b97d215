"""From a path and a format to a Hugging Face folder."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from modelzoo import hf_files
from modelzoo.convert.checkpoint import Checkpoint
from modelzoo.convert.fairseq import read_fairseq
from modelzoo.convert.flax_msgpack import read_flax
from modelzoo.convert.megatron import read_megatron_bert, read_megatron_lm
from modelzoo.convert.mesh_transformer import read_mesh_transformer
from modelzoo.convert.torch_bin import read_torch
from modelzoo.convert.writing import fit, new_folder, write

FORMATS: dict[str, Callable[[Path, dict[str, Any] | None, Path], Checkpoint]] = {
    "megatron-bert": read_megatron_bert,
    "megatron-lm": read_megatron_lm,
    "mesh-transformer-jax": read_mesh_transformer,
    "fairseq": read_fairseq,
    "flax": read_flax,
    "torch": read_torch,
}
"""Format -> what reads it: (path, config.json's contents if one was passed, a scratch folder) -> checkpoint."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def convert_checkpoint(
    source_format: str,
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]] | None = None,
) -> Checkpoint:
    """Writes another framework's checkpoint as a folder that transformers and `from_hf` open.

    Nothing is seen half-written, and the host holds one tensor at a time with the parts it is made of.

    Args:
        source_format: a key of FORMATS.
        path: the checkpoint: a file or a folder.
        output: the folder to write.
        config: a config.json that says what the checkpoint does not; None takes what lies beside it, or the
            format's defaults.
        dtype: to write the numbers as, a key of DTYPES; None keeps each tensor's own.
        max_shard_size: bytes of tensors in one file, or a size such as "5GB".
        progress: a context manager of all bytes to be written, whose value is called with bytes written.

    Returns:
        What was written: its config, its tensors and notes for the user.

    Raises:
        OSError: a file is missing, or cannot be read or written.
        ValueError: the format is unknown, a file is corrupt or would run code, or its tensors are not those of
            the model that the config describes.
    """
    if source_format not in FORMATS:
        raise ValueError(f"unknown format {source_format!r}: choose from {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: choose from {', '.join(DTYPES)}")
    room = hf_files.parse_size(max_shard_size)
    path, output = Path(path).expanduser(), Path(output).expanduser()
    given = None if config is None else hf_files.read_json(Path(config).expanduser())
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    with new_folder(output) as (unpacked, result):
        try:
            checkpoint = fit(FORMATS[source_format](path, given, unpacked))
        except RecursionError:
            raise ValueError(f"{path}: nests too deep to be a checkpoint") from None
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        with progress(total) if progress else nullcontext(lambda nbytes: None) as advance:
            write(checkpoint, result, np.dtype(DTYPES[dtype]) if dtype else None, room, advance)
    return checkpoint
