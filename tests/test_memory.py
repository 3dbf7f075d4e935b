"""What the memory of a training is told to be, before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_ft.callbacks import ExactResume, Freeze, GradualUnfreezing
from lightning_ft.callbacks.memory_report import MemoryReport
from lightning_ft.memory import memory
from tests.strangers import FILTERED, STRANGERS, Stranger, identical, weights

PROJECTS = [stranger for stranger in STRANGERS if stranger.name != "manual"]


@pytest.mark.parametrize("stranger", PROJECTS, ids=lambda stranger: stranger.name)
def test_tells_what_the_fit_will_measure_and_makes_no_step(stranger: Stranger, tmp_path: Path) -> None:
    module = stranger.module()
    exact = ExactResume("1 steps", dirpath=tmp_path / "saved")
    trainer = stranger.trainer([exact], default_root_dir=tmp_path, logger=CSVLogger(tmp_path / "logs"))
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    (report,) = memory(trainer, module)
    assert trainer.global_step == 0
    assert identical(weights(module), weights(stranger.fit(max_epochs=0).lightning_module))
    assert (trainer.callbacks, trainer.loggers) == (callbacks, loggers)
    assert not (tmp_path / "saved" / "last.ckpt").exists()
    assert not list(tmp_path.rglob("metrics.csv"))

    callback = MemoryReport()
    stranger.fit(callback)
    assert callback.report is not None
    measured = {row["part"]: row["measured"] for row in callback.report.rows if row["part"] != "workspace"}
    assert {row["part"]: row["bytes"] for row in report.rows if row["part"] != "workspace"} == measured


def test_counts_what_is_frozen_and_what_will_thaw() -> None:
    (whole,) = memory(FILTERED.trainer(), FILTERED.module())
    (frozen,) = memory(FILTERED.trainer([Freeze(["top:1", "tail", "head"])]), FILTERED.module())
    assert frozen.facts["peak bytes"] < 0.6 * whole.facts["peak bytes"]
    module = FILTERED.module()
    now, later = memory(FILTERED.trainer([GradualUnfreezing("1 epoch")]), module)
    assert now.facts["peak bytes"] < 0.5 * later.facts["peak bytes"]
    assert later.rows == whole.rows
    assert later.title == "Memory of a training step, once all has thawed"


def test_goes_on_to_the_fit() -> None:
    trainer = FILTERED.trainer()
    module = FILTERED.module()
    memory(trainer, module)
    torch.manual_seed(0)
    trainer.fit(module)
    assert identical(weights(module), weights(FILTERED.fit().lightning_module))


def test_refusals() -> None:
    manual: Any = next(stranger for stranger in STRANGERS if stranger.name == "manual")
    with pytest.raises(ValueError, match="step= is needed: Manual optimises by hand"):
        memory(manual.trainer(), manual.module())
    with pytest.raises(ValueError, match="needs a training batch"):
        memory(FILTERED.trainer(limit_train_batches=0), FILTERED.module())
