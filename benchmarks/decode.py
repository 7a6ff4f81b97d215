"""Decoding: greedy tokens a second of `inference.generate` against transformers' `generate`, the same weights.

The time of a token is that of a generation of n + 1 tokens less that of one of 1 token, so that the prompt's
pass is not in it. The time to the first token is that of a generation of 1.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides import Shape, alternate, median, ratio


class Flaxtron:
    """Our side."""

    def __init__(self, folder: Path, prompt: np.ndarray, num_new: int):
        import inference
        import modelzoo

        model, params = modelzoo.from_hf(folder)
        self._model, self._params = model, inference.prepare(model, params)
        self._prompt = prompt
        for count in (1, num_new + 1):  # compiles
            self.generate(count)

    def generate(self, count: int) -> np.ndarray:
        """Continues the prompts by `count` tokens; returns them [B, count]."""
        import inference

        config = inference.GenerationConfig(max_new_tokens=count, eos_token_id=None, pad_token_id=0)
        out = inference.generate(self._model, self._params, self._prompt, config=config)
        return np.asarray(out.sequences)[:, self._prompt.shape[1] :]


class Torch:
    """Transformers, as `from_pretrained` gives it."""

    def __init__(self, folder: Path, prompt: np.ndarray, num_new: int):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._model = transformers.GPTJForCausalLM.from_pretrained(folder).eval()
        self._prompt = torch.from_numpy(prompt)
        self.generate(2)

    def generate(self, count: int) -> np.ndarray:
        """Continues the prompts by `count` tokens; returns them [B, count]."""
        import torch

        with torch.inference_mode():
            tokens = self._model.generate(
                self._prompt,
                attention_mask=torch.ones_like(self._prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tokens[:, self._prompt.shape[1] :].numpy()


class OldFlax:
    """The Flax class that transformers 4 had."""

    def __init__(self, folder: Path, prompt: np.ndarray, num_new: int):
        import transformers

        transformers.logging.set_verbosity_error()
        self._model: Any = transformers.FlaxGPTJForCausalLM.from_pretrained(folder, from_pt=True)
        self._prompt = prompt
        for count in (1, num_new + 1):  # outside jax.jit it compiles at every call
            self.generate(count)

    def generate(self, count: int) -> np.ndarray:
        """Continues the prompts by `count` tokens; returns them [B, count]."""
        out = self._model.generate(
            self._prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return np.asarray(out.sequences)[:, self._prompt.shape[1] :]


def check_tokens(sides: dict[str, Any], count: int) -> None:
    """Checks that all sides choose the same tokens.

    Raises:
        RuntimeError: they do not.
    """
    tokens = {name: side.call("generate", count)[0] for name, side in sides.items()}
    for name, ours in tokens.items():
        if not np.array_equal(ours, tokens["flaxtron"]):
            raise RuntimeError(f"{name} and flaxtron choose different tokens: the ratio would mean nothing")


def compare_first(sides: dict[str, Any], num_prompt: int, rounds: int) -> list[str]:
    """Measures the time to the first token; lines to print.

    Raises:
        RuntimeError: the sides chose another token.
    """
    check_tokens(sides, 1)
    turns = {name: lambda side=side: side.call("generate", 1)[1] for name, side in sides.items()}
    times = alternate(turns, rounds)
    lines = [f"first token, prompt of {num_prompt}: flaxtron {1e3 * median(times['flaxtron']).wall:.0f} ms"]
    return lines + [
        f"  {name} {1e3 * median(times[name]).wall:.0f} ms; "
        f"flaxtron / {name} = {ratio(times['flaxtron'], times[name]).wall:.2f}"
        for name in times
        if name != "flaxtron"
    ]


def compare(
    sides: dict[str, Any], machine: Any, shape: Shape, batch: int, num_new: int, rounds: int
) -> list[str]:
    """Measures one batch size.

    Args:
        sides: "flaxtron" and perhaps others, workers of the classes above.
        machine: a worker of `machine.Machine`.
        shape: of the model.
        batch: B.
        num_new: new tokens a row.
        rounds: how often each side runs.

    Returns:
        Lines to print.

    Raises:
        RuntimeError: the sides chose other tokens.
    """
    check_tokens(sides, num_new)

    calls = {}
    for name, side in sides.items():
        calls[name] = lambda side=side: side.call("generate", num_new + 1)[1]
        calls[f"{name} first"] = lambda side=side: side.call("generate", 1)[1]
    wholes = alternate(calls | {"read": lambda: machine.call("read")[1]}, rounds)
    times = {
        name: [a - b for a, b in zip(wholes[name], wholes[f"{name} first"], strict=True)] for name in sides
    }
    times["read"] = wholes["read"]
    num_tokens, ours = batch * num_new, median(times["flaxtron"])
    lines = [f"decode, batch {batch}, {num_new} tokens: flaxtron {num_tokens / ours.wall:.1f} tok/s"]
    for name in [name for name in sides if name != "flaxtron"]:
        gain = ratio(times[name], times["flaxtron"])
        lines.append(
            f"  {name} {num_tokens / median(times[name]).wall:.1f} tok/s; flaxtron / {name} = {gain.wall:.2f}"
            f" (by processor time {gain.cpu:.2f}; of whole calls {ratio(wholes[name], wholes['flaxtron']).wall:.2f})"
        )
    if batch == 1:
        share = 4 * shape.kernel_size * num_new / machine.call("read")[0]
        reads = ratio(times["read"], times["flaxtron"])
        speed = 4e-9 * shape.kernel_size * num_new / ours.wall
        lines.append(
            f"  weights read at {speed:.1f} GB/s = {share * reads.wall:.2f} of the machine's read bandwidth"
        )
    return lines
