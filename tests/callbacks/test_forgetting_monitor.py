"""Forgetting: measured beside the fit, by the module itself or by an old head on the new body."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_ft.callbacks import ExactResume, Freeze, LayerReinit
from lightning_ft.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_ft.core import Layers
from lightning_ft.data import ClassificationData, LanguageModelingData
from lightning_ft.functional.share_body import share_body
from lightning_ft.modules import MaskedLM, SequenceClassification
from tests.callbacks.test_exact_resume import Kill, Killed
from tests.modules.test_masked_lm import texts
from tests.pretrained import CORPUS, pretrained
from tests.ranks import RANKS, run_ranks
from tests.strangers import (
    FILTERED,
    LENGTH,
    STRANGERS,
    VOCABULARY,
    Filtered,
    HeadFirst,
    Stranger,
    identical,
    outcome,
    weights,
)

ROWS = 30


def old_rows() -> TensorDataset:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(9))
    return TensorDataset(tokens, tokens[:, 1] % 2)


class OldTask(LightningDataModule):
    def __init__(self, batch_size: int = 7) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.rows = old_rows()
        self.stage = stage

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows, self.batch_size)


def right(module: Any, batch: Any) -> tuple[Tensor, int]:
    """The mean probability of the right label as a sum and a count."""
    assert not any(child.training for child in module.modules())
    return module(batch[0]).softmax(-1)[torch.arange(len(batch[1])), batch[1]].sum(), len(batch[1])


def oracle(module: Any) -> tuple[float, float]:
    """Loss and probability by hand."""
    tokens, labels = old_rows().tensors
    copied = copy.deepcopy(module).eval()
    with torch.no_grad():
        logits = copied(tokens)
    return F.cross_entropy(logits, labels).item(), logits.softmax(-1)[range(ROWS), labels].mean().item()


class Oracle(Callback):
    """At the same moments as the monitor, which comes after it in the list."""

    def __init__(self, steps: list[int], body: Any = None) -> None:
        self.steps, self.seen, self.old = steps, [], body

    def look(self, trainer: Any, pl_module: Any) -> None:
        module = pl_module
        if self.old is not None:
            module = copy.deepcopy(self.old)
            module.encoder.load_state_dict(pl_module.thing_from_paris["inner"].state_dict())
        self.seen.append((trainer.global_step, *oracle(module)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step in self.steps:
            self.look(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)


@pytest.mark.parametrize("metric", ["val_loss", right])
@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_measures_what_a_loop_by_hand_does_and_changes_no_bit(stranger: Stranger, metric: Any) -> None:
    seen, monitor = Oracle([2, 4]), ForgettingMonitor(OldTask(), metric, every="2 steps")
    trainer = stranger.fit(seen, monitor, max_epochs=1)
    assert identical(outcome(trainer), outcome(stranger.fit(max_epochs=1)))
    rows = monitor.report().rows
    steps = [0, 2, 3] if stranger.name == "manual" else [0, 2, 4, 6]
    assert [row["step"] for row in rows] == steps
    found = {step: values for step, *values in seen.seen}
    for row in rows:
        assert row["value"] == pytest.approx(found[row["step"]][0 if metric == "val_loss" else 1], abs=1e-6)
        assert row["change"] == pytest.approx(row["value"] - rows[0]["value"], abs=1e-9)
    assert len({row["value"] for row in rows}) > 1


class Metered(Filtered):
    """Says what it is in whose validation, with a metric that lives on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.validations: list[tuple[int, int]] = []
        self.rows = 0

    def on_validation_epoch_start(self) -> None:
        self.rows = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.rows += len(batch[0])

    def on_validation_epoch_end(self) -> None:
        self.log("rows", float(self.rows), prog_bar=True)
        self.validations.append((self.trainer.global_step, self.rows))


class Listener(Callback):
    """What other callbacks hear of validations."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.heard.append(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        known = {**trainer.callback_metrics, **trainer.progress_bar_metrics, **trainer.logged_metrics}
        self.metrics.append({name: float(value) for name, value in known.items() if not name.startswith("forgetting")})


def test_nothing_of_the_fit_hears_of_it(tmp_path: Path) -> None:
    def run(*callbacks: Callback, folder: str) -> tuple[Listener, Any]:
        listener, module = Listener(), Metered()
        options = {"logger": CSVLogger(tmp_path, folder, version=0), "log_every_n_steps": 1, "val_check_interval": 3}
        FILTERED.fit(*callbacks, listener, module=module, **options)
        return listener, module

    monitor = ForgettingMonitor(OldTask(), every="1 steps", name="old", batches=3)
    with_it, module = run(monitor, folder="with")
    without, plain = run(folder="without")
    assert (with_it.heard, with_it.metrics) == (without.heard, without.metrics)
    assert [v for v in module.validations if v[1] != 21] == plain.validations
    assert [step for step, rows in module.validations if rows == 21] == list(range(13))
    lines = (tmp_path / "with" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"forgetting/old", "forgetting/old_change", "val_loss", "rows"} <= set(lines[0].split(","))
    header = (tmp_path / "without" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "forgetting" not in header


@pytest.mark.filterwarnings("ignore:Found 10 module")
def test_modes_and_hooks_are_as_before() -> None:
    module = Filtered()
    module.encoder.layers[0].eval()
    modes = [child.training for child in module.modules()]
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append([child.training for child in pl_module.modules()])
            assert trainer.lightning_module is pl_module
            assert trainer.datamodule is None
            assert len(trainer.callbacks) > 1
            assert trainer.training

    data = OldTask()
    FILTERED.fit(ForgettingMonitor(data, right, every="1 steps"), Look(), module=module, max_epochs=1)
    assert seen == [modes] * 6
    assert "validation_step" not in vars(module)
    assert data.stage == "validate"


def test_others_may_decide_by_it(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, monitor="forgetting/old", every_n_train_steps=2, save_top_k=1)
    monitor = ForgettingMonitor(OldTask(), every="2 steps", name="old")
    FILTERED.fit(monitor, keeper, max_epochs=1, enable_checkpointing=True)
    assert keeper.best_model_score is not None


# --- an old head on the new body ---------------------------------------------------------------------------------


def old_module() -> Filtered:
    """The old task's own module: another head, and its body under another name."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Filtered()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        return module


