from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_ft.callbacks import L2SP, ExactResume, GradualUnfreezing
from lightning_ft.callbacks.layer_reinit import LayerReinit
from lightning_ft.core.fresh import fresh_parameters
from tests.ranks import run_ranks
from tests.strangers import BATCHES, FILTERED, STRANGERS, Filtered, Late, Stranger, identical, outcome, weights

each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
STRANGER = {stranger.name: stranger for stranger in STRANGERS}


class Start(Callback):
    """All weights, and the state of the global generator, when the fit starts."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        assert "configure_model" not in vars(pl_module)  # nothing is left that a second call, or a copy, would run
        self.weights = weights(pl_module)
        self.random = torch.get_rng_state()
        self.fresh = {name for name, p in pl_module.named_parameters() if p in fresh_parameters(pl_module)}


def start(stranger: Stranger, *callbacks: Any, **options: Any) -> Start:
    seen = Start()
    stranger.fit(*callbacks, seen, **{"max_epochs": 0, **options})
    return seen


def moved(left: dict[str, Tensor], right: dict[str, Tensor]) -> set[str]:
    return {name for name in left if not torch.equal(left[name], right[name])}


@each_stranger
def test_draws_before_the_fit_and_takes_no_random_number(stranger: Stranger) -> None:
    plain, callback = start(stranger), LayerReinit(2)
    seen = start(stranger, callback)
    changed = moved(plain.weights, seen.weights)
    top = (".layers.1.", ".layers.2.", ".layer.1.", ".layer.2.", "bert.bert.pooler.")
    assert {name for name in plain.weights if any(part in name for part in top)} == seen.fresh
    assert changed <= seen.fresh
    assert {name for name in seen.fresh if seen.weights[name].ndim > 1} <= changed
    assert torch.equal(plain.random, seen.random)
    assert callback.report is not None
    assert callback.report.facts["tensors"] == len(seen.fresh)
    assert callback.state_dict() == {}
    # Once trained, they are like any other layer.
    module = stranger.fit(callback, max_epochs=1).lightning_module
    assert not fresh_parameters(module)
    assert "configure_model" not in vars(module)


class InSetup(Filtered):
    """Loads its weights only in its own ``setup``."""

    def setup(self, stage: str) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(5)


class Loaded(Late):
    """Its BERT comes from ``from_pretrained``."""

    folder: Path

    def configure_model(self) -> None:
        super().configure_model()
        if not self.folder.exists():
            self.bert.save_pretrained(self.folder)
        self.bert = hf.BertForSequenceClassification.from_pretrained(self.folder).train()


def test_weights_loaded_late_are_drawn_all_the_same(tmp_path: Path) -> None:
    hf.utils.logging.disable_progress_bar()
    seen = start(Stranger("setup", InSetup), LayerReinit(1))
    assert all(bool((value == 5).all()) != (name in seen.fresh) for name, value in seen.weights.items())

    Loaded.folder = tmp_path / "bert"
    stranger = Stranger("loaded", Loaded)
    plain, seen = start(stranger), start(stranger, LayerReinit(1))
    matrices = {name for name in seen.fresh if seen.weights[name].ndim > 1}
    assert moved(plain.weights, seen.weights) == matrices
    assert "bert.bert.pooler.dense.weight" in matrices


def test_two_callbacks_act_in_their_order() -> None:
    def fill(value: float) -> Any:
        def draw(module: Any) -> None:
            for parameter in module.parameters(recurse=False):
                torch.nn.init.constant_(parameter, value)

        return draw

    both = [LayerReinit(2, pooler=False, init=fill(3)), LayerReinit(1, pooler=False, init=fill(4))]
    for name in ("filtered", "late"):
        seen = start(STRANGER[name], *both)
        blocks = {i: [v for n, v in seen.weights.items() if f".{i}." in n and "layer" in n] for i in (0, 1, 2)}
        assert all(bool((value == 3).all()) for value in blocks[1])
        assert all(bool((value == 4).all()) for value in blocks[2])


def test_seed_is_that_of_the_run_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(**options: Any) -> Tensor:
        return start(FILTERED, LayerReinit(1, **options)).weights["encoder.layers.2.linear1.weight"]

    default = drawn()
    assert torch.equal(default, drawn(seed=0))
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert torch.equal(drawn(), drawn(seed=7))
    assert not torch.equal(drawn(), default)


def test_a_trainer_that_goes_on_draws_nothing() -> None:
    callback = LayerReinit(1)
    trainer = FILTERED.fit(callback, Start(), max_epochs=1)
    trained = weights(trainer.lightning_module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module)
    seen = trainer.callbacks[1]
    assert identical(seen.weights, trained)
    assert callback.report is None
    assert seen.fresh == {name for name in trained if ".layers.2." in name}


def test_a_new_fit_draws_again_and_other_stages_nothing() -> None:
    module = FILTERED.fit(LayerReinit(1), max_epochs=1).lightning_module
    before, callback = weights(module), LayerReinit(1)
    trainer = FILTERED.trainer([callback])
    trainer.validate(module, verbose=False)
    assert identical(weights(module), before)
    again = start(FILTERED, LayerReinit(1), module=module)
    assert moved(before, again.weights) == again.fresh


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
def test_resumes_exactly_from_the_weights_of_the_checkpoint(name: str, epoch: int, batch: int, tmp_path: Path) -> None:
    stranger = STRANGER[name]
    options: dict[str, Any] = {"val_check_interval": BATCHES // 2, "default_root_dir": tmp_path}
    options |= {} if name == "manual" else {"accumulate_grad_batches": 2}

    def callbacks(folder: str) -> list[Any]:
        # Top of the list, and behind it what looks at weights and flags.
        return [
            ExactResume("1 steps", dirpath=tmp_path / folder),
            LayerReinit(2),
            L2SP(0.1, head_strength=0.01),
            GradualUnfreezing("2 steps"),
        ]

    whole = outcome(stranger.fit(*callbacks("whole"), **options))
    with pytest.raises(Killed):
        stranger.fit(*callbacks("killed"), Kill(epoch, batch), **options)
    resumed = callbacks("killed")
    seen = Start()
    trainer = stranger.fit(*resumed, seen, ckpt_path=tmp_path / "killed" / "last.ckpt", **options)
    assert identical(outcome(trainer), whole)
    assert resumed[1].report is None
    stored = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    assert identical(weights(trainer.lightning_module), dict(stored))
    assert seen.fresh


class Bias(Filtered):
    """Its loss is nought: what moves was pulled."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 0.0 * self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("order", [1, -1])
