"""Greedy decoding, tokens per second after the prompt, beside transformers (torch, eager) on the same weights."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import inference
import modelzoo
from benchmarks import machine, peers

PROMPT, SHORT = 16, 4


def measure(
    config: modelzoo.GPTJConfig, batches: tuple[int, ...], new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Decodes with every batch size.

    Args:
        config: the model.
        batches: sizes to try.
        new_tokens: timed; a shorter run is subtracted, so that the prompt and what surrounds the loop do not count.
        rounds: alternations.

    Returns:
        One row per batch: medians of tokens per second, their ratio, and the share of the read bandwidth that reading
        every weight once per step amounts to.
    """
    peer, model, params = peers.make_pair(config)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - config.vocab_size * config.n_embd * 4
    params = inference.prepare(model, params)
    return [_one_batch(peer, model, params, weights, batch, new_tokens, rounds) for batch in batches]


def _one_batch(
    peer: Any, model: modelzoo.Model, params: Any, weights: int, batch: int, new_tokens: int, rounds: int
) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, PROMPT))

    def ours(count: int) -> None:
        how = inference.GenerationConfig(max_new_tokens=count, eos_token_id=None, pad_token_id=0)
        inference.generate(model, params, ids, config=how)

    def theirs(count: int) -> None:
        import torch

        mask = torch.ones(ids.shape, dtype=torch.long)
        options = dict(max_new_tokens=count, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            peer.generate(torch.tensor(ids), attention_mask=mask, **options)

    def speed(run: Callable[[int], None]) -> float:
        """Tokens per second between a short and a long run."""
        times = [machine.seconds(lambda count=count: run(count)) for count in (SHORT, SHORT + new_tokens)]
        return batch * new_tokens / (times[1] - times[0])

    contestants = {"flaxtron": lambda: speed(ours), "bandwidth": machine.read_bandwidth()}
    if peer is not None:
        contestants["torch"] = lambda: speed(theirs)
    figures = machine.alternate(contestants, rounds)
    pairs = zip(figures["flaxtron"], figures["bandwidth"], strict=True)
    row = {
        "batch": batch,
        "flaxtron tok/s": float(np.median(figures["flaxtron"])),
        "of read bandwidth": float(np.median([weights * speed / batch / peak for speed, peak in pairs])),
        "bandwidth GB/s": float(np.median(figures["bandwidth"])) / 1e9,
    }
    if peer is not None:
        row["torch tok/s"] = float(np.median(figures["torch"]))
        row["ratio"] = machine.ratio(figures, "flaxtron", "torch")
    return row
