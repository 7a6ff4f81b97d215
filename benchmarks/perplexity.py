"""`python -m benchmarks.perplexity --path FOLDER`: held-out perplexity of a small GPT-J, ours and transformers'.

The other side is transformers' own model, trained by torch from the same initial weights with the same batches and the
same AdamW.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.sides import Worker, has_torch
from benchmarks.texts import Plan, held_out_loss

B1, B2, EPS, DECAY, CLIP = 0.9, 0.95, 1e-8, 0.1, 1.0
Batches = list[Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Plan):
    """The command line."""

    torch: bool = True
    """Train the other side too, where torch and transformers are installed."""


class Checkpoint:
    """Writes the initial weights as a Hugging Face folder; to be made in a process that ends after."""

    def __init__(self, plan: Plan, folder: Path):
        import jax

        import modelzoo
        import parallel

        model = modelzoo.GPTJForCausalLM(modelzoo.GPTJConfig(**plan.shape.config()))
        params = parallel.init_params(model, jax.random.key(plan.seed))
        modelzoo.to_hf(model, jax.tree.map(np.asarray, params), folder)


class Flaxtron:
    """Our side."""

    def __init__(self, plan: Plan, folder: Path):
        import jax

        import modelzoo
        import train
        from train import optim

        model, params = modelzoo.from_hf(folder)
        rate = plan.schedule()
        optimizer = optim.adamw(learning_rate=rate, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, clip_norm=CLIP)
        self._state: Any = train.init_state(model, optimizer, params=params, rng=jax.random.key(plan.seed))
        self._step, self._eval = train.make_train_step(model, optimizer), train.make_eval_step(model)

    def train(self, batches: Batches) -> list[float]:
        """Takes a step a batch; the losses."""
        losses = []
        for batch in batches:
            self._state, metrics = self._step(self._state, batch)
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]

    def held_out(self, batches: Batches) -> float:
        """The mean loss on these batches."""

        def evaluate(batch: Mapping[str, np.ndarray]) -> tuple[float, int]:
            found = self._eval(self._state.params, batch)
            return float(found["loss_sum"]), int(found["tokens"])

        return held_out_loss(evaluate, batches)


class Torch:
    """transformers' model and torch's AdamW."""

    def __init__(self, plan: Plan, folder: Path):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._torch, model = torch, transformers.GPTJForCausalLM.from_pretrained(folder).train()
        spared = {name for name, _ in model.named_parameters() if name.endswith("bias") or "ln_" in name}
        groups = [
            {
                "params": [p for n, p in model.named_parameters() if (n in spared) == spare],
                "weight_decay": decay,
            }
            for spare, decay in ((False, DECAY), (True, 0.0))
        ]
        schedule = plan.schedule()
        self._rates = [float(schedule(step)) for step in range(plan.steps)]
        self._model = model
        self._optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(B1, B2), eps=EPS)

    def train(self, batches: Batches) -> list[float]:
        """Takes a step a batch; the losses."""
        losses = []
        for batch, rate in zip(batches, self._rates, strict=True):
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._loss(batch)
            loss.backward()
            self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
            self._optimizer.step()
            losses.append(loss.item())
        return losses

    def held_out(self, batches: Batches) -> float:
        """The mean loss on these batches."""
        self._model.eval()

        def evaluate(batch: Mapping[str, np.ndarray]) -> tuple[float, int]:
            count = int((batch["labels"][:, 1:] >= 0).sum())
            with self._torch.no_grad():
                return (self._loss(batch).item() * count if count else 0.0), count

        return held_out_loss(evaluate, batches)

    def _loss(self, batch: Mapping[str, np.ndarray]) -> Any:
        ids, labels = (self._torch.from_numpy(np.asarray(batch[n])).long() for n in ("input_ids", "labels"))
        return self._model(ids, labels=labels).loss


def run(flags: Flags, side: Any = Worker) -> dict[str, float]:
    """Trains, measures and prints.

    Args:
        flags: what, and for how long.
        side: `Worker`, or `Local` to stay in this process.

    Returns:
        Each side's held-out perplexity.
    """
    tokens = flags.tokens()
    batches, held_out = flags.batches(tokens), flags.held_out_batches(tokens)
    labels = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in held_out)
    print(
        f"{flags.steps} steps of {flags.batch} x {flags.length} tokens of {tokens.manifest['train_tokens']:,}; "
        f"{labels:,} held out",
        flush=True,
    )
    kinds: dict[str, Any] = {"flaxtron": Flaxtron}
    if flags.torch and has_torch():
        kinds["torch"] = Torch
    elif flags.torch:
        print("torch and transformers are not installed: no ratio (pip install -e '.[parity]')")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        with side(Checkpoint, flags, Path(name)):
            pass
        for kind, make in kinds.items():
            with side(make, flags, Path(name)) as worker:
                losses = worker.call("train", batches)[0]
                loss = worker.call("held_out", held_out)[0]
            found[kind] = math.exp(loss)
            print(
                f"{kind}: training loss {losses[0]:.4f} to {np.mean(losses[-10:]):.4f} (the last ten), "
                f"held-out loss {loss:.5f}, perplexity {found[kind]:.3f}",
                flush=True,
            )
    if "torch" in found:
        print(f"perplexity flaxtron / torch = {found['flaxtron'] / found['torch']:.5f}")
    return found


def main(args: list[str] | None = None) -> None:
    """Reads the flags."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run(tyro.cli(Flags, prog="python -m benchmarks.perplexity", description=__doc__, args=args), Worker)


if __name__ == "__main__":
    main()
