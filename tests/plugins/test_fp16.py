from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.callbacks import EMA, EWC, L2SP, ExactResume
from lightning_ft.plugins.fp16 import FP16
from tests.callbacks.test_ema import close, debiased
from tests.callbacks.test_exact_resume import Kill, Killed, options
from tests.fisher_file import fisher_file
from tests.ranks import run_ranks
from tests.strangers import BATCHES, FILTERED, STRANGERS, Filtered, Stranger, identical, outcome, weights

PROJECTS = [stranger for stranger in STRANGERS if stranger.name != "legacy"]
"""A plugin is bound to its package: Trainer refuses one of the other."""
each_stranger = pytest.mark.parametrize("stranger", PROJECTS, ids=lambda stranger: stranger.name)
QUIET: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0}


class Injected(Filtered):
    """At the optimiser steps ``at`` the gradient that enters block 1 from above is infinite."""

    def __init__(self, at: Any = (2,), dropout: float = 0.1, where: str = "encoder.layers.1", **settings: Any) -> None:
        super().__init__(dropout)
        self.at, self.settings = set(at), settings
        self.get_submodule(where).register_forward_hook(self.inject)

    def inject(self, _: nn.Module, args: Any, output: Tensor) -> None:
        if self.training and self.trainer.global_step in self.at and output.requires_grad:
            output.register_hook(lambda grad: grad * torch.inf)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.settings.get("fused", False))
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        timing = {"interval": "step", "frequency": self.settings.get("frequency", 1)}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **timing}}


class Hooked(Injected):
    """Steps its schedulers in its own way."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(metric)


class Trace(Callback):
    """Learning rates as multiples of the first, and all weights, after each batch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 1e-2)
        self.weights.append(weights(pl_module))

    def moved(self) -> list[bool]:
        return [not identical(a, b) for a, b in zip(self.weights, self.weights[1:], strict=False)]


def steps_of(rates: list[float]) -> list[int]:
    return [round(1 / rate) - 1 for rate in rates]


# --- which layer ---------------------------------------------------------------------------------------------------


def test_names_the_layer_in_which_the_overflow_began() -> None:
    plugin, trace = FP16(init_scale=1024.0), Trace()
    module = Injected({2, 3})
    FILTERED.fit(trace, module=module, plugins=[plugin], gradient_clip_val=1.0, **QUIET)
    facts, rows = plugin.report.facts, {row["layer"]: row for row in plugin.report.rows}
    assert (facts["optimiser steps tried"], facts["skipped"]) == (BATCHES, 2)
    assert (facts["first at"], facts["last at"]) == (3, 4)
    assert facts["loss scale now"] == 256.0
    # What lies above block 1 is finite; what lies below inherits.
    assert list(rows) == ["block.1", "block.0", "embeddings"]
    assert [row["began here"] for row in rows.values()] == [2, 0, 0]
    assert [row["reached"] for row in rows.values()] == [2, 2, 2]
    assert (rows["block.1"]["lowest scale"], rows["block.1"]["highest scale"]) == (512.0, 1024.0)
    assert rows["block.1"]["parameter"].startswith("encoder.layers.1.")
    assert trace.moved() == [True, False, False, True, True]


def test_a_stale_gradient_of_another_optimiser_is_none_of_this_ones_business() -> None:
    from lightning_ft.functional.overflow import find_overflow

    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net(torch.ones(1, 1)).backward()
    net[0].weight.grad.fill_(torch.nan)  # type: ignore[union-attr]
    assert find_overflow(net, net[1].parameters()) is None
    found = find_overflow(net)
    assert found is not None
    assert found.began == "0"


