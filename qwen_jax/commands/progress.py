"""Progress on standard error: bars with rate and time left where it is a terminal, else nothing or a line a step."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

BYTES = "bytes"


class Update(Protocol):
    """Moves the bar of a step; the first call of a step opens it. `total` None: not known yet."""

    def __call__(self, step: str, done: int, total: int | None, *, unit: str = "", note: str = "") -> None: ...


class CountColumn(ProgressColumn):
    """Done of total, in the task's unit."""

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`."""
        done, total = task.completed, task.total
        if total is None:
            return Text("")
        if task.fields["unit"] == BYTES:
            return Text(f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB")
        return Text(f"{done:,.0f}/{total:,.0f} {task.fields['unit']}".rstrip())


class RateColumn(ProgressColumn):
    """Units a second, or seconds a unit where that is the larger number."""

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`."""
        speed = task.finished_speed or task.speed
        if speed is None and (seconds := task.finished_time or task.elapsed):  # units that take long, or one alone
            speed = task.completed / seconds
        if not speed or task.total is None:
            return Text("")
        if task.fields["unit"] == BYTES:
            return Text(f"{speed / 1e6:,.0f} MB/s", style="cyan")
        return Text(f"{speed:,.1f}/s" if speed >= 1 else f"{1 / speed:,.1f} s each", style="cyan")


class TimeColumn(ProgressColumn):
    """The time left; before that can be told the time so far, and what it took once the step is over."""

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`."""
        if task.finished:
            return Text(f"{clock(task.finished_time or 0)}", style="dim")
        left = task.time_remaining
        if left is None and task.completed and task.total:  # one unit says enough, when each takes long
            left = (task.elapsed or 0) / task.completed * (task.total - task.completed)
        if left is None:
            return Text(f"{clock(task.elapsed or 0)} so far", style="dim")
        return Text(f"{clock(left)} left", style="magenta")


def clock(seconds: float) -> str:
    """Seconds as 0:07, 3:20 or 1:02:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@contextlib.contextmanager
def progress_bars(announce: bool = False) -> Iterator[Update]:
    """Gives the function that moves the bars; steps stay on the screen after they have ended.

    Args:
        announce: write a line a step where standard error is no terminal; else there is nothing then.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=20),
        CountColumn(table_column=Column(no_wrap=True)),
        RateColumn(table_column=Column(no_wrap=True)),
        TimeColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", style="dim", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    tasks = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def update(step: str, done: int, total: int | None, *, unit: str = "", note: str = "") -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total, unit=unit, note=note)
                if announce and not console.is_terminal:
                    print(f"{step} …", file=sys.stderr, flush=True)
            bars.update(tasks[step], completed=done, total=total, note=note)

        yield update


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner with the time so far while the block runs, for what has no number of steps; gone afterwards."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bars.add_task(text, total=None)
        yield
