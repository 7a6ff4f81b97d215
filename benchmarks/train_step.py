"""One training step (forward, backward, AdamW), tokens per second, beside transformers (torch) on the same weights."""

from typing import Any

import jax
import numpy as np

import modelzoo
import train
from benchmarks import machine, peers
from train import optim
from train.metrics import flops_per_token


def measure(config: modelzoo.GPTJConfig, batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Trains on one batch again and again.

    Args:
        config: the model.
        batch: B.
        length: T.
        rounds: alternations.

    Returns:
        One row: medians of tokens per second, their ratio, and the share of JAX's own matmul peak that the step's model
        FLOPs amount to.
    """
    peer, model, params = peers.make_pair(config)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (batch, length)).astype(np.int32)
    optimizer = optim.adamw(learning_rate=1e-5, weight_decay=0.01, clip_norm=None)
    step = train.make_train_step(model, optimizer)
    state = train.init_state(model, optimizer, params=params)
    flops = flops_per_token(model, length)
    del params

    def ours() -> float:
        nonlocal state

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, {"input_ids": ids, "labels": ids})
            return state, metrics

        return batch * length / machine.seconds(run)

    contestants = {
        "flaxtron": ours,
        "peak": machine.matmul_peak(batch * length, config.n_embd, config.mlp_dim),
    }
    if peer is not None:
        import torch

        peer.train()
        labels = torch.tensor(ids, dtype=torch.long)
        adamw = torch.optim.AdamW(peer.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

        def theirs() -> float:
            def run() -> None:
                adamw.zero_grad()
                peer(input_ids=labels, labels=labels, use_cache=False).loss.backward()
                adamw.step()

            return batch * length / machine.seconds(run)

        contestants["torch"] = theirs
    figures = machine.alternate(contestants, rounds)
    share = [speed * flops / peak for speed, peak in zip(figures["flaxtron"], figures["peak"], strict=True)]
    row = {
        "batch": f"{batch} x {length}",
        "flaxtron tok/s": float(np.median(figures["flaxtron"])),
        "of matmul peak": float(np.median(share)),
        "peak GFLOP/s": float(np.median(figures["peak"])) / 1e9,
    }
    if peer is not None:
        row |= {
            "torch tok/s": float(np.median(figures["torch"])),
            "ratio": machine.ratio(figures, "flaxtron", "torch"),
        }
    jax.block_until_ready(state)
    return [row]