class ForwardInf(Filtered):
    """From the third batch on, the second layer's last linear map gives inf."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            with torch.no_grad():
                self.encoder.layers[1].linear2.bias.fill_(torch.inf)
        return self.loss(batch)


def test_names_the_part_of_the_forward_pass_that_overflows_and_warns() -> None:
    plugin = FP16(init_scale=1024.0)
    message = r"the loss is inf or nan, and 3 steps in a row .* forward pass: encoder.layers.1.linear2. Use precision="
    with pytest.warns(UserWarning, match=message):
        FILTERED.fit(module=ForwardInf(), plugins=[plugin], **QUIET)
    rows = plugin.report.rows
    assert rows[0]["layer"] == "forward pass: encoder.layers.1.linear2"
    assert rows[0]["began here"] == 3
    assert {"layer": "forward pass", "began here": 1}.items() <= rows[1].items()


def test_warns_at_the_lowest_scale_with_the_layer_and_never_goes_below_it() -> None:
    plugin = FP16(init_scale=8.0, min_scale=2.0)
    message = (
        r"gradients overflow even at loss scale 2, and 3 steps in a row were skipped. It begins in block.1 "
        r"\(encoder.layers.1\..*\). Use precision=\"bf16-mixed\""
    )
    with pytest.warns(UserWarning, match=message):
        FILTERED.fit(module=Injected(range(9)), plugins=[plugin], **QUIET)
    assert plugin.report.facts["loss scale now"] == 2.0
    assert plugin.report.facts["share skipped"] == 1.0


def test_searches_gradients_only_where_a_step_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads one value a step from the device otherwise, for fused optimisers, too."""
    import lightning_ft.plugins.fp16 as file

    calls, search = [], file.find_overflow
    monkeypatch.setattr(file, "find_overflow", lambda *args, **more: calls.append(1) or search(*args, **more))

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts: list[int] = []

    class Counted(FP16):
        def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
            result = closure()
            with Reads() as reads:
                super().optimizer_step(optimizer, model, lambda: result, **kwargs)
            counts.append(reads.count)
            return result

    FILTERED.fit(module=Injected({2}, fused=True), plugins=[Counted(1024.0)], gradient_clip_val=1.0, **QUIET)
    assert len(calls) == 1
    assert counts[:2] + counts[3:] == [1] * (BATCHES - 1)


# --- schedulers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module_class", [Injected, Hooked])
@pytest.mark.parametrize("fused", [False, True])
def test_schedulers_wait_for_a_real_step(module_class: type[Injected], fused: bool) -> None:
    """The first step is skipped as well, at which torch else warns that the scheduler comes before the optimiser."""
    trace, module = Trace(), module_class({0, 3}, fused=fused)
    trainer = FILTERED.fit(trace, module=module, plugins=[FP16(1024.0)], **QUIET)
    assert steps_of(trace.rates) == [0, 1, 2, 2, 3, 4]
    assert trainer.global_step == BATCHES  # Lightning's count of tries
    assert "lr_scheduler_step" not in vars(module)

    lightnings = Trace()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    FILTERED.fit(lightnings, module=module_class({3}), plugins=[plugin], **QUIET)
    assert steps_of(lightnings.rates) == [1, 2, 3, 4, 5, 6]


def test_schedulers_wait_under_accumulation() -> None:
    trace = Trace()
    FILTERED.fit(trace, module=Injected({1}), plugins=[FP16(1024.0)], accumulate_grad_batches=2, **QUIET)
    assert steps_of(trace.rates) == [0, 1, 1, 1, 1, 2]


def test_a_scheduler_of_every_second_step_waits_only_where_none_of_them_was_real() -> None:
    trace = Trace()
    FILTERED.fit(trace, module=Injected({1, 2, 3}, frequency=2), plugins=[FP16(1024.0)], **QUIET)
    assert steps_of(trace.rates) == [0, 1, 1, 1, 1, 2]


class ByEpoch(Injected):
    """One scheduler by the epoch, one by a metric."""

    def __init__(self, plateau: bool) -> None:
        super().__init__(range(99))
        self.plateau, self.calls = plateau, 0

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.calls += 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.plateau:
            scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


@pytest.mark.parametrize("plateau", [False, True])
def test_schedulers_of_epochs_and_metrics_are_left_alone(plateau: bool) -> None:
    module = ByEpoch(plateau)
    FILTERED.fit(module=module, plugins=[FP16(2.0**40)], max_epochs=2)
    assert module.calls == 2


# --- what acts on gradients ----------------------------------------------------------------------------------------


class Seen(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("fused", [False, True])
def test_hooks_and_clipping_get_unscaled_gradients_of_every_optimiser(fused: bool) -> None:
    class Clipped(Injected):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

    norms: list[float] = []
    large, plain = Seen(), Seen()
    module = Clipped({}, dropout=0, fused=fused)
    FILTERED.fit(large, module=module, plugins=[FP16(2.0**12)], gradient_clip_val=0.01, **QUIET)
    FILTERED.fit(plain, module=Injected({}, dropout=0), **QUIET)
    for name, expected in plain.seen[0].items():
        torch.testing.assert_close(large.seen[0][name], expected, rtol=0.02, atol=2e-3)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)
    assert len(norms) >= BATCHES - 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("penalty", [lambda: L2SP(0.5, head_strength=0.1), lambda: EWC(0.5, fisher_file())])
