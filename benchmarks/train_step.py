"""Training: tokens a second of `train.make_train_step` against a transformers model and torch.optim.AdamW."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides import Seconds, Shape, against_torch, alternate, median, ratio

RATE = 1e-4


class Flaxtron:
    """Our side."""

    def __init__(self, folder: Path, ids: np.ndarray):
        import jax

        import modelzoo
        import train
        from train import optim

        model, params = modelzoo.from_hf(folder)
        optimizer = optim.adamw(learning_rate=RATE, b2=0.999, weight_decay=0.01, clip_norm=None)
        self._state: Any = train.init_state(model, optimizer, params=params, rng=jax.random.key(0))
        self._step, self._batch = train.make_train_step(model, optimizer), {"input_ids": ids, "labels": ids}
        del params
        self.losses = [self.step(), self.step()]

    def step(self) -> float:
        """Takes a step, waits for its end, returns the loss before it."""
        import jax

        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def first_losses(self) -> list[float]:
        """The losses of the two steps that warmed up."""
        return self.losses


class Torch:
    """Transformers in training mode with torch's fused AdamW, its quickest here."""

    def __init__(self, folder: Path, ids: np.ndarray):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._model = transformers.GPTJForCausalLM.from_pretrained(folder).train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=0.01, fused=True
        )
        self._ids = torch.from_numpy(ids).long()
        self.losses = [self.step(), self.step()]

    def step(self) -> float:
        """Takes a step, returns the loss before it."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(self._ids, labels=self._ids).loss
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def first_losses(self) -> list[float]:
        """The losses of the two steps that warmed up."""
        return self.losses


def num_flops(shape: Shape, batch: int, length: int) -> int:
    """Floating-point operations of the step's matrix products, attention counted whole as both sides compute it."""
    scores = 2 * shape.n_layer * batch * length**2 * shape.n_embd
    return 3 * (2 * batch * length * shape.kernel_size + 2 * scores)


def compare(
    sides: dict[str, Any], machine: Any, shape: Shape, batch: int, length: int, rounds: int
) -> list[str]:
    """Measures the step.

    Args:
        sides: "flaxtron" and perhaps "torch", workers of the classes above.
        machine: a worker of `machine.Machine`.
        shape: of the model.
        batch: B.
        length: T.
        rounds: how often each side runs.

    Returns:
        Lines to print.

    Raises:
        RuntimeError: the sides' losses differ.
    """
    losses = {name: side.call("first_losses")[0] for name, side in sides.items()}
    for name, found in losses.items():
        if not np.allclose(found, losses["flaxtron"], rtol=1e-3):
            raise RuntimeError(f"{name} has losses {found}, flaxtron {losses['flaxtron']}: not the same step")

    def multiply(name: str) -> Seconds:
        flops, seconds = machine.call("multiply", name)
        return Seconds(seconds.wall / flops, seconds.cpu / flops)

    turns = {name: lambda side=side: side.call("step")[1] for name, side in sides.items()}
    names = ("attention", "fc_in", "fc_out", "lm_head")
    times = alternate(turns | {name: lambda name=name: multiply(name) for name in names}, rounds)

    ours, flops = median(times["flaxtron"]), num_flops(shape, batch, length)
    lines = [f"train step, {batch} x {length} tokens: flaxtron {batch * length / ours.wall:.1f} tok/s"]
    lines += against_torch(times, batch * length)
    products = {name: median(times[name]) for name in names}
    best = min(products, key=lambda name: products[name].wall)
    per_flop = ratio(times[best], [Seconds(t.wall / flops, t.cpu / flops) for t in times["flaxtron"]])
    lines.append(
        f"  {flops / ours.wall / 1e9:.0f} GFLOP/s = {per_flop.wall:.2f} of JAX's best matmul, "
        f"{1e-9 / products[best].wall:.0f} GFLOP/s for {best} (by processor time {per_flop.cpu:.2f})"
    )
    return lines
