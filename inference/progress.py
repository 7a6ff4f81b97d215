"""A progress bar on the terminal, where there is one."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows how far a piece of work is; yields what to call with how much was done.

    Args:
        what: the work.
        total: how much there is to do.
        show: False shows nothing, as does an error stream that is no terminal.
    """
    if not show or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
