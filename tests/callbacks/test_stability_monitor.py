from __future__ import annotations

import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_ft.callbacks import GradualUnfreezing
from lightning_ft.callbacks.stability_monitor import StabilityMonitor
from lightning_ft.functional.stability import StabilityRecord
from tests.ranks import run_ranks
from tests.strangers import FILTERED, STILL, Filtered, Late, Stranger, identical, outcome


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pictures go."""
    monkeypatch.chdir(tmp_path)


class Steep(Filtered):
    """Its learning rate is far too high."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1.0)


class Blind(Filtered):
    """Its head sees nothing of the text."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(0 * self.encoder(tokens)[:, 0])


class Breaks(Filtered):
    """Its loss is nan from the fourth batch of an epoch on."""

    begins = 3

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (math.nan if batch_idx >= self.begins else 1.0)


class Mapped(Filtered):
    """Its batches are mappings; it does not weigh classes alike, or it does."""

    weight: Tensor | None = None

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> Any:
        return {"tokens": batch[0], "labels": batch[1]}

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["tokens"]), batch["labels"], weight=self.weight)


class Chooses(Filtered):
    """Gives each of two choices a score: whether a text's first token is even, or odd."""

    sees = 1

    def __init__(self) -> None:
        super().__init__()
        self.classifier = torch.nn.Linear(self.classifier.in_features, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        choices = torch.stack([torch.cat([torch.full_like(tokens[:, :1], k), tokens], 1) for k in (0, 1)], 1)
        return self.classifier(self.sees * self.encoder(choices.flatten(0, 1)).mean(1)).view(-1, 2)


class ChoosesBlindly(Chooses):
    """Sees nothing of texts and choices."""

    sees = 0


class Norms(Callback):
    """The norms of all groups at each step, one parameter at a time."""

    def __init__(self, monitor: StabilityMonitor) -> None:
        self.monitor = monitor
        self.rows: list[list[float | None]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        groups = self.monitor.layers.of(pl_module)
        scale = trainer.precision_plugin.scaler.get_scale() if trainer.precision_plugin.precision != "32-true" else 1
        self.rows.append([])
        for name in groups:
            grads = [p.grad for p in groups.parameters(name) if p.grad is not None]
            total = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads)) / scale
            self.rows[-1].append(total if grads else None)


@pytest.mark.parametrize("frozen", [False, True])
def test_norms_are_those_of_the_whole_step(frozen: bool) -> None:
    monitor = StabilityMonitor("1 steps")
    others = [GradualUnfreezing("1 steps")] if frozen else []
    FILTERED.fit(*others, monitor, norms := Norms(monitor), accumulate_grad_batches=2)
    assert len(norms.rows) == 6
    assert any(None in row for row in norms.rows) is frozen
    for found, expected in zip(monitor._record.norms, norms.rows, strict=True):
        assert found == [None if value is None else pytest.approx(value, rel=1e-4) for value in expected]
    assert monitor._record.steps == [1, 2, 3, 4, 5, 6]
    assert monitor.findings == []


