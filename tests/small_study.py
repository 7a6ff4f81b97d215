"""A study without a model behind it."""

from pathlib import Path

from train.sweeping.study import Arm, Study


def arm(name: str, steps: int = 10) -> Arm:
    """An arm of a small model."""
    key, _, value = name.partition("=")
    settings = {f"GPTJ.{key}": value}
    return Arm(name, name, settings, settings | {"train.num_steps": str(steps)}, 1234, steps, (8, None, 16))


def small_study(folder: Path, seeds: tuple[int, ...] = (0, 1, 2), metric: str = "eval_loss") -> Study:
    """Three arms, a=2 the baseline."""
    folder.mkdir(parents=True, exist_ok=True)
    arms = tuple(arm(f"a={i}") for i in (1, 2, 3))
    return Study(folder, arms, seeds, "a=2", metric, ("tiny.gin",), ("x.y=1",), "python -m train.sweep")


VALUES = {"a=1": {0: 2.5, 1: 2.7, 2: 2.6}, "a=2": {0: 2.0, 1: 2.3, 2: 2.1}, "a=3": {0: 2.1, 1: 2.2, 2: 2.2}}
