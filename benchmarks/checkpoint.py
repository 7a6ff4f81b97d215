"""The checkpoint that both sides read."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides import Shape


class Checkpoint:
    """Writes a random model as a Hugging Face folder; to be made in a process that ends after."""

    def __init__(self, shape: Shape, folder: Path):
        import modelzoo

        model = modelzoo.GPTJForCausalLM(modelzoo.GPTJConfig(**shape.config()))
        write_random(model, folder, 0.02)


def write_random(model: Any, folder: Path, spread: float) -> None:
    """Writes a model whose parameters are noise of a standard deviation, about 1 where they scale."""
    import jax

    import modelzoo

    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        mean = np.float32("scale" in jax.tree_util.keystr(path))
        return mean + np.float32(spread) * rng.standard_normal(leaf.shape, np.float32)

    modelzoo.to_hf(model, jax.tree_util.tree_map_with_path(draw, modelzoo.abstract_params(model)), folder)
