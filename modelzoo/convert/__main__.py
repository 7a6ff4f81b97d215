"""`python -m modelzoo.convert`: reads the flags, converts, and says what was written."""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from modelzoo.errors import user_errors

EXAMPLES = """\
Converts another framework's checkpoint into a Hugging Face folder (config.json,
model.safetensors, tokenizer files from beside the input), which transformers
and modelzoo.from_hf open. No torch is needed, and no code in a file is run.

formats:
  megatron-bert         NVIDIA's release zip, its model_optim_rng.pt, or a folder
  megatron-lm           a run's folder of iter_XXXXXXX/mp_rank_XX, of BERT or GPT:
                        all tensor and pipeline ranks are merged
  mesh-transformer-jax  GPT-J: a folder or .tar of shard_0 .. shard_7
  fairseq               a RoBERTa's model.pt
  flax                  flax_model.msgpack, or its index and parts
  torch                 pytorch_model.bin, its index and parts, or any .bin

examples:
  python -m modelzoo.convert --from megatron-bert \\
      --input megatron_bert_345m_v0.1_cased.zip --output bert-345m
  python -m modelzoo.convert --from megatron-lm --input checkpoints/gpt2 \\
      --output gpt2 --config config.json
  python -m modelzoo.convert --from mesh-transformer-jax --input step_383500 \\
      --output gpt-j-6b --config 6B_roto_256.json"""
PROGRESS_BYTES = 64 << 20
"""Conversions of more than this show a progress bar on a terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    source_format: Annotated[str, tyro.conf.arg(name="from", metavar="FORMAT")]
    """What wrote the checkpoint: megatron-bert, megatron-lm, mesh-transformer-jax, fairseq, flax or
    torch."""
    input: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """The checkpoint: a file or a folder."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write. It appears when all is written; files that it already has are kept or replaced."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A config.json (for mesh-transformer-jax, the run's own config too) that says what the checkpoint does
    not: sizes that its options lack, the true vocab_size of a padded vocabulary. By default the one beside
    the weights (flax, torch), the checkpoint's own options, or the released model's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """To write the numbers as; auto keeps what the checkpoint stores."""
    max_shard_size: str = "5GB"
    """Size of one safetensors file; past it there are several and an index."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags and converts.

    Args:
        args: of the command line; None takes the program's own.
    """
    flags = tyro.cli(Flags, args=args, prog="python -m modelzoo.convert", description=EXAMPLES)
    # As Ctrl-C: what is half-written goes.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with user_errors("\ninterrupted; nothing was written"):
        run(flags)


def run(flags: Flags) -> None:
    """Converts, and prints what was written.

    Raises:
        OSError, ValueError: flags or files are at fault.
    """
    from modelzoo.convert import convert_checkpoint

    started = time.perf_counter()
    checkpoint = convert_checkpoint(
        flags.source_format,
        flags.input,
        flags.output,
        flags.config,
        None if flags.dtype == "auto" else flags.dtype,
        flags.max_shard_size,
        progress,
    )
    seconds = time.perf_counter() - started
    for note in checkpoint.notes:
        sys.stdout.write(f"note: {note}\n")
    written = sum(file.stat().st_size for file in flags.output.expanduser().glob("model*.safetensors"))
    sys.stdout.write(
        f"{checkpoint.config['architectures'][0]}: {len(checkpoint.tensors)} tensors, {written / 1e6:,.1f} MB, "
        f"in {seconds:.1f} s\nwritten: {flags.output}\n"
    )


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal for long conversions; yields what to call with bytes written."""
    if total < PROGRESS_BYTES or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = "converting", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("converting", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


if __name__ == "__main__":
    main()
