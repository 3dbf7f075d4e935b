"""What a study of seeds shows, as plain data: everything that its report prints and draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from lightning_ft.functional.expected_best import expected_best_band
from lightning_ft.functional.seed_pruning import cost, rung_step
from lightning_ft.functional.variance_split import variance_split
from lightning_ft.seeds.record import Evaluation, SeedRun, SeedStudy, State

OVER: tuple[State, ...] = ("finished", "stopped", "collapsed", "failed")
"""States that a run does not leave."""
_LUCKLESS = ("collapsed", "failed")


def summarise(study: SeedStudy) -> dict[str, Any]:
    """Everything that a report says, as JSON-able values; what is not a finite number is None.

    Means, standard deviations and the split of variance leave collapsed and failed runs out, and say how many. The
    expected best of n counts a collapsed run as a draw like any other, with the score that it has; one whose score is
    no number as the worst score seen. Failed runs (which raised) are no draws.

    Args:
        study: What was found so far.
    """
    over = bool(study.runs) and all(run.state in OVER for run in study.runs)
    runs = [_run(study, run) for run in study.runs]
    counts = Counter(run.state for run in study.runs)
    lucky = [run for run in runs if run["state"] not in _LUCKLESS]
    return {
        "study": {
            "name": study.name,
            "metric": study.metric,
            "mode": study.mode,
            "horizon": study.horizon,
            "stop_at": study.stop_at,
            "rungs": _rungs(study),
            "keep": study.keep,
            "rule": study.rule,
            "reduction": study.reduction,
            "chance": study.chance,
            "settings": _plain(study.settings),
        },
        "over": over,
        "states": dict(counts),
        "chosen": _chosen(study),
        "at_rungs": [_spread([run["rungs"][i] for run in lucky]) for i in range(len(_rungs(study)))],
        "at_end": _spread([run["end"] for run in lucky]),
        "variance": _variance(runs),
        "grid": _grid(runs),
        "expected_best": _expected(study, runs, over),
        "cost": _cost(study),
        "runs": runs,
    }


def _rungs(study: SeedStudy) -> list[int]:
    """The steps after which runs are judged."""
    return [rung_step(study.horizon, share) for share in (study.stop_at, *study.later)]


def _run(study: SeedStudy, run: SeedRun) -> dict[str, Any]:
    last, rungs = run.last, [None if one is None else _finite(one.score) for one in _at_rungs(study, run)]
    done = {name: value for name, value in asdict(run).items() if name not in ("test", "checkpoint", "evaluations")}
    return done | {
        "number": int(run.number),  # it names classes in a page
        "seconds": _finite(run.seconds),
        "rung": rungs[0],
        "rungs": rungs,
        "end": _finite(last.score) if last is not None and _ended(study, run) else None,
        "last": None if last is None else _finite(last.score),
        "loss": None if last is None else _finite(last.loss),
        "evaluations": [[one.step, _finite(one.score), _finite(one.loss)] for one in run.evaluations],
    }


def _ended(study: SeedStudy, run: SeedRun) -> bool:
    """Whether it was trained to its end, well or not."""
    return run.state == "finished" or (
        run.state == "collapsed" and run.last is not None and run.last.step >= study.horizon
    )


def _at_rungs(study: SeedStudy, run: SeedRun) -> list[Evaluation | None]:
    """The evaluations that judge a run. The first is the last one of a run that ended before it."""
    found = [next((one for one in run.evaluations if one.step >= step), None) for step in _rungs(study)]
    if run.state in ("stopped", "collapsed"):
        found[0] = found[0] or run.last
    return found


def _chosen(study: SeedStudy) -> dict[str, Any] | None:
    run = next((run for run in study.runs if run.number == study.chosen), None)
    if run is None:
        return None
    last = run.last
    return {
        "number": run.number,
        "init": run.init,
        "order": run.order,
        "dropout": run.dropout,
        "dev": None if last is None else _finite(last.score),
        "loss": None if last is None else _finite(last.loss),
        "test": None if run.test is None else _finite(run.test),
        "checkpoint": run.checkpoint,
    }


def _spread(scores: Sequence[float | None]) -> dict[str, Any]:
    known = [score for score in scores if score is not None]
    return {
        "count": len(known),
        "mean": mean(known) if known else None,
        "std": stdev(known) if len(known) > 1 else None,
        "low": min(known, default=None),
        "high": max(known, default=None),
    }


def _variance(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    used = [run for run in runs if run["rung"] is not None and run["state"] not in _LUCKLESS]
    split = variance_split([run["rung"] for run in used], [run["init"] for run in used], [run["order"] for run in used])
    left_out = sum(run["state"] in _LUCKLESS for run in runs)
    return {**asdict(split), "runs": len(used), "left_out": left_out}


def _grid(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The runs as a table of initialisation by order, where they are one: each cell at most once, and most there."""
    cells = {(run["init"], run["order"]): run for run in runs}
    inits, orders = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    whole = len(cells) == len(runs) and 2 * len(runs) > len(inits) * len(orders)
    if not (whole and len(inits) > 1 and len(orders) > 1):
        return None
    numbers = [[cells[i, o]["number"] if (i, o) in cells else None for o in orders] for i in inits]
    return {"inits": inits, "orders": orders, "runs": numbers}


def _expected(study: SeedStudy, runs: Sequence[dict[str, Any]], over: bool) -> list[dict[str, Any]]:
    """Curves of the expected best of n runs against what n runs cost, in full runs."""
    drawn = [run for run in runs if run["state"] != "failed"]
    ranked = [run for run in drawn if run["rung"] is not None or run["state"] == "collapsed"]
    curves = []
    if study.stop_at < 1:
        share = rung_step(study.horizon, study.stop_at) / study.horizon
        curves.append(("stopped at the rung", share, [run["rung"] for run in ranked]))
    if over and drawn:
        name = "in full" if all(run["state"] == "finished" for run in drawn) else "as this study ran them"
        curves.append((name, _cost(study)["spent"] / len(runs), [run["last"] for run in drawn]))
    return [curve for one in curves if (curve := _curve(study, *one))]


def _curve(study: SeedStudy, name: str, share: float, scores: Sequence[float | None]) -> dict[str, Any] | None:
    known = [score for score in scores if score is not None]
    if not known:
        return None
    worst = min(known) if study.mode == "max" else max(known)
    counts = list(range(1, len(scores) + 1))
    drawn = [worst if score is None else score for score in scores]
    band = expected_best_band(drawn, counts, mode=study.mode)
    return {
        "name": name,
        "n": counts,
        "cost": [n * share for n in counts],
        **{part: values.tolist() for part, values in band._asdict().items()},
        "without_score": len(scores) - len(known),
    }


def _cost(study: SeedStudy) -> dict[str, Any]:
    """In units of a full run. What a rule other than the rung costs is not known beforehand."""
    t, p, f = len(study.runs), min(study.keep, len(study.runs)), rung_step(study.horizon, study.stop_at) / study.horizon
    return {
        "planned": cost(t, f, p) if study.rule == "rung" else None,
        "spent": sum(run.steps for run in study.runs) / study.horizon,
        "all": t,
        "steps": sum(run.steps for run in study.runs),
        "seconds": sum(_finite(run.seconds) or 0.0 for run in study.runs),
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """JSON-able, whatever came."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _finite(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)
