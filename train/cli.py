"""What the command lines of this package share: one-line errors, and a Ctrl-C that ends a step first."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_OURS = tuple(
    str(Path(__file__).resolve().parent.parent / package) for package in ("modelzoo", "parallel", "train")
)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error that is the user's to mend into one line and exit code 2.

    These are OSError, and ValueError raised by our own code. Anything else is a defect and keeps its
    traceback, as does everything if FLAXTRON_TRACEBACK is set.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if os.environ.get("FLAXTRON_TRACEBACK") or not (isinstance(error, OSError) or _raised_by_us(error)):
            raise
        sys.stderr.write(f"error: {str(error).splitlines()[0]}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to go on\n")
        raise SystemExit(130) from None


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_OURS)


class StopRequest:
    """Ctrl-C or SIGTERM asks a loop to stop where nothing is half done; a second Ctrl-C interrupts at once.

        with StopRequest() as stop:
            while not stop.requested: ...

    Attributes:
        requested: whether a signal has come.
        exit_code: 128 + its number, as shells report it.
    """

    def __init__(self) -> None:
        self.requested, self.exit_code = False, 0

    def __enter__(self) -> "StopRequest":
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.exit_code = True, 128 + number
        sys.stderr.write("\nstopping after this step (Ctrl-C again to stop at once)\n")
