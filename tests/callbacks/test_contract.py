"""What every callback promises to every project: one table of callbacks, one of strangers, one contract."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader

from lightning_ft.callbacks import (
    EMA,
    EWC,
    FGM,
    L2SP,
    PEFT,
    PGD,
    R3F,
    SMART,
    ActivationCheckpointing,
    BiasCorrection,
    BitFit,
    BottleneckAdapters,
    CheckpointAverage,
    DiffPruning,
    DiscriminativeLR,
    DriftReport,
    ExactResume,
    ForgettingMonitor,
    FreeLB,
    Freeze,
    FrozenPrefixCache,
    GradualUnfreezing,
    HeadImportance,
    IntrinsicDimension,
    LayerDrop,
    LayerReinit,
    LayerRemoval,
    LayerTimeline,
    MemoryReport,
    Mixout,
    MovementPruning,
    NEFTune,
    PrecisionCheck,
    RDrop,
    RecAdam,
    SeedPruning,
    SnapshotEnsemble,
    StabilityMonitor,
    TemporalEnsembling,
    TrainingModeCheck,
    WiSEFT,
)
from lightning_ft.callbacks.eight_bit_optimizer import EightBitOptimizer
from lightning_ft.core import Phase, Plateau
from lightning_ft.functional import BottleneckConfig
from lightning_ft.functional.alterations import alterations
from tests.fisher_file import fisher_file
from tests.strangers import FILTERED, STRANGERS, Stranger, dataset, identical, outcome, weights


class OldTask(LightningDataModule):
    def val_dataloader(self) -> Any:
        return DataLoader(dataset(), 7)


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "unfreezing-epochs": partial(GradualUnfreezing, "1 epoch"),
    "unfreezing-steps": partial(GradualUnfreezing, "2 steps"),
    "unfreezing-fraction": partial(GradualUnfreezing, 0.25, groups_per_step=2),
    "unfreezing-metric": partial(GradualUnfreezing, Plateau("val_loss", "max"), norms="always"),
    "unfreezing-phases": partial(GradualUnfreezing, phases=[Phase("head"), Phase("all", "3 steps", 0.5, "2 steps")]),
    "chain-thaw": partial(GradualUnfreezing, "2 steps", previous="freeze"),
    "freeze": partial(Freeze, ["top:1", "tail", "head"]),
    "freeze-bitfit": partial(Freeze, "head", parameters=r"(^|\.)bias$", eval_mode=True),
    "frozen-prefix-cache": FrozenPrefixCache,
    "layer-reinit": partial(LayerReinit, 2),
    "layer-removal": partial(LayerRemoval, [1]),
    "layer-timeline": LayerTimeline,
    "discriminative-lr": partial(DiscriminativeLR, 0.5),
    "l2-sp-coupled": partial(L2SP, 0.5, head_strength=0.1),
    "l2-sp-decoupled": partial(L2SP, 0.5, "decoupled", head_strength=0.1),
    "ewc-coupled": lambda: EWC(0.5, fisher_file()),
    "ewc-decoupled": lambda: EWC(0.5, fisher_file(), mode="decoupled"),
    "rec-adam": partial(RecAdam, 5.0, t0=4, k=0.5),
    "rec-adam-linear": partial(RecAdam, 5.0, t0="3 steps", curve="linear", legacy_order=True),
    "mixout": partial(Mixout, 0.5, dropout=0.0),
    "mixout-elements": partial(Mixout, 0.5, per="element", warmup="3 steps", legacy_gradient=True),
    "exact-resume": partial(ExactResume, "2 steps"),
    "training-mode-check": TrainingModeCheck,
    "ema": partial(EMA, 0.9),
    "checkpoint-average": CheckpointAverage,
    "checkpoint-average-last": partial(CheckpointAverage, 1, start="1 epoch"),
    "snapshot-ensemble": partial(SnapshotEnsemble, every="3 steps"),
    "temporal-ensembling": partial(TemporalEnsembling, 1.0, "1 epoch"),
    "forgetting-monitor": lambda: ForgettingMonitor(OldTask(), every="2 steps"),
    "drift-report": partial(DriftReport, "2 steps", head=True),
    "wise-ft": partial(WiSEFT, [0.3, 0.6]),
    "activation-checkpointing": partial(ActivationCheckpointing, offload=True),
    "memory-report": MemoryReport,
    "precision-check": PrecisionCheck,
    "peft-lora": lambda: PEFT(peft.LoraConfig(r=2)),
    "peft-loraplus": lambda: PEFT(peft.LoraConfig(r=2), loraplus_ratio=16),
    "bottleneck-adapters": lambda: BottleneckAdapters(config=BottleneckConfig(2)),
    "bit-fit": BitFit,
    "diff-pruning": partial(DiffPruning, 0.05),
    "intrinsic-dimension": partial(IntrinsicDimension, 100),
    "movement-pruning": partial(MovementPruning, 0.3),
    "movement-pruning-soft": partial(MovementPruning, mode="soft"),
    "layer-drop": partial(LayerDrop, 0.3),
    "head-importance": lambda: HeadImportance(0.3, examples=8, loss=lambda module, batch: module.loss(batch)),
    "eight-bit-optimizer": partial(EightBitOptimizer, min_size=0),
    "eight-bit-optimizer-paged": partial(EightBitOptimizer, "paged_same"),
    "r3f": partial(R3F, 0.7),
    "r-drop": partial(RDrop, 2.0),
    "smart": partial(SMART, 2.0),
    "free-lb": partial(FreeLB, 0.1, 3, max_norm=0.5),
    "fgm": FGM,
    "pgd": partial(PGD, dropout="independent"),
    "neftune": NEFTune,
    "stability-monitor": partial(StabilityMonitor, "2 steps"),
    "seed-pruning": partial(SeedPruning, "3 steps", monitor="val_loss", loss="val_loss", decide=lambda *_: True),
}
NEUTRAL: dict[str, Callable[[], Callback]] = {
    "unfreezing": partial(GradualUnfreezing, "1 steps", start=5),
    "unfreezing-phases": partial(GradualUnfreezing, phases=[Phase("all"), Phase("all", at=0.5)]),
    "freeze": partial(Freeze, "all"),
    "frozen-prefix-cache": FrozenPrefixCache,
    "layer-reinit": partial(LayerReinit, 0, pooler=False),
    "layer-timeline": LayerTimeline,
    "discriminative-lr": partial(DiscriminativeLR, 1.0),
    "l2-sp-coupled": partial(L2SP, 0.0),
    "l2-sp-decoupled": partial(L2SP, 0.0, "decoupled"),
    "ewc-coupled": lambda: EWC(0.0, fisher_file()),
    "ewc-decoupled": lambda: EWC(0.0, fisher_file(), mode="decoupled"),
    "mixout": partial(Mixout, 0.0),
    "training-mode-check": TrainingModeCheck,
    "ema": partial(EMA, 0.9, start="99 steps"),
    "checkpoint-average": partial(CheckpointAverage, 1),
    "temporal-ensembling": partial(TemporalEnsembling, 0.0),
    "forgetting-monitor": lambda: ForgettingMonitor(OldTask(), every="2 steps"),
    "drift-report": partial(DriftReport, "2 steps"),
    "wise-ft": partial(WiSEFT, 1.0),
    "activation-checkpointing": ActivationCheckpointing,
    "memory-report": MemoryReport,
    "precision-check": PrecisionCheck,
    "layer-drop": partial(LayerDrop, 0.0),
    "head-importance": lambda: HeadImportance(examples=8, loss=lambda module, batch: module.loss(batch)),
    "r3f": partial(R3F, 0.0),
    "smart": partial(SMART, 0.0, 0.0),
    "free-lb": partial(FreeLB, 0.1, 1, magnitude=0.0),
    "fgm": partial(FGM, weight=0.0),
    "pgd": partial(PGD, weight=0.0),
    "neftune": partial(NEFTune, 0.0),
    "stability-monitor": partial(StabilityMonitor, "2 steps"),
    "bias-correction": partial(BiasCorrection, True),
}

each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
each_callback = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)


class Failure(Exception):
    pass


class FailAt(Callback):
    """Raises in the middle of the fourth batch, after its backward pass."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4:
            raise Failure


