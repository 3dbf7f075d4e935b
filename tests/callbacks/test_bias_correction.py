from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_ft.callbacks import DiscriminativeLR, GradualUnfreezing, RecAdam
from lightning_ft.callbacks.bias_correction import BiasCorrection, _UncorrectedSteps
from tests.callbacks.test_contract import FailAt, Failure, Watch
from tests.strangers import FILTERED, STILL, STRANGERS, Filtered, Stranger, identical, weights


class Plain(Filtered):
    """No dropout and no schedule: closed forms."""

    def __init__(self, kind: type[torch.optim.Optimizer], **options: Any) -> None:
        super().__init__(dropout=0)
        self.kind, self.options = kind, {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4, **options}

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), **self.options)


class BERTAdam(torch.optim.Optimizer):
    """The update of google-research/bert's optimization.py, written out."""

    def __init__(self, params: Any, lr: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m, v = (state.setdefault(name, torch.zeros_like(p)) for name in "mv")
                m.copy_(0.9 * m + 0.1 * p.grad)
                v.copy_(0.999 * v + 0.001 * p.grad**2)
                update = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(group["lr"] * update)
        return loss


def module(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Plain:
    return Plain(kind, **options)


def step_once(optimizer: torch.optim.Optimizer) -> None:
    steps = _UncorrectedSteps(optimizer)
    optimizer.step()
    steps.remove()


def test_first_step_is_root_of_ten_times_the_corrected_one() -> None:
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    step_once(torch.optim.AdamW([weight], lr=1.0, eps=0.0, weight_decay=0.0))
    assert weight.item() == pytest.approx(-3.1623, abs=1e-4)


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_fifty_steps_are_those_of_bert_adam(options: dict[str, Any]) -> None:
    oracle = module(BERTAdam)
    ours = STILL.fit(BiasCorrection(correct_bias=False), module=module(**options), max_steps=50, max_epochs=-1)
    theirs = STILL.fit(module=oracle, max_steps=50, max_epochs=-1)
    close(weights(ours.lightning_module), weights(theirs.lightning_module))
    plain = STILL.fit(module=module(**options), max_steps=50, max_epochs=-1)
    assert not torch.allclose(
        plain.lightning_module.classifier.weight, ours.lightning_module.classifier.weight, atol=1e-3
    )


def test_coupled_decay_of_adam_goes_through_the_gradient() -> None:
    decay = 0.1

    class Coupled(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for p in pl_module.parameters():
                p.grad.add_(p.detach(), alpha=decay)

    ours = STILL.fit(BiasCorrection(correct_bias=False), module=module(torch.optim.Adam, weight_decay=decay))
    theirs = STILL.fit(Coupled(), module=module(BERTAdam, weight_decay=0.0))
    close(weights(ours.lightning_module), weights(theirs.lightning_module))


def test_amsgrad_keeps_the_largest_average() -> None:
    weight, rate, eps = nn.Parameter(torch.tensor([0.5])), 0.01, 1e-3
    optimizer = torch.optim.AdamW([weight], lr=rate, eps=eps, weight_decay=0.0, amsgrad=True)
    steps = _UncorrectedSteps(optimizer)
    expected, m, v, largest = 0.5, 0.0, 0.0, 0.0
    for gradient in (1.0, -2.0, 0.1, 0.0, 0.3):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        largest = max(largest, v)
        expected -= rate * m / (largest**0.5 + eps)
        assert weight.item() == pytest.approx(expected, abs=1e-6)
    steps.remove()


def test_layers_that_thaw_late_begin_at_their_own_first_step() -> None:
    callbacks = [GradualUnfreezing("2 steps"), BiasCorrection(correct_bias=False)]
    ours = STILL.fit(*callbacks, module=module(), max_epochs=3)
    theirs = STILL.fit(GradualUnfreezing("2 steps"), module=module(BERTAdam), max_epochs=3)
    close(weights(ours.lightning_module), weights(theirs.lightning_module))


@pytest.mark.parametrize("order", [1, -1])
def test_works_inside_the_rates_of_others(order: int) -> None:
    callbacks = [DiscriminativeLR(0.5), BiasCorrection(correct_bias=False)][::order]
    ours = STILL.fit(*callbacks, module=module())
    theirs = STILL.fit(DiscriminativeLR(0.5), module=module(BERTAdam))
    close(weights(ours.lightning_module), weights(theirs.lightning_module))


def test_recalls_at_the_true_rate() -> None:
    def recall(kind: type[torch.optim.Optimizer], *callbacks: Callback) -> dict[str, Tensor]:
        # λ = 1/2 all along: half of the step, and half of the pull.
        recall = RecAdam(50.0, t0=10**6, k=1e-12, legacy_order=True)
        return weights(STILL.fit(recall, *callbacks, module=module(kind, weight_decay=0.0)).lightning_module)

    from lightning_ft.callbacks import _annealed_recall

    found = recall(torch.optim.AdamW, BiasCorrection(correct_bias=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_annealed_recall, "check_linear", lambda *_: None)
        patch.setattr("lightning_ft.callbacks.rec_adam.check_linear", lambda *_: None)
        close(found, recall(BERTAdam))


def test_refuses_to_stand_before_rec_adam() -> None:
    with pytest.raises(RuntimeError, match="put BiasCorrection last"):
        STILL.fit(BiasCorrection(correct_bias=False), RecAdam(1.0), module=module())


def test_a_step_that_the_device_skipped_does_not_count() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer: Any = torch.optim.AdamW([weight], lr=1.0, eps=0.0, weight_decay=0.0, fused=True)
    steps = _UncorrectedSteps(optimizer)
    weight.grad = torch.ones(1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert weight.item() == 0
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert weight.item() == pytest.approx(-3.1623, abs=1e-4)
    steps.remove()


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_serves_strangers_and_leaves_nothing_behind(stranger: Stranger) -> None:
    if stranger.name == "head-first":
        with pytest.raises(TypeError, match="not that of SGD: use one of them"):
            stranger.fit(BiasCorrection(correct_bias=False))
        return
    watch, module = Watch(), stranger.module()
    trainer = stranger.fit(watch, BiasCorrection(correct_bias=False), module=module)
    watch.check(trainer, module)
    assert not identical(weights(module), weights(stranger.fit(BiasCorrection(correct_bias=True)).lightning_module))
    trainer = stranger.trainer([watch, BiasCorrection(correct_bias=False), FailAt()])
    with pytest.raises(Failure):
        trainer.fit(module)
    watch.check(trainer, module)


def test_resumes_bit_for_bit(tmp_path: Any) -> None:
    whole = FILTERED.fit(BiasCorrection(correct_bias=False), module=module(), max_epochs=2)
    half = FILTERED.fit(BiasCorrection(correct_bias=False), module=module(), max_epochs=1, default_root_dir=tmp_path)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = FILTERED.fit(
        BiasCorrection(correct_bias=False), module=module(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt"
    )
    assert identical(weights(rest.lightning_module), weights(whole.lightning_module))


def test_state_dict_and_schedule_stay_the_projects_own() -> None:
    ours, plain = FILTERED.fit(BiasCorrection(correct_bias=False)), FILTERED.fit()
    theirs = plain.optimizers[0].state_dict()["param_groups"]
    assert ours.optimizers[0].state_dict()["param_groups"] == theirs
    assert not ours.optimizers[0]._optimizer_step_pre_hooks
    assert not ours.optimizers[0]._optimizer_step_post_hooks
