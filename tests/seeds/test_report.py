"""The report on a study of seeds, for studies as they are: whole, cut off, hopeless, hostile."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from lightning_ft.functional.expected_best import expected_best
from lightning_ft.seeds.page import WARNING
from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.report import write_report
from lightning_ft.seeds.summary import summarise
from tests.seeds.studies import HOSTILE, all_collapsed, at, grid, study, unfinished, with_bad

SINGLE = study({(0, 0): 0.6}, keep=1)
PAIRED = study({(i, i): 0.5 + 0.03 * i for i in range(6)})
STUDIES = {
    "whole": grid(),
    "some bad": with_bad(grid(4, 3)),
    "unfinished": unfinished(grid()),
    "none begun": SeedStudy("empty", "val_accuracy", "max", 40, 0.25, 2),
    "all collapsed": all_collapsed(grid()),
    "lower is better": grid(mode="min"),
    "a single run": SINGLE,
    "paired": PAIRED,
    "all in full": replace(grid(keep=6), stop_at=1.0),
    "asha": replace(grid(), rule="asha", later=(0.5,), reduction=2),
    "many": study({(i, j): 0.5 + 0.001 * (i * j % 7) for i in range(15) for j in range(15)}, keep=50),
    "equal scores": study({(i, j): 0.5 for i in range(3) for j in range(2)}),
    "huge losses": replace(study({(i, 0): 1e12 * (i + 1) for i in range(4)}, mode="min"), chance=-1e9),
}


class Page(HTMLParser):
    """Checks that tags close in their order, and collects them and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def written(found: SeedStudy, folder: Path) -> tuple[str, dict[str, Any], str]:
    """The page, the JSON and the terminal's text."""
    report = write_report(found, folder)
    # `constant` would be NaN or Infinity, which is not JSON.
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return (folder / "report.html").read_text(encoding="utf-8"), data, str(report)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_report(name: str, tmp_path: Path) -> None:
    html, data, text = written(STUDIES[name], tmp_path)
    page = Page(html)
    assert data == json.loads(json.dumps(summarise(STUDIES[name])))
    assert len(data["runs"]) == len(STUDIES[name].runs)
    assert STUDIES[name].name in text
    values = [value for _, attrs in page.tags for value in attrs.values() if value]
    assert not re.search(r"\b(nan|inf|None)\b", " ".join([*page.words, *values]).replace("loss is nan", ""))
    assert "script" not in [tag for tag, _ in page.tags]
    for _, attrs in page.tags:
        assert not {"src", "href", "onload", "onclick"} & attrs.keys()  # it loads and runs nothing
    figures = page.count("figure")
    assert figures == page.count("figcaption") >= 5
    drawings = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert all(attrs["aria-label"] for attrs in drawings)


def test_what_is_wrong_with_a_study_is_said(tmp_path: Path) -> None:
    said = {
        "unfinished": "not finished: 6 runs still to come",
        "none begun": "has no runs yet",
        "all collapsed": "Every run collapsed or failed",
        "paired": "cannot be told apart",
    }
    for name, words in said.items():
        html, _, text = written(STUDIES[name], tmp_path / name)
        assert words in html
        assert words in text
    html, _, text = written(STUDIES["whole"], tmp_path / "whole")
    assert 'role="status"' not in html
    assert "note" not in text


@pytest.mark.parametrize("name", ["whole", "lower is better", "some bad"])
def test_the_test_score_is_said_once_and_warned_of(name: str, tmp_path: Path) -> None:
    html, data, text = written(STUDIES[name], tmp_path)
    assert html.count("0.1235") == html.count("0.123") == 1
    assert json.dumps(data).count("0.123456") == 1
    assert text.count("0.1235") == 1
    assert WARNING in html
    assert "optimistic by construction" in text
    assert data["chosen"]["test"] == 0.123456


def test_a_test_score_of_another_run_is_never_shown(tmp_path: Path) -> None:
    found = grid()
    runs = tuple(replace(run, test=0.98765 if run.number != found.chosen else None) for run in found.runs)
    html, data, text = written(replace(found, runs=runs), tmp_path)
    for output in (html, json.dumps(data), text):
        assert "0.98" not in output
    assert "not tested yet" in html


def test_collapsed_and_failed_runs_are_in_no_mean(tmp_path: Path) -> None:
    found = STUDIES["some bad"]
    good = [run.evaluations[1].score for run in found.runs[3:]]
    html, data, _ = written(found, tmp_path)
    assert data["at_rungs"][0]["count"] == 9
    assert data["at_rungs"][0]["mean"] == pytest.approx(mean(good))
    assert data["at_rungs"][0]["std"] == pytest.approx(stdev(good))
    assert data["variance"]["runs"] == 9
    assert data["variance"]["left_out"] == 3
    assert "3 runs collapsed or failed (×)" in html
    assert "score 0.2 is that of the commonest class" in html


def test_a_collapsed_run_is_a_draw_all_the_same() -> None:
    found = STUDIES["some bad"]
    curve = summarise(found)["expected_best"][0]
    # Nine good ones, the collapsed one, the diverged one as the worst seen; the failed one is no draw.
    drawn = [run.evaluations[1].score for run in found.runs[3:]] + [0.2, 0.2]
    assert curve["name"] == "stopped at the rung"
    assert curve["without_score"] == 1
    assert curve["expected"] == pytest.approx(expected_best(drawn, range(1, 12)).tolist())
    assert curve["cost"] == pytest.approx([0.25 * n for n in range(1, 12)])


