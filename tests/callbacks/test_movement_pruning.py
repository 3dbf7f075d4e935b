"""Movement pruning in projects that know nothing of it, and in four kinds of models."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_ft.callbacks import L2SP, DiscriminativeLR, ExactResume, GradualUnfreezing, Mixout
from lightning_ft.callbacks.movement_pruning import MovementPruning
from lightning_ft.core.layers import Layers
from lightning_ft.data import ClassificationData
from lightning_ft.export import export_hf, export_onnx, load_session
from lightning_ft.functional.alterations import load_altered
from lightning_ft.functional.masked_weights import Mode, bake, masked_weights
from lightning_ft.functional.movement import cubic, kept_count
from lightning_ft.modules import SequenceClassification, load_checkpoint
from tests.pretrained import Kind, pretrained
from tests.strangers import BATCHES, FILTERED, STRANGERS, Filtered, Stranger, dataset, identical, outcome, weights

MODES: tuple[Mode, ...] = ("hard", "soft", "magnitude")
KINDS: tuple[Kind, ...] = ("bert", "gpt2", "llama", "t5")
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda s: s.name)
SCORES = "parametrizations.weight.0.scores"


class StopAt(Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = epoch, batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise KeyboardInterrupt


class Look(Callback):
    """The masks during each batch, by their number of kept weights; and the levels."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.masks.append({m.name: m.by.mask.clone() for m in masked_weights(pl_module)})


def accumulating(stranger: Stranger) -> dict[str, Any]:
    return {} if stranger.name == "manual" else {"accumulate_grad_batches": 2}


# ---- strangers


@each_stranger
@pytest.mark.parametrize("mode", MODES)
def test_prunes_on_schedule_and_leaves_no_trace(stranger: Stranger, mode: Mode) -> None:
    final, look = 0.25, Look()
    callback = MovementPruning(final, mode, warmup="1 epoch", cooldown=0.25, penalty=4.0)
    trainer = stranger.fit(callback, look, max_epochs=4, **accumulating(stranger))
    module, found = trainer.lightning_module, masked_weights(trainer.lightning_module)
    assert len(found) == (18 if stranger.name == "late" else 12)
    assert all(m.name.split(".")[-3] != "verdict" for m in found)
    assert not any("classifier" in m.name for m in found)
    if mode != "soft":
        for batch, masks in enumerate(look.masks):
            position = batch // 2 * 2 / (4 * BATCHES)  # the same through a window of two batches
            share = cubic(1.0, final, (position - 0.25) / (1 - 0.25 - 0.25))
            assert all(int(mask.sum()) == kept_count(share, mask.numel()) for mask in masks.values()), batch
        assert callback.report is not None
        assert callback.report.facts["kept"] == sum(kept_count(final, m.weight.numel()) for m in found)
    else:
        for m in found:
            assert m.by.scores is not None
            assert torch.equal(m.by.mask, torch.sigmoid(m.by.scores) > final)
    assert callback.report is not None
    assert callback.report.facts["optimiser steps"] == 4 * BATCHES // 2
    assert "clip_gradients" not in vars(module)
    assert "configure_gradient_clipping" not in vars(module)
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert len(optimizer.param_groups) == (2 if stranger.name == "late" else 1)
    tokens = dataset().tensors[0]
    with torch.no_grad():
        before = module.eval()(tokens)
        bake(module)
        torch.testing.assert_close(module(tokens), before, rtol=0, atol=1e-5)
    assert stranger.module().load_state_dict is not None


