"""A study's summary as one HTML page that needs nothing beside it: no script, no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from lightning_ft.seeds.figures_of_runs import grid, learning_curves, strip
from lightning_ft.seeds.figures_of_study import cost, expected_best, variance
from lightning_ft.seeds.marks import Figure, Summary, counted, listed, lucky, metric, number, rule_of
from lightning_ft.seeds.run_table import run_table
from lightning_ft.seeds.style import STYLE, highlight

WARNING = (
    "The dev score of the best of many runs is optimistic by construction: that run was chosen because its dev score "
    "is good. The test score is that of the chosen run alone; the test set is touched once, after the choice."
)


def page(summary: Summary) -> str:
    """The whole page; whatever came from a user is escaped."""
    study = summary["study"]
    made = [strip(summary), learning_curves(summary), grid(summary)]
    made += [expected_best(summary), variance(summary), cost(summary)]
    figures = "\n".join(_figure(figure) for figure in made if figure is not None)
    title = escape(f"{study['name']}: study of seeds")
    # The policy lets the page load nothing and run nothing, whatever a name in it may hold.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}{highlight([run["number"] for run in summary["runs"]])}</style>
</head>
<body>
<main>
<header>
<p class="over">Study of seeds</p>
<h1>{escape(study["name"])}</h1>
<p class="lead">{escape(lead(summary))}</p>
{_notice(summary)}
</header>
<dl class="facts">{_facts(summary)}</dl>
<p class="warning">{WARNING}</p>
<div class="figures">
{figures}
</div>
{run_table(summary)}
{_settings(study["settings"])}
<footer>Made by lightning-ft. Point at a run in any figure or in the table to see it everywhere.</footer>
</main>
</body>
</html>
"""


def lead(summary: Summary) -> str:
    """The study in two sentences."""
    study, count = summary["study"], len(summary["runs"])
    text = f"One configuration, {counted(count, 'run')} of different seeds, judged by {metric(summary)}."
    steps = counted(study["horizon"], "optimiser step")
    if study["rungs"][0] >= study["horizon"]:
        return f"{text} Each has {steps}."
    if study["reduction"]:
        return f"{text} Judged after {listed(study['rungs'])} of {steps}; {rule_of(study)}."
    verb = "is" if study["keep"] == 1 else "are"
    return f"{text} Ranked after {listed(study['rungs'])} of {steps}; the best {study['keep']} {verb} finished."


def notice(summary: Summary) -> str:
    """What is not as it should be, in words; nothing where all is well."""
    states = summary["states"]
    if not summary["runs"]:
        return "This study has no runs yet."
    if not summary["over"]:
        waiting = sum(states.get(state, 0) for state in ("waiting", "running", "at rung"))
        return f"This study is not finished: {counted(waiting, 'run')} still to come. All that follows may change."
    if states.get("collapsed", 0) + states.get("failed", 0) == len(summary["runs"]):
        return "Every run collapsed or failed: change the configuration before the seeds."
    return "" if states.get("finished") else "No run was finished."


def _notice(summary: Summary) -> str:
    text = notice(summary)
    return f'<p class="notice" role="status">{escape(text)}</p>' if text else ""


def _facts(summary: Summary) -> str:
    return "".join(
        f'<div class="fact{" main" * (i == 0)}"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
        for i, (name, value, note) in enumerate(_headline(summary))
    )


def _headline(summary: Summary) -> list[tuple[str, str, str]]:
    """The study's main numbers, each with its name and a note. The one place that says the test score."""
    chosen, rung, spent = summary["chosen"], summary["at_rungs"][0], summary["cost"]
    of_all = f"of {counted(len(summary['runs']), 'run')}"
    deviation = f"± {number(rung['std'], 2)}, {number(rung['low'], 3)} to {number(rung['high'], 3)}"
    facts = [("Chosen run", "–", "none yet")]
    if chosen:
        seeds = f"run {chosen['number']}: init {chosen['init']}, order {chosen['order']}, dropout {chosen['dropout']}"
        tested = "not tested yet" if chosen["test"] is None else seeds
        facts = [("Test score, chosen run", number(chosen["test"]), tested)]
        facts.append(("Dev score, chosen run", number(chosen["dev"]), f"the best {of_all}"))
    return [
        *facts,
        ("Mean at the rung", number(rung["mean"], 3), "" if rung["std"] is None else deviation),
        ("Collapsed or failed", str(sum(not lucky(run) for run in summary["runs"])), of_all),
        ("Cost, in full runs", number(spent["spent"], 3), f"all in full: {spent['all']}"),
    ]


def _figure(figure: Figure) -> str:
    return (
        f'<figure id="{figure.name}"{"" if figure.drawing else " class=none"}><h2>{escape(figure.heading)}</h2>'
        f"{figure.drawing}<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_text(v))}</td></tr>' for name, v in settings.items()
    )
    table = f'<table class="settings"><tbody>{rows}</tbody></table>'
    return f'<section><h2>Settings</h2><div class="scroll">{table}</div></section>'


def _text(value: Any) -> str:
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and not any(isinstance(v, list | dict) for v in value)
    ):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
