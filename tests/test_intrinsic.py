"""The search for d90: of trainings with known scores, of a real configuration, and from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ft.intrinsic import command, search_dimension
from tests.test_cli import project

__all__ = ["project"]


class Training:
    """Reaches s(d) = 0.8 d / (d + 20): nine tenths of 0.8 from d = 180 on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[int | None] = []
        self.fails_at = fails_at

    def __call__(self, dimension: int | None) -> float:
        if dimension == self.fails_at is not None:
            raise KeyboardInterrupt
        self.asked.append(dimension)
        return 0.8 if dimension is None else 0.8 * dimension / (dimension + 20)


def test_finds_the_smallest_dimension_that_reaches_the_target(tmp_path: Path) -> None:
    train, said = Training(), []
    report = search_dimension(train, tmp_path, dims=[1000, 10, 100, 100], progress=said.append)
    assert train.asked == [None, 10, 100, 1000]
    assert report.facts == {"d90": 1000, "target": pytest.approx(0.72), "full": 0.8}
    assert [(row["dimension"], row["reaches"]) for row in report.rows] == [
        *(("10", False), ("100", False), ("1000", True), ("full", True)),
    ]
    assert said[:3] == ["training in full", "full: 0.8", "training in 10 dimensions"]
    assert (tmp_path / "search.png").stat().st_size > 1000


def test_halves_the_interval_on_a_logarithmic_scale(tmp_path: Path) -> None:
    train = Training()
    report = search_dimension(train, tmp_path, dims=[10, 1000], refine=4)
    # √(10·1000) = 100, √(100·1000) = 316, √(100·316) = 178, √(178·316) = 237.
    assert train.asked == [None, 10, 1000, 100, 316, 178, 237]
    assert report.facts["d90"] == 237
    # As far as whole numbers go.
    search_dimension(train, tmp_path, dims=[10, 1000], refine=40)
    assert min(d for d in train.asked if d is not None and d >= 180) == 180
    assert len(train.asked) < 20


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search_dimension(first := Training(fails_at=100), tmp_path, dims=[10, 100, 1000], told={"metric": "val_f1"})
    assert first.asked == [None, 10]
    assert json.loads((tmp_path / "search.json").read_text())["scores"].keys() == {"full", "10"}
    search_dimension(second := Training(), tmp_path, dims=[10, 100, 1000], told={"metric": "val_f1"})
    assert second.asked == [100, 1000]
    with pytest.raises(ValueError, match=r"is of another search, with .*val_f1.* where this one has .*val_accuracy"):
        search_dimension(Training(), tmp_path, dims=[10], told={"metric": "val_accuracy"})


def test_tells_where_nothing_reaches_the_target(tmp_path: Path) -> None:
    report = search_dimension(Training(), tmp_path, dims=[10, 20], share=0.95, refine=3)
    assert report.facts["d95"] is None
    assert [row["dimension"] for row in report.rows] == ["10", "20", "full"]
    everything = search_dimension(lambda d: 0.5, tmp_path / "all", dims=[10, 20], refine=3)
    assert everything.facts["d90"] == 10


def test_a_training_that_went_astray_reaches_nothing(tmp_path: Path) -> None:
    scores = {None: 0.5, 10: math.nan, 20: 0.5}
    assert search_dimension(scores.__getitem__, tmp_path, dims=[10, 20]).facts["d90"] == 20
    assert search_dimension(scores.__getitem__, tmp_path, dims=[10, 20]).facts["d90"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": []}, r"dims=\[\] must be whole numbers of 1 or more"),
        ({"dims": [0]}, r"dims=\[0\] must be whole numbers of 1 or more"),
        ({"dims": [1], "share": 0.0}, r"share=0.0 must lie in \(0, 1\]"),
        ({"dims": [1], "refine": -1}, r"refine=-1 must be 0 or more"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        search_dimension(Training(), tmp_path, **arguments)


def test_refuses_a_score_of_which_there_is_no_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"full fine-tuning scores -0.1"):
        search_dimension(lambda d: -0.1, tmp_path, dims=[10])


@pytest.fixture
def configured(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One epoch without callbacks."""
    settings = yaml.safe_load((project / "config.yaml").read_text())
    settings["trainer"] |= {"callbacks": [], "max_epochs": 1, "val_check_interval": 1.0}
    (project / "plain.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(project)
    return project


# What Lightning and jsonargparse say of each other's older spellings is no concern of this.
@pytest.mark.filterwarnings("ignore")
def test_the_command_trains_as_the_configuration_says(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["search", "--config", "plain.yaml", "--dims", "60,200", "--rate", "0.1", "--out", "runs/search"]
    command(line)
    output = capsys.readouterr()
    assert "Intrinsic dimension: runs/search" in output.out
    assert "training in 60 dimensions" in output.err
    notes = json.loads((configured / "runs" / "search" / "search.json").read_text())
    assert notes["scores"].keys() == {"full", "60", "200"}
    runs = configured / "runs" / "search" / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["d_200", "d_60", "full"]

    # All that was done is known. A run whose score was lost is not trained again, but asked.
    del notes["scores"]["60"]
    (configured / "runs" / "search" / "search.json").write_text(json.dumps(notes))
    command(line)
    again = json.loads((configured / "runs" / "search" / "search.json").read_text())
    assert again["scores"].keys() == {"full", "60", "200"}
    assert [path.name for path in (runs / "d_60").iterdir()] == ["run_0"]
    with pytest.raises(SystemExit):
        command(["search", "--config", "plain.yaml", "--dims", "ten"])
    assert "write whole numbers with commas" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"metric='val_f7' is not logged in validation; logged are: .*val_accuracy"):
        command([*line[:-1], "runs/other", "--metric", "val_f7"])
