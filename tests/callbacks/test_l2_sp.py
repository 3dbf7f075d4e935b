from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ft.callbacks import L2SP, DiscriminativeLR, GradualUnfreezing
from lightning_ft.core import Layers
from tests.strangers import BATCHES, FILTERED, STRANGERS, Filtered, Stranger, identical, outcome, weights

ALPHA, BETA, RATE = 0.5, 0.1, 0.1
LATE = next(stranger for stranger in STRANGERS if stranger.name == "late")


def anchored(name: str, tensor: Tensor) -> bool:
    """The oracle's own rule, by hand: the matrices of everything but the classifier."""
    return not name.startswith(("classifier", "bert.classifier", "verdict")) and tensor.ndim > 1


class Plain(Filtered):
    """No dropout, no scheduler: an optimiser to choose, and an Ω in the loss if ``in_loss``."""

    def __init__(self, optimizer: Any = torch.optim.SGD, *, in_loss: bool = False) -> None:
        super().__init__(dropout=0)
        self.make_optimizer, self.in_loss = optimizer, in_loss
        self.start = weights(self)

    def omega(self) -> Tensor:
        named = dict(self.named_parameters())
        body = [(p - self.start[name]).square().sum() for name, p in named.items() if anchored(name, p)]
        return 0.5 * ALPHA * sum(body) + 0.5 * BETA * named["classifier.weight"].square().sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        window = self.trainer.accumulate_grad_batches
        last = (batch_idx + 1) % window == 0 or batch_idx + 1 == BATCHES
        # Lightning divides by the window, so that this is Ω once an optimiser step, in a window cut short, too.
        return self.loss(batch) + (window * self.omega() if self.in_loss and last else 0)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=RATE)


EPS = 1e-3  # large: some gradients (of the keys' biases) are zero but for rounding, and 1/√v would make them count


def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr / 10, weight_decay=0, eps=EPS)


def run(*callbacks: Any, **options: Any) -> Any:
    optimizer, in_loss = options.pop("optimizer", torch.optim.SGD), options.pop("in_loss", False)
    return FILTERED.fit(*callbacks, module=options.pop("module", None) or Plain(optimizer, in_loss=in_loss), **options)


def close(left: Any, right: Any) -> bool:
    left, right = weights(left.lightning_module), weights(right.lightning_module)
    return all(torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6) for name in right)


# --- coupled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, adamw])
def test_coupled_equals_autograd_of_the_penalty_in_the_loss(
    optimizer: Any, clip: float | None, accumulation: int
) -> None:
    """Once an optimiser step whatever the accumulation, and before clipping, whose norm sees it."""
    options = {"optimizer": optimizer, "accumulate_grad_batches": accumulation, "gradient_clip_val": clip}
    ours = run(L2SP(ALPHA, head_strength=BETA), **options)
    assert close(ours, run(in_loss=True, **options))
    assert not close(ours, run(**options))


class Gradients(Callback):
    """All gradients of the first steps, where this callback stands in the list."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor | None]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append({n: None if p.grad is None else p.grad.clone() for n, p in pl_module.named_parameters()})
        self.weights.append(weights(pl_module))


@pytest.mark.parametrize("kernels_only", [True, False])
@pytest.mark.parametrize("stranger", [FILTERED, LATE], ids=lambda stranger: stranger.name)
def test_coupled_adds_the_closed_form_and_never_anchors_the_head(stranger: Stranger, kernels_only: bool) -> None:
    before, after = Gradients(), Gradients()
    stranger.fit(before, L2SP(ALPHA, kernels_only=kernels_only), after, max_epochs=1)
    start = before.weights[0]
    for theta, old, new in zip(before.weights, before.seen, after.seen, strict=True):
        for name, gradient in new.items():
            head = not anchored(name, torch.empty(1, 1))
            pulled = not head and (theta[name].ndim > 1 or not kernels_only)
            added = ALPHA * (theta[name] - start[name]) if pulled else torch.zeros(())
            torch.testing.assert_close(gradient, old[name] + added, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_have_no_anchor_and_get_no_gradient() -> None:
    module = Plain()
    module.encoder.layers[0].requires_grad_(False)
    frozen = weights(module.encoder.layers[0])
    after = Gradients()
    run(L2SP(ALPHA), after, module=module, max_epochs=1)
    assert identical(weights(module.encoder.layers[0]), frozen)
    assert all(grads["encoder.layers.0.linear1.weight"] is None for grads in after.seen)


# --- decoupled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}])
def test_both_modes_agree_under_sgd_but_for_the_second_order_of_the_rate(options: Any) -> None:
    coupled, decoupled, free = Gradients(), Gradients(), Gradients()
    run(L2SP(ALPHA), coupled, **options)
    run(L2SP(ALPHA, "decoupled"), decoupled, **options)
    run(free, **options)
    for name, gradient in free.seen[0].items():  # the first step leaves θ⁰: nothing pulls yet in the coupled form
        assert gradient is not None
        second_order = RATE**2 * ALPHA * gradient if anchored(name, gradient) else 0
        torch.testing.assert_close(
            decoupled.weights[1][name], coupled.weights[1][name] + second_order, rtol=1e-6, atol=1e-7
        )


class PullingAdamW(torch.optim.AdamW):
    """The oracle: AdamW, and after each step θ ← θ − ηα(θ − θ⁰), from its own groups and by a plain loop."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=RATE / 10, weight_decay=0, eps=EPS)
        self.start = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                pull = group["strength"] * (p.detach() - self.start[p] * group["anchored"])
                if group["strength"] and p.grad is not None:
                    p.data.sub_(group["lr"] * pull)
        return loss


