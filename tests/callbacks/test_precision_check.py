from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_ft.callbacks.precision_check import PrecisionCheck
from lightning_ft.core.layers import Layers
from tests.strangers import FILTERED, STRANGERS, Filtered, Stranger, identical, outcome, weights

GROUPS = ["embeddings", "block.0", "block.1", "block.2", "tail", "head"]


class Rate(Filtered):
    def __init__(self, rate: float, optimizer: Any = torch.optim.AdamW, warmup: int = 0, **settings: Any) -> None:
        super().__init__(dropout=0)
        self.rate, self.optimizer, self.warmup, self.settings = rate, optimizer, warmup, settings

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=self.rate, **self.settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / (self.warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Every(Callback):
    """All values and gradients at each step, for an oracle that looks at every value."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []
        self.moved: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.moved.append({name: p.grad != 0 for name, p in pl_module.named_parameters()})
        self.values.append(weights(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(weights(pl_module))

    def share(self, steps: slice) -> float:
        pairs = list(zip(self.values, self.values[1:], self.moved, strict=False))[steps]
        lost = sum(int((moved[n] & (a[n] == b[n])).sum()) for a, b, moved in pairs for n in moved)
        return lost / sum(int(m.sum()) for *_, moved in pairs for m in moved.values())


@pytest.mark.parametrize("rate", [1e-2, 3e-4, 2e-5])
def test_counts_the_updates_that_bf16_loses(rate: float) -> None:
    every, callback = Every(), PrecisionCheck(4, 1.0)
    FILTERED.fit(every, callback, module=Rate(rate), precision="bf16-true", max_epochs=1)
    assert callback.report is not None
    assert callback.report.facts["optimiser steps looked at"] == 4
    assert callback.report.facts["lost"] == pytest.approx(every.share(slice(0, 4)))
    assert [row["layer"] for row in callback.report.rows] == GROUPS
    # A norm's weights are one, where a unit in the last place is 2^-7: AdamW's step is the rate.
    tail = callback.report.rows[4]["lost"]
    assert tail > 0.4 if rate < 2**-9 else tail < 0.6


def test_warns_with_the_layer_and_the_remedy() -> None:
    message = (
        r"9\d% of the updates .* torch.bfloat16 weights and are lost \(most in .*: 100%\). Use Trainer\(precision="
    )
    with pytest.warns(UserWarning, match=message):
        FILTERED.fit(PrecisionCheck(2), module=Rate(2e-6), precision="bf16-true", max_epochs=1)
    with pytest.raises(RuntimeError, match=message):
        FILTERED.fit(PrecisionCheck(2, action="raise"), module=Rate(2e-6), precision="bf16-true", max_epochs=1)


def test_a_warm_up_is_not_looked_at() -> None:
    every, callback = Every(), PrecisionCheck(2, 1.0)
    FILTERED.fit(every, callback, module=Rate(1e-2, warmup=5), precision="bf16-true", max_epochs=1)
    assert callback.report is not None
    assert callback.report.facts["lost"] == pytest.approx(every.share(slice(2, 4)))


def test_speaks_up_at_the_end_of_a_run_that_was_shorter() -> None:
    callback = PrecisionCheck(99)
    with pytest.warns(UserWarning, match="PrecisionCheck"):
        FILTERED.fit(callback, module=Rate(2e-6), precision="bf16-true", max_epochs=1)
    assert callback.report is not None
    assert callback.report.facts["optimiser steps looked at"] == 6


def test_refuses_an_epsilon_that_is_zero_in_fp16() -> None:
    message = r"AdamW\(eps=1e-08\) is zero in fp16, of which encoder.tokens.weight is, .* write eps=1e-4"
    with pytest.raises(ValueError, match=message):
        FILTERED.fit(PrecisionCheck(), module=Rate(1e-3), precision="16-true", max_epochs=1)
    callback = PrecisionCheck(2, 1.0)
    FILTERED.fit(callback, module=Rate(1e-3, eps=1e-4), precision="16-true", max_epochs=1, limit_val_batches=0)
    assert callback.report is not None
    assert callback.report.title == "Updates lost in torch.float16 weights"


def test_a_resumed_run_does_not_measure_again(tmp_path: Any) -> None:
    first = PrecisionCheck(2, 1.0)
    options = {"module": Rate(1e-2), "precision": "bf16-true"}
    FILTERED.fit(first, **options, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    second = PrecisionCheck(2, 1.0)
    FILTERED.fit(second, **options, ckpt_path=tmp_path / "a.ckpt")
    assert second.report == first.report


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_fp32_weights_cost_nothing(stranger: Stranger) -> None:
    callback = PrecisionCheck()
    assert identical(outcome(stranger.fit(callback)), outcome(stranger.fit()))
    assert callback.report is None


def test_refuses_arguments_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="steps=0 must be 1 or more"):
        PrecisionCheck(0)
    with pytest.raises(ValueError, match=r"limit=0 must be a share of updates in \(0, 1\]"):
        PrecisionCheck(limit=0)
    with pytest.raises(ValueError, match='action=\'stop\' must be "warn" or "raise"'):
        PrecisionCheck(action="stop")  # type: ignore[arg-type]


def test_wrong_layers_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        FILTERED.fit(PrecisionCheck(2, layers=Layers(head="nowhere")), module=Rate(1e-2), precision="bf16-true")
