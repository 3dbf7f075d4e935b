from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_ft.callbacks import L2SP, DiscriminativeLR, ExactResume, GradualUnfreezing
from lightning_ft.callbacks.layer_reinit import LayerReinit
from lightning_ft.callbacks.layer_removal import LayerRemoval
from lightning_ft.modules import SequenceClassification, load_checkpoint
from lightning_ft.modules.checkpoint import Architecture
from tests.strangers import BATCHES, FILTERED, STRANGERS, Stranger, identical, outcome, weights
from tests.tiny import BERT

STRANGER = {stranger.name: stranger for stranger in STRANGERS}
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
BLOCK = 12 + 4  # tensors: of torch's block, and of BERT's


def depth(module: nn.Module) -> int:
    (blocks,) = (m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) and "Layer" in str(type(m[0])))
    return len(blocks)


class Held(Callback):
    """What the optimisers hold when the fit starts."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        held = {p for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        assert held == set(pl_module.parameters())
        assert "configure_model" not in vars(pl_module)
        self.depth = depth(pl_module)


@each_stranger
def test_the_optimisers_know_the_short_model_alone(stranger: Stranger) -> None:
    callback, held = LayerRemoval([1]), Held()
    trainer = stranger.fit(callback, held)
    assert held.depth == depth(trainer.lightning_module) == 2
    assert trainer.global_step == (6 if stranger.name == "manual" else 12)
    assert callback.report is not None
    assert callback.report.rows[0]["kept"] == "[0, 2]"
    assert callback.state_dict() == {}
    assert "configure_model" not in vars(trainer.lightning_module)
    assert not trainer.lightning_module._load_state_dict_pre_hooks


@each_stranger
def test_takes_the_blocks_away_once(stranger: Stranger) -> None:
    callback = LayerRemoval("top:1")
    trainer = stranger.fit(callback, max_epochs=1)
    module = trainer.lightning_module
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert callback.report is None
    stranger.fit(LayerRemoval("top:1"), module=module)
    stranger.fit(LayerRemoval([2]), module=module)
    assert depth(module) == 2
    stranger.fit(LayerRemoval([1]), module=module)
    assert depth(module) == 1


class Killed(Exception):
    pass


class Kill(Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.place = epoch, batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.place:
            raise Killed


@pytest.mark.parametrize("name", STRANGER)
@pytest.mark.parametrize(("epoch", "batch"), [(0, BATCHES - 1), (1, 3)])
def test_resumes_exactly(name: str, epoch: int, batch: int, tmp_path: Path) -> None:
    stranger = STRANGER[name]
    options: dict[str, Any] = {"val_check_interval": BATCHES // 2, "default_root_dir": tmp_path}
    options |= {} if name == "manual" else {"accumulate_grad_batches": 2}

    def callbacks(folder: str) -> list[Any]:
        return [
            LayerRemoval("bottom:1"),
            LayerReinit(1),
            ExactResume("1 steps", dirpath=tmp_path / folder),
            GradualUnfreezing("2 steps"),
            DiscriminativeLR(0.7),
            L2SP(0.1, head_strength=0.01),
        ]

    whole = outcome(stranger.fit(*callbacks("whole"), **options))
    with pytest.raises(Killed):
        stranger.fit(*callbacks("killed"), Kill(epoch, batch), **options)
    trainer = stranger.fit(*callbacks("killed"), ckpt_path=tmp_path / "killed" / "last.ckpt", **options)
    assert identical(outcome(trainer), whole)
    assert depth(trainer.lightning_module) == 2


@pytest.mark.parametrize("name", ["filtered", "late"])
def test_evaluates_a_checkpoint_in_a_full_model(name: str, tmp_path: Path) -> None:
    stranger = STRANGER[name]
    trained = stranger.fit(LayerRemoval("top:1"), max_epochs=1)
    trained.save_checkpoint(tmp_path / "short.ckpt")
    module = stranger.module()
    trainer = stranger.trainer([LayerRemoval("top:1")])
    (results,) = trainer.test(module, ckpt_path=tmp_path / "short.ckpt", verbose=False)
    assert depth(module) == 2
    assert identical(weights(module), weights(trained.lightning_module))
    assert not module._load_state_dict_pre_hooks
    (again,) = stranger.trainer().test(trained.lightning_module, verbose=False)
    assert results == again
    full = stranger.module()
    stranger.trainer([LayerRemoval("top:1")]).test(full, verbose=False)
    assert depth(full) == 3


def head(source: Any = None) -> SequenceClassification:
    config = hf.BertConfig(**{**BERT, "num_hidden_layers": 4})
    return SequenceClassification(source or Architecture(config), labels=["a", "b"], warmup=0.0)


def test_a_checkpoint_of_ours_is_rebuilt_short_and_goes_on(tmp_path: Path) -> None:
    hf.utils.logging.disable_progress_bar()
    rows = [{"input_ids": torch.randint(5, 50, (6,)), "labels": torch.tensor(i % 2)} for i in range(8)]
    data = torch.utils.data.DataLoader(rows, batch_size=4)
    module = head()
    trainer = FILTERED.trainer([LayerRemoval("alternate")], max_epochs=1)
    trainer.fit(module, data, data)
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    module.save_pretrained(tmp_path / "folder")
    ids = torch.stack([row["input_ids"] for row in rows])
    logits = module.eval()({"input_ids": ids})

    rebuilt = load_checkpoint(tmp_path / "short.ckpt")
    assert (rebuilt.model.config.num_hidden_layers, depth(rebuilt)) == (2, 2)
    assert torch.equal(rebuilt.eval()({"input_ids": ids}), logits)
    rebuilt.train()
    # Short already: the callback must not shorten it again, to resume or to begin anew; a full one is shortened.
    for start, checkpoint in ((rebuilt, "short.ckpt"), (head(), "short.ckpt"), (head(tmp_path / "folder"), None)):
        trainer = FILTERED.trainer([LayerRemoval("alternate")], max_epochs=2)
        trainer.fit(start, data, data, ckpt_path=checkpoint and tmp_path / checkpoint)
        assert (start.model.config.num_hidden_layers, depth(start)) == (2, 2)
        assert trainer.global_step == 4


def test_weight_averaging_comes_after_it() -> None:
    def average() -> Any:
        return EMAWeightAveraging(decay=0.5)

    trainer = FILTERED.fit(LayerRemoval("top:1"), average(), max_epochs=1)
    assert depth(trainer.lightning_module) == 2
    with pytest.raises(ValueError, match="EMAWeightAveraging has copied the whole model already: put LayerRemoval bef"):
        FILTERED.fit(average(), LayerRemoval("top:1"), max_epochs=1)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_weight_averaging_of_a_model_built_late() -> None:
    average = EMAWeightAveraging(decay=0.5)
    trainer = STRANGER["late"].fit(LayerRemoval("top:1"), average, max_epochs=1)
    assert depth(trainer.lightning_module) == depth(average._average_model.module) == 2


def test_refuses_unknown_words_at_once_and_wrong_numbers_in_the_fit() -> None:
    with pytest.raises(ValueError, match="drop='upper' must be"):
        LayerRemoval("upper")
    module = FILTERED.module()
    with pytest.raises(ValueError, match="drop='top:3' must take 1 to 2 of the 3 blocks away"):
        FILTERED.fit(LayerRemoval("top:3"), module=module)
    assert depth(module) == 3
