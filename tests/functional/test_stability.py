from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ft.functional.plot_stability import plot_stability
from lightning_ft.functional.stability import Finding, LabelCounts, StabilityRecord, Step, by_row, own_loss

GROUPS = ["embeddings", "block.0", "block.1", "head"]
RUNS = json.loads((Path(__file__).parent / "stability_runs.json").read_text())
"""Real runs of all-MiniLM-L6-v2, batch 16: losses, gradient norms every ten steps, examples predicted positive.

Healthy: AdamW, warm-up over 10 %, linear decay, η = 2e-4 (small rate: 2e-5), clipping at 1, 100 rows of SST-2 or 500 of
RTE. Failed: the same with a constant rate of 2e-3 or 2e-2 and no warm-up.
"""


def replay(run: dict[str, Any], record: StabilityRecord | None = None, begin: int = 1) -> StabilityRecord:
    """The record of a run, judged wherever it has norms as StabilityMonitor does."""
    record = record or StabilityRecord(["embeddings", *(f"block.{i}" for i in range(6)), "tail", "head"])
    total = len(run["losses"])
    for step in range(begin, total + 1):
        positive = run["positive"][step - 1]
        record.add(Step(step, run["losses"][step - 1], {1: positive, 0: 16 - positive}))
        if norms := run["norms"].get(str(step)):
            record.add_norms(step, norms)
            record.judge(step, due=step >= 0.5 * total, chance=math.log(2), commonest=0.55)
    return record


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("healthy")])
def test_healthy_runs_raise_no_alarm(name: str) -> None:
    assert replay(RUNS[name]).findings == []


@pytest.mark.parametrize(
    ("name", "first", "by"),
    [
        ("failed sst2, rate x 100", "vanishing gradients", 21),
        ("failed rte, rate x 100", "diverging", 15),
        ("failed sst2, rate x 10", "at chance", 55),
        ("failed rte, rate x 10", "at chance", 55),
    ],
)
def test_failed_runs_are_seen_early(name: str, first: str, by: int) -> None:
    findings = replay(RUNS[name]).findings
    assert findings[0].sign == first
    assert findings[0].step <= by


@pytest.mark.parametrize("name", RUNS)
def test_goes_on_from_its_state(name: str) -> None:
    half = {**RUNS[name], "losses": RUNS[name]["losses"][:37]}
    stopped = replay(half)
    resumed = StabilityRecord([])
    resumed.load(json.loads(json.dumps(stopped.state())))
    # JSON has neither integer keys nor tuples.
    resumed._losses = stopped._losses
    resumed._recent = stopped._recent
    found, expected = replay(RUNS[name], resumed, begin=38), replay(RUNS[name])
    # The half run was due earlier: only what was seen after it is compared.
    late = [one for one in expected.findings if one.step > 37 and one.sign not in {f.sign for f in stopped.findings}]
    assert [one for one in found.findings if one.step > 37] == late
    assert found.norms == expected.norms


def feed(
    record: StabilityRecord, losses: list[float], *, start: int = 1, predictions: dict[int, int] | None = None
) -> int:
    for step, loss in enumerate(losses, start):
        record.add(Step(step, loss, predictions or {0: 8, 1: 8}))
    return start + len(losses) - 1


def signs(found: list[Finding]) -> list[str]:
    return [finding.sign for finding in found]


def test_a_loss_that_is_not_a_number_is_told_with_its_step() -> None:
    record = StabilityRecord(GROUPS)
    last = feed(record, [0.7, 0.7, math.nan, 0.7])
    (finding,) = record.judge(last, due=False)
    assert (finding.sign, finding.since, finding.step) == ("non-finite", 3, 4)
    assert "gradient_clip_val" in str(finding)
    assert record.judge(last + 1, due=False) == []  # each sign once


def test_a_gradient_that_is_not_finite_is_none_of_ours_under_a_loss_scaler() -> None:
    def judge(scaled: bool) -> list[str]:
        record = StabilityRecord(GROUPS)
        feed(record, [0.7])
        record.add_norms(1, [1.0, math.inf, 1.0, 1.0])
        return signs(record.judge(1, due=False, scaled=scaled))

    assert judge(False) == ["non-finite"]
    assert judge(True) == []


def test_divergence_is_twice_chance() -> None:
    def judge(loss: float, chance: float | None) -> list[str]:
        record = StabilityRecord(GROUPS)
        return signs(record.judge(feed(record, [0.7] * 5 + [loss] * 10), due=False, chance=chance))

    assert judge(1.41, 0.7) == ["diverging"]
    assert judge(1.39, 0.7) == []
    assert judge(2.2, None) == ["diverging"]
    assert judge(2.0, None) == []


def test_what_was_learnt_and_lost_is_divergence() -> None:
    record = StabilityRecord(GROUPS)
    last = feed(record, [0.7] * 5 + [0.2] * 20)
    assert record.judge(last, due=False, chance=math.log(2)) == []
    last = feed(record, [0.69] * 15, start=last + 1)
    (finding,) = record.judge(last, due=False, chance=math.log(2))
    assert finding.sign == "diverging"
    assert finding.evidence["lowest before"] == pytest.approx(0.2)


def vanishing(rows: list[list[float | None]], loss: float = 0.7) -> list[str]:
    record = StabilityRecord(GROUPS)
    last = feed(record, [loss] * 20)
    for i, row in enumerate(rows):
        record.add_norms(i + 1, row)
    return signs(record.judge(last, due=False, chance=math.log(2)))