class Reference(Plain):
    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def configure_optimizers(self) -> Any:
        depths = ["encoder.layers.2", "encoder.layers.1", "encoder.layers.0", "encoder.tokens"]
        groups = []
        for name, p in self.named_parameters():
            depth = next((i + 1 for i, prefix in enumerate(depths) if name.startswith(prefix)), 0)
            strength = ALPHA if anchored(name, p) else BETA if name == "classifier.weight" else 0
            extra = {"strength": strength, "anchored": anchored(name, p)}
            groups.append({"params": [p], "lr": RATE / 10 * self.decay**depth, **extra})
        return PullingAdamW(groups)


def test_decoupled_equals_an_optimiser_that_pulls_by_itself() -> None:
    ours = run(L2SP(ALPHA, "decoupled", head_strength=BETA), optimizer=adamw)
    assert close(ours, FILTERED.fit(module=Reference(1.0)))
    assert not close(ours, run(L2SP(ALPHA, head_strength=BETA), optimizer=adamw))


def test_decoupled_pulls_at_the_rates_of_discriminative_lr_in_either_order() -> None:
    pair = [L2SP(ALPHA, "decoupled", head_strength=BETA), DiscriminativeLR(0.5)]
    first, second = (run(*order, optimizer=adamw) for order in permutations(pair))
    assert identical(outcome(first), outcome(second))
    assert close(first, FILTERED.fit(module=Reference(0.5)))


def test_refuses_a_pull_that_jumps_past_the_anchor() -> None:
    with pytest.raises(ValueError, match=r"at learning rate 0.1 pulls 1 of the way back, .*: lower the strength"):
        run(L2SP(10.0, "decoupled"))


# --- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_order_with_gradual_unfreezing_does_not_matter(stranger: Stranger, mode: Any) -> None:
    outcomes = [
        outcome(stranger.fit(*order)) for order in permutations([L2SP(ALPHA, mode), GradualUnfreezing("2 steps")])
    ]
    assert identical(*outcomes)
    assert not identical(outcomes[0], outcome(stranger.fit(GradualUnfreezing("2 steps"))))


