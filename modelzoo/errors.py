"""Errors at a command line: one line for what is the user's to mend, a traceback for what is ours."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

_OURS = tuple(
    str(Path(__file__).parents[1] / package) for package in ("modelzoo", "parallel", "train", "inference")
)


@contextlib.contextmanager
def user_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Turns an error that is the user's to mend into one line and exit code 2.

    These are OSError, and ValueError raised by our own code. Anything else is a defect and keeps its traceback, as
    does everything if FLAXTRON_TRACEBACK is set.

    Args:
        interrupted: what Ctrl-C prints; its exit code is 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        raise SystemExit(130) from None
    except (OSError, ValueError) as error:
        raised_by_us = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_OURS)
        if os.environ.get("FLAXTRON_TRACEBACK") or not (isinstance(error, OSError) or raised_by_us):
            raise
        sys.stderr.write(f"error: {str(error).splitlines()[0]}\n")
        raise SystemExit(2) from None