def test_what_a_study_cost() -> None:
    found = summarise(study({(i, j): 0.01 * (10 * i + j) for i in range(10) for j in range(4)}, keep=10))["cost"]
    assert found["planned"] == 17.5  # t = 40, f = 0.25, p = 10
    assert found["spent"] == 17.5
    assert found["all"] == 40
    assert found["steps"] == 700


def test_curves_against_what_runs_cost_here_and_in_full() -> None:
    rung, ran = summarise(grid())["expected_best"]
    assert (rung["name"], ran["name"]) == ("stopped at the rung", "as this study ran them")
    assert ran["cost"][-1] == pytest.approx(6 * 0.25 + 2 * 0.75)
    ends = [run.last.score for run in grid().runs if run.last is not None]
    assert ran["expected"][0] == pytest.approx(mean(ends))
    (only,) = summarise(STUDIES["all in full"])["expected_best"]
    assert (only["name"], only["cost"]) == ("in full", [1, 2, 3, 4, 5, 6])
    assert [curve["name"] for curve in summarise(STUDIES["unfinished"])["expected_best"]] == ["stopped at the rung"]


def test_the_score_at_the_rung_is_that_of_its_step() -> None:
    found = grid()
    run = replace(found.runs[0], evaluations=(at(7, 0.9), at(10, 0.3), at(13, 0.8), at(40, 0.7)), state="finished")
    seen = summarise(replace(found, runs=(run, *found.runs[1:])))["runs"][0]
    assert (seen["rung"], seen["end"]) == (0.3, 0.7)
    early = replace(run, evaluations=(at(7, 0.9),), state="running")
    assert summarise(replace(found, runs=(early, *found.runs[1:])))["runs"][0]["rung"] is None
    assert summarise(replace(found, horizon=100, stop_at=0.07))["study"]["rungs"] == [7]  # 0.07 * 100 > 7


def test_asha_judges_more_than_once(tmp_path: Path) -> None:
    found = summarise(STUDIES["asha"])
    assert found["study"]["rungs"] == [10, 20]
    first = [run.evaluations[1].score for run in grid().runs]
    finished = [run.evaluations[2].score for run in grid().runs if run.state == "finished"]
    assert [run["rungs"][0] for run in found["runs"]] == first
    assert [run["rungs"][1] for run in found["runs"] if run["rungs"][1] is not None] == finished
    assert [one["mean"] for one in found["at_rungs"]] == pytest.approx([mean(first), mean(finished)])
    html, _, text = written(STUDIES["asha"], tmp_path)
    assert "Judged after 10 and 20 of 40 optimiser steps; one in 2 goes on, the best of those" in html
    assert "at step 20" in html
    assert f"At step 20: {mean(finished):.4f}" in html
    assert f"val_accuracy at step 20: {mean(finished):.4f}" in text
    strip = html[html.index('id="strip"') : html.index('id="curves"')]
    assert len(re.findall(r'class="run-\d+ mark ', strip)) == len(first) + 2 * len(finished)


def test_a_grid_is_shown_as_one_and_others_are_not() -> None:
    assert summarise(grid())["grid"] == {"inits": [0, 1, 2], "orders": [0, 1], "runs": [[0, 1], [2, 3], [4, 5]]}
    with_hole = study({(0, 0): 0.1, (0, 1): 0.2, (1, 0): 0.3})
    assert summarise(with_hole)["grid"] == {"inits": [0, 1], "orders": [0, 1], "runs": [[0, 1], [2, None]]}
    for name in ("paired", "a single run", "none begun"):
        assert summarise(STUDIES[name])["grid"] is None


def test_runs_come_best_first(tmp_path: Path) -> None:
    for found in (grid(), grid(mode="min")):
        rows = write_report(found, tmp_path).rows
        sign = -1 if found.mode == "max" else 1
        scores = [float(row["at rung"]) * sign for row in rows]
        assert rows[0]["run"] == found.chosen
        assert scores == sorted(scores)


def test_nothing_of_a_users_is_markup(tmp_path: Path) -> None:
    found = with_bad(grid(4, 3))
    runs = tuple(replace(run, reason=HOSTILE, worker=HOSTILE, init=HOSTILE) for run in found.runs)  # type: ignore[arg-type]
    settings = {
        HOSTILE: HOSTILE,
        "list": [HOSTILE],
        "nested": {HOSTILE: [1.0, float("nan"), HOSTILE]},
        "path": Path("/tmp"),
    }
    hostile = replace(found, name=HOSTILE, metric=HOSTILE, runs=runs, settings=settings)
    html, data, _ = written(hostile, tmp_path)
    page = Page(html)
    assert "<script" not in html
    assert "<b>" not in html
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert HOSTILE in " ".join(page.words)
    assert data["study"]["settings"]["nested"] == {HOSTILE: [1.0, None, HOSTILE]}


def test_the_page_forbids_itself_to_load_anything(tmp_path: Path) -> None:
    html, _, _ = written(grid(), tmp_path)
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    write_report(unfinished(grid()), tmp_path)
    write_report(grid(), tmp_path)
    assert "not finished" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_what_was_saved_reads_back(tmp_path: Path) -> None:
    found = with_bad(grid(4, 3))
    found.save(tmp_path / "study.json")
    read = SeedStudy.load(tmp_path / "study.json")
    assert summarise(read) == summarise(found)
    STUDIES["asha"].save(tmp_path / "asha.json")
    assert SeedStudy.load(tmp_path / "asha.json") == STUDIES["asha"]
