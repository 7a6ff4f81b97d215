"""The settings of a study under `sweep.` in gin files."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """The settings of a study of several runs, each set in gin as `sweep.<name>`; `python -m train` ignores them.

    Attributes:
        vary: settings with the values to try, such as ["GPTJ.rotary_dim=16,32,64"].
        seeds: how many seeds each arm is trained with, counted from train.seed; or the seeds themselves, as (0, 5, 7).
        paired: the first values of all that is varied are one arm, the second values another, rather than all
            combinations.
        alone: each value is an arm of its own beside the base, all else as in the base.
        baseline: the arm that the others are compared with; None is the one whose values are the base's own, else the
            first.
        metric: what is compared: a value in metrics.jsonl, at the last step.
        workdir: the study's folder; None is runs/sweeps/ and the name of the gin file.
    """

    vary: list[str] | tuple[str, ...] = ()
    seeds: int | list[int] | tuple[int, ...] = 1
    paired: bool = False
    alone: bool = False
    baseline: str | None = None
    metric: str = "eval_loss"
    workdir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seeds, int) and self.seeds < 1:
            raise ValueError(f"sweep.seeds = {self.seeds}: it is at least 1")
        if not isinstance(self.seeds, int) and not self.seeds:
            raise ValueError("sweep.seeds is empty: name one seed or more")
        if not isinstance(self.seeds, int) and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sweep.seeds = {self.seeds}: a seed is named twice")
        if self.paired and self.alone:
            raise ValueError("sweep.paired and sweep.alone are both on: arms are made one way or the other")

    def seeds_from(self, first: int) -> tuple[int, ...]:
        """The seeds.

        Args:
            first: the base's train.seed.
        """
        if isinstance(self.seeds, int):
            return tuple(range(first, first + self.seeds))
        return tuple(self.seeds)
