"""The picture of a training: what it recorded, beside what the callbacks did; and what was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_ft.callbacks import DiscriminativeLR, ExactResume, GradualUnfreezing, LayerTimeline
from lightning_ft.core import LayerGroups, Phase, Timeline, step_cost
from lightning_ft.functional import plot_timeline
from tests.strangers import FILTERED, STRANGERS, Stranger
from tests.tiny import BERT, tiny

PNG = b"\x89PNG"


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_records_what_trained_and_draws_it(stranger: Stranger, tmp_path: Path) -> None:
    seen = LayerTimeline(tmp_path / "layers.png")
    trainer = stranger.fit(GradualUnfreezing("2 steps"), seen, max_epochs=2)
    timeline = seen.timeline
    assert timeline is not None
    assert timeline.steps == list(range(trainer.global_step))
    assert [len(rates) for rates in timeline.rates] == [min(2 + step // 2, 6) for step in timeline.steps]
    assert timeline.changes() == [step for step in range(0, 10, 2) if step < trainer.global_step]
    assert (tmp_path / "layers.png").read_bytes().startswith(PNG)


def test_rates_are_those_of_the_step(tmp_path: Path) -> None:
    """After the scheduler, the depth's factor and the phase's, whichever callback is listed first."""
    phases = [Phase("head"), Phase("all", at="4 steps", lr=0.5)]
    for order in (1, -1):
        callbacks: list[Callback] = [
            LayerTimeline(tmp_path / "layers.svg"),
            DiscriminativeLR(0.5),
            GradualUnfreezing(phases=phases),
        ]
        FILTERED.fit(*callbacks[::order], max_epochs=1)
        timeline = next(c.timeline for c in callbacks if isinstance(c, LayerTimeline))
        assert timeline is not None
        own = [1e-2 / (1 + 0.1 * step) for step in range(6)]
        assert [rates["head"] for rates in timeline.rates] == pytest.approx([*own[:4], own[4] / 2, own[5] / 2])
        assert [rates.get("block.0") for rates in timeline.rates[:4]] == [None] * 4
        assert timeline.rates[4]["block.0"] == pytest.approx(own[4] / 2 * 0.5**3)


def test_a_resumed_run_has_the_whole_picture(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            ExactResume("1 steps", dirpath=tmp_path),
            GradualUnfreezing("2 steps"),
            LayerTimeline(tmp_path / "a.png"),
        ]

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("stop")

    whole = callbacks()
    FILTERED.fit(*whole, max_epochs=2)
    with pytest.raises(RuntimeError, match="stop"):
        FILTERED.fit(*callbacks(), Stop(), max_epochs=2)
    assert (tmp_path / "a.png").exists()  # of what there was
    resumed = callbacks()
    FILTERED.fit(*resumed, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert vars(resumed[-1].timeline) == vars(whole[-1].timeline)


def test_long_trainings_are_thinned_but_not_their_phases() -> None:
    timeline = Timeline(["body", "head"])
    for step in range(1000):
        timeline.note(step, {"head": 1.0, **({"body": 0.1} if step >= 777 else {})})
        timeline.thin(40)
    assert len(timeline.steps) <= 40
    assert timeline.changes() == [0, 777]
    assert timeline.end == 1000
    timeline.clip(800)
    assert (max(timeline.steps) < 800, timeline.end) == (True, 800)
    with pytest.raises(ValueError, match=r"step=3 must come after step"):
        timeline.note(3, {})


def test_cost_of_a_step_by_hand() -> None:
    groups = LayerGroups.of(tiny("bert"))
    work = {name: sum(p.numel() for p in groups.parameters(name) if p.ndim > 1) for name in groups}
    work["embeddings"] = 0
    total = sum(work.values())
    top = f"block.{BERT['num_hidden_layers'] - 1}"
    above = work[top] + work.get("tail", 0) + work["head"]
    assert step_cost(groups, list(groups)) == pytest.approx(1)
    assert step_cost(groups, [top, "tail", "head"]) == pytest.approx((total + 2 * above) / (3 * total))
    # A lower block alone: the gradient runs down to it, through layers that do not train.
    assert step_cost(groups, ["block.0"]) == pytest.approx((2 * total + work["block.0"]) / (3 * total))


@pytest.mark.parametrize(
    ("path", "steps", "message"),
    [("a.png", 0, "nothing was planned or trained"), ("a.docx", 1, r"must end in .png, .svg or .pdf")],
)
def test_pictures_that_cannot_be(path: str, steps: int, message: str, tmp_path: Path) -> None:
    timeline = Timeline(["head"])
    if steps:
        timeline.note(0, {"head": 1.0})
    with pytest.raises(ValueError, match=message):
        plot_timeline(timeline, tmp_path / path, title="t")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_draws_nothing(tmp_path: Path) -> None:
    FILTERED.fit(LayerTimeline(tmp_path / "layers.png"), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_points_must_be_two_or_more() -> None:
    with pytest.raises(ValueError, match="points=1 must be 2 or more"):
        LayerTimeline(points=1)
