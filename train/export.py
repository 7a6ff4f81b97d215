"""`python -m train.export`: what a run has learned, as a Hugging Face folder or as a peft adapter."""

import ast
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from train.cli import user_errors

EXAMPLES = """\
Writes a run's parameters as a Hugging Face folder that transformers and
modelzoo.from_hf open, adapters merged into their kernels; or its adapters alone,
as a folder that peft opens on the model that the run started from.

examples:
  python -m train.export runs/mine exported
  python -m train.export runs/lora adapter --adapter
  python -m train.export gpt-j-6b merged --peft adapter     # a model and a peft adapter of it"""


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A run's folder (its newest step is taken), the folder of one step, or a Hugging Face folder."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The folder to write."""
    adapter: bool = False
    """Write the adapters alone."""
    peft: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A peft adapter to merge into the checkpoint first."""
    max_shard_size: str = "5GB"
    """Size of one safetensors file; past it there are several and an index."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None) and exports."""
    flags = tyro.cli(
        Flags, prog="python -m train.export", args=args, description=EXAMPLES, use_underscores=True
    )
    with user_errors():
        sys.stdout.write(f"written: {flags.output} ({write_folder(flags)})\n")


def write_folder(flags: Flags) -> str:
    """Writes what the flags ask for.

    Returns:
        What it was, in a few words.

    Raises:
        OSError: the checkpoint cannot be read, or the folder not be written.
        ValueError: there are no adapters to write, or the peft adapter is of another model.
    """
    import jax.numpy as jnp

    import modelzoo
    from modelzoo import peft, tuning
    from parallel import checkpoint
    from train.starting import open_start

    if flags.adapter and flags.peft is not None:
        raise ValueError("--adapter with --peft: an adapter is written, or merged, not both")
    start = open_start(flags.checkpoint, "CHECKPOINT")
    output = flags.output.expanduser()
    if start.is_run:
        plain = start.saved_model()
        model, params = checkpoint.restore_adapted(start.folder, plain, dtype=jnp.float32)
    else:
        model, params = modelzoo.from_hf(start.folder)
    name = type(model).__name__
    if flags.adapter:
        if model.tuning is None:
            raise ValueError(f"{flags.checkpoint}: it has no adapters: it was trained without lora.rank")
        peft.write_adapter(model, params, output, base_of(start.folder))
        lora = model.tuning.lora
        return f"{name}: adapters of rank {lora.rank}"
    if flags.peft is not None:
        model, params = peft.read_adapter(modelzoo.untuned(model), tuning.merge(params), flags.peft)
    merged = " with its adapters merged" if model.tuning is not None else ""
    modelzoo.to_hf(modelzoo.untuned(model), tuning.merge(params), output, flags.max_shard_size)
    copy_texts(start.folder, output)
    return f"{name}{merged}"


def base_of(folder: Any) -> str | None:
    """What a run started from, as its checkpoint's config.gin says."""
    file = folder / "config.gin"
    lines = file.read_text().splitlines() if file.exists() else []
    found = (line.partition(" = ")[2] for line in lines if line.startswith("train.init_from = "))
    return ast.literal_eval(next(found, "None"))


def copy_texts(folder: Any, output: Path) -> None:
    """Copies the files of the tokenizer."""
    from modelzoo.convert.writing import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)


if __name__ == "__main__":
    main()
