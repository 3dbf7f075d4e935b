from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.callbacks import ExactResume, GradualUnfreezing
from lightning_ft.callbacks.temporal_ensembling import TemporalEnsembling, row_keys
from lightning_ft.functional.temporal_ensembling import ramp_up
from tests.callbacks.test_exact_resume import Kill, Killed, options
from tests.ranks import run_ranks
from tests.strangers import (
    BATCH,
    BATCHES,
    FILTERED,
    ROWS,
    STRANGERS,
    Filtered,
    Stranger,
    dataset,
    identical,
    outcome,
    weights,
)

STRANGER = {stranger.name: stranger for stranger in STRANGERS}
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
W, A = 3.0, 0.6


class Oracle(Filtered):
    """The method written into a module: dense tables by row number, by hand; ``forward`` as it is."""

    def __init__(self, own: bool, output: str = "loss", dropout: float = 0.1) -> None:
        super().__init__(dropout)
        self.own, self.output = own, output
        self.z, self.t = torch.zeros(ROWS, 2), torch.zeros(ROWS)
        self.ignored = 0

    def rows(self, batch: Any) -> list[int]:
        all_tokens = self.all_tokens
        return [next(i for i in range(ROWS) if torch.equal(all_tokens[i], row)) for row in batch[0]]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        if self.own:
            rows, p = self.rows(batch), logits.float().softmax(-1)
            if batch_idx == 0:
                self.epoch = torch.zeros(ROWS, 2)
            known = self.t[rows] > 0
            if known.any():
                share = (self.trainer.current_epoch + batch_idx / BATCHES) / 2  # a ramp of two epochs
                target = self.z[rows][known] / (1 - A ** self.t[rows][known])[:, None]
                loss = loss + W * ramp_up(share) * (p[known] - target).square().sum() / p.numel()
            self.epoch[rows] = p.detach()
        return {"loss": loss, "more": 1} if self.output == "mapping" else loss

    def on_train_epoch_end(self) -> None:
        if self.own:
            self.z, self.t = A * self.z + (1 - A) * self.epoch, self.t + 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def all_tokens(self) -> Tensor:
        return dataset().tensors[0]


def ours(**arguments: Any) -> TemporalEnsembling:
    return TemporalEnsembling(W, "2 epochs", **arguments)


def close(one: Any, other: Any, tolerance: float = 1e-6) -> bool:
    one, other = weights(one), weights(other)
    return all(torch.allclose(one[name], other[name], atol=tolerance) for name in one)


@pytest.mark.parametrize("output", ["loss", "mapping"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}])
def test_does_what_a_module_does_that_knows_the_method(output: str, settings: Any) -> None:
    def run(own: bool, *callbacks: Any) -> Any:
        return FILTERED.fit(*callbacks, module=Oracle(own, output), max_epochs=4, **settings).lightning_module

    callback = ours()
    expected = run(True)
    module = run(False, callback)
    assert close(module, expected)
    assert not close(module, run(False), 1e-4)
    rows = [expected.rows([row[None]])[0] for row in expected.all_tokens]
    keys = row_keys([expected.all_tokens], None)
    at = [callback._averages._index[keys[i]] for i in rows]
    torch.testing.assert_close(callback._averages.values[at], expected.z, rtol=1e-5, atol=1e-6)
    assert callback._averages.seen.tolist() == [4] * ROWS


def test_the_first_epoch_is_the_plain_one_to_the_bit() -> None:
    plain, with_it = (weights(FILTERED.fit(*c, max_epochs=1).lightning_module) for c in ([], [ours()]))
    assert identical(plain, with_it)


def test_manual_optimisation_gets_the_term_in_its_first_backward() -> None:
    """``manual_backward(loss / 2)``: the term comes in whole, since nothing tells what the module divides by."""

    class Manual(Oracle):
        def __init__(self, own: bool) -> None:
            super().__init__(own)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            self.optimizers().zero_grad()

    automatic = FILTERED.fit(ours(), module=Oracle(False), max_epochs=3).lightning_module
    manual = FILTERED.fit(ours(), module=Manual(False), max_epochs=3).lightning_module
    assert close(manual, automatic)


def test_unlabelled_rows_are_taught_by_the_term_alone() -> None:
    class Unlabelled(Filtered):
        def loss(self, batch: Any) -> Tensor:
            logits = self(batch[0])
            labels = torch.full_like(batch[1], -100)
            return F.cross_entropy(logits, labels, reduction="sum")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(*callbacks: Any) -> dict[str, Tensor]:
        return weights(FILTERED.fit(*callbacks, module=Unlabelled(), max_epochs=2).lightning_module)

    assert identical(run(), weights(Unlabelled()))
    assert not identical(run(ours()), weights(Unlabelled()))


def test_fp16_scaler_scales_both_alike() -> None:
    def run(own: bool, *callbacks: Any) -> Any:
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024))
        module = Oracle(own, dropout=0)
        return FILTERED.fit(*callbacks, module=module, plugins=[plugin], max_epochs=3).lightning_module

    assert close(run(False, ours()), run(True), 2e-3)
    assert not close(run(False), run(True), 2e-3)


