"""A trace of chosen steps, which TensorBoard and Perfetto show."""

import os
from pathlib import Path
from typing import Any

import jax


class Profile:
    """Traces the steps from the first to the last of `steps` with jax.profiler. A context manager.

    Args:
        workdir: the run's folder; the trace goes into its folder profile/.
        steps: (first, last), counted from 1; None traces nothing.
    """

    def __init__(self, workdir: str | os.PathLike[str], steps: tuple[int, int] | None):
        self.folder = Path(workdir) / "profile"
        self._first, self._last = steps or (0, 0)
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """To be called before each step."""
        # A run that goes on in the middle of them traces what is left of them.
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """To be called after each step.

        Args:
            step: its number.
            result: what it returned: waited for after the last one, so that the trace holds it.
        """
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
