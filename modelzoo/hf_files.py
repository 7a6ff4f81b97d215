"""Hugging Face model folders: which files one has, and writing one so that it is never seen half-written."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelzoo.tensor_files import read_safetensors_header
from modelzoo.unpickle import read_torch_header

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"
SHARDS = {SAFETENSORS: "model-*-of-*.safetensors", TORCH: "pytorch_model-*-of-*.bin"}
READERS = {SAFETENSORS: read_safetensors_header, TORCH: read_torch_header}
TEXT_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "generation_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)
"""What reading and writing text takes beside the weights."""


def find_folder(path: str | os.PathLike[str], with_weights: bool = True) -> Path:
    """The folder that `path` names: itself, or a snapshot of that repository on the Hugging Face hub.

    Args:
        path: a folder, or "organisation/name".
        with_weights: False fetches no more than the config and the index of the weights.

    Raises:
        OSError: no such folder, no such repository, or the hub cannot be reached and has not been before.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise OSError(f"{folder} is a file: pass the folder that holds {CONFIG} and the weights")
    if is_mistyped(path):
        raise OSError(f"{folder}: no such folder")
    # Repositories often hold the same weights twice: the second format is fetched only where the first is missing.
    for weights in (SAFETENSORS, TORCH):
        patterns = [CONFIG, weights + INDEX]
        patterns += [weights, SHARDS[weights], *TEXT_FILES] if with_weights else []
        folder = from_hub(path, patterns)
        if weight_files(folder):
            break
    return folder


def is_mistyped(path: str | os.PathLike[str]) -> bool:
    """Whether a path that is not there stands in a folder that is: it is then not asked for on the hub."""
    return "/" in str(path) and Path(path).expanduser().parent.is_dir()


def check_is_no_run(folder: Path) -> None:
    """Refuses what training wrote, which is not in Hugging Face's layout.

    Raises:
        OSError: it is a run's folder, or that of one of its steps.
    """
    whole = (folder / "checkpoints").is_dir() and not (folder / CONFIG).is_file()
    if whole or ((folder / "params").is_dir() and weight_files(folder) is None):
        raise OSError(
            f"{folder} is a training run's: `python -m train.export {folder} FOLDER` makes a Hugging Face folder of it"
        )


def from_hub(path: str | os.PathLike[str], patterns: Iterable[str]) -> Path:
    """The snapshot of a repository on the Hugging Face hub.

    Args:
        path: "organisation/name", or "name".
        patterns: of the files to fetch.

    Raises:
        OSError: it is no such name, there is no such repository, or the hub cannot be reached and has not been before.
    """
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        raise OSError(f"{path}: no such folder")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        why = _refusal(error, path)
        raise OSError(
            f"{path}: no such folder here, and the Hugging Face hub did not give it: {why}"
        ) from error


def _refusal(error: Exception, path: str | os.PathLike[str]) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted: ask for it at {constants.ENDPOINT}/{path}, then `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it has none of this name, or a private one that needs `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it cannot be reached, and this was not fetched before"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; a Hugging Face folder has one") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


def find_tensors(folder: Path, readers: Mapping[str, Callable[[Path], dict[str, Any]]] = READERS) -> Any:
    """Where the tensors of a folder's checkpoint lie; reads the headers of its files alone.

    Args:
        folder: the folder.
        readers: the forms of checkpoint to look for, by the name of the file, best first: what reads one.

    Returns:
        A `TensorRef` (what the reader gives) per tensor.

    Raises:
        OSError: there are no weights, or a file is missing or cannot be read.
        ValueError: a file is corrupt, or lacks a tensor that the index puts there.
    """
    weights = weight_files(folder, readers)
    if weights is None:
        raise FileNotFoundError(f"{folder}: no {' or '.join(readers)}, nor an index and its parts")
    read = readers[weights.removesuffix(INDEX)]
    if not weights.endswith(INDEX):
        return read(folder / weights)
    index = folder / weights
    parts = read_index(index)
    names = sorted(set(parts.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(names)} parts are missing: {', '.join(missing)}"
        )
    found = {name: read(folder / name) for name in names}
    absent = [f"{tensor} in {part}" for tensor, part in parts.items() if tensor not in found[part]]
    if absent:
        raise ValueError(f"{index}: {len(absent)} tensors are not in the files it names: {', '.join(absent)}")
    return {tensor: ref for part in found.values() for tensor, ref in part.items()}


def read_index(index: Path) -> dict[str, str]:
    """The file of every tensor, as an index has it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no index, or names a file of another folder.
    """
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise ValueError(f"{index}: has no weight_map from tensors to files")
    if outside := [name for name in sorted(set(parts.values())) if Path(name).name != name]:
        raise ValueError(f"{index}: names {outside[0]!r}, which is not a file of its own folder")
    return parts


def weight_files(folder: Path, forms: Iterable[str] = READERS) -> str | None:
    """The file that leads to a folder's weights; transformers looks for them in this order."""
    names = [name + suffix for name in forms for suffix in ("", INDEX)]
    return next((name for name in names if (folder / name).is_file()), None)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a checkpoint to be written: its name and its tensors."""

    name: str
    tensors: tuple[str, ...]


def parse_size(size: int | str) -> int:
    """Bytes in 5_000_000_000, "5GB" or "5GiB".

    Raises:
        ValueError: it is none of these, or not positive.
    """
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    units |= {unit + "I": 1024**i for i, unit in enumerate(units) if unit}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size), re.IGNORECASE)
    if (
        not match
        or match[2].upper() not in units
        or not (bytes_ := int(float(match[1]) * units[match[2].upper()]))
    ):
        raise ValueError(f"max_shard_size = {size!r}: pass bytes, or a size such as '5GB' or '500MB'")
    return bytes_


def plan_shards(nbytes: Mapping[str, int], max_shard_size: int) -> list[Shard]:
    """Divides tensors over files, in order, as transformers does and with its names.

    Args:
        nbytes: of every tensor.
        max_shard_size: bytes of tensors per file; a larger tensor gets a file of its own.
    """
    groups: list[list[str]] = [[]]
    room = max_shard_size
    for name, size in nbytes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return [Shard(SAFETENSORS, tuple(groups[0]))]
    total = len(groups)
    return [
        Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)
    ]


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into `folder` when the block ends well, and vanish when it does not.

    Weights move first, their index after them; then the files of a checkpoint that was there before and would
    shadow or outlive the new one are removed; config.json moves last.

    Raises:
        OSError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".to_hf-", dir=folder))
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        yield scratch
        weights = sorted((file.name for file in scratch.iterdir() if file.name != CONFIG), key=_leads)
        for name in weights:
            os.replace(scratch / name, folder / name)
        for stale in (
            *folder.glob(SHARDS[SAFETENSORS]),
            folder / SAFETENSORS,
            folder / (SAFETENSORS + INDEX),
        ):
            if stale.name not in weights:
                stale.unlink(missing_ok=True)
        os.replace(scratch / CONFIG, folder / CONFIG)
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _leads(name: str) -> bool:
    """Whether a file leads to others, and so must come after them."""
    return name.endswith(INDEX)
