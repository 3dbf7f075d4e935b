"""A study of seeds while it runs, in a terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_ft.seeds.record import SeedRun, SeedStudy
from lightning_ft.seeds.run_table import duration
from lightning_ft.seeds.summary import OVER

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_STYLES = {"running": "cyan", "at rung": "blue", "finished": "green", "collapsed": "red", "failed": "red"}
_BEFORE = "waiting for the study to begin"


def watch(load: Callable[[], SeedStudy], *, every: float = 1.0, console: Console | None = None) -> SeedStudy:
    """Show a study until it is over: a row for each run with its state, progress, last score and worker.

    It only reads, so that any number of terminals may watch. Ctrl-C ends the watching, not the study. Where the
    output is no terminal, a line is written whenever something has changed.

    Args:
        load: Reads the study anew. While what it reads is not there yet, or is being replaced (``OSError``,
            ``ValueError`` as of JSON that is cut off), the last good reading stays.
        every: Seconds between two readings.
        console: Where to show it; standard output by default.

    Returns:
        The last good reading.

    Raises:
        ValueError: ``every`` is not above 0.
        KeyboardInterrupt: Ctrl-C, before the study could be read at all.
    """
    if not every > 0:
        raise ValueError(f"every={every!r} must be above 0: seconds between two readings")
    from rich.console import Console

    show = _live if (console := console or Console()).is_terminal else _lines
    return show(load, every, console)


def _live(load: Callable[[], SeedStudy], every: float, console: Console) -> SeedStudy:
    from rich.live import Live

    study: SeedStudy | None = None
    with Live(_BEFORE, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            while study is None or not over(study):
                if (now := _read(load)) is not None:
                    study = now
                    live.update(_view(study, max(console.height - 6, 3)), refresh=True)
                if study is None or not over(study):
                    time.sleep(every)
        except KeyboardInterrupt:
            if study is None:
                raise
        if study is not None:
            live.update(_view(study, len(study.runs)), refresh=True)  # what stays on the screen
    assert study is not None
    return study


def _lines(load: Callable[[], SeedStudy], every: float, console: Console) -> SeedStudy:
    study: SeedStudy | None = None
    said: object = ""
    try:
        while study is None or not over(study):
            if (now := _read(load)) is not None:
                study = now
            # Steps grow all the time: what is news is a state or an evaluation.
            news = study and [(run.state, len(run.evaluations)) for run in study.runs]
            if news != said:
                line = _BEFORE if study is None else headline(study)
                console.print(line, markup=False, highlight=False, soft_wrap=True)
                said = news
            if study is None or not over(study):
                time.sleep(every)
    except KeyboardInterrupt:
        if study is None:
            raise
    assert study is not None
    return study


def _read(load: Callable[[], SeedStudy]) -> SeedStudy | None:
    try:
        return load()
    except (OSError, ValueError):
        return None


def over(study: SeedStudy) -> bool:
    """Whether every run has come to its end."""
    return bool(study.runs) and all(run.state in OVER for run in study.runs)


def headline(study: SeedStudy) -> str:
    """The study in one line: steps, states, best score."""
    steps = sum(run.steps for run in study.runs)
    states = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in study.runs).items())
    line = f"{study.name}: {steps:,} steps; {states or 'no runs yet'}"
    if best := _best(study):
        assert best.last is not None
        line += f"; best {study.metric} {best.last.score:.4g} (run {best.number})"
    return line


def _best(study: SeedStudy) -> SeedRun | None:
    sign = 1 if study.mode == "max" else -1
    scored = [run for run in study.runs if run.last is not None and run.last.score == run.last.score]
    return max(scored, key=lambda run: (sign * run.last.score, -run.last.loss), default=None)  # type: ignore[union-attr]


def _view(study: SeedStudy, room: int) -> RenderableType:
    """The table; where not all runs fit into ``room`` rows, those that are on first."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("run", "right"), ("init", "right"), ("order", "right"), ("state", "left"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, justify in (("step", "right"), (study.metric, "right"), ("loss", "right"), ("time", "right")):
        table.add_column(Text(name), justify=justify)  # type: ignore[arg-type]
    table.add_column("worker", overflow="ellipsis", no_wrap=True)
    shown = _most_telling(study, room)
    for run in shown:
        style = "bold green" if run.number == study.chosen else _STYLES.get(run.state, "dim")
        step = run.last.step if run.last else 0
        done = max(step, min(run.steps, study.horizon)) if run.state == "running" else step
        row = [Text(str(cell)) for cell in (run.number, run.init, run.order)]
        scores = (f"{run.last.score:.4f}", f"{run.last.loss:.4f}") if run.last else ("–", "–")
        words = (f"{done:,}", *scores, duration(run.seconds) if run.seconds else "–", run.worker or "")
        state = Text("chosen" if run.number == study.chosen else run.state, style)
        bar = ProgressBar(study.horizon, done, width=18, complete_style=style, finished_style=style)
        table.add_row(*row, state, bar, *(Text(word) for word in words))
    hidden = len(study.runs) - len(shown)
    more = [Text(f"… and {hidden} more", "dim")] if hidden else []
    return Group(Text(headline(study), "bold"), table, *more)


def _most_telling(study: SeedStudy, room: int) -> list[SeedRun]:
    """As many runs as fit, those first that are on or well; then in the order of their numbers."""
    ranks = ("running", "at rung", "finished", "failed", "collapsed", "waiting", "stopped")
    first = sorted(study.runs, key=lambda run: (run.number != study.chosen, ranks.index(run.state), run.number))
    return sorted(first[:room], key=lambda run: run.number)