def test_l2_sp_counts_the_new_layers_as_head(order: int) -> None:
    anchored: list[str] = []

    class Penalty(L2SP):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            anchored.extend(self._anchoring.take().tensors)

    seen = Start()
    callbacks = [LayerReinit(1), Penalty(0.5, head_strength=0.1)][::order]
    trainer = FILTERED.fit(*callbacks, seen, module=Bias(), max_epochs=1, limit_train_batches=1)
    after = weights(trainer.lightning_module)
    shrunk = {name for name in after if torch.allclose(after[name], seen.weights[name] * (1 - 0.1 * 0.1), atol=1e-7)}
    new = {name for name in after if ".layers.2." in name or name.startswith("classifier")}
    assert {name for name in new if after[name].ndim > 1} <= shrunk
    rest = [name for name in after if name not in new]
    assert all(torch.equal(after[name], seen.weights[name]) for name in rest)
    assert set(anchored) == {name for name in rest if after[name].ndim > 1}


def test_weight_averaging_starts_from_the_new_layers() -> None:
    seen = Start()
    average = EMAWeightAveraging(decay=0.5)
    trainer = FILTERED.fit(LayerReinit(1), average, seen, max_epochs=1, limit_train_batches=0)
    assert identical(weights(trainer.lightning_module), seen.weights)
    assert identical(weights(average._average_model.module), seen.weights)


def train_on_two_ranks() -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    class Own(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            torch.manual_seed(trainer.global_rank)  # ranks that would draw otherwise from the global generator

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.weights = weights(pl_module)

    class Before(LayerReinit):
        def _reinit(self, trainer: Any, module: Any) -> None:
            super()._reinit(trainer, module)
            self.drawn = weights(module)  # before DDP sends those of rank 0 to all

    own, drawn = Own(), Before(1)
    options: dict[str, Any] = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    FILTERED.fit(own, drawn, max_epochs=1, use_distributed_sampler=False, limit_val_batches=0, **options)
    return {"drawn": drawn.drawn, "start": own.weights}


@pytest.mark.slow  # two processes import everything
def test_ranks_draw_the_same(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.test_layer_reinit:train_on_two_ranks", tmp_path)
    assert identical(first, second)
    assert identical(first["drawn"], first["start"])


@pytest.mark.parametrize("name", ["filtered", "late"])
def test_refuses_what_the_model_has_not_and_leaves_no_trace(name: str) -> None:
    with pytest.raises(ValueError, match="top=-1 must be a number of blocks, 0 or more"):
        LayerReinit(-1)
    module = STRANGER[name].module()
    with pytest.raises(ValueError, match="'top:9' must ask for 1 to 3 blocks"):
        STRANGER[name].fit(LayerReinit(9), module=module)
    assert "configure_model" not in vars(module)


def test_a_failure_before_the_model_is_built_leaves_no_trace() -> None:
    class Broken(Late):
        def setup(self, stage: str) -> None:
            raise Killed

    module = Broken()
    with pytest.raises(Killed):
        FILTERED.fit(LayerReinit(1), module=module)
    assert "configure_model" not in vars(module)
