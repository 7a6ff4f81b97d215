"""`python -m benchmarks.data`: preparing text against the tokenizers library alone, and what steps wait for batches.

The library is given the documents in memory, all in one call, and its tokens are thrown away; we read files, tokenise,
choose what is held out and write shards with their checksums. Both sides use every CPU, in turns.
"""

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.sides import Shape
from train.data.sources import find_files, iter_documents
from train.data.tokenizer import load_tokenizer, train_tokenizer
from train.data.tokens import prepare_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    text: str = "stdlib"
    """A folder of text, or "stdlib"; it is taken several times to make up the size."""
    megabytes: int = 200
    """Of text to tokenise."""
    vocab_size: int = 8192
    """Of the tokenizer, which is trained first."""
    rounds: int = 3
    """How often each side runs; medians are taken."""
    steps: int = 5
    """Training steps whose wait is measured; 0 leaves them out."""
    shape: Shape = dataclasses.field(default_factory=Shape)
    """The model of these steps."""
    batch: int = 4
    """Sequences in a step."""
    length: int = 256
    """Tokens of a sequence."""


def write_text(flags: Flags, folder: Path) -> list[str]:
    """The documents, and the same in .jsonl files of about 32 MB."""
    found = list(iter_documents(find_files(flags.text)))
    texts: list[str] = []
    size, copy = 0, 0
    while size < flags.megabytes * 1_000_000:
        text = f"# {copy}\n{found[copy % len(found)]}"  # no two the same
        texts.append(text)
        size, copy = size + len(text.encode()), copy + 1
    for i, part in enumerate(np.array_split(np.arange(len(texts)), max(1, size // 32_000_000))):
        lines = (json.dumps({"text": texts[j]}) + "\n" for j in part)
        (folder / f"{i:04}.jsonl").write_text("".join(lines))
    return texts


def tokenising(flags: Flags, folder: Path) -> list[str]:
    """Measures both sides of tokenising."""
    (folder / "text").mkdir()
    texts = write_text(flags, folder / "text")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    train_tokenizer(texts[:2000], flags.vocab_size).save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    count = iter(range(10_000))

    def ours() -> None:
        prepare_tokens(
            str(folder / "text"),
            tokenizer=str(folder / "tokenizer.json"),
            cache_dir=str(folder / f"cache{next(count)}"),
        )

    sides: dict[str, Callable[[], Any]] = {
        "flaxtron": ours,
        "encode_batch": lambda: tokenizer.encode_batch(texts, add_special_tokens=False),
        "encode_batch_fast": lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    speed = {name: megabytes / float(np.median(each)) for name, each in seconds.items()}
    lines = [
        f"tokenising {megabytes:.0f} MB, {len(texts):,} documents: flaxtron {speed['flaxtron']:.1f} MB/s"
    ]
    for name in ("encode_batch", "encode_batch_fast"):
        share = speed["flaxtron"] / speed[name]
        lines.append(f"  {name} alone {speed[name]:.1f} MB/s; flaxtron / {name} = {share:.2f}")
    return lines


def waiting(flags: Flags, folder: Path) -> list[str]:
    """Measures what steps wait for batches, and how fast batches come where nothing else runs."""
    import jax

    import modelzoo
    import train
    from train import optim
    from train.data.batches import train_batches

    model = modelzoo.GPTJForCausalLM(modelzoo.GPTJConfig(**flags.shape.config()))
    optimizer = optim.adamw(learning_rate=1e-4)
    state: Any = train.init_state(model, optimizer, rng=jax.random.key(0))
    step = train.make_train_step(model, optimizer)
    lines = []
    for packing in ("concatenate", "documents"):
        data = prepare_tokens(
            str(folder / "text"),
            tokenizer=str(folder / "tokenizer.json"),
            cache_dir=str(folder / "cache0"),
            packing=packing,
        )
        source = train_batches(data, sequence_length=flags.length, global_batch_size=flags.batch, seed=0)
        state, metrics = step(state, next(source))
        jax.block_until_ready(metrics)
        waited, start = 0.0, time.perf_counter()
        for _ in range(flags.steps):
            before = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - before
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
        each = (time.perf_counter() - start) / flags.steps
        alone, start = 200, time.perf_counter()
        for _ in range(alone):
            next(source)
        rate = alone * flags.batch * flags.length / (time.perf_counter() - start)
        lines.append(
            f"input, {packing}: {1e3 * waited / flags.steps:.2f} ms of {each:.2f} s a step = "
            f"{waited / flags.steps / each:.3%}; batches alone come at {rate / 1e6:.2f} M tok/s"
        )
    return lines


def run(flags: Flags) -> Iterator[str]:
    """Measures; yields lines to print."""
    with tempfile.TemporaryDirectory() as name:
        yield from tokenising(flags, Path(name))
        if flags.steps:
            yield from waiting(flags, Path(name))


def main() -> None:
    """Reads the flags."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for line in run(tyro.cli(Flags, prog="python -m benchmarks.data", description=__doc__)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