class Overflowing(Plain):
    """The third step's loss is infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (torch.inf if batch_idx == 2 else 1)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("fused", [False, True])
def test_fp16_scaler(mode: Any, fused: bool) -> None:
    """The same pull as in the closed form, whoever unscales; and where the scaler skips a step nothing moves."""

    def fp16(strength: float, module_class: type[Plain]) -> tuple[Gradients, Gradients]:
        before, after = Gradients(), Gradients()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        module = module_class(lambda p, lr: torch.optim.AdamW(p, lr / 10, eps=EPS, weight_decay=0, fused=fused))
        run(before, L2SP(strength, mode, head_strength=strength), after, module=module, plugins=[plugin], max_epochs=1)
        before.weights.append(weights(module))
        return before, after

    before, after = fp16(ALPHA, Overflowing)
    steps = [not identical(a, b) for a, b in zip(before.weights, before.weights[1:], strict=False)]
    assert steps == [True, True, False, True, True, True]

    start, scale = before.weights[0], 1024.0 if fused else 1.0
    if mode == "coupled":
        for theta, old, new in list(zip(before.weights, before.seen, after.seen, strict=False))[:2]:
            for name in ("encoder.layers.1.linear1.weight", "encoder.tokens.weight"):
                added = (new[name] - old[name]) / scale
                torch.testing.assert_close(added, ALPHA * (theta[name] - start[name]), rtol=1e-3, atol=1e-5)
    else:
        free, _ = fp16(0.0, Plain)
        for name in ("encoder.layers.1.linear1.weight", "encoder.tokens.weight", "classifier.weight"):
            stepped = free.weights[1][name]  # the first step's gradient is the same in both
            anchor = 0 if name == "classifier.weight" else start[name]
            pulled = stepped - RATE / 10 * ALPHA * (stepped - anchor)
            torch.testing.assert_close(before.weights[1][name], pulled, rtol=1e-6, atol=1e-7)


def test_logs_the_penalty(tmp_path: Path) -> None:
    values = []

    class Oracle(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            values.append(pl_module.omega().item())

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            assert trainer.logged_metrics["l2_sp"].item() == pytest.approx(values[-1], rel=1e-5)

    run(L2SP(ALPHA, head_strength=BETA), Oracle(), logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1)
    assert len(values) == BATCHES


def test_logs_one_sum_for_several_optimisers_also_where_one_holds_nothing_anchored(tmp_path: Path) -> None:
    class Two(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            expected = self.omega().item()
            for optimizer in self.optimizers():
                optimizer.step()
                assert self.trainer.callback_metrics["l2_sp"].item() == pytest.approx(expected, rel=1e-5)
                expected = self.omega().item()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD([p for p in self.parameters() if (p.ndim < 2) == vectors], lr=RATE)
                for vectors in (False, True)
            ]

    callback = L2SP(ALPHA, head_strength=BETA)
    run(callback, module=Two(), logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1)


# --- the anchor and resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_resumed_run_is_anchored_to_the_pretrained_weights(stranger: Stranger, tmp_path: Path) -> None:
    start = weights(stranger.fit(max_epochs=0).lightning_module)
    stranger.fit(L2SP(ALPHA), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    before, after = Gradients(), Gradients()
    stranger.fit(before, L2SP(ALPHA), after, ckpt_path=tmp_path / "first.ckpt")
    for name, gradient in after.seen[0].items():
        added = ALPHA * (before.weights[0][name] - start[name]) if anchored(name, gradient) else torch.zeros(())
        torch.testing.assert_close(gradient, before.seen[0][name] + added, rtol=1e-6, atol=1e-7)


def test_refuses_to_resume_from_other_pretrained_weights(tmp_path: Path) -> None:
    trainer = FILTERED.fit(L2SP(ALPHA), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match=r"fingerprint .* build the model from the same pretrained weights"):
        FILTERED.fit(L2SP(ALPHA), module=trainer.lightning_module, ckpt_path=tmp_path / "first.ckpt")


class LoadsItself(Plain):
    """Takes its pretrained weights from a state dict in ``setup``, after it was built at random."""

    def setup(self, stage: str) -> None:
        self.load_state_dict(self.pretrained)

    def __init__(self) -> None:
        super().__init__()
        self.pretrained = weights(self)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter)


def test_anchor_is_what_the_module_loads_in_its_setup(tmp_path: Path) -> None:
    ours = run(L2SP(ALPHA), module=LoadsItself(), max_epochs=1)
    assert identical(weights(ours.lightning_module), weights(run(L2SP(ALPHA), max_epochs=1).lightning_module))

    ours.save_checkpoint(tmp_path / "first.ckpt")
    resumed = run(L2SP(ALPHA), module=LoadsItself(), ckpt_path=tmp_path / "first.ckpt")
    assert resumed.global_step == 2 * BATCHES


# --- refusals ----------------------------------------------------------------------------------------------------


def test_refuses_a_model_whose_body_is_frozen() -> None:
    module = Plain()
    module.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="everything outside the head is frozen, so there is nothing to anchor"):
        run(L2SP(ALPHA), module=module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0 must be 0 or more"),
        ({"strength": float("nan")}, "strength=nan must be 0 or more"),
        ({"strength": 1.0, "head_strength": -1.0}, "head_strength=-1.0 must be 0 or more"),
        ({"strength": 1.0, "mode": "both"}, "mode='both' must be \"coupled\""),
        ({}, "strength=None and pull_rate=None: give one of them"),
        ({"strength": 1.0, "pull_rate": 1.0}, "strength=1.0 and pull_rate=1.0: give one of them"),
        ({"pull_rate": 1e-3}, "pull_rate=0.001 is of a pull beside the step"),
        ({"pull_rate": -1e-3, "mode": "decoupled"}, "pull_rate=-0.001 must be 0 or more"),
    ],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2SP(**arguments)


class Flat(LightningModule):
    """Embedding, blocks and classifier side by side: nothing tells that the classifier is new."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(9, 4)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))
        self.classifier = torch.nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.classifier(hidden.mean(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_model_in_which_no_head_is_found_is_anchored_aloud() -> None:
    def fit(**options: Any) -> None:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=1,
            callbacks=[L2SP(0.1, **options)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Flat(), DataLoader(torch.ones(4, 3, dtype=torch.int64)))

    with pytest.warns(UserWarning, match=r'no head in Flat .*head="classifier"\).*head=\[\]'):
        fit()
    fit(layers=Layers(head="classifier"))
    fit(layers=Layers(head=[]))
