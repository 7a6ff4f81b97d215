"""Writes a converted checkpoint: first all is checked, then a folder is written aside, then it moves into place."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from modelzoo import hf_files, hf_match, registry
from modelzoo import weights as tables
from modelzoo.convert.checkpoint import Checkpoint, Tensor
from modelzoo.model import Model, abstract_params
from modelzoo.tensor_files import TensorRef, contiguous_strides, safetensors_header

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "generation_config.json"),
)
"""What is copied from beside the input."""


def fit(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with exactly the tensors that its class writes, under the names that it writes.

    Older spellings, tied copies, buffers and what belongs to another head are gone. A config that names no
    class gets the first one of the family to which every tensor belongs.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape than the config says, or the family is
            none of ours and the checkpoint's reader could not check it.
    """
    model_type = checkpoint.config.get("model_type")
    if checkpoint.checked and model_type not in registry.FAMILIES:
        return checkpoint
    hf_config = dict(checkpoint.config)
    architectures = [str(name).removeprefix("Flax") for name in hf_config.get("architectures") or ()]
    hf_config["architectures"] = architectures
    try:
        family, named = hf_match.choose_class(hf_config, None)
        config = family.config_class.from_hf(hf_config)
    except ValueError as misfit:
        raise ValueError(f"{checkpoint.folder}: its config: {misfit}") from None
    candidates = [named] if architectures else list(family.classes)
    error: ValueError | None = None
    best: dict[str, Tensor] = {}
    for model_class in candidates:
        try:
            with _silent(hf_match.logger, len(candidates) > 1):
                found = _match(checkpoint, family, model_class, config)
        except ValueError as misfit:
            error = error or misfit
            continue
        if len(found) > len(best):
            best, hf_config["architectures"] = found, [model_class.__name__]
    if not best:
        raise error or ValueError("it holds no tensors")
    return Checkpoint(hf_config, best, checkpoint.folder, checkpoint.notes, checked=True)


@contextmanager
def _silent(logger: logging.Logger, silent: bool) -> Iterator[None]:
    before, logger.disabled = logger.disabled, silent or logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def _match(
    checkpoint: Checkpoint, family: registry.Family, model_class: type[Model], config: Any
) -> dict[str, Tensor]:
    """The tensors of one class by the names that it writes."""
    options = hf_match.trunk_options(family, model_class, checkpoint.tensors)
    shapes = tables.flatten(abstract_params(model_class(config, **options)))
    # References that say a shape and a type, and under which name the tensor is to be found.
    refs = {
        name: TensorRef(Path(name), 0, tensor.dtype, tensor.shape, contiguous_strides(tensor.shape))
        for name, tensor in checkpoint.tensors.items()
    }
    sources, _ = hf_match.match_tensors(
        checkpoint.folder, model_class, family.weights, shapes, refs, other_class=False
    )
    found = {source.tensor.name: source.ref.file for group in sources.values() for source in group}
    return {
        name: checkpoint.tensors[str(found[tensor.name])]
        for tensor in tables.bind(family.weights, shapes)
        for name in tensor.written(config.tie_word_embeddings)
    }


def write(
    checkpoint: Checkpoint,
    scratch: Path,
    dtype: np.dtype | None,
    room: int,
    progress: Callable[[int], None],
) -> None:
    """Writes weights, config.json and tokenizer files into an empty folder, a tensor at a time.

    Args:
        checkpoint: what `fit` made.
        scratch: the folder.
        dtype: to write numbers as; None keeps each tensor's own.
        room: bytes of tensors in one file.
        progress: called with numbers of bytes written.

    Raises:
        OSError: a file cannot be read or written.
    """
    tensors = checkpoint.tensors
    dtypes = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    counts = {name: int(np.prod(tensor.shape, dtype=np.int64)) for name, tensor in tensors.items()}
    nbytes = {name: counts[name] * dtypes[name].itemsize for name in tensors}
    shards = hf_files.plan_shards(nbytes, room)
    for shard in shards:
        # Wide elements first, so that every tensor begins on a multiple of its element.
        held = sorted(shard.tensors, key=lambda name: -dtypes[name].itemsize)
        with open(scratch / shard.name, "wb") as stream:
            stream.write(safetensors_header({name: (dtypes[name], tensors[name].shape) for name in held}))
            for name in held:
                data = np.ascontiguousarray(tensors[name].read()).astype(dtypes[name], copy=False)
                assert data.size == counts[name], name
                stream.write(data.reshape(-1).view(np.uint8).data)
                progress(nbytes[name])
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": sum(counts.values()), "total_size": sum(nbytes.values())},
            "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
        }
        _write_json(scratch / (hf_files.SAFETENSORS + hf_files.INDEX), index)
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, scratch / name)
    widest = max(nbytes, key=lambda name: nbytes[name])
    config = dict(checkpoint.config)
    config.pop("dtype", None)  # transformers 5's name of it
    _write_json(scratch / hf_files.CONFIG, config | {"torch_dtype": dtypes[widest].name})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def new_folder(output: Path) -> Iterator[tuple[Path, Path]]:
    """Two empty folders beside `output`; the second becomes it when the block ends well, and both go otherwise.

    Yields:
        (one for temporary files, one for the result). Where `output` already holds files, those of the result
        move into it, config.json last.

    Raises:
        OSError: `output` is a file, or cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise OSError(f"{output} is a file: pass a folder to write")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=above))
    except OSError as error:
        raise OSError(f"cannot write to {above}: {error.strerror or error}") from error
    unpacked, result = aside / "unpacked", aside / "result"
    try:
        unpacked.mkdir()
        result.mkdir()
        yield unpacked, result
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir() and any(output.iterdir()):
            with hf_files.replacing(output) as scratch:
                for file in result.iterdir():
                    shutil.move(file, scratch / file.name)
        else:
            os.replace(result, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
