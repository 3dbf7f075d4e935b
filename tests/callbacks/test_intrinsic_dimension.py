"""IntrinsicDimension on strangers: what trains, when weights are computed, exact resume, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft.callbacks import ExactResume
from lightning_ft.callbacks.intrinsic_dimension import IntrinsicDimension
from lightning_ft.functional.alterations import load_altered
from lightning_ft.functional.intrinsic_dimension import FastFood, subspace_of
from tests.callbacks.test_exact_resume import STRANGER
from tests.resuming import Resuming
from tests.strangers import FILTERED, STILL, STRANGERS, Filtered, Late, Stranger, identical, weights

TENSORS = len(list(Filtered().encoder.parameters()))


def callback(**arguments: Any) -> IntrinsicDimension:
    return IntrinsicDimension(100, **{"seed": 3, "rate": 0.05, **arguments})


RUN = Resuming(callback, epochs=2)


@pytest.mark.parametrize(
    ("name", "hook", "epoch", "batch"),
    [
        ("filtered", "on_train_batch_end", 0, 5),
        ("filtered", "on_validation_end", 0, 2),
        ("filtered", "on_after_backward", 1, 3),
        *((stranger.name, "on_after_backward", 1, 3) for stranger in STRANGERS[1:]),
    ],
)
def test_resumed_run_ends_as_if_it_had_never_stopped(
    name: str, hook: str, epoch: int, batch: int, tmp_path: Path
) -> None:
    RUN.check(name, hook, epoch, batch, tmp_path)


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_checkpoint_holds_d_values_and_the_head(stranger: Stranger, tmp_path: Path) -> None:
    module = RUN.fit(stranger.name, tmp_path).lightning_module.eval()
    subspace = subspace_of(module)
    assert subspace is not None
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    own = {name: value for name, value in state.items() if name.startswith("intrinsic_dimension.")}
    assert own.keys() == {"intrinsic_dimension.vector", "intrinsic_dimension.scales"}
    assert sum(value.numel() for value in own.values()) == 100
    assert all(bool(value.detach().std() > 0) for value in own.values())  # both have trained
    assert not any("parametrizations" in name for name in state)

    fresh = stranger.module()
    fresh.configure_model()
    load_altered(fresh.eval(), tmp_path / "last.ckpt")
    tokens = torch.randint(20, (3, 5))
    with torch.no_grad():
        assert torch.equal(fresh(tokens), module(tokens))
    assert identical(weights(fresh), weights(module))


class Count:
    """How often a tensor is projected, forth and back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forth = self.back = 0
        project, transpose = FastFood.project, FastFood.transpose

        def forth(*args: Any) -> Any:
            self.forth += 1
            return project(*args)

        def back(*args: Any) -> Any:
            self.back += 1
            return transpose(*args)

        monkeypatch.setattr(FastFood, "project", forth)
        monkeypatch.setattr(FastFood, "transpose", back)


def test_weights_are_computed_once_an_optimiser_step_and_once_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six batches in windows of two, and two batches of validation."""
    count = Count(monkeypatch)
    FILTERED.fit(callback(), accumulate_grad_batches=2, max_epochs=1, num_sanity_val_steps=0)
    assert count.forth == TENSORS * (3 + 1)
    assert count.back == TENSORS * 6


@pytest.mark.parametrize("fused", [True, False])
def test_accumulated_gradients_are_those_of_one_batch(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two half batches read the weights that one of them computed, and no later step reads old ones."""

    class Module(Late):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def configure_optimizers(self) -> Any:
            # Adam would make steps of the noise of gradients that are zero.
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, fused=fused)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(super().train_dataloader().dataset, self.size)

        def configure_model(self) -> None:
            super().configure_model()
            self.bert.eval()

    monkeypatch.setattr("warnings.warn", lambda *args, **options: None)  # of the model in eval mode
    results = []
    for size, windows in ((8, 1), (4, 2)):
        module = Module(size)
        STILL.fit(
            callback(rate=None), module=module, accumulate_grad_batches=windows, max_epochs=3, limit_val_batches=0
        )
        results.append(weights(module))
    assert results[0]["intrinsic_dimension.vector"].abs().max() > 1e-2
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-5, msg=name)


class Before(Callback):
    """Reads a weight just before a step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        read(module)


class After(Callback):
    """Reads a weight after a step, as it is computed and as it should be."""

    def __init__(self) -> None:
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        now = read(module)
        module.intrinsic_dimension.moment.drop()
        self.read.append((now, read(module)))


def read(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.bert.bert.encoder.layer[0].output.dense.weight
    return weight.detach().clone()


def test_who_reads_weights_after_a_fused_step_reads_those_of_now() -> None:
    """Such a step does not tell that it wrote to a parameter."""
    after = After()
    STRANGER["late"].fit(after, callback(), Before(), max_epochs=1)
    assert len(after.read) == 6
    assert all(torch.equal(now, fresh) for now, fresh in after.read)
    assert not torch.equal(after.read[0][0], after.read[1][0])


def test_rate_is_that_of_v_and_follows_the_schedule() -> None:
    """Adam's first step is the rate, here with the head at 0.01."""
    module = Filtered(dropout=0)
    STILL.fit(callback(rate=0.3, said=False), module=module, max_steps=1, limit_val_batches=0)
    subspace = subspace_of(module)
    assert subspace is not None
    torch.testing.assert_close(subspace.vector.detach().abs(), torch.full((100,), 0.3), rtol=1e-3, atol=0)
    head = (module.classifier.weight - Filtered().classifier.weight).detach().abs()
    assert head.max().item() == pytest.approx(0.01, rel=0.05)


def test_without_a_rate_the_optimiser_decides() -> None:
    module = Filtered(dropout=0)
    STILL.fit(callback(rate=None), module=module, max_steps=1, limit_val_batches=0)
    subspace = subspace_of(module)
    assert subspace is not None
    torch.testing.assert_close(subspace.vector.detach().abs(), torch.full((100 - TENSORS,), 0.01), rtol=1e-3, atol=0)


def test_validation_changes_no_number() -> None:
    module = Filtered(dropout=0)
    before = STILL.trainer()
    before.validate(module, verbose=False)
    trainer = STILL.trainer([callback()])
    trainer.validate(module, verbose=False)
    assert trainer.callback_metrics["val_loss"] == before.callback_metrics["val_loss"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(precision: str) -> None:
    module = FILTERED.fit(callback(), precision=precision).lightning_module
    subspace = subspace_of(module)
    assert subspace is not None
    assert subspace.vector.detach().abs().min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, r"dimension=0 must be a whole number of 1 or more"),
        ({"dimension": 0.5}, r"dimension=0.5 must be a whole number"),
        ({"dimension": 10, "rate": 0.0}, r"rate=0.0 must be a learning rate above 0, or None"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntrinsicDimension(**arguments)


def test_refuses_sharded_weights() -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(restore_checkpoint_after_setup=True))
    with pytest.raises(ValueError, match="IntrinsicDimension computes whole weights: SimpleNamespace shards them"):
        callback().on_fit_start(trainer, Filtered())


def test_refuses_a_checkpoint_of_another_projection(tmp_path: Path) -> None:
    RUN.fit("filtered", tmp_path)
    others = [ExactResume("1 steps", dirpath=tmp_path), callback(seed=4)]
    with pytest.raises(ValueError, match=r"'seed': 3.* and this one is changed by .*'seed': 4"):
        FILTERED.fit(*others, **RUN.options("filtered", tmp_path), ckpt_path=tmp_path / "last.ckpt")