def test_norms_are_unscaled_where_a_fused_optimiser_has_not_yet() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = StabilityMonitor("1 steps")
    late = Stranger("late", Late)
    late.fit(monitor, norms := Norms(monitor), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    for found, expected in zip(monitor._record.norms, norms.rows, strict=True):
        assert found == [pytest.approx(value, rel=1e-3) for value in expected]


def test_losses_are_those_that_were_returned() -> None:
    plain, halved = StabilityMonitor("1 steps", labels=1), StabilityMonitor("1 steps", labels=1)
    STILL.fit(plain, max_epochs=1, limit_train_batches=2)
    STILL.fit(halved, max_epochs=1, limit_train_batches=2, accumulate_grad_batches=2)
    first = [one.loss for one in plain._record._losses]
    (both,) = halved._record._losses
    assert both.loss == pytest.approx(first[0] / 2 + first[1] / 2, rel=0.1)
    assert both.loss > 0.4  # not half of it
    assert sum(both.predictions.values()) == 8


@pytest.mark.filterwarnings("ignore:StabilityMonitor")
def test_a_rate_far_too_high_is_seen_early_and_stopped() -> None:
    trainer = Stranger("steep", Steep).fit(monitor := StabilityMonitor("5 steps", labels=1, stop=True), max_epochs=20)
    (finding,) = monitor.findings
    assert finding.sign in ("vanishing gradients", "diverging")
    assert finding.step == trainer.global_step <= 21  # of 120
    assert trainer.callback_metrics["stability/findings"] == 1


def test_a_healthy_run_raises_no_alarm() -> None:
    FILTERED.fit(monitor := StabilityMonitor("5 steps", labels=1), max_epochs=20)
    assert monitor.findings == []
    assert monitor._agrees


def test_a_head_that_learns_nothing_is_told_in_words() -> None:
    blind = Stranger("blind", Blind)
    with pytest.warns(UserWarning, match="StabilityMonitor: .* since step .* Try: a lower learning rate") as told:
        blind.fit(monitor := StabilityMonitor("5 steps", labels=1), max_epochs=20)
    assert {finding.sign for finding in monitor.findings} == {"at chance", "constant predictions"}
    assert sum("StabilityMonitor" in str(warning.message) for warning in told) == 2
    assert "constant predictions: since step" in str(monitor.report())
    assert all(0.5 * 120 <= finding.step <= 80 for finding in monitor.findings)


@pytest.mark.filterwarnings("ignore:StabilityMonitor")
@pytest.mark.parametrize("kind", [Chooses, ChoosesBlindly])
def test_chance_is_known_of_a_head_that_scores_choices(kind: type[Chooses]) -> None:
    Stranger("chooses", kind).fit(monitor := StabilityMonitor("5 steps", labels=1), max_epochs=20)
    assert monitor._agrees
    assert {finding.sign for finding in monitor.findings} == (
        {"at chance", "constant predictions"} if kind is ChoosesBlindly else set()
    )


def test_a_loss_that_is_not_a_number_is_told() -> None:
    with pytest.warns(UserWarning, match="non-finite since step 4 "):
        trainer = Stranger("breaks", Breaks).fit(StabilityMonitor("2 steps", stop=True))
    assert trainer.global_step == 5


@pytest.mark.parametrize("weight", [None, [1.0, 30.0]])
def test_labels_are_found_and_the_loss_is_checked(weight: list[float] | None) -> None:
    module = Mapped()
    module.weight = None if weight is None else torch.tensor(weight)
    Stranger("mapped", Mapped).fit(monitor := StabilityMonitor("2 steps"), module=module)
    assert monitor._labelled.chance() == pytest.approx(0.68, abs=0.01)
    assert monitor._agrees is (weight is None)


@pytest.mark.parametrize("fit", ["plain", "accumulated"])
def test_resumes_with_its_windows(fit: str, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2} if fit == "accumulated" else {}

    def monitor() -> StabilityMonitor:
        return StabilityMonitor("4 steps", patience=0.95, labels=1)

    FILTERED.fit(whole := monitor(), max_epochs=4, **options)
    first = FILTERED.fit(monitor(), max_epochs=2, **options)
    first.save_checkpoint(tmp_path / "half.ckpt")
    FILTERED.fit(rest := monitor(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt", **options)
    assert rest._record.steps == whole._record.steps
    assert len(rest._record._losses) == len(whole._record._losses) == (12 if options else 20)
    assert rest._record._first == whole._record._first
    assert rest._labelled.classes == whole._labelled.classes


@pytest.mark.filterwarnings("ignore:StabilityMonitor")
def test_touches_nothing_of_the_training() -> None:
    for make in (FILTERED.module, Late):
        stranger = Stranger("any", make)
        assert identical(outcome(stranger.fit(StabilityMonitor("1 steps", labels=1))), outcome(stranger.fit()))


def test_logs_and_draws(tmp_path: Path) -> None:
    FILTERED.fit(
        StabilityMonitor("3 steps", path=tmp_path / "norms.svg"),
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    (log,) = tmp_path.rglob("metrics.csv")
    assert "stability/grad_norm/block.2" in log.read_text()
    assert (tmp_path / "norms.svg").read_text().startswith("<?xml")


def ranks() -> Any:
    """What rank 0 sees stops both."""
    warnings.filterwarnings("ignore", message="StabilityMonitor")
    monitor = StabilityMonitor("1 steps", stop=True)
    if os.environ["RANK"] == "1":
        StabilityRecord.judge = lambda *args, **options: []  # type: ignore[method-assign]
    strategy = DDPStrategy(process_group_backend="gloo")
    module = Breaks()
    module.begins = 1
    options = {"strategy": strategy, "devices": 2, "limit_val_batches": 0, "default_root_dir": tempfile.mkdtemp()}
    trainer = FILTERED.fit(monitor, module=module, max_epochs=4, **options)
    return {"step": trainer.global_step, "signs": [f.sign for f in monitor.findings]}


@pytest.mark.slow  # two processes
def test_ranks_stop_together(tmp_path: Path) -> None:
    one, other = run_ranks("tests.callbacks.test_stability_monitor:ranks", tmp_path)
    assert one["step"] == other["step"] == 2
    assert (one["signs"], other["signs"]) == (["non-finite"], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 10}, "every=10 has no unit"),
        ({"patience": 1.5}, "patience=1.5 is not a stretch"),
        ({"chance_loss": 0.0}, "chance_loss=0.0 must be above 0"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StabilityMonitor(**arguments)


def test_refuses_labels_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="labels='verdict' is not in the batches"):
        FILTERED.fit(StabilityMonitor(labels="verdict"))