class Watch(Callback):
    """Keeps the module as it was when the callbacks had not touched it yet."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.hooks: dict[str, int] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.flags = [p.requires_grad for p in pl_module.parameters()]
        self.groups = [list(optimizer.param_groups) for optimizer in trainer.optimizers]
        self.hooks = hooks(trainer, pl_module)

    def check(self, trainer: Any, module: Any) -> None:
        """Nothing is left of what other callbacks attached or changed."""
        assert [p.requires_grad for p in module.parameters()] == self.flags
        for optimizer, groups in zip(trainer.optimizers, self.groups, strict=True):
            assert [id(group) for group in optimizer.param_groups] == [id(group) for group in groups]
        assert not any(hooks(trainer, module).values())


def hooks(trainer: Any, module: Any) -> dict[str, int]:
    holders = [("module", module), *((f"optimizer {i}", optimizer) for i, optimizer in enumerate(trainer.optimizers))]
    return {
        f"{name}.{attribute}": len(value)
        for name, holder in holders
        for attribute, value in vars(holder).items()
        if attribute.endswith("_hooks")
    }


@each_stranger
@each_callback
def test_trains_releases_everything_and_keeps_its_state(
    stranger: Stranger, make: Callable[[], Callback], tmp_path: Path
) -> None:
    callback, watch, module = make(), Watch(), stranger.module()
    trainer = stranger.fit(watch, callback, module=module, default_root_dir=tmp_path)

    assert trainer.global_step == (6 if stranger.name == "manual" else 12)
    assert not identical(weights(module), weights(stranger.fit(max_epochs=0).lightning_module))
    watch.check(trainer, module)

    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    restored = make()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert identical(restored.state_dict(), callback.state_dict())


@each_stranger
@each_callback
def test_releases_everything_after_an_exception(
    stranger: Stranger, make: Callable[[], Callback], tmp_path: Path
) -> None:
    watch, module = Watch(), stranger.module()
    trainer = stranger.trainer([watch, make(), FailAt()], default_root_dir=tmp_path)
    with pytest.raises(Failure):
        trainer.fit(module)
    watch.check(trainer, module)


@each_stranger
@pytest.mark.parametrize("make", NEUTRAL.values(), ids=NEUTRAL)
def test_strength_zero_changes_no_bit(stranger: Stranger, make: Callable[[], Callback], tmp_path: Path) -> None:
    assert identical(outcome(stranger.fit(make(), default_root_dir=tmp_path)), outcome(stranger.fit()))


@each_stranger
@each_callback
def test_validation_and_test_change_nothing(stranger: Stranger, make: Callable[[], Callback], tmp_path: Path) -> None:
    module = stranger.fit(max_epochs=0).lightning_module
    before, flags = weights(module), [p.requires_grad for p in module.parameters()]
    plain = stranger.trainer().validate(module, verbose=False)
    trainer = stranger.trainer([make()], default_root_dir=tmp_path)
    found = trainer.validate(module, verbose=False)
    assert found == [{name: pytest.approx(value, abs=1e-6) for name, value in row.items()} for row in plain]
    trainer.test(module, verbose=False)
    if alterations(module):
        return  # so that the checkpoint of a changed model may be loaded; what it computes is the same
    assert identical(weights(module), before)
    assert [p.requires_grad for p in module.parameters()] == flags
    assert not any(hooks(trainer, module).values())


@each_stranger
@each_callback
def test_second_fit_owes_nothing_to_the_first(stranger: Stranger, make: Callable[[], Callback], tmp_path: Path) -> None:
    def twice(*callbacks: Callback) -> Any:
        module = stranger.module()
        for callback in callbacks:
            trainer = stranger.fit(callback, module=module, max_epochs=1, default_root_dir=tmp_path)
        return outcome(trainer)

    callback = make()
    assert identical(twice(callback, callback), twice(make(), make()))


@each_callback
def test_the_same_trainer_continues(make: Callable[[], Callback], tmp_path: Path) -> None:
    module = FILTERED.module()
    trainer = FILTERED.fit(make(), module=module, max_epochs=1, default_root_dir=tmp_path)
    before = weights(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert trainer.current_epoch == 2
    assert not identical(weights(module), before)
