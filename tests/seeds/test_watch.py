"""Watching a study: what is shown of it, in a terminal and in a log, from files that come, go and are cut off."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.watch import headline, watch
from tests.seeds.studies import grid, unfinished, with_bad


def terminal(width: int = 120, height: int = 40) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, height=height, color_system=None), out


def readings(*found: SeedStudy | Exception) -> Callable[[], SeedStudy]:
    """What one reading after another gives."""
    rest: Iterator[SeedStudy | Exception] = iter(found)

    def load() -> SeedStudy:
        one = next(rest)
        if isinstance(one, BaseException):
            raise one
        return one

    return load


def test_a_terminal_shows_a_row_for_each_run() -> None:
    console, out = terminal()
    over = with_bad(grid(4, 3))
    assert watch(readings(unfinished(over), over), every=1e-3, console=console) == over
    text = out.getvalue()
    assert text.count("waiting") > 5
    for words in (
        "running",
        "host-1",
        "at rung",
        "finished",
        "collapsed",
        "failed",
        "chosen",
        "val_accuracy",
        "0.8100",
    ):
        assert words in text
    last = text[text.rindex("toy:") :]
    assert "2 collapsed" in last
    assert all(any(line.split()[:1] == [str(run.number)] for line in last.splitlines()) for run in over.runs)


def test_a_low_terminal_shows_those_runs_that_are_on() -> None:
    console, out = terminal(height=12)
    half = unfinished(grid(10, 3))
    busy = replace(half, runs=(*half.runs[:-1], replace(half.runs[-1], state="running", worker="the-last")))
    watch(readings(busy, KeyboardInterrupt()), every=1e-3, console=console)  # type: ignore[arg-type]
    first = out.getvalue()[: out.getvalue().index("… and 24 more")]
    assert "the-last" in first


def test_a_log_gets_a_line_for_each_change_and_no_more() -> None:
    console = Console(file=(out := io.StringIO()), width=40)
    half, over = unfinished(grid()), grid()
    further = replace(half, runs=tuple(replace(run, steps=run.steps + 1) for run in half.runs))  # no news
    watch(readings(half, half, further, over), every=1e-3, console=console)
    lines = out.getvalue().splitlines()
    assert lines == [headline(half), headline(over)]
    assert lines[1] == "toy: 120 steps; 4 stopped, 2 finished; best val_accuracy 0.74 (run 4)"
    low = grid(mode="min")
    assert headline(low).endswith("best val_accuracy 0.38 (run 1)")


@pytest.mark.parametrize("lines", [False, True])
def test_what_is_not_there_or_cut_off_is_waited_for(lines: bool) -> None:
    console = Console(file=io.StringIO()) if lines else terminal()[0]
    broken = [FileNotFoundError("study.json"), json.JSONDecodeError("cut off", "{", 1), PermissionError("replaced")]
    over = grid()
    load = readings(*broken, unfinished(over), *broken, over)
    assert watch(load, every=1e-3, console=console) == over


@pytest.mark.parametrize("lines", [False, True])
def test_an_error_of_the_reader_is_not_swallowed(lines: bool) -> None:
    console = Console(file=io.StringIO()) if lines else terminal()[0]
    with pytest.raises(AttributeError, match="a mistake"):
        watch(readings(AttributeError("a mistake")), console=console)


@pytest.mark.parametrize("lines", [False, True])
def test_ctrl_c_ends_the_watching_alone(lines: bool) -> None:
    console = Console(file=io.StringIO()) if lines else terminal()[0]
    half = unfinished(grid())
    assert watch(readings(half, KeyboardInterrupt()), every=1e-3, console=console) == half  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        watch(readings(KeyboardInterrupt()), every=1e-3, console=console)  # type: ignore[arg-type]


def test_names_are_no_markup() -> None:
    console, out = terminal()
    found = replace(
        grid(), name="[red]x[/red]", metric="[/b]", runs=tuple(replace(r, worker="[/]") for r in grid().runs)
    )
    watch(readings(found), console=console)
    assert "[red]x[/red]" in out.getvalue()
    assert "[/b]" in out.getvalue()
    lines = Console(file=(written := io.StringIO()))
    watch(readings(found), console=lines)
    assert "[red]x[/red]" in written.getvalue()


def test_a_file_that_another_process_writes(tmp_path: Path) -> None:
    path, over = tmp_path / "study.json", grid()

    def write() -> None:
        for found in [unfinished(over)] * 20 + [over]:
            found.save(path)
            time.sleep(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    assert watch(lambda: SeedStudy.load(path), every=1e-3, console=Console(file=io.StringIO())) == over
    writer.join()


def test_ctrl_c_in_a_terminal_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    unfinished(grid()).save(path)
    code = (
        # A shell starts what it runs in the background with this signal ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from pathlib import Path; from lightning_ft.seeds.record import SeedStudy;"
        "from lightning_ft.seeds.watch import watch;"
        "found = watch(lambda: SeedStudy.load(Path(sys.argv[1])), every=0.05); print('left', found.name)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stdout is not None
    assert "1 running" in process.stdout.readline()
    process.send_signal(2)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out.strip(), err) == (0, "left toy", "")


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="every=0 must be above 0: seconds"):
        watch(grid, every=0)
