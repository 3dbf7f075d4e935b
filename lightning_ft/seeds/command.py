"""``lightning-ft seeds``: many runs of a configuration that differ in their seeds, of which the best are finished."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_ft.functional.seed_pruning import budget, cost
from lightning_ft.seeds.cells import SeedSettings
from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.storage import open_storage
from lightning_ft.seeds.study import study_record

_TEXT = """Start many runs that differ in their seeds, rank them early, finish the best.

Running the same command again goes on with the study, or joins it from another machine (with --storage)."""


def command(arguments: list[str]) -> None:
    """``lightning-ft seeds``."""
    parser = _parser()
    options = parser.parse_args([_spelt(argument) for argument in arguments])
    out = Path(options.out)
    storage = open_storage(options.storage, out)

    def load() -> SeedStudy:
        try:
            return study_record(storage, options.study, out)
        except KeyError as error:
            raise FileNotFoundError(error.args[0]) from error

    if options.config is None:
        if not options.watch:
            parser.error("--config names the configuration of a run; without it, --watch shows a study that is there")
        _watch(load)
        return
    _run(options, parser, load)
    _report(load(), out)


def _run(options: Namespace, parser: ArgumentParser, load: Callable[[], SeedStudy]) -> None:
    from lightning_ft.seeds.configured import (
        ConfiguredTest,
        ConfiguredTrain,
        check_seeds,
        configuration,
        content,
        has_test,
    )
    from lightning_ft.seeds.pool import Assignment, run_study
    from lightning_ft.seeds.worker import Patience

    line = tuple(shlex.split(options.arguments))
    parsed = configuration(options.config, line)
    check_seeds(parsed)
    runs, keep = _numbers(options, parser)
    settings = SeedSettings(
        runs,
        keep,
        options.stop_at,
        options.metric,
        options.mode,
        options.loss,
        options.rule,
        options.design,
        options.dropout,
        options.seed,
        options.threads,
        {"config": content(options.config), "arguments": options.arguments},
    )
    _say(
        f"{runs} runs to {options.stop_at:g} of their length, {keep} to the end: the cost of "
        f"{cost(runs, options.stop_at, keep):g} full runs"
    )
    assignment = Assignment(
        options.study,
        settings,
        ConfiguredTrain(options.config, line, options.checkpoint_every),
        Path(options.out),
        options.storage,
        ConfiguredTest(options.config, line) if has_test(parsed) else None,
        Patience(options.lease, options.barrier_timeout),
    )
    assignment.board()  # refuses other settings before anything is shown
    try:
        with _shown(load):
            run_study(assignment, workers=options.workers)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on with it")
        raise SystemExit(130) from None


@contextmanager
def _shown(load: Callable[[], SeedStudy]) -> Iterator[None]:
    """A study that is shown while it runs."""
    from rich.console import Console

    console = Console(stderr=True)
    shown = threading.Thread(target=_watch, args=(load, console), daemon=True, name="watch")
    shown.start()
    try:
        yield
        shown.join(5)
    finally:
        console.show_cursor(True)  # which a live table hides


def _numbers(options: Namespace, parser: ArgumentParser) -> tuple[int, int]:
    if options.budget is None:
        runs = 20 if options.runs is None else options.runs
        return runs, min(5, runs) if options.keep is None else options.keep
    if options.runs is not None or options.keep is not None:
        parser.error("--budget sets the numbers of runs by the published rule: leave --runs and --keep out")
    return budget(options.budget, options.stop_at)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lightning-ft seeds", description=_TEXT)
    add: Any = parser.add_argument
    add("--config", type=str, help="Configuration of a run, as of lightning-ft fit.")
    add("--runs", type=int, help="How many are started (20).")
    add("--keep", type=int, help="How many are finished (5).")
    add("--budget", type=float, help="In place of both: what to spend, in full runs; the published rule sets them.")
    add("--stop_at", type=float, default=0.25, help="The fraction of a run after which it is judged.")
    add("--metric", type=str, default="val_accuracy", help="The logged value that ranks.")
    add("--mode", choices=["max", "min"], default="max", help="Which value is better.")
    add("--loss", type=str, default="val_loss", help="The logged value that settles ties.")
    add("--rule", choices=["rung", "asha"], default="rung", help="Rank all together, or each as it comes.")
    add("--design", choices=["paired", "grid"], default="paired", help="Seeds of initialisation and order.")
    add("--dropout", choices=["own", "order"], default="own", help="Seed of dropout: a third one, or the order's.")
    add("--seed", type=int, default=0, help="The first seed of each stream.")
    add("--workers", type=int, default=1, help="Processes on this machine, each with a device; 0 for this one.")
    add("--threads", type=int, default=1, help="Of each process: results depend on their number.")
    add("--storage", type=str, help="Of the study: postgresql://…; by default a journal file in OUT.")
    add("--study", type=str, default="seeds", help="Its name.")
    add("--out", type=str, default="runs/seeds", help="Folder of checkpoints, logs and report.")
    add("--checkpoint_every", type=int, default=100, help="Steps between two checkpoints: what a kill may cost.")
    add("--lease", type=float, default=60.0, help="Seconds of silence after which a worker counts as dead.")
    add("--barrier_timeout", type=float, help="Seconds after which a rung waits no longer for missing runs.")
    add("--arguments", type=str, default="", help="More arguments of fit, in quotes.")
    add("--watch", action="store_true", help="Show a study that runs elsewhere.")
    return parser


def _spelt(argument: str) -> str:
    """Both spellings of an option, --stop-at and --stop_at."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or " " in name:  # a value may look so, too
        return argument
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _watch(load: Callable[[], SeedStudy], console: Any = None) -> None:
    from lightning_ft.seeds.watch import watch

    watch(load, console=console)


def _report(study: SeedStudy, out: Path) -> None:
    from lightning_ft.seeds.report import write_report

    print(write_report(study, out))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
