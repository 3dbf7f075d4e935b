from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import lightning_ft.callbacks.memory_report as file
from lightning_ft.callbacks import L2SP, Freeze, Mixout
from lightning_ft.callbacks.activation_checkpointing import ActivationCheckpointing
from lightning_ft.callbacks.memory_report import MemoryReport
from lightning_ft.plugins.fp16 import FP16
from tests.callbacks.test_exact_resume import Kill, Killed
from tests.strangers import FILTERED, STRANGERS, Filtered, Stranger, identical, outcome

each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


def rows(callback: MemoryReport) -> dict[str, dict[str, Any]]:
    assert callback.report is not None
    return {row["part"]: row for row in callback.report.rows}


@each_stranger
def test_what_it_predicts_is_what_it_measures_and_nothing_changes(stranger: Stranger) -> None:
    """The parts that tensors tell, to the byte; batches are of one size here, and have no padding."""
    callback = MemoryReport()
    trainer = stranger.fit(callback)
    assert identical(outcome(trainer), outcome(stranger.fit()))
    table = rows(callback)
    for part in ("weights", "gradients", "optimiser", "activations"):
        if stranger.name == "manual":
            assert table[part]["predicted"] is None
        else:
            assert table[part]["predicted"] == table[part]["measured"] > 0
    module = trainer.lightning_module
    assert table["weights"]["measured"] == sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    assert table["gradients"]["measured"] == sum(p.nbytes for p in module.parameters())
    assert callback.report is not None
    assert ("not predicted" in callback.report.facts) == (stranger.name == "manual")


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [
        ([Freeze(["top:1", "tail", "head"])], {}),
        ([ActivationCheckpointing()], {}),
        ([Mixout(0.5), L2SP(0.1)], {}),
        ([], {"accumulate_grad_batches": 2}),
        ([], {"precision": "bf16-mixed"}),
        ([], {"precision": "bf16-true", "limit_val_batches": 0}),
        ([], {"plugins": [FP16(1024.0)]}),
    ],
    ids=["freeze", "checkpointing", "mixout", "accumulation", "bf16-mixed", "bf16-true", "fp16"],
)
def test_beside_other_callbacks_and_precisions(callbacks: Any, options: Any) -> None:
    """They stand in the module when the prediction is made."""
    callback = MemoryReport()
    FILTERED.fit(*callbacks, callback, **options)
    table = rows(callback)
    for part in ("weights", "gradients", "optimiser"):
        assert table[part]["predicted"] == table[part]["measured"] > 0
    assert table["activations"]["predicted"] == pytest.approx(table["activations"]["measured"], rel=0.1)


MESSAGE = (
    r"a training step of this batch will take .* GiB, and 1e-05 are there. Most of it are activations \(.* GiB\). "
    r"Of the peak, ActivationCheckpointing saves \d+.* %, half the batch"
)


def test_speaks_up_before_the_first_step() -> None:
    class Steps(Filtered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if type(batch[0]) is Tensor:
                taken.append(batch_idx)
            return self.loss(batch)

    taken: list[int] = []
    with pytest.raises(MemoryError, match=MESSAGE):
        FILTERED.fit(MemoryReport(limit=1e-5, strict=True), module=Steps())
    assert taken == []
    with pytest.warns(UserWarning, match=MESSAGE):
        FILTERED.fit(MemoryReport(limit=1e-5), max_epochs=1)


def test_the_limit_is_what_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    read = file._proc
    monkeypatch.setattr(file, "_proc", lambda path, name: 1 if name == "MemAvailable" else read(path, name))
    with pytest.raises(MemoryError, match="ActivationCheckpointing saves"):
        FILTERED.fit(MemoryReport(strict=True))
    monkeypatch.setattr(file, "_proc", lambda path, name: None)
    callback = MemoryReport(strict=True)
    FILTERED.fit(callback)
    assert callback.report is not None
    assert callback.report.facts["measured peak GiB"] == "unknown"
    assert rows(callback)["workspace"]["measured"] is None


@pytest.mark.skipif(file._proc(Path("/proc/self/status"), "VmHWM") is None, reason="needs Linux's /proc")
def test_the_peak_of_a_process_is_measured(tmp_path: Path) -> None:
    class Greedy(Filtered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if type(batch[0]) is Tensor:
                torch.ones(1 << 25)  # 128 MiB
            return self.loss(batch)

    callback = MemoryReport()
    FILTERED.fit(callback, module=Greedy(), logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1)
    assert callback.report is not None
    assert callback.report.facts["measured peak GiB"] == pytest.approx(0.125, rel=0.25)
    assert rows(callback)["workspace"]["measured"] == pytest.approx(1 << 27, rel=0.25)
    assert "memory/peak_gib" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_measures_alone_and_at_the_end_of_a_short_run() -> None:
    callback = MemoryReport(99, predict=False)
    FILTERED.fit(callback, max_epochs=1)
    assert rows(callback)["activations"]["predicted"] is None
    assert rows(callback)["optimiser"]["measured"] > 0
    assert callback.report is not None
    assert "not predicted" not in callback.report.facts


def test_passes_that_follow_each_other_do_not_add_up() -> None:
    class Passes(Filtered):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.automatic_optimization, self.count = False, count

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            for _ in range(self.count):
                self.manual_backward(self.loss(batch))
            self.optimizers().step()

    kept = []
    for count in (1, 3):
        FILTERED.fit(callback := MemoryReport(), module=Passes(count))
        kept.append(rows(callback)["activations"]["measured"])
    assert kept[0] == kept[1]


def test_leaves_nothing_after_an_exception_and_measures_anew() -> None:
    callback = MemoryReport()
    with pytest.raises(Killed):
        FILTERED.fit(callback, Kill("on_before_zero_grad", 0, 0))
    # A hook that was left would keep what comes now.
    kept = len(callback._saved)
    torch.ones(2, requires_grad=True).exp().sum().backward()
    FILTERED.fit(callback)
    assert kept <= 1
    first = callback.report
    FILTERED.fit(callback, module=Filtered(dropout=0))
    assert callback.report is not first


def test_is_kept_plain_in_checkpoints(tmp_path: Path) -> None:
    callback = MemoryReport()
    FILTERED.fit(callback, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    FILTERED.fit(MemoryReport(), ckpt_path=tmp_path / "a.ckpt")
    torch.save(callback.state_dict(), io.BytesIO())
    assert callback.report is not None
    assert math.isfinite(callback.report.facts["predicted peak GiB"])
    assert callback.report.to_json()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="steps=1 must be 2 or more"):
        MemoryReport(1)
    with pytest.raises(ValueError, match="limit=0 must be above 0 GiB"):
        MemoryReport(limit=0)