def test_rows_can_be_told_apart_by_a_column() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    other = torch.cat([tokens, torch.zeros(3, 2, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones(3, 4), torch.zeros(3, 2)], 1).long()
    padded = row_keys({"input_ids": other, "attention_mask": mask, "labels": tokens}, None)
    whole = row_keys({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, None)
    assert padded == whole  # padding on the right is no part of a row
    assert len(set(whole)) == 3
    assert row_keys({"row": torch.tensor([5, 2])}, None) == row_keys([0, [5, 2]], 1)
    assert row_keys({"n": [5, 2]}, lambda batch: batch["n"]) == row_keys({"row": torch.tensor([5, 2])}, None)
    with pytest.raises(ValueError, match=r"no column of row numbers and no token ids.* give rows="):
        row_keys([torch.zeros(3, 2)], None)
    with pytest.raises(ValueError, match="rows='nothing' is not in the batches, which are dicts"):
        row_keys({}, "nothing")


def test_logs_the_term(tmp_path: Path) -> None:
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if "consistency_loss" in trainer.callback_metrics:
                seen.append(float(trainer.callback_metrics["consistency_loss"]))

    FILTERED.fit(ours(), Look(), logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=2)
    assert len(seen) == BATCHES
    assert all(0 < value < W for value in seen)


class Inside(Filtered):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.classifier(self.encoder(batch[0])[:, 0]), batch[1])


def test_refusals() -> None:
    for arguments, message in (
        ({"weight": -1.0}, "weight=-1.0 must be 0 or more"),
        ({"weight": 1.0, "ramp": 3}, "ramp=3 has no unit"),
        ({"weight": 1.0, "momentum": 1.0}, "momentum=1.0 must lie in"),
        ({"weight": 1.0, "answer": "z"}, "answer='z' must be"),
    ):
        with pytest.raises(ValueError, match=message):
            TemporalEnsembling(**arguments)
    with pytest.raises(ValueError, match=r"never called forward .* through="):
        FILTERED.fit(ours(), module=Inside())
    with pytest.raises(ValueError, match=r"the logits have the shape \(4, 5, 8\) for 4 rows"):
        FILTERED.fit(ours(through="encoder"), module=Inside())
    with pytest.raises(ValueError, match="a fraction of a training that has no end"):
        FILTERED.fit(TemporalEnsembling(1.0), max_epochs=-1)
    module = Inside()
    FILTERED.fit(ours(through="classifier"), module=module)
    assert not {"training_step", "manual_backward"} & vars(module).keys()


@each_stranger
@pytest.mark.parametrize(
    ("hook", "epoch", "batch"),
    [("on_after_backward", 1, 3), ("on_train_batch_end", 1, 5)],
)
def test_resume_is_exact(stranger: Stranger, hook: str, epoch: int, batch: int, tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        return [ExactResume("1 steps", dirpath=folder), GradualUnfreezing("2 steps"), ours()]

    settings = options(stranger, tmp_path)
    first = callbacks(tmp_path / "whole")
    whole = outcome(stranger.fit(*first, **settings))
    with pytest.raises(Killed):
        stranger.fit(*callbacks(tmp_path), Kill(hook, epoch, batch), **settings)
    again = callbacks(tmp_path)
    trainer = stranger.fit(*again, **settings, ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), whole)
    assert identical(again[-1].state_dict(), first[-1].state_dict())


# --- two processes -----------------------------------------------------------------------------------------------


class Shuffled(Oracle):
    """Each process has its part of each batch, another one in each epoch."""

    def __init__(self) -> None:
        super().__init__(own=False, dropout=0)

    def train_dataloader(self) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        tokens = self.all_tokens.roll(self.trainer.current_epoch, 0)
        labels = tokens[:, 0] % 2
        return DataLoader(TensorDataset(tokens[rank::world], labels[rank::world]), BATCH // world)


def train(folder: str, **more: Any) -> dict[str, Any]:
    callback = ours()
    settings = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 0}
    settings |= {"use_distributed_sampler": False, "default_root_dir": folder}
    trainer = FILTERED.fit(callback, SaveAt(9, f"{folder}/middle.ckpt"), module=Shuffled(), **settings, **more)
    state = callback._averages.state_dict()
    order = sorted(range(ROWS), key=lambda i: state["keys"][i].tolist())
    return {"weights": weights(trainer.lightning_module), "z": state["values"][order], "t": state["seen"][order]}


class SaveAt(Callback):
    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run() -> dict[str, Any]:
    import tempfile

    from lightning.pytorch.strategies import DDPStrategy

    folder = tempfile.mkdtemp()
    result = train(folder, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    path = Path(folder) / "middle.ckpt"
    if path.exists():  # on rank 0
        saved = torch.load(path, weights_only=True)["callbacks"]["TemporalEnsembling"]
        result["pending"] = sum(len(seen["keys"]) for seen in saved["pending"])
    return result


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_share_what_they_have_seen(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.test_temporal_ensembling:run", tmp_path)
    assert first.pop("pending") == 3 * BATCH  # of both ranks, in the middle of the second epoch
    assert identical(first, second)
    single = train(str(tmp_path))
    assert first["t"].tolist() == [4] * ROWS
    torch.testing.assert_close(first["z"], single["z"], rtol=0, atol=1e-5)
    for name, value in single["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-5)