@each_stranger
@pytest.mark.parametrize("place", [(0, BATCHES - 1), (1, 2)])
def test_resumes_bit_for_bit(stranger: Stranger, place: tuple[int, int], tmp_path: Path) -> None:
    """Dropout, shuffling, accumulation, validation in mid-epoch; killed on an epoch's last batch, and in a window."""
    options = {"val_check_interval": 0.5, "num_sanity_val_steps": 0, "max_epochs": 3, "gradient_clip_val": 0.5}
    if stranger.name in ("manual", "late"):
        del options["gradient_clip_val"]
    options |= accumulating(stranger)

    def callbacks(folder: Path, *more: Callback) -> list[Callback]:
        mode: Mode = "soft" if stranger.name == "late" else "hard"
        pruning = MovementPruning(0.3, mode, warmup="1 epoch", cooldown=0.1, penalty=4.0)
        return [ExactResume("1 steps", dirpath=folder), pruning, DiscriminativeLR(0.8), *more]

    whole = callbacks(tmp_path / "whole")
    wanted = outcome(stranger.fit(*whole, **options))
    killed = callbacks(tmp_path, StopAt(*place))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stranger.fit(*killed, **options)
    resumed = callbacks(tmp_path)
    assert identical(outcome(stranger.fit(*resumed, ckpt_path=tmp_path / "last.ckpt", **options)), wanted)
    assert resumed[1].state_dict() == whole[1].state_dict()
    assert resumed[1].report == whole[1].report  # type: ignore[attr-defined]


@each_stranger
def test_a_stranger_is_loaded_again(stranger: Stranger, tmp_path: Path) -> None:
    trainer = stranger.fit(MovementPruning(0.3, cooldown=0))
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    fresh = stranger.module()
    if stranger.name == "late":
        fresh.configure_model()
    load_altered(fresh, tmp_path / "pruned.ckpt")
    tokens = dataset().tensors[0]
    with torch.no_grad():
        logits = fresh.eval()(tokens)
        assert torch.equal(logits, trainer.lightning_module.eval()(tokens))
        report = bake(fresh)
        torch.testing.assert_close(fresh(tokens), logits, rtol=0, atol=1e-5)
    assert report.facts["sparsity"] == pytest.approx(0.7, abs=0.02)


def test_keeping_all_is_training_without() -> None:
    plain = FILTERED.fit()
    kept = FILTERED.fit(MovementPruning(1.0, "magnitude"))
    bake(kept.lightning_module)
    ours, theirs = weights(kept.lightning_module), weights(plain.lightning_module)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Scores beside it do not change what the weights do, either.
    scored = FILTERED.fit(MovementPruning(1.0))
    bake(scored.lightning_module)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(scored.lightning_module).items())


def test_one_step_by_hand() -> None:
    """SGD: S ← S − η_S g ⊙ W, whatever the module's rate is; W ← W − η g ⊙ M."""

    class Plain(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.5)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    class Catch(Callback):
        gradient: Tensor

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            linear = pl_module.encoder.layers[0].linear1
            self.gradient = linear.parametrizations.weight.original.grad.clone()

    module, catch = Plain(), Catch()
    start = module.encoder.layers[0].linear1.weight.detach().clone()
    FILTERED.fit(MovementPruning(0.5, score_learning_rate=3.0), catch, module=module, max_steps=1)
    linear = module.encoder.layers[0].linear1.parametrizations.weight
    torch.testing.assert_close(linear[0].scores, -1.5 * catch.gradient * start)  # η_S at half its base, no decay
    torch.testing.assert_close(linear.original, start - 0.05 * (catch.gradient + 0.5 * start))


