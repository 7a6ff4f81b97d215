"""Prepared folders: found, built in the cache from raw text, or built where a user says; and mixtures of them.

A prepared folder holds manifest.json, tokenizer.json, train-NNNNN.arrayrecord and validation-NNNNN.arrayrecord (see
`train.data.shards`). There is no other form of tokens on disk: `data.path` names such a folder, or text of which one is
made in the cache under a name that follows from all that decides its content.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from train.data.building import FORMAT, MANIFEST, Recipe, build, locked, read_plan, sha256
from train.data.shards import Split
from train.data.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, load_tokenizer
from train.data.units import TOKENIZER

Packing = Literal["concatenate", "documents"]


@dataclasses.dataclass(frozen=True)
class TokenData:
    """Tokenised text.

    Attributes:
        train: the documents to train on, of each part of a mixture; one part where there is no mixture.
        validation: the same of the documents held out.
        weights: the share of the rows that each part has.
        folder: where the files lie, those of the first part.
        manifest: what they were made of; `manifest["fingerprint"]` names the tokens themselves.
        built: whether this call made them, rather than finding them.
        packing: how documents come into rows (`train.data.batches`).
    """

    train: tuple[Split, ...]
    validation: tuple[Split, ...]
    weights: tuple[float, ...]
    folder: Path
    manifest: dict[str, Any]
    built: bool
    packing: Packing = "concatenate"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json."""
        return self.folder / TOKENIZER


def prepare_tokens(
    path: str | list[str] | None = None,
    *,
    mixture: Mapping[str, float] | None = None,
    packing: Packing = "concatenate",
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    end_of_text: str = END_OF_TEXT,
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
    text_field: str = "text",
    cache_dir: str | None = None,
    processes: int | None = None,
    model_vocab_size: int | None = None,
) -> TokenData:
    """Opens prepared folders, or tokenises text first, unless that was done before.

    What is built is built by several processes where it makes more than one shard: as ever in Python, a script that
    calls this then needs `if __name__ == "__main__":`.

    Args:
        path: a folder that `python -m train.data` prepared, or text: folders or files of text, code, .jsonl or
            .parquet, or "stdlib".
        mixture: in place of path, several of these and how large a share of the rows comes from each, such as
            {'prepared/web': 0.7, 'prepared/code': 0.3}.
        packing: 'concatenate' lays documents end to end and cuts rows of them, 'documents' packs whole ones into rows,
            where none attends to another.
        tokenizer: a tokenizer.json, a folder with one or with vocab.json and merges.txt, or a hub id such as "gpt2";
            None trains one on the text. Of a prepared folder it has to be the tokenizer.
        vocab_size: of the tokenizer that is trained; None is the model's.
        end_of_text: the token that ends each document (a prepared folder has its own).
        validation_fraction: share of the documents held out, chosen by a hash of their text.
        max_bytes: read at most this much text; None reads all.
        text_field: of a line of .jsonl or a row of .parquet, where the text stands.
        cache_dir: where folders made of text are kept; None is flaxtron/data in the user's cache folder.
        processes: how many tokenise at once; None is one for each CPU.
        model_vocab_size: the model's vocabulary, which has to hold every token; None skips the check.

    Raises:
        ValueError: no text, text that cannot be read, a value out of range, a tokenizer larger than the model's
            vocabulary, or folders of different tokenizers.
        OSError: no such path, a damaged folder, or the cache cannot be written.
    """
    if (path is None) == (mixture is None):
        given = "neither is set" if path is None else "both are set"
        raise ValueError(f"data.path and data.mixture: {given}; name the text by one of them")
    names = list(mixture) if mixture is not None else [path]
    weights = tuple(float(weight) for weight in (mixture or {"": 1.0}).values())
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(
            f"data.mixture = {dict(mixture or {})}: it names one folder or more, each with a weight above 0"
        )
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    options: dict[str, Any] = dict(end_of_text=end_of_text, validation_fraction=validation_fraction)
    options |= dict(max_bytes=max_bytes, text_field=text_field)
    opened = []
    for name in names:
        if isinstance(name, str) and is_prepared(name):
            found, built = open_prepared(Path(name).expanduser()), False
        else:
            paths = (name,) if isinstance(name, str) else tuple(name or ())
            recipe = make_recipe(paths, loaded, vocab_size, model_vocab_size, **options)
            found, built = _from_cache(recipe, _cache_root(cache_dir), processes)
        check_manifest(found, str(name), loaded, tokenizer, model_vocab_size)
        opened.append((found, built))
    folders = [found for found, _ in opened]
    for name, found in zip(names, folders, strict=True):
        if found.manifest["tokenizer"] != folders[0].manifest["tokenizer"]:
            raise ValueError(
                f"data.mixture: {name!r} was prepared with another tokenizer than {names[0]!r}: prepare one of them "
                "again with the other's (python -m train.data --tokenizer), or set data.tokenizer for text"
            )
    return TokenData(
        train=tuple(found.train for found in folders),
        validation=tuple(found.validation for found in folders),
        weights=tuple(weight / sum(weights) for weight in weights),
        folder=folders[0].folder,
        manifest=_merged([found.manifest for found in folders], weights),
        built=any(built for _, built in opened),
        packing=packing,
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One prepared folder."""

    folder: Path
    manifest: dict[str, Any]
    train: Split
    validation: Split


def make_recipe(
    paths: tuple[str, ...],
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    model_vocab_size: int | None = None,
    *,
    end_of_text: str = END_OF_TEXT,
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
    text_field: str = "text",
) -> Recipe:
    """What to build, checked; arguments as `prepare_tokens`'.

    Raises:
        ValueError: a value out of range, or no tokenizer.
        OSError: no such path.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"data.validation_fraction = {validation_fraction}: a share lies in [0, 1)")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"data.max_bytes = {max_bytes}: it is at least 1, or None to read everything")
    if not paths:
        raise ValueError("data.path = []: name at least one folder or file")
    named = "data.vocab_size" if vocab_size else "the model's vocab_size"
    vocab_size = vocab_size or model_vocab_size
    if tokenizer is not None:
        check_vocabulary(tokenizer, end_of_text, model_vocab_size)
        vocab_size = None
    elif vocab_size is None:
        raise ValueError("data.vocab_size is not set: say how large a tokenizer to train")
    elif vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"{named} = {vocab_size}: a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} tokens (every byte, and "
            f"{end_of_text})"
        )
    elif model_vocab_size is not None and vocab_size > model_vocab_size:
        raise ValueError(
            f"data.vocab_size = {vocab_size} is larger than the model's vocabulary, {model_vocab_size}"
        )
    recipe = Recipe(paths, tokenizer, vocab_size, end_of_text, validation_fraction, max_bytes, text_field)
    assert recipe.files  # what is not there is said before anything is written
    return recipe


