"""Beam search: seconds of MVP's `inference.generate` against transformers' `generate`, the same weights.

The time of a token is that of a generation of n + 1 tokens less that of one of 1 token.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoint import write_random
from benchmarks.decode import check_tokens
from benchmarks.sides import Seconds, Shape, against_torch, alternate, median

PAD, END = 1, 2


def _settings(num_beams: int, count: int) -> dict[str, Any]:
    """Of either library; nothing ends a hypothesis early, so that both take every step."""
    return dict(
        num_beams=num_beams,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=PAD,
        forced_eos_token_id=END,
        early_stopping=False,
    )


class Checkpoint:
    """Writes a random MVP of six layers a side as a Hugging Face folder; to be made in a process that ends after."""

    def __init__(self, shape: Shape, folder: Path):
        import modelzoo

        ends: dict[str, Any] = dict(
            bos_token_id=0, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=END
        )
        config = modelzoo.MvpConfig(
            vocab_size=shape.vocab_size,
            d_model=shape.n_embd,
            encoder_layers=shape.n_layer // 2,
            decoder_layers=shape.n_layer // 2,
            encoder_attention_heads=shape.n_head,
            decoder_attention_heads=shape.n_head,
            encoder_ffn_dim=4 * shape.n_embd,
            decoder_ffn_dim=4 * shape.n_embd,
            **ends,
        )
        model = modelzoo.MvpForConditionalGeneration(config)
        write_random(model, folder, 0.05)


class Flaxtron:
    """Our side."""

    def __init__(self, folder: Path, source: np.ndarray, num_beams: int, num_new: int):
        import inference
        import modelzoo

        model, params = modelzoo.from_hf(folder)
        self._model, self._params = model, inference.prepare(model, params)
        self._source, self._num_beams = source, num_beams
        for count in (1, num_new + 1):  # compiles
            self.generate(count)

    def generate(self, count: int) -> np.ndarray:
        """The best hypotheses of `count` tokens."""
        import inference

        config = inference.GenerationConfig(**_settings(self._num_beams, count))
        mask = np.ones_like(self._source)
        return np.asarray(
            inference.generate(self._model, self._params, self._source, mask, config=config).sequences
        )


class Torch:
    """Transformers, as `from_pretrained` gives it."""

    def __init__(self, folder: Path, source: np.ndarray, num_beams: int, num_new: int):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._model: Any = transformers.MvpForConditionalGeneration.from_pretrained(folder).eval()
        self._source, self._num_beams = torch.from_numpy(source), num_beams
        self.generate(2)

    def generate(self, count: int) -> np.ndarray:
        """The best hypotheses of `count` tokens."""
        import torch

        with torch.inference_mode():
            mask = torch.ones_like(self._source)
            settings = _settings(self._num_beams, count)
            return self._model.generate(self._source, attention_mask=mask, **settings).numpy()


def compare(sides: dict[str, Any], num_beams: int, num_new: int, rounds: int) -> list[str]:
    """Measures a beam search; lines to print.

    Raises:
        RuntimeError: the sides chose other tokens.
    """
    check_tokens(sides, num_new)

    def turn(side: Any) -> Seconds:
        return side.call("generate", num_new + 1)[1] - side.call("generate", 1)[1]

    times = alternate({name: lambda side=side: turn(side) for name, side in sides.items()}, rounds)
    ours = median(times["flaxtron"])
    lines = [f"MVP, {num_beams} beams, {num_new} tokens: flaxtron {num_new / ours.wall:.1f} tok/s"]
    return lines + against_torch(times, num_new)