def test_the_rate_of_scores_follows_the_highest_of_a_one_cycle() -> None:
    rates = []

    class Cycled(Filtered):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, total_steps=12)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            step = trainer.optimizers[0]
            if batch_idx == 0 and trainer.current_epoch == 0:
                step.register_step_pre_hook(self._note)

        def _note(self, optimizer: Any, *_: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    FILTERED.fit(MovementPruning(0.5, score_learning_rate=0.1), Rates(), module=Cycled())
    assert len(rates) == 12
    assert all(own == pytest.approx(0.05 * other) for other, own in rates)
    assert max(own for _, own in rates) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_groups_split_by_others_too_are_joined_again(order: tuple[int, ...]) -> None:
    makes = [lambda: MovementPruning(0.5), lambda: DiscriminativeLR(0.5), lambda: GradualUnfreezing("3 steps")]
    trainer = FILTERED.fit(*(makes[i]() for i in order))
    (group,) = trainer.optimizers[0].param_groups
    assert len(group["params"]) == len(list(trainer.lightning_module.parameters()))
    # Orders differ in when blocks thaw beside scores, but not in what the first two do.
    if order[0] != 2:
        reference = FILTERED.fit(makes[0](), makes[1](), GradualUnfreezing("3 steps"))
        assert identical(outcome(trainer), outcome(reference))


# ---- clipping


class Norms(Callback):
    """Gradient norms of weights and of scores when the optimiser steps; the scores' gradients are made large before."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.norms: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._note(pl_module))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, p in pl_module.named_parameters():
            p.grad.mul_(self.factor if name.endswith("scores") else 1e3)

    def _note(self, module: Any) -> None:
        named = dict(module.named_parameters())
        parts = [[p for n, p in named.items() if n.endswith("scores") == scores] for scores in (False, True)]
        sums = [sum(float(p.grad.square().sum()) for p in part) ** 0.5 for part in parts]
        self.norms.append((sums[0], sums[1]))


class ByHand(Filtered):
    """Clips in its own way."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)


class ManualClipping(Filtered):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        for name, p in self.named_parameters():
            p.grad.mul_(1e6 if name.endswith("scores") else 1e3)  # type: ignore[union-attr]
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [Filtered, ByHand, ManualClipping])
def test_large_gradients_of_scores_do_not_shrink_those_of_weights(make: Any) -> None:
    norms = Norms(1e6)
    options = {"gradient_clip_val": 0.5} if make is Filtered else {}
    if make is ManualClipping:
        norms.on_before_optimizer_step = lambda *_: None  # type: ignore[method-assign]
    FILTERED.fit(MovementPruning(0.5), norms, module=make(), max_epochs=1, **options)
    assert len(norms.norms) == BATCHES
    for of_weights, of_scores in norms.norms:
        assert of_weights == pytest.approx(0.5, rel=1e-3)
        assert of_scores == pytest.approx(0.5, rel=1e-3)


# ---- fp16


