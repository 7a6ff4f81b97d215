"""What the command lines of this package share: one-line errors, and a Ctrl-C that ends a step first."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

_OURS = tuple(
    str(Path(__file__).resolve().parent.parent / package) for package in ("modelzoo", "parallel", "train")
)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error that is the user's to mend into one line and exit code 2.

    These are OSError, and ValueError raised by our own code. Anything else is a defect and keeps its
    traceback, as does everything if FLAXTRON_TRACEBACK is set. One of several processes ends at once: it does not
    wait for the others, which may be waiting for it.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to go on\n")
        _end(130)
    except Exception as error:
        if _is_users(error):
            sys.stderr.write(f"error: {str(error).splitlines()[0]}\n")
            _end(2)
        if _several_processes():
            traceback.print_exc()
            _end(1)
        raise


def _end(exit_code: int) -> NoReturn:
    if _several_processes():
        from parallel.cluster import leave

        leave(exit_code)
    raise SystemExit(exit_code) from None


def _several_processes() -> bool:
    if "jax" not in sys.modules:  # slow to import, and not needed to say what is wrong with a flag
        return False
    import jax

    return jax.distributed.is_initialized()


def _is_users(error: Exception) -> bool:
    if os.environ.get("FLAXTRON_TRACEBACK"):
        return False
    return isinstance(error, OSError) or (isinstance(error, ValueError) and _raised_by_us(error))


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_OURS)


class StopRequest:
    """Ctrl-C or SIGTERM asks a loop to stop where nothing is half done; a second Ctrl-C interrupts at once.

        with StopRequest() as stop:
            for step in ...:
                if stop.after(step): break

    Of several processes it is enough that one gets the signal: they agree on the step after which all stop.

    Attributes:
        requested: whether to stop.
        exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self) -> None:
        self.requested, self.exit_code = False, 0

    def __enter__(self) -> "StopRequest":
        self._several = _several_processes()
        # Where there are several, jax listens for SIGTERM and tells the other processes.
        numbers = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked at each, by every process.

        Args:
            step: steps taken.
        """
        if self._several and not self.requested:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.requested, self.exit_code = True, self.exit_code or 128 + signal.SIGTERM
        return self.requested

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.exit_code = 128 + number
        if self._several:
            signal.raise_signal(signal.SIGTERM)
        else:
            self.requested = True
        sys.stderr.write("\nstopping after this step (Ctrl-C again to stop at once)\n")
