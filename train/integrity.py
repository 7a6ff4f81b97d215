"""Checksums of checkpoints, and the newest one that is whole.

TensorStore checks its indices but not the arrays: a bit that flips in one is read back without a word, and so is
one in the files that only say how a checkpoint came about. So the last thing that is written into a checkpoint,
before it gets its name, is the size and CRC-32 of every file, and a run goes on from the newest checkpoint whose
files have them.
"""

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from parallel import checkpoint

CHECKSUMS = "checksums.json"
_UNLISTED = (CHECKSUMS, "commit_success.txt", "_CHECKPOINT_METADATA")  # written later, or rewritten
_BLOCK = 2**24
_VERDICT_BYTES = 512


def write_checksums(folder: epath.Path) -> None:
    """Notes size and CRC-32 of a checkpoint's files; of a store such as gs://, which has its own, sizes alone.

    Args:
        folder: of the checkpoint, all else being written.
    """
    names = sorted(_files(folder))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = dict(zip(names, pool.map(lambda name: _measure(folder / name), names), strict=True))
    # Aside first: a list that was cut off would condemn a good checkpoint.
    aside = folder / f"{CHECKSUMS}.tmp"
    aside.write_text(json.dumps({"crc32": found}, indent=1) + "\n")
    aside.replace(folder / CHECKSUMS)


def damage(folder: str | os.PathLike[str], part: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint's files.

    Args:
        folder: of the checkpoint.
        part: (index, count): reads every count-th file only, from the index-th.

    Returns:
        The first file that differs and how; None if none does, or if the checkpoint has no checksums.
    """
    folder = checkpoint.as_path(folder)
    try:
        listed = json.loads((folder / CHECKSUMS).read_text())["crc32"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return f"{CHECKSUMS} is damaged"
    except OSError as error:
        return f"{CHECKSUMS} cannot be read: {error.strerror or error}"

    def check(item: tuple[str, list[Any]]) -> str | None:
        name, (size, crc) = item
        try:
            actual = (folder / name).stat().length
            if actual != size:
                return f"{name} has {actual:,} bytes, not {size:,}"
            if crc is not None and _measure(folder / name)[1] != crc:
                return f"{name} does not have its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        return None

    index, count = part
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        verdicts: Iterator[str | None] = pool.map(check, list(listed.items())[index::count])
        return next((verdict for verdict in verdicts if verdict), None)


def newest_sound(checkpoints: str | os.PathLike[str], check: Callable[..., str | None] = damage) -> int:
    """The newest step whose checkpoint is whole; damaged ones above it are set aside, with a warning each.

    Of several processes each reads its share of the files, and all come to the same answer.

    Args:
        checkpoints: a run's checkpoints folder, which need not be there.
        check: as `damage`.

    Returns:
        The step, or 0.
    """
    folder = checkpoint.as_path(checkpoints)
    while True:
        step = max(checkpoint.finished_steps(folder), default=0)
        part = (jax.process_index(), jax.process_count())
        verdict = (check(folder / str(step), part) if step else None) or ""
        if jax.process_count() > 1:
            steps, verdict = _agree(step, verdict)
            if len(set(steps)) > 1:  # they look at different folders, which the caller reports
                return step
        if not verdict:
            return step
        damaged = folder / str(step)
        if jax.process_index() == 0:
            aside = _set_aside(damaged)
            warnings.warn(
                f"checkpoint {damaged} is damaged: {verdict}; set aside as {aside}, the one before is used",
                stacklevel=2,
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")


def _set_aside(damaged: epath.Path) -> str:
    number, aside = 1, damaged.parent / f"{damaged.name}.damaged"
    while aside.exists():
        number += 1
        aside = damaged.parent / f"{damaged.name}.damaged-{number}"
    return damaged.rename(aside).name


def _agree(step: int, verdict: str) -> tuple[list[int], str]:
    """Every process's step, and the first verdict that is not empty."""
    text = verdict.encode()[:_VERDICT_BYTES].ljust(_VERDICT_BYTES, b"\0")
    steps = np.asarray(multihost_utils.process_allgather(np.int32(step))).tolist()
    texts = np.asarray(multihost_utils.process_allgather(np.frombuffer(text, np.uint8)))
    verdicts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in texts]
    return steps, next((found for found in verdicts if found), "")


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names of the files under a folder, relative to it."""
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from _files(path, name + "/")
        elif name.rpartition("/")[2] not in _UNLISTED:
            yield name


def _measure(file: epath.Path) -> list[Any]:
    """[size, CRC-32 or None]."""
    if "://" in os.fspath(file):
        return [file.stat().length, None]
    size, crc = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
