"""`python -m train.data`: text to a prepared folder, which `data.path` and `data.mixture` of a run then name."""

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from train.cli import user_errors
from train.data.building import MANIFEST, Recipe, build, locked, read_plan
from train.data.tokenizer import END_OF_TEXT, load_tokenizer
from train.data.tokens import make_recipe, open_prepared


@dataclasses.dataclass(frozen=True)
class Flags:
    """Tokenises text into ArrayRecord shards. Run the same command again to go on where it was stopped or killed."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Folders and files: .txt, .md and other text, code, .jsonl and .parquet, packed by .gz or .zst or not; or
    "stdlib", the sources of this Python. Each is counted by itself."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """A tokenizer.json, a folder with one or with GPT-2's vocab.json and merges.txt, or a hub id such as gpt2."""
    train_tokenizer: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """In place of --tokenizer: train one of N tokens on the first 64 MiB of the text."""
    model_vocab_size: int | None = None
    """The vocabulary of the model that will read it: a larger tokenizer is refused."""
    end_of_text: str = END_OF_TEXT
    """The token that ends each document."""
    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of their text."""
    max_bytes: int | None = None
    """Read at most this much text."""
    text_field: str = "text"
    """Where the text stands in a line of .jsonl or a row of .parquet."""
    processes: int | None = None
    """How many tokenise at once; by default one for each CPU. What is written does not depend on it."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None) and prepares the text."""
    flags = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Flags),
        prog="python -m train.data",
        args=args,
    )
    with user_errors():
        try:
            prepare(flags)
        except (ValueError, OSError) as error:
            message = re.sub(r"\bdata\.(\w+)", _flag, str(error))
            if message == str(error):
                raise
            raise (OSError if isinstance(error, OSError) else ValueError)(message) from None


def _flag(setting: re.Match[str]) -> str:
    name = setting[1]
    flags = {"path": "INPUT", "vocab_size": "--train-tokenizer"}
    return flags.get(name, f"--{name.replace('_', '-')}")


def prepare(flags: Flags) -> None:
    """Builds the folder, or finds it complete.

    Raises:
        ValueError: text that cannot be read, a value out of range, or a folder of something else.
        OSError: nothing at a path, or a folder that cannot be written.
    """
    if (flags.tokenizer is None) == (flags.train_tokenizer is None):
        raise ValueError("give one of --tokenizer PATH and --train-tokenizer N")
    names = ("end_of_text", "validation_fraction", "max_bytes", "text_field")
    recipe = make_recipe(
        flags.inputs,
        None if flags.tokenizer is None else load_tokenizer(flags.tokenizer),
        flags.train_tokenizer,
        flags.model_vocab_size,
        **{name: getattr(flags, name) for name in names},
    )
    start = time.perf_counter()
    check_output(flags.output, recipe)
    with locked(flags.output):
        check_output(flags.output, recipe)
        is_built = not (flags.output / MANIFEST).exists()
        if is_built:
            build(flags.output, recipe, flags.processes)
    manifest = open_prepared(flags.output).manifest
    for source in manifest["sources"]:
        print(f"  {source['path']}: {_counts(source)}")
    rate = f", {manifest['bytes'] / 1e6 / (time.perf_counter() - start):.1f} MB/s" if is_built else ""
    shards = len(manifest["shards"]["train"])
    print(
        f"{'done' if is_built else 'complete'}: {_counts(manifest)}; {shards} shards in {flags.output}{rate}"
    )


def _counts(counted: dict[str, Any]) -> str:
    return (
        f"{counted['documents']:,} documents ({counted['empty']:,} empty ones left out) of {counted['files']:,} files, "
        f"{counted['bytes']:,} bytes, {counted['train_tokens']:,} tokens to train on, "
        f"{counted['validation_tokens']:,} held out"
    )


def check_output(folder: Path, recipe: Recipe) -> None:
    """Checks that a folder is empty, or of this recipe.

    Raises:
        ValueError: it is of something else.
        OSError: it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {folder}: a file is in the way")
    plan = read_plan(folder)
    if plan is None:
        if folder.is_dir() and any(file.name != ".lock" for file in folder.iterdir()):
            raise ValueError(
                f"--output {folder}: it holds other files, and no {MANIFEST}: choose a new or empty folder"
            )
        return
    changed = [
        f"{key} was {plan.get(key)}, is {value}"
        for key, value in recipe.plan.items()
        if plan.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"--output {folder}: it is of something else: {'; '.join(changed)}; choose another folder"
        )


if __name__ == "__main__":
    main()