@pytest.mark.parametrize("metric", ["val_loss", right])
def test_an_old_head_reads_the_body_that_trains(metric: Any) -> None:
    old = old_module()
    head = weights(old.classifier)
    seen, stranger = Oracle([3], old_module()), next(s for s in STRANGERS if s.name == "head-first")
    monitor = ForgettingMonitor(OldTask(), metric, every="3 steps", old=old)
    trainer = stranger.fit(seen, monitor, max_epochs=1)
    assert identical(outcome(trainer), outcome(stranger.fit(max_epochs=1)))
    for row, (step, loss, accuracy) in zip(monitor.report().rows, seen.seen, strict=True):
        assert row["step"] == step
        assert row["value"] == pytest.approx(loss if metric == "val_loss" else accuracy, abs=1e-6)
    assert identical(weights(old.classifier), head)
    assert old._trainer is None
    assert not any("classifier" in name for name in trainer.lightning_module.state_dict())


class Normed(nn.Module):
    """A body with running statistics and a tied weight."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)
        self.out = nn.Linear(4, 4, bias=False)
        self.out.weight = self.embed.weight


GROUPS = Layers(groups={"body": r"embed|norm|out", "head": r"^head"})


def test_sharing_is_by_reference_with_statistics_and_ties() -> None:
    old, current = Normed(3), Normed(2)
    report = share_body(old, current, GROUPS)
    assert report.facts == {"shared": 3, "left to the old head": []}
    assert old.embed.weight is old.out.weight is current.embed.weight
    current.norm(torch.randn(8, 4))
    assert old.norm.running_mean is current.norm.running_mean
    assert old.norm.num_batches_tracked == 1
    assert old.head.out_features == 3


def test_a_masked_language_model_lends_its_head(tmp_path: Path) -> None:
    """Its loss at the start is that of the pretrained model; its decoder is tied to the embeddings that train."""
    folder = pretrained(tmp_path / "lm", "bert", hf.AutoModelForMaskedLM)

    def corpus() -> LanguageModelingData:
        return LanguageModelingData(folder, val=texts(9), rows="documents", max_length=32, eval_batch_size=4)

    lm = MaskedLM(folder)
    data = corpus()
    data.setup("validate")
    with torch.no_grad():
        sums = [lm.eval().loss(lm(batch), batch) for batch in data.val_dataloader()]
    expected = sum(float(mean) * int(n) for mean, n in sums) / sum(int(n) for _, n in sums)

    module = SequenceClassification(folder, labels=["a", "b"], learning_rate=1e-2, warmup=0)
    rows = Dataset.from_dict({"text": CORPUS * 4, "label": ["a", "b"] * 10})
    monitor = ForgettingMonitor(corpus(), every="2 steps", old=lm, name="lm")
    trainer = FILTERED.trainer([monitor], max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=ClassificationData(folder, rows, labels=["a", "b"], batch_size=4))
    table = monitor.report().rows
    assert [row["step"] for row in table] == [0, 2, 4, 5]
    assert table[0]["value"] == pytest.approx(expected, rel=1e-5)
    assert abs(table[-1]["change"]) > 1e-3
    assert lm.model.cls.predictions.decoder.weight is module.model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (
            lambda: _changed(lambda m: m.encoder.layers.__delitem__(2)),
            r"groups block.0, block.1, embeddings, and .* as many blocks",
        ),
        (
            lambda: _changed(lambda m: setattr(m.encoder, "tokens", nn.Embedding(7, 8))),
            r"no counterpart of its name and shape in embeddings",
        ),
    ],
)
def test_bodies_that_differ(old: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_body(old(), Filtered())


def _changed(change: Any) -> Filtered:
    module = Filtered()
    change(module)
    return module


# --- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "batch"), [(0, 5), (1, 2), (1, 3)])
@pytest.mark.parametrize("old", [None, old_module])
def test_resumed_run_has_the_same_table(old: Any, epoch: int, batch: int, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        monitor = ForgettingMonitor(OldTask(), every="0.5 epochs", old=old and old())
        return [ExactResume("1 steps", dirpath=tmp_path), monitor]

    options = {"accumulate_grad_batches": 2, "max_epochs": 2, "val_check_interval": 3}
    whole = callbacks()
    expected = outcome(FILTERED.fit(*whole, **options))
    with pytest.raises(Killed):
        FILTERED.fit(*callbacks(), Kill("on_after_backward", epoch, batch), **options)
    resumed = callbacks()
    torch.manual_seed(99)
    trainer = FILTERED.trainer(resumed, **options)
    trainer.fit(Filtered(), ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), expected)
    assert resumed[1].report() == whole[1].report()
    assert len(resumed[1].report().rows) == 5


def test_the_start_of_a_resumed_run_is_not_measured_again(tmp_path: Path) -> None:
    FILTERED.fit(ForgettingMonitor(OldTask()), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    monitor = ForgettingMonitor(OldTask())
    FILTERED.fit(monitor, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert [row["step"] for row in monitor.report().rows] == [0, 6, 12]


# --- ranks -------------------------------------------------------------------------------------------------------


class TwoRanks(HeadFirst):
    def __init__(self) -> None:
        super().__init__(dropout=0)

    def train_dataloader(self) -> Any:
        from tests.strangers import dataset

        rank, world = self.trainer.global_rank, self.trainer.world_size
        # Lightning's own would shuffle.
        return DataLoader(dataset(), 4 // world, sampler=DistributedSampler(dataset(), world, rank, shuffle=False))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(**options: Any) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True")
    tables = {}
    for name, metric, old in (("loss", "val_loss", None), ("right", right, None), ("old", right, old_module())):
        monitor = ForgettingMonitor(OldTask(5), metric, every="3 steps", old=old)
        two = {"strategy": options.get("strategy") or DDPStrategy(process_group_backend="gloo"), "devices": RANKS}
        settings = {"use_distributed_sampler": True, "limit_val_batches": 0, "max_epochs": 1, **two, **options}
        trainer = FILTERED.fit(monitor, module=TwoRanks(), **settings)
        tables[name] = [dict(row) for row in monitor.report().rows]
    return {**tables, "weights": weights(trainer.lightning_module)}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.test_forgetting_monitor:run", tmp_path)
    assert identical(first, second)
    single = run(strategy="auto", devices=1)
    for name in ("loss", "right", "old"):
        assert [row["step"] for row in first[name]] == [0, 3, 6]
        assert [row["value"] for row in first[name]] == pytest.approx([row["value"] for row in single[name]], abs=1e-5)


# --- errors ------------------------------------------------------------------------------------------------------


class Stepless(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Filtered()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.inner.loss(batch)

    def train_dataloader(self) -> Any:
        return DataLoader(old_rows(), 5)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


def test_a_function_needs_no_validation_step() -> None:
    monitor = ForgettingMonitor(OldTask(), right)
    FILTERED.fit(monitor, module=Stepless(), max_epochs=1)
    assert len(monitor.report().rows) == 2
    with pytest.raises(ValueError, match=r"Stepless has no validation_step, .* give a function"):
        FILTERED.fit(ForgettingMonitor(OldTask()), module=Stepless(), max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, "batches=0 must be 1 or more"),
        ({"metric": 3}, "metric=3 must be the name of a logged value, or a function"),
        ({"every": 5}, "every=5 has no unit"),
        ({"metric": "accuracy"}, r"metric='accuracy' was not logged for OldTask; logged were: val_loss. Name one"),
        ({"metric": lambda module, batch: (0.0, 0)}, "metric counted nothing in the validation data"),
        ({"every": 0.5, "trainer": {"max_epochs": -1, "max_steps": -1}}, "fraction of a training that has no end"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    options = arguments.pop("trainer", {})
    with pytest.raises(ValueError, match=message):
        FILTERED.fit(ForgettingMonitor(OldTask(), **arguments), **options)


def test_several_have_states_of_their_own(tmp_path: Path) -> None:
    pair = [ForgettingMonitor(OldTask(), name=name) for name in ("a", "b")]
    FILTERED.fit(*pair, LayerReinit(1), Freeze("head"), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert sum("ForgettingMonitor" in key for key in keys) == 2


def test_yaml_names_data_and_the_old_checkpoint(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--monitor", type=ForgettingMonitor)
    here = "tests.callbacks.test_forgetting_monitor"
    old = {"class_path": f"{here}.old_module"}
    config = {"datamodule": {"class_path": f"{here}.OldTask"}, "every": "3 steps", "old": old}
    parsed = parser.parse_object(
        {"monitor": {"class_path": "lightning_ft.callbacks.forgetting_monitor.ForgettingMonitor", "init_args": config}}
    )
    monitor = parser.instantiate(parsed).monitor
    assert isinstance(monitor.old, Filtered)
    assert isinstance(monitor.datamodule, OldTask)