def test_norms_that_vanish_beside_the_heads() -> None:
    good, gone = [1.0, 1.0, 1.0, 2.0], [1e-9, 1e-6, 0.005, 2.0]
    assert vanishing([good, gone, gone, gone]) == ["vanishing gradients"]
    assert vanishing([good, gone, gone]) == ["vanishing gradients"]
    assert vanishing([good, good, gone]) == []
    assert vanishing([good, *[[1e-9, 1e-6, 0.02, 2.0]] * 3]) == []
    # All small together: it has fitted its data; or the loss falls.
    assert vanishing([good, *[[1e-3, 1e-3, 1e-3, 2e-3]] * 3]) == []
    assert vanishing([good, gone, gone, gone], loss=0.3) == []


def test_frozen_groups_do_not_vanish() -> None:
    frozen = [None, None, None, 2.0]
    assert vanishing([[1.0, 1.0, 1.0, 2.0], frozen, frozen, frozen]) == []
    # Thawed, they begin with norms of their own.
    thawed = [None, None, 0.02, 2.0]
    assert vanishing([frozen, thawed, thawed, thawed]) == []


def test_chance_is_judged_in_time_and_where_it_is_known() -> None:
    record = StabilityRecord(GROUPS)
    last = feed(record, [0.68] * 20)
    assert record.judge(last, due=False, chance=math.log(2)) == []
    assert record.judge(last, due=True) == []
    assert record.judge(last, due=True, chance=0.75) == []
    assert signs(record.judge(last, due=True, chance=math.log(2))) == ["at chance"]


@pytest.mark.parametrize(("loss", "commonest", "found"), [(0.65, 0.5, True), (0.65, 0.95, False), (0.3, 0.5, False)])
def test_constant_predictions(loss: float, commonest: float, found: bool) -> None:
    record = StabilityRecord(GROUPS)
    last = feed(record, [loss] * 20, predictions={1: 4})
    expected = ["constant predictions"] if found else []
    assert signs(record.judge(last, due=True, chance=math.log(2), commonest=commonest)) == expected


def test_keeps_a_bounded_table() -> None:
    record = StabilityRecord(GROUPS, points=10)
    for step in range(1, 101):
        record.add_norms(step, [float(step)] * 4)
    assert len(record.steps) <= 10
    assert record.steps[-1] == 100
    assert [row[0] for row in record.norms] == record.steps


def test_draws_the_norms_and_marks_the_signs(tmp_path: Path) -> None:
    plot_stability(replay(RUNS["failed sst2, rate x 100"]), tmp_path / "norms.png", title="failed")
    assert (tmp_path / "norms.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_stability(StabilityRecord(GROUPS), tmp_path / "no.png", title="")


def test_norms_of_nought_are_told_in_words(tmp_path: Path) -> None:
    record = StabilityRecord(GROUPS)
    record.add_norms(5, [0.0, math.inf, 0.0, None])
    plot_stability(record, tmp_path / "norms.svg", title="nothing learnt")
    assert "all norms are 0, or not finite" in (tmp_path / "norms.svg").read_text()


def labelled(*labels: Any) -> LabelCounts:
    counts = LabelCounts()
    counts.add(labels)
    return counts


@pytest.mark.parametrize(
    ("labels", "chance"),
    [
        ([0, 1, 2, 3], math.log(4)),
        ([0] * 9 + [1], 0.325083),
        ([0, 1, -100, -100], math.log(2)),
        ([1.0, 3.0, 5.0], 8 / 3),
        ([[0.0, 1.0], [1.0, 1.0]], math.log(2) / 2),
        ([1, 1], None),
        ([], None),
    ],
    ids=str,
)
def test_chance_is_the_loss_of_the_best_constant(labels: list[Any], chance: float | None) -> None:
    expected = None if chance is None else pytest.approx(chance, abs=1e-6)
    assert labelled(*labels).chance() == expected


def test_commonest_label() -> None:
    assert labelled(0, 0, 1).commonest() == pytest.approx(2 / 3)
    assert labelled(0.5).commonest() is None


def test_own_loss_is_the_standard_one() -> None:
    torch.manual_seed(0)
    logits, classes, numbers = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, -100, 0]), torch.randn(6)
    several = torch.randint(2, (6, 3)).float()
    assert own_loss(logits, classes) == pytest.approx(F.cross_entropy(logits, classes).item(), rel=1e-6)
    assert own_loss(logits, several) == F.binary_cross_entropy_with_logits(logits, several)
    assert own_loss(logits[:, :1], numbers) == F.mse_loss(logits[:, 0], numbers)
    assert own_loss(logits, classes + 40) is not None  # no class of these logits; on a GPU that must not stop it
    assert own_loss(logits, classes[:3]) is None
    assert own_loss(logits, numbers) is None
    assert own_loss(logits[:, :1], classes) is None
    assert own_loss(logits, several[:, :2]) is None


def test_scores_of_choices_are_put_side_by_side_and_nothing_else() -> None:
    torch.manual_seed(0)
    scores, right = torch.randn(6, 1), torch.tensor([2, 0])
    expected = F.cross_entropy(scores.view(2, 3), right).item()
    assert own_loss(by_row(scores, right), right) == pytest.approx(expected, rel=1e-6)
    others: list[tuple[Tensor, Tensor | None]] = [
        (scores, None),
        (scores, torch.zeros(6).long()),  # one logit for each label
        (scores[:5], right),  # no whole number of choices
        (scores, torch.zeros(0).long()),
        (scores, torch.zeros(2)),
        (scores, torch.zeros(2, 1)),
        (torch.randn(6, 2), right),
    ]
    for logits, labels in others:
        assert by_row(logits, labels) is logits