def check_vocabulary(tokenizer: Tokenizer, end_of_text: str, model_vocab_size: int | None) -> None:
    """Checks that a model of that size holds a tokenizer's ids, and that it knows the end of a text.

    Raises:
        ValueError: it does not.
    """
    largest = max(tokenizer.get_vocab().values())
    if model_vocab_size is not None and largest >= model_vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the model's vocab_size is {model_vocab_size}: raise "
            f"vocab_size to {largest + 1} or choose a smaller tokenizer"
        )
    if tokenizer.token_to_id(end_of_text) is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        raise ValueError(
            f"data.end_of_text = {end_of_text!r} is not a token of the tokenizer; its special tokens are "
            f"{special[:8]}"
        )


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a prepared folder.

    Raises:
        OSError: it is one that is not finished.
    """
    folder = Path(path).expanduser()
    try:
        if "shards" in json.loads((folder / MANIFEST).read_text()):
            return True
    except (OSError, ValueError, TypeError):
        pass
    if "shard_bytes" in (read_plan(folder) or {}):
        raise OSError(
            f"{folder}: these tokens are not finished: run the command that prepares them again, it goes on"
        )
    return False


def open_prepared(folder: Path) -> Prepared:
    """Opens a prepared folder.

    Raises:
        ValueError: it is of another version, or its tokenizer is not the manifest's.
        OSError: a shard is not there or is damaged.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{folder}: a folder of format {manifest['format']}, and this program reads {FORMAT}: prepare it again"
        )
    if sha256(load_tokenizer(folder / TOKENIZER).to_str()) != manifest["tokenizer"]:
        raise ValueError(
            f"{folder / TOKENIZER}: not the tokenizer that the manifest beside it was made with: bring that one back, "
            "or prepare the text again"
        )
    dtype = np.dtype(manifest["dtype"])
    splits = {}
    for name, shards in manifest["shards"].items():
        for shard in shards:
            file = folder / shard["file"]
            size = file.stat().st_size if file.is_file() else None
            if size is not None and size != shard["bytes"]:
                raise OSError(
                    f"{file}: {size} bytes, of {shard['bytes']} in the manifest: prepare the text again"
                )
        splits[name] = Split([folder / shard["file"] for shard in shards], dtype)
    return Prepared(folder, manifest, **splits)


def check_manifest(
    found: Prepared,
    name: str,
    tokenizer: Tokenizer | None,
    tokenizer_path: str | None,
    model_vocab_size: int | None,
) -> None:
    """Checks that a folder was made with the tokenizer that is asked for and fits the model.

    Raises:
        ValueError: it was not, or does not.
    """
    if tokenizer is not None and sha256(tokenizer.to_str()) != found.manifest["tokenizer"]:
        raise ValueError(
            f"data.path = {name!r}: prepared with another tokenizer than data.tokenizer = {tokenizer_path!r} (that in "
            f"{found.folder / TOKENIZER}): leave data.tokenizer out, or prepare the text again"
        )
    check_vocabulary(
        load_tokenizer(found.folder / TOKENIZER), found.manifest["end_of_text"], model_vocab_size
    )


def _from_cache(recipe: Recipe, root: Path, processes: int | None) -> tuple[Prepared, bool]:
    folder = root / sha256(json.dumps(recipe.plan))[:24]
    try:
        with locked(folder):
            found = _open_whole(folder)
            if found is not None:
                return found, False
            if (folder / MANIFEST).exists():  # damaged: it is made anew
                for file in folder.iterdir():
                    if file.name != ".lock":
                        file.unlink()
            build(folder, recipe, processes)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise OSError(f"data.cache_dir: cannot write to {root}: {error.strerror}") from None
    except ValueError:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # what is wrong with the text will be mended under another name
        raise
    return open_prepared(folder), True


def _open_whole(folder: Path) -> Prepared | None:
    try:
        return open_prepared(folder)
    except (OSError, ValueError, KeyError):
        return None


def _cache_root(cache_dir: str | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "flaxtron", "data")


def _merged(manifests: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """What a mixture's manifests say together; one alone is as it is."""
    if len(manifests) == 1:
        return manifests[0]
    counted = ("files", "documents", "empty", "bytes", "train_tokens", "validation_tokens")
    mixed = [[manifest["fingerprint"], weight] for manifest, weight in zip(manifests, weights, strict=True)]
    return {
        **{key: value for key, value in manifests[0].items() if key not in ("plan", "shards")},
        "path": [manifest["path"] for manifest in manifests],
        **{key: sum(manifest[key] for manifest in manifests) for key in counted},
        "fingerprint": sha256(json.dumps(mixed)),
        "sources": [source for manifest in manifests for source in manifest["sources"]],
    }