def test_coupled_penalties_are_added_to_scale_and_inf_is_never_repaired(penalty: Any, fused: bool) -> None:
    """The same gradient at any scale; of a skipped step no weight moves."""

    def fit(scale: float) -> Seen:
        before, after = Seen(), Seen()
        module = Injected({2}, dropout=0, fused=fused)
        FILTERED.fit(before, penalty(), after, module=module, plugins=[FP16(scale)], **QUIET)
        name = "encoder.layers.1.linear1.weight"
        added = [new[name] - old[name] for new, old in zip(after.seen, before.seen, strict=True)]
        assert added[1].abs().max() > 1e-4
        assert not after.seen[2][name].isfinite().any()
        assert [bool(a.isfinite().all()) for a in added] == [True, True, False, True, True, True]
        return after

    one, other = fit(256.0), fit(4096.0)
    for name, gradient in one.seen[1].items():
        torch.testing.assert_close(gradient, other.seen[1][name], rtol=0.02, atol=2e-3)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def everything(trainer: Any, plugin: FP16) -> Any:
    return outcome(trainer), plugin.state_dict()


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize(
    ("hook", "epoch", "batch"),
    [
        ("on_after_backward", 1, 3),
        ("on_train_batch_end", 1, 5),
        ("on_validation_end", 0, 5),
        ("on_after_backward", 0, 4),
    ],
)
def test_resume_is_exact_in_scale_report_and_schedule(
    hook: str, epoch: int, batch: int, frequency: int, tmp_path: Path
) -> None:
    """Dropout, shuffling, accumulation, mid-epoch validation; the steps 1, 3 and 5 are skipped, and the scale grows."""

    def fit(folder: Path, *more: Callback, **resume: Any) -> Any:
        plugin = FP16(1024.0, growth_interval=2)
        module = Injected({1, 3, 5}, frequency=frequency)
        exact = ExactResume("1 steps", dirpath=folder)
        trainer = FILTERED.fit(exact, *more, module=module, plugins=[plugin], **options(FILTERED, folder), **resume)
        return everything(trainer, plugin)

    whole = fit(tmp_path / "whole")
    assert whole[1]["log"]["skipped"] == 3
    with pytest.raises(Killed):
        fit(tmp_path / "killed", Kill(hook, epoch, batch))
    torch.manual_seed(99)
    assert identical(fit(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "last.ckpt"), whole)


def test_takes_over_the_scale_that_lightnings_plugin_saved(tmp_path: Path) -> None:
    theirs = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    FILTERED.fit(plugins=[theirs], **QUIET).save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    plugin = FP16()
    FILTERED.fit(plugins=[plugin], ckpt_path=tmp_path / "a.ckpt", **{**QUIET, "max_epochs": 2})
    assert plugin.report.facts["loss scale now"] == 64.0


# --- strangers and neighbours ----------------------------------------------------------------------------------------


