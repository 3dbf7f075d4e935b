"""The report's page in a real browser: nothing missing, nothing loaded, nothing outside its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.report import write_report
from tests.seeds.browser import Page, browser
from tests.seeds.studies import grid
from tests.seeds.test_report import STUDIES

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "docs" / "seeds"
MARKS = "path, circle, rect, polygon"

# Of each figure: its id, the size of its drawing, how many marks with an area or a length it has, and its words that
# lie outside of the window.
FIGURES = f"""[...document.querySelectorAll("figure")].map(figure => {{
  const drawing = figure.querySelector("svg"), size = drawing && drawing.getBBox();
  const marks = drawing ? [...drawing.querySelectorAll("{MARKS}")] : [];
  const boxes = marks.map(mark => mark.getBBox()).filter(box => box.width > 0 || box.height > 0);
  const outside = [...figure.querySelectorAll("svg text")].filter(text => {{
    const box = text.getBoundingClientRect();
    return box.left < 0 || box.right > document.documentElement.clientWidth;
  }});
  return {{name: figure.id, drawn: !!drawing, width: size && size.width, height: size && size.height,
           marks: boxes.length, outside: outside.map(text => text.textContent),
           label: drawing && drawing.getAttribute("aria-label"),
           caption: figure.querySelector("figcaption").innerText}};
}})"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as one:
        yield one


def check(page: Page, file: Path, folder: Path) -> dict[str, int]:
    """Look at a page in all its looks; the marks of each figure that has any."""
    marks = {}
    for width in (1280, 800, 390):
        for dark in (False, True):
            page.open(file, width=width, dark=dark)
            assert page.errors() == []
            assert page.requests() == [file.resolve().as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            for figure in page.evaluate(FIGURES):
                assert figure["caption"]
                if figure["drawn"]:
                    assert figure["width"] > 100
                    assert figure["height"] > 50
                    assert figure["label"]
                    assert figure["outside"] == []
                    marks[figure["name"]] = figure["marks"]
            shot = folder / f"{width}-{'dark' if dark else 'light'}.png"
            page.screenshot(shot)
            assert shot.stat().st_size > 30_000  # a blank page has about a tenth of it
    return marks


def test_the_example_shows_all_its_figures(page: Page, tmp_path: Path) -> None:
    marks = check(page, EXAMPLE / "report.html", tmp_path)
    runs = len(SeedStudy.load(EXAMPLE / "study.json").runs)
    assert marks.keys() == {"strip", "curves", "grid", "best", "variance", "cost"}
    assert marks["strip"] > runs
    assert marks["curves"] > 2 * runs
    assert marks["grid"] >= runs
    assert marks["best"] > 2 * runs
    assert marks["variance"] == 6
    assert marks["cost"] == 3


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_shown(name: str, page: Page, tmp_path: Path) -> None:
    write_report(STUDIES[name], tmp_path)
    marks = check(page, tmp_path / "report.html", tmp_path)
    assert all(count >= 2 for count in marks.values())
    assert ("cost" in marks) == (name != "none begun")


def test_dark_and_light_differ_and_both_can_be_read(page: Page, tmp_path: Path) -> None:
    write_report(grid(), tmp_path)
    seen = {}
    for dark in (False, True):
        page.open(tmp_path / "report.html", dark=dark)
        style = 'getComputedStyle(document.querySelector("{}")).{}'
        colours = [
            ("body", "color"),
            ("body", "backgroundColor"),
            ("figcaption", "color"),
            ("figure", "backgroundColor"),
        ]
        seen[dark] = [page.evaluate(style.format(*one)) for one in colours]
        text, ground, caption, card = map(luminance, seen[dark])
        for one, other in ((text, ground), (caption, card)):
            assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5  # WCAG's contrast
    assert not set(seen[False]) & set(seen[True])


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_run_that_is_pointed_at_stands_out_everywhere(page: Page, tmp_path: Path) -> None:
    write_report(grid(), tmp_path)
    page.open(tmp_path / "report.html")
    opacity = 'getComputedStyle(document.querySelector("#curves .run-{}.curve")).opacity'
    before = page.evaluate(opacity.format(3))
    page.point_at("tr.run-2 td")
    assert float(page.evaluate(opacity.format(3))) < 0.2 < float(before)
    assert float(page.evaluate(opacity.format(2))) == float(before)


def test_the_example_is_what_its_study_gives(tmp_path: Path) -> None:
    write_report(SeedStudy.load(EXAMPLE / "study.json"), tmp_path)
    fresh = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert fresh == (EXAMPLE / "report.html").read_text(encoding="utf-8")