def test_a_step_that_overflowed_changes_no_mask_and_the_end_is_reached() -> None:
    """The scaler begins so high that the first steps overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000, backoff_factor=2.0**-30)
    look, callback = Look(), MovementPruning(0.25, cooldown=0, warmup=0)

    class Half(Filtered):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            # What an fp16 backward pass would do at such a scale.
            loss = self.loss(batch)
            loss.register_hook(lambda g: torch.where(g > 2.0**20, torch.inf, g))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = FILTERED.fit(callback, look, module=Half(), plugins=[plugin])
    assert trainer.global_step == 12
    assert callback.state_dict()["steps"] == 11
    kept = [sum(int(mask.sum()) for mask in masks.values()) for masks in look.masks]
    total = sum(mask.numel() for mask in look.masks[0].values())
    assert kept[:2] == [total, total]  # the first step was none
    assert kept[2] == sum(kept_count(cubic(1, 0.25, 2 / 12), mask.numel()) for mask in look.masks[0].values())
    assert callback.report is not None
    assert callback.report.facts["sparsity"] == pytest.approx(0.75, abs=1e-3)


def test_the_penalty_is_added_to_unscaled_gradients() -> None:
    """Fused optimisers unscale inside ``step()``, others before."""
    results = []
    for scale, fused in itertools.product((1.0, 1024.0), (False, True)):

        class Optimised(Filtered):
            def __init__(self) -> None:
                super().__init__(dropout=0)

            def configure_optimizers(self, fused: bool = fused) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        pruning = MovementPruning(0.2, "soft", warmup=0, cooldown=0, score_learning_rate=1.0, penalty=50.0)
        module = FILTERED.fit(pruning, module=Optimised(), plugins=[plugin], max_epochs=1).lightning_module
        results.append([m.by.scores for m in masked_weights(module)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-4)  # bf16 rounds in both


def test_the_penalty_moves_scores_down() -> None:
    def mean(penalty: float) -> float:
        pruning = MovementPruning(0.1, "soft", warmup=0, cooldown=0, penalty=penalty)
        module = FILTERED.fit(pruning).lightning_module
        return float(torch.stack([m.by.scores.detach().mean() for m in masked_weights(module)]).mean())

    assert mean(400.0) < mean(0.0) - 0.02


# ---- four kinds


def _data(folder: str, tmp_path: Path) -> ClassificationData:
    rows = "\n".join(f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(16))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}\n", encoding="utf-8")
    return ClassificationData(folder, str(tmp_path / "rows.csv"), str(tmp_path / "rows.csv"), batch_size=4)


def _fit(module: Any, data: Any, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    settings = {"accelerator": "cpu", "max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 0.5}
    trainer = Trainer(callbacks=list(callbacks), num_sanity_val_steps=0, **{**quiet, **settings, **options})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_of_each_kind(kind: Kind, tmp_path: Path) -> None:
    """Trains, resumes exactly, is loaded from its checkpoint alone, is baked, and opens in transformers."""
    folder = pretrained(tmp_path / "base", kind, hf.AutoModelForSequenceClassification)
    module, data = SequenceClassification(folder, num_labels=2, learning_rate=1e-3), _data(folder, tmp_path)
    start = weights(module)
    whole = [ExactResume("1 steps", dirpath=tmp_path / "whole"), MovementPruning(0.25)]
    _fit(module, data, *whole)
    moved = {name: not torch.equal(value, start[name]) for name, value in weights(_baked(module)).items()}
    assert all(moved[name] for name in moved if name.endswith("weight") and "relative_attention" not in name)

    files = tmp_path / "killed"
    make = lambda: SequenceClassification(folder, num_labels=2, learning_rate=1e-3)  # noqa: E731
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        _fit(make(), data, ExactResume("1 steps", dirpath=files), MovementPruning(0.25), StopAt(0, 3))
    resumed = make()
    again = [ExactResume("1 steps", dirpath=files), MovementPruning(0.25)]
    _fit(resumed, _data(folder, tmp_path), *again, ckpt_path=files / "last.ckpt")
    assert identical(weights(resumed), weights(module))

    path = tmp_path / "whole" / "last.ckpt"
    loaded = load_checkpoint(path).eval()
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        logits = loaded(batch)
        assert torch.equal(logits, module.eval()(batch))
        torch.testing.assert_close(_baked(loaded).eval()(batch), logits, rtol=0, atol=1e-5)
    found = masked_weights(loaded)
    with pytest.raises(ValueError, match=r"are computed when the model runs \(MovementPruning .*export_hf"):
        loaded.save_pretrained(tmp_path / "wrong")
    export_hf(path, tmp_path / "folder")
    opened = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "folder").eval()
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    with torch.no_grad():
        torch.testing.assert_close(opened(**given).logits, logits, rtol=0, atol=1e-5)
    tensors = dict(opened.named_parameters())
    for m in found:
        name = m.name.removeprefix("model.")
        assert int(tensors[name].count_nonzero()) <= kept_count(0.25, m.weight.numel())


def _baked(module: Any) -> Any:
    copied = copy.deepcopy(module)
    bake(copied)
    return copied


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_pruned_model_exports_with_its_zeros(kind: Kind, tmp_path: Path) -> None:
    import onnx
    import onnx.numpy_helper

    folder = pretrained(tmp_path / "base", kind, hf.AutoModelForSequenceClassification)
    module, data = SequenceClassification(folder, num_labels=2, learning_rate=1e-3), _data(folder, tmp_path)
    _fit(module, data, MovementPruning(0.25)).save_checkpoint(path := tmp_path / "pruned.ckpt")
    report = export_onnx(path, tmp_path / "onnx")
    assert report.facts
    load_session(tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    zeros = sum(int((onnx.numpy_helper.to_array(t) == 0).sum()) for t in graph.initializer)
    wanted = sum(m.weight.numel() - kept_count(0.25, m.weight.numel()) for m in masked_weights(module))
    assert wanted <= zeros


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "mode='both' must be \"hard\""),
        ({"final": 0.0}, r"final=0.0 must be the share of weights that is kept, in \(0, 1\]"),
        ({"final": 1.0, "mode": "soft"}, r"final=1.0 must be a threshold in \(0, 1\)"),
        ({"scope": "block"}, 'scope=\'block\' must be "matrix" or "global"'),
        ({"score_learning_rate": -1.0}, "score_learning_rate=-1.0 must be 0 or more"),
        ({"penalty": float("nan")}, "penalty=nan must be 0 or more"),
        ({"warmup": 100}, "warmup=100 has no unit"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovementPruning(**arguments)


def test_refuses_what_cannot_be_scheduled() -> None:
    with pytest.raises(ValueError, match="follows the share of training that is done, and this one has no end"):
        FILTERED.fit(MovementPruning(), max_epochs=-1)
    with pytest.raises(ValueError, match=r"warmup and cooldown leave no training to prune in: 0.6 and 0.5"):
        FILTERED.fit(MovementPruning(warmup=0.6, cooldown=0.5))
    with pytest.raises(ValueError, match=r'warmup="2 steps" is no known share of this training'):
        STRANGERS[2].fit(MovementPruning(warmup="2 steps"))


def test_refuses_an_optimiser_without_the_scores() -> None:
    class Named(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.classifier.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"added 12 tensors to the model, and 12 of them are in no optimiser"):
        FILTERED.fit(MovementPruning(), module=Named())


def test_refuses_a_base_rate_of_zero() -> None:
    class Still(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    with pytest.raises(ValueError, match=r"has the base learning rate 0\.0, of which nothing can take a share"):
        FILTERED.fit(MovementPruning(), module=Still())


def test_warns_of_scores_in_half_precision() -> None:
    with pytest.warns(UserWarning, match="MovementPruning with scores of half precision"):
        FILTERED.fit(MovementPruning(), precision="bf16-true", max_steps=1)


def test_the_durations_of_a_known_length_are_shares() -> None:
    callback = MovementPruning(0.5, warmup="3 steps", cooldown="1 epoch")
    FILTERED.fit(callback)
    assert callback._ends == (0.25, 0.5)
    FILTERED.fit(callback := MovementPruning(0.5, warmup="3 steps"), max_steps=6, max_epochs=-1)
    assert callback._ends == (0.5, 0.8)


def test_logs_its_level_and_what_it_keeps() -> None:
    told: list[tuple[int | None, dict[str, float]]] = []

    class Told(DummyLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            told.append((step, dict(metrics)))

    callback = MovementPruning(0.25, warmup=0, cooldown=0)
    FILTERED.fit(callback, logger=Told(), log_every_n_steps=4, limit_val_batches=0)
    ours = [(step, metrics) for step, metrics in told if "pruning/level" in metrics]
    assert [step for step, _ in ours] == [4, 8, 12]
    for step, metrics in ours:
        assert metrics["pruning/level"] == pytest.approx(cubic(1.0, 0.25, step / 12))  # type: ignore[operator]
        assert metrics["pruning/sparsity"] == pytest.approx(1 - metrics["pruning/level"], abs=1e-2)


def test_layers_said_by_hand() -> None:
    module = Filtered()
    FILTERED.fit(MovementPruning(0.5, layers=Layers(blocks="encoder.layers")), module=module, max_epochs=1)
    assert len(masked_weights(module)) == 12


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_weights_that_are_computed_are_not_mixed(order: tuple[int, int]) -> None:
    both = [MovementPruning(), Mixout(0.5)]
    with pytest.raises(ValueError, match=r"has a weight that is computed \(ParametrizedMultiheadAttention; Movement"):
        FILTERED.fit(*(both[i] for i in order))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_scores_are_not_pulled_to_where_they_began(order: tuple[int, int]) -> None:
    """They have no pretrained values."""

    class Still(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    both = [MovementPruning(1.0, score_learning_rate=0.0), L2SP(1.0, "decoupled")]
    module = Still()
    masks = Spread()
    FILTERED.fit(*(both[i] for i in order), masks, module=module, max_epochs=1)
    assert all(bool((m.by.scores == 3).all()) for m in masked_weights(module))


class Spread(Callback):
    """Sets all scores to 3."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for m in masked_weights(pl_module):
            torch.nn.init.constant_(m.by.scores, 3)  # type: ignore[arg-type]


def test_a_mask_that_was_changed_is_not_saved(tmp_path: Path) -> None:
    class Change(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            masked_weights(pl_module)[0].by.mask[0, 0] = False

    trainer = FILTERED.fit(MovementPruning(1.0), Change(), max_steps=1)
    with pytest.raises(RuntimeError, match=r"keeps 191 weights, where 192 were chosen"):
        trainer.save_checkpoint(tmp_path / "changed.ckpt")


def test_refuses_sharded_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ft.functional.masked_weights.is_sharded", lambda p: True)
    with pytest.raises(ValueError, match=r"chooses among all scores of a matrix.*train with DDP"):
        FILTERED.fit(MovementPruning())
