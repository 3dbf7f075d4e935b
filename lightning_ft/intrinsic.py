"""The intrinsic dimension of a task: the smallest random subspace in which training does nearly as well as in full."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_ft.cli import last_checkpoint, run
from lightning_ft.core.files import atomic_file
from lightning_ft.core.report import Report
from lightning_ft.functional.plot_dimension import plot_dimension

Train = Callable[[int | None], float]
"""Trains in a subspace of some dimension, None for all weights, and returns the held-out score."""
_CALLBACK = "lightning_ft.callbacks.intrinsic_dimension.IntrinsicDimension"
_FULL = "full"


def search_dimension(
    train: Train,
    out: str | os.PathLike[str],
    *,
    dims: Sequence[int],
    share: float = 0.9,
    refine: int = 0,
    told: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Find d₉₀, the smallest dimension that reaches 90 % of the score of full fine-tuning.

    Trains in full, then in each of ``dims``. Then ``refine`` times in the geometric mean of the smallest dimension that
    reached the target and the next smaller one that was tried. Each score is written to ``OUT/search.json`` as soon as
    it is known, and none that is there is computed again; ``OUT/search.png`` shows them. Scores are noisy: d₉₀ is the
    smallest of those tried that reaches the target.

    Args:
        train: Trains once; a high score is good.
        out: Folder, made when absent.
        dims: Dimensions to try.
        share: Of the full score, in (0, 1].
        refine: How many further dimensions are tried.
        told: What the runs depend on, plain: a search goes on only where it is the same.
        progress: Is told each thing as it begins.

    Returns:
        A row for each run, d₉₀ (None where no dimension reaches the target) and the target.

    Raises:
        ValueError: An argument is out of range; what lies in ``out`` is another search; the full score is not above 0.

    Reference:
        Li, Farkhoor, Liu and Yosinski 2018, "Measuring the Intrinsic Dimension of Objective Landscapes".
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} must lie in (0, 1]: 0.9 for d90")
    if not dims or any(d < 1 for d in dims):
        raise ValueError(f"dims={list(dims)!r} must be whole numbers of 1 or more, such as 10, 100, 1000")
    if refine < 0:
        raise ValueError(f"refine={refine!r} must be 0 or more: how many further dimensions are tried")
    notes = _Notes(Path(out), {} if told is None else dict(told))
    full = notes.score(train, None, progress)
    if not full > 0:
        raise ValueError(f"full fine-tuning scores {full}, of which no share can be asked: take another metric")
    for dimension in sorted(set(dims)):
        notes.score(train, dimension, progress)
    for _ in range(refine):
        if (middle := _between(notes.subspaces(), share * full)) is None:
            break
        notes.score(train, middle, progress)
    scores = notes.subspaces()
    found = min((d for d, score in scores.items() if score >= share * full), default=None)
    with suppress(ImportError):  # the table says it all
        plot_dimension(
            scores, full, notes.folder / "search.png", label=notes.told.get("metric", "score"), share=share, found=found
        )
    name = f"d{share * 100:.3g}"
    rows = [
        {"dimension": str(d), "score": score, "of full": score / full, "reaches": score >= share * full}
        for d, score in [*sorted(scores.items()), (_FULL, full)]
    ]
    return Report(f"Intrinsic dimension: {notes.folder}", {name: found, "target": share * full, "full": full}, rows)


class _Notes:
    """Scores in a file, which a search that was interrupted goes on from."""

    def __init__(self, folder: Path, told: dict[str, Any]) -> None:
        self.folder = folder
        self.told: dict[str, Any] = json.loads(json.dumps(told))
        self.file = folder / "search.json"
        self.scores: dict[str, float] = {}
        if self.file.is_file():
            known = json.loads(self.file.read_text(encoding="utf-8"))
            if known["told"] != self.told:
                raise ValueError(
                    f"{self.file} is of another search, with {known['told']} where this one has {self.told}: name "
                    "another folder, or move it away"
                )
            self.scores = known["scores"]

    def score(self, train: Train, dimension: int | None, progress: Callable[[str], None]) -> float:
        name = _FULL if dimension is None else str(dimension)
        if name not in self.scores:
            progress(f"training {'in full' if dimension is None else f'in {dimension:,} dimensions'}")
            self.scores[name] = float(train(dimension))
            with atomic_file(self.file) as path:
                path.write_text(json.dumps({"told": self.told, "scores": self.scores}, indent=2), encoding="utf-8")
        progress(f"{name}: {self.scores[name]:.4g}")
        return self.scores[name]

    def subspaces(self) -> dict[int, float]:
        return {int(name): score for name, score in self.scores.items() if name != _FULL}


def _between(scores: Mapping[int, float], target: float) -> int | None:
    """The geometric mean of the smallest dimension that reaches the target and the next smaller one."""
    high = min((d for d, score in scores.items() if score >= target), default=None)
    low = max((d for d in scores if high is not None and d < high), default=None)
    if high is None or low is None:
        return None
    middle = round(math.sqrt(low * high))
    return middle if low < middle < high else None


def configured(
    config: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    metric: str,
    said: bool = True,
    rate: float | None = None,
    arguments: Sequence[str] = (),
) -> Train:
    """Training as a configuration of ``lightning-ft fit`` says, each run in a folder of its own below ``OUT/runs``.

    A run that was interrupted goes on from its last checkpoint.

    Args:
        config: The configuration.
        out: The search's folder.
        metric: The logged value that is the score, such as ``"val_accuracy"``.
        said: See :class:`~lightning_ft.callbacks.intrinsic_dimension.IntrinsicDimension`.
        rate: Learning rate of the subspace; None for the optimiser's own.
        arguments: More of the command line of every run.
    """

    def train(dimension: int | None) -> float:
        place = Path(out) / "runs" / (_FULL if dimension is None else f"d_{dimension}")
        line = ["fit", "--config", os.fspath(config), "--trainer.default_root_dir", str(place), *arguments]
        if dimension is not None:
            settings = {"dimension": dimension, "said": str(said).lower(), **({} if rate is None else {"rate": rate})}
            line += [f"--trainer.callbacks+={_CALLBACK}"]
            line += [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
        with suppress(FileNotFoundError):
            line += ["--ckpt_path", str(last_checkpoint(place))]
        with warnings.catch_warnings():
            # These are its arguments; the process has others.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            built = run(line)
        if metric not in built.trainer.callback_metrics:  # it had ended, and went on to nothing
            built.trainer.validate(built.model, built.datamodule, verbose=False)
        logged = built.trainer.callback_metrics
        if metric not in logged:
            raise ValueError(f"metric={metric!r} is not logged in validation; logged are: {', '.join(sorted(logged))}")
        return float(logged[metric])

    return train


def command(arguments: list[str]) -> None:
    """``lightning-ft intrinsic_dimension search``."""
    parser = ArgumentParser(
        prog="lightning-ft intrinsic_dimension", description=(search_dimension.__doc__ or "").splitlines()[0]
    )
    parser.add_argument("action", choices=["search"], help="What to do.")
    parser.add_argument("--config", type=str, required=True, help="Configuration of a run, as of lightning-ft fit.")
    parser.add_argument("--dims", type=str, required=True, help="Dimensions to try, such as 100,1000,10000.")
    parser.add_argument("--out", type=str, default="runs/intrinsic", help="Folder of the search.")
    parser.add_argument("--metric", type=str, default="val_accuracy", help="The logged value that is the score.")
    parser.add_argument("--share", type=float, default=0.9, help="Of the score of full fine-tuning.")
    parser.add_argument("--refine", type=int, default=0, help="Further dimensions, between those of dims.")
    parser.add_argument("--said", type=bool, default=True, help="A scale for each tensor, among the values that train.")
    parser.add_argument("--rate", type=float, help="Learning rate in the subspace; by default the configuration's.")
    parser.add_argument("--arguments", type=str, default="", help="More arguments of fit, in quotes.")
    options = parser.parse_args(arguments)
    try:
        dims = [int(d) for d in options.dims.split(",")]
    except ValueError:
        parser.error(f"--dims {options.dims}: write whole numbers with commas, such as 100,1000,10000")
    more = options.arguments.split()
    shared = {"metric": options.metric, "said": options.said, "rate": options.rate, "arguments": more}
    content = hashlib.sha256(Path(options.config).read_bytes()).hexdigest()
    report = search_dimension(
        configured(options.config, options.out, **shared),
        options.out,
        dims=dims,
        share=options.share,
        refine=options.refine,
        told={**shared, "config": content},
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report)
