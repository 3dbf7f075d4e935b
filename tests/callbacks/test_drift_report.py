"""Drift: closed forms, what is left out, sharded weights, resuming, and the picture."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_ft.callbacks import L2SP, ExactResume, GradualUnfreezing, LayerReinit
from lightning_ft.callbacks.drift_report import DriftReport
from lightning_ft.core import LayerGroups, Layers
from lightning_ft.functional.drift import distances
from lightning_ft.functional.plot_drift import plot_drift
from tests.callbacks.test_exact_resume import Kill, Killed
from tests.ranks import run_ranks
from tests.sharded_worker import train
from tests.strangers import FILTERED, STRANGERS, Filtered, Stranger, identical, outcome, weights

PNG = b"\x89PNG"


class Norms(Callback):
    """The oracle: all weights after each step, by hand."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen[0] = weights(pl_module)
        self.groups = LayerGroups.of(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen[trainer.global_step] = weights(pl_module)

    def drift(self, group: str, step: int) -> tuple[float, float]:
        names = [name for name, _ in self.groups.named_parameters(group)]
        start, now = (torch.cat([self.seen[at][n].double().flatten() for n in names]) for at in (0, step))
        return (now - start).norm().item(), ((now - start).norm() / start.norm()).item()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_is_the_distance_by_hand_and_changes_no_bit(stranger: Stranger, head: bool, tmp_path: Path) -> None:
    oracle, drift = Norms(), DriftReport("2 steps", head=head)
    trainer = stranger.fit(oracle, drift, default_root_dir=tmp_path)
    assert identical(outcome(trainer), outcome(stranger.fit()))
    state = drift.state_dict()
    assert state["steps"] == list(range(2, trainer.global_step + 1, 2))
    assert state["groups"] == [name for name in oracle.groups if head or name != "head"]
    for step, row in zip(state["steps"], state["absolute"], strict=True):
        assert row.tolist() == pytest.approx([oracle.drift(name, step)[0] for name in state["groups"]], rel=1e-4)
    report = drift.report()
    for row in report.rows:
        absolute, relative = oracle.drift(row["group"], trainer.global_step)
        assert row["absolute"] == pytest.approx(absolute, rel=1e-4)
        assert row["relative"] == pytest.approx(relative, rel=1e-4)
    names = [name for name in oracle.groups if name != "head"]
    moved = sum(oracle.drift(name, trainer.global_step)[0] ** 2 for name in names) ** 0.5
    size = sum((a / b) ** 2 for a, b in (oracle.drift(name, trainer.global_step) for name in names)) ** 0.5
    assert report.facts["total, relative"] == pytest.approx(moved / size, rel=1e-4)
    assert (tmp_path / "drift.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("storage", ["cpu", "bf16", "disk"])
def test_wherever_the_start_is_kept(storage: Any, tmp_path: Path) -> None:
    kept, plain = DriftReport("3 steps", storage=storage), DriftReport("3 steps")
    FILTERED.fit(kept, L2SP(0.1), default_root_dir=tmp_path)
    FILTERED.fit(plain, L2SP(0.1), default_root_dir=tmp_path)
    tolerance = 0.05 if storage == "bf16" else 1e-6
    torch.testing.assert_close(kept.state_dict()["absolute"], plain.state_dict()["absolute"], rtol=tolerance, atol=1e-2)


def test_half_precision_is_summed_in_fp32() -> None:
    theta, start = torch.full((4096,), 1.0, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    assert distances([([theta], [start])]).item() == 64
    assert distances([([theta], [start.float()])]).item() == 64


def test_layers_drawn_anew_are_left_out_and_named(tmp_path: Path) -> None:
    drift = DriftReport("3 steps")
    FILTERED.fit(LayerReinit(1), drift, default_root_dir=tmp_path)
    assert "block.2" not in drift.state_dict()["groups"]
    assert drift.report().facts["left out, drawn anew"].startswith("12 tensors from encoder.layers.2")


def test_frozen_layers_stand_still_until_they_thaw(tmp_path: Path) -> None:
    drift = DriftReport("1 steps")
    FILTERED.fit(GradualUnfreezing("2 steps"), drift, default_root_dir=tmp_path)
    state = drift.state_dict()
    column = state["groups"].index("block.1")
    # The head and the tail, block.2, then block.1: it moves in the fifth step.
    assert state["absolute"][:4, column].tolist() == [0.0] * 4
    assert state["absolute"][4, column] > 0


def test_logs_when_it_measures(tmp_path: Path) -> None:
    drift = DriftReport("4 steps", head=True)
    FILTERED.fit(drift, logger=CSVLogger(tmp_path, "log", version=0), log_every_n_steps=1, default_root_dir=tmp_path)
    lines = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    logged = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    logged = [row for row in logged if row["drift/total"]]
    assert [int(row["step"]) for row in logged] == [4, 8, 12]
    last = {row["group"]: row["relative"] for row in drift.report().rows}
    for group, value in last.items():
        assert float(logged[-1][f"drift/{group}"]) == pytest.approx(value)


@pytest.mark.parametrize(("epoch", "batch"), [(0, 5), (1, 2), (1, 3)])
def test_a_resumed_run_has_the_same_table(epoch: int, batch: int, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [ExactResume("1 steps", dirpath=tmp_path), DriftReport("1 steps", head=True)]

    def module(shift: float) -> Filtered:
        made = Filtered()  # a head is drawn anew in each process
        made.classifier.weight.data.add_(shift)
        return made

    options = {"accumulate_grad_batches": 2, "val_check_interval": 3, "default_root_dir": tmp_path}
    whole = callbacks()
    expected = outcome(FILTERED.fit(*whole, module=module(0), **options))
    with pytest.raises(Killed):
        FILTERED.fit(*callbacks(), Kill("on_after_backward", epoch, batch), module=module(0), **options)
    assert (tmp_path / "drift.png").exists()  # of what there was
    resumed = callbacks()
    trainer = FILTERED.trainer(resumed, **options)
    trainer.fit(module(1.0), ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), expected)
    assert identical(resumed[1].state_dict(), whole[1].state_dict())
    assert resumed[1].report() == whole[1].report()
    assert len(whole[1].state_dict()["steps"]) == 6


def test_refuses_to_resume_from_other_weights(tmp_path: Path) -> None:
    trainer = FILTERED.fit(DriftReport("1 steps"), max_epochs=1, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="build the model from the same pretrained weights"):
        FILTERED.fit(DriftReport("1 steps"), module=trainer.lightning_module, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"would measure .* now: keep head="):
        FILTERED.fit(DriftReport("1 steps", head=True), ckpt_path=tmp_path / "a.ckpt")


def test_long_trainings_are_thinned(tmp_path: Path) -> None:
    drift = DriftReport("1 steps", points=4)
    FILTERED.fit(drift, default_root_dir=tmp_path)
    steps = drift.state_dict()["steps"]
    assert len(steps) <= 4
    assert steps[-1] == 12
    assert len(drift.state_dict()["absolute"]) == len(steps)


def test_a_dry_run_draws_nothing(tmp_path: Path) -> None:
    FILTERED.fit(DriftReport(), fast_dev_run=True, default_root_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 1}, "points=1 must be 2 or more"),
        ({"every": 7}, "every=7 has no unit"),
        ({"layers": Layers(head="decoder")}, "head= must name a submodule"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FILTERED.fit(DriftReport(**arguments))


@pytest.mark.parametrize(
    ("path", "steps", "message"),
    [("a.png", [], "nothing was measured"), ("a.docx", [1], r"must end in .png, .svg or .pdf")],
)
def test_pictures_that_cannot_be(path: str, steps: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plot_drift(["head"], steps, [[0.1]] * len(steps), tmp_path / path, title="t")
    assert not list(tmp_path.iterdir())


def test_no_matplotlib_is_told_before_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lightning_ft.callbacks.drift_report.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install .*\[plot\]"):
        FILTERED.fit(DriftReport(path=tmp_path / "a.png"))
    FILTERED.fit(DriftReport(), default_root_dir=tmp_path, max_epochs=1)
    assert not list(tmp_path.iterdir())


# --- processes ---------------------------------------------------------------------------------------------------


def table(sharding: str | None) -> dict[str, Any]:
    drift = DriftReport("2 steps")
    train(sharding, "steps", None, drift, max_epochs=1, default_root_dir=tempfile.mkdtemp())
    refused = ""
    if sharding == "fsdp2-whole":
        try:
            train(sharding, "steps", None, DriftReport("2 steps", head=True), max_epochs=1)
        except ValueError as error:
            refused = str(error)
    return {**drift.state_dict(), "relative": [row["relative"] for row in drift.report().rows], "refused": refused}


def run() -> dict[str, Any]:
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified in DDP constructor")
    return {sharding: table(sharding) for sharding in ("ddp", "fsdp2-whole")}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_processes_measure_what_one_does(tmp_path: Path) -> None:
    ranks, alone = run_ranks("tests.callbacks.test_drift_report:run", tmp_path), table(None)
    for rank in ranks:
        assert "head=True does not serve a sharded head" in rank["fsdp2-whole"]["refused"]
        for found in rank.values():
            assert (found["groups"], found["steps"]) == (alone["groups"], alone["steps"])
            torch.testing.assert_close(found["absolute"], alone["absolute"], rtol=1e-4, atol=1e-6)
            assert found["relative"] == pytest.approx(alone["relative"], rel=1e-4)