@each_stranger
def test_serves_every_project_and_leaves_nothing(stranger: Stranger) -> None:
    plugin, module = FP16(1024.0), stranger.module()
    trainer = stranger.fit(module=module, plugins=[plugin])
    assert plugin.report.facts["optimiser steps tried"] == trainer.global_step > 0
    assert "lr_scheduler_step" not in vars(module)
    assert not identical(weights(module), weights(stranger.fit(max_epochs=0).lightning_module))
    file = io.BytesIO()
    torch.save(plugin.state_dict(), file)
    file.seek(0)
    other = FP16(1024.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert identical(other.state_dict(), plugin.state_dict())


@each_stranger
def test_without_overflow_it_is_lightnings_plugin_to_the_bit(stranger: Stranger) -> None:
    """But for fused optimisers, whose gradients Lightning leaves scaled: powers of two, so the bits are the same."""
    theirs = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert identical(outcome(stranger.fit(plugins=[FP16(1024.0)])), outcome(stranger.fit(plugins=[theirs])))


def test_leaves_nothing_after_an_exception_and_forgets_the_first_fit() -> None:
    plugin, module = FP16(1024.0), Injected({2})
    with pytest.raises(Killed):
        FILTERED.fit(Kill("on_after_backward", 0, 4), module=module, plugins=[plugin])
    assert "lr_scheduler_step" not in vars(module)
    FILTERED.fit(module=Injected({}), plugins=[plugin], **QUIET)
    assert plugin.report.facts["skipped"] == 0
    assert plugin.report.facts["loss scale now"] == 1024.0


def test_the_report_outlives_a_validation() -> None:
    plugin = FP16(1024.0)
    trainer = FILTERED.fit(module=Injected({2}), plugins=[plugin], **QUIET)
    trainer.validate(trainer.lightning_module, verbose=False)
    assert plugin.report.facts["skipped"] == 1


def test_manual_optimisation_is_told_what_was_skipped() -> None:
    class ByHand(Injected):
        def __init__(self) -> None:
            super().__init__({1})
            self.automatic_optimization = False
            self.skipped: list[bool] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()
            self.skipped.append(self.trainer.precision_plugin.skipped)

    module = ByHand()
    FILTERED.fit(module=module, plugins=[FP16(1024.0)], **QUIET)
    assert module.skipped == [False, True, False, False, False, False]


@pytest.mark.filterwarnings("ignore:.*returned .None.")
def test_steps_without_a_loss_are_neither_counted_nor_held() -> None:
    class Silent(Injected):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else self.loss(batch)

    plugin, trace = FP16(1024.0), Trace()
    FILTERED.fit(trace, module=Silent({}), plugins=[plugin], **QUIET)
    assert plugin.report.facts["optimiser steps tried"] == BATCHES - 1
    assert steps_of(trace.rates) == [1, 2, 3, 4, 5, 6]


def test_averages_skip_what_was_skipped_and_copies_of_the_module_work() -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            copy.deepcopy(pl_module)

    trace = Trace()
    trainer = FILTERED.fit(
        trace, EMA(0.5), Copies(), module=Injected({2, 3}, fused=True), plugins=[FP16(1024.0)], **QUIET
    )
    assert trace.moved() == [True, False, False, True, True]
    close(weights(trainer.lightning_module), debiased([*trace.weights[:2], *trace.weights[4:]], 0.5))


def test_two_processes_skip_together(tmp_path: Path) -> None:
    first, second = run_ranks("tests.plugins.fp16_ranks:run", tmp_path)
    assert identical(first["weights"], second["weights"])
    assert first["rates"] == second["rates"]
    assert first["report"] == second["report"]
    assert '"skipped": 2' in first["report"]
    assert '"layer": "block.1"' in first["report"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_is_named_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "trainer:\n  accelerator: cpu\n  logger: false\n  plugins:\n"
        "  - class_path: lightning_ft.plugins.fp16.FP16\n"
        "    init_args: {init_scale: 512.0, layers: {head: classifier}}\n"
    )
    monkeypatch.setattr("sys.argv", ["fit", "--config", str(file)])
    cli = LightningCLI(Filtered, run=False, save_config_callback=None, seed_everything_default=1)
    plugin = cli.trainer.precision_plugin
    assert isinstance(plugin, FP16)
    assert (plugin.init_scale, plugin.layers.head) == (512.0, "classifier")


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_refuses_weights_in_half_precision_unless_frozen(dtype: torch.dtype) -> None:
    module = Filtered()
    module.encoder.layers[0].to(dtype)
    with pytest.raises(ValueError, match=rf"FP16 trains fp32 .* encoder.layers.0.* is {dtype}.* Load the model"):
        FILTERED.fit(module=module, plugins=[FP16()], **QUIET)
    module.encoder.layers[0].requires_grad_(False)
    FP16(1024.0).connect(module, [torch.optim.AdamW(module.parameters())], [])


def test_refuses_arguments_that_make_no_sense_and_lbfgs() -> None:
    with pytest.raises(ValueError, match=r"min_scale=4 must be above 0, and at most init_scale=2"):
        FP16(2, min_scale=4)
    with pytest.raises(ValueError, match=r"growth_interval=0 must be 1 step or more"):
        FP16(growth_interval=0)

    class Second(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="FP16 cannot scale the losses of LBFGS"):
        FILTERED.fit(module=Second(), plugins=[FP16()], **QUIET)


def test_layers_that_were_given_wrong_are_not_guessed() -> None:
    from lightning_ft.core.layers import Layers

    plugin = FP16(1024.0, layers=Layers(head="nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        FILTERED.fit(module=Injected({2}), plugins=[plugin], **QUIET)


def test_a_model_without_blocks_is_told_by_module() -> None:
    class Flat(Injected):
        def __init__(self) -> None:
            super().__init__({2}, where="classifier")
            self.encoder = nn.Embedding(20, 8)

    plugin = FP16(1024.0)
    FILTERED.fit(module=Flat(), plugins=[plugin], **QUIET)
    assert [row["layer"] for row in plugin.report.rows] == ["classifier", "encoder"]


def test_trainer_is_of_one_precision() -> None:
    with pytest.raises(ValueError, match="both"):
        Trainer(plugins=[FP16()], precision="bf16-mixed", accelerator="cpu", logger=False)
