"""Where the files of a Megatron-LM checkpoint are: zips, iteration folders, tensor and pipeline ranks.

    FOLDER/latest_checkpointed_iteration.txt      "release", or a number
    FOLDER/release/mp_rank_00/model_optim_rng.pt  or iter_0500000/...; mp_rank_TT_PPP with a pipeline

Layout: https://github.com/NVIDIA/Megatron-LM, megatron/checkpointing.py.
"""

import dataclasses
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelzoo.torch_names import Record
from modelzoo.unpickle import read_torch_tree

WEIGHTS = ("model_optim_rng.pt", "model_rng.pt")
TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")


@dataclasses.dataclass(frozen=True)
class Rank:
    """One rank's file.

    Attributes:
        file: where it is.
        content: what it holds: `model`, `args`, `checkpoint_version`, ...
    """

    file: Path
    content: Mapping[Any, Any]

    @property
    def args(self) -> dict[str, Any] | None:
        """The options of the run that wrote it; None in old files."""
        args = self.content.get("args")
        if isinstance(args, Record):
            return args.fields
        return args if isinstance(args, dict) else None


def read_ranks(path: Path, scratch: Path) -> list[list[Rank]]:
    """Finds a checkpoint and reads the headers of all its ranks.

    Args:
        path: a zip, a model_optim_rng.pt, or a folder at any height above one.
        scratch: an empty folder for what a zip holds.

    Returns:
        The ranks by pipeline stage and tensor rank.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is corrupt, or ranks are missing.
    """
    if path.is_file() and zipfile.is_zipfile(path) and not _is_torch_archive(path):
        _unpack(path, scratch)
        grid = _find_grid(scratch, path)
    elif path.is_file():
        grid = {(0, 0): path}
    elif path.is_dir():
        grid = _find_grid(path, path)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder")
    num_stages = 1 + max(stage for stage, _ in grid)
    num_ranks = 1 + max(rank for _, rank in grid)
    absent = [
        _folder_name(rank, stage if num_stages > 1 else None)
        for stage in range(num_stages)
        for rank in range(num_ranks)
        if (stage, rank) not in grid
    ]
    if absent:
        raise FileNotFoundError(f"{path}: {len(absent)} ranks are missing: {', '.join(absent)}")
    ranks = [[_read(grid[stage, rank], path) for rank in range(num_ranks)] for stage in range(num_stages)]
    _check_iterations(path, ranks)
    return ranks


def _read(file: Path, path: Path) -> Rank:
    try:
        rank = Rank(file, read_torch_tree(file))
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), str(path), 1)) if path.is_file() else error from None
    if not any(str(key).startswith("model") for key in rank.content):
        held = ", ".join(map(str, rank.content)) or "nothing"
        raise ValueError(f"{file}: not a Megatron-LM checkpoint: it has no `model`, but {held}")
    return rank


def _check_iterations(path: Path, ranks: list[list[Rank]]) -> None:
    iterations = {str(rank.content.get("iteration")) for stage in ranks for rank in stage}
    if len(iterations) > 1:
        raise ValueError(f"{path}: its ranks are of different iterations: {', '.join(sorted(iterations))}")


def _folder_name(rank: int, stage: int | None) -> str:
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stage is not None else "")


def _is_torch_archive(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in archive.namelist())


def _unpack(path: Path, scratch: Path) -> None:
    """Unpacks the members of a zip that matter, under names of our own."""
    with zipfile.ZipFile(path) as archive:
        found = False
        for entry in archive.infolist():
            *folders, name = entry.filename.split("/")
            inner = [
                part for part in folders if _RANK.fullmatch(part) or re.fullmatch(r"release|iter_\d+", part)
            ]
            if name == TRACKER:
                inner = []
            elif name not in WEIGHTS or not inner:
                continue
            found = found or name != TRACKER
            target = scratch.joinpath(*inner, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(entry) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink, 4 << 20)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise ValueError(
                    f"{path}: its member {entry.filename} cannot be unpacked ({error})"
                ) from None
        if not found:
            names = archive.namelist()
            held = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{path}: has no release/mp_rank_00/{WEIGHTS[0]}; it holds {held or 'nothing'}")


def _find_grid(folder: Path, path: Path) -> dict[tuple[int, int], Path]:
    """The files in a folder by (pipeline stage, tensor rank); `path` is what messages call it."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return {(0, 0): folder / name}
    holders = {
        (int(match[2] or 0), int(match[1])): child
        for child in folder.iterdir()
        if child.is_dir() and (match := _RANK.fullmatch(child.name))
    }
    if not holders:
        return _find_grid(_iteration(folder, path), path)
    grid = {}
    for place, holder in holders.items():
        file = next((holder / name for name in WEIGHTS if (holder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path}: {holder.name} has no {WEIGHTS[0]}")
        grid[place] = file
    return grid


def _iteration(folder: Path, path: Path) -> Path:
    """The subfolder of a run's folder that holds its newest checkpoint."""
    tracker = folder / TRACKER
    children = [child for child in folder.iterdir() if child.is_dir()]
    found = [child for child in children if re.fullmatch(r"release|iter_\d+", child.name)]
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not text.isdecimal():
            raise ValueError(f"{path}: its {TRACKER} says {text[:40]!r}, not a number or `release`")
        name = text if text == "release" else f"iter_{int(text):07d}"
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{path}: its {TRACKER} says {text!r}, but there is no folder {name}")
        return folder / name
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(sorted(child.name for child in found))
        raise ValueError(f"{path}: holds several checkpoints and no {TRACKER}: pass one of {names}")
    raise FileNotFoundError(
        f"{path}: has no release/mp_rank_00/{WEIGHTS[0]}, nor an iter_XXXXXXX or mp_rank_XX"
    )
