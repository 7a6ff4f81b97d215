"""`python -m benchmarks.saving`: what a save keeps a training step waiting for, beside the copy that it cannot avoid.

A GPT-J with a state of about 2 GB (parameters and both moments of AdamW, float32) takes steps; after some of them it
is saved. Printed are, as shares of a step: the time until `Saver.maybe_save` returns with the digests of the state
computed, the same beyond a plain copy of the state on the host, and what the steps that run while the files are being
written lose.
"""

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tyro

import modelzoo
import train
from train import canonical, certificate, optim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    n_embd: int = 1024
    """Width of the model."""
    n_layer: int = 11
    """Layers."""
    vocab_size: int = 16384
    """Tokens of the vocabulary."""
    batch: int = 4
    """Sequences in a step."""
    length: int = 256
    """Tokens of a sequence."""
    rounds: int = 3
    """Saves."""
    workdir: str | None = None
    """Where to save; the default is a temporary folder."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None), measures and prints."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.saving", description=__doc__, args=args)
    shape: Any = dict(n_embd=flags.n_embd, n_layer=flags.n_layer, vocab_size=flags.vocab_size, n_head=8)
    config = modelzoo.get_config("tiny-gptj", **shape, n_inner=4 * flags.n_embd, n_positions=flags.length)
    model, optimizer = modelzoo.GPTJForCausalLM(config), optim.adamw()
    state = train.init_state(model, optimizer)
    step = train.make_train_step(model, optimizer)
    ids = np.random.default_rng(0).integers(0, flags.vocab_size, (flags.batch, flags.length)).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))

    def timed_step() -> float:
        nonlocal state
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begun

    timed_step()
    quiet = statistics.median(timed_step() for _ in range(3))
    print(f"state {size / 1e9:.2f} GB, step {quiet:.2f} s", flush=True)
    certificate.as_texts(certificate.digest_of(canonical.leaves_of(model, state)))  # compiles
    folder = flags.workdir or tempfile.mkdtemp()
    blocked, copied, digested, disturbed = [], [], [], []
    saver = train.Saver(folder, model=model, every=1, keep=1)
    for number in range(1, flags.rounds + 1):
        begun = time.perf_counter()
        copies = [np.array(leaf, copy=True) for leaf in jax.tree.leaves((state.params, state.opt_state))]
        copied.append(time.perf_counter() - begun)
        del copies
        begun = time.perf_counter()
        certificate.as_texts(certificate.digest_of(canonical.leaves_of(model, state)))
        digested.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        saver.maybe_save(number, state)
        blocked.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        during = [timed_step()]
        while saver.is_writing and len(during) < 20:
            during.append(timed_step())
        saver.settle()
        disturbed.append(sum(during) - len(during) * quiet)
    saver.close()
    if flags.workdir is None:
        shutil.rmtree(folder)

    def share(seconds: float) -> str:
        return f"{seconds / quiet:6.1%} of a step ({seconds:.2f} s)"

    block, copy, digest = (statistics.median(x) for x in (blocked, copied, digested))
    print(f"maybe_save returns after          {share(block)}")
    print(f"a plain copy of the state takes   {share(copy)}")
    print(f"digests of the state take         {share(digest)}, {size / digest / 1e9:.1f} GB/s")
    print(f"blocked beyond the copy           {share(max(block - copy, 0.0))}")
    print(f"   and with the digests, in full  {share(max(block + digest - copy, 0.0))}")
    print(f"steps beside the writing lose     {share(statistics.median(disturbed))} in all, for each save")


if __name__ == "__main__":
    main()
