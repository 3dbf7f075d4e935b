from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_ft.callbacks import DiscriminativeLR, ExactResume, GradualUnfreezing, LayerReinit
from lightning_ft.callbacks._annealed_recall import AnnealedRecall
from lightning_ft.callbacks.rec_adam import RecAdam
from lightning_ft.core import Layers, Phase
from lightning_ft.core.annealing import Annealing
from tests.strangers import BATCHES, FILTERED, STRANGERS, Filtered, Stranger, identical, outcome, weights

GAMMA, K, T0, RATE, DECAY = 40.0, 0.5, 4, 1e-2, 0.3
EPS = 1e-3  # large: some gradients (of the keys' biases) are zero but for rounding, and 1/√v would make them count
DEPTHS = ["encoder.layers.2", "encoder.layers.1", "encoder.layers.0", "encoder.tokens"]


def recall(**options: Any) -> RecAdam:
    return RecAdam(GAMMA, **{"t0": T0, "k": K, **options})


class ByHand(torch.optim.Optimizer):
    """The oracle: the authors' loop over parameters; ``order="paper"`` pulls at θ, ``"code"`` where Adam left it."""

    def __init__(self, groups: Any, order: str = "paper", curve: str = "sigmoid") -> None:
        super().__init__(groups, {"lr": RATE, "recalled": False})
        self.order, self.curve = order, curve
        self.start = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    with torch.no_grad():
                        self.update(group, p)
        return loss

    def update(self, group: dict[str, Any], p: Tensor) -> None:
        state, eta = self.state[p], group["lr"]
        if not state:
            state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["t"] += 1
        t = state["t"]
        state["m"].mul_(0.9).add_(p.grad, alpha=0.1)
        state["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
        step_size = eta * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        # The authors' ε is not corrected for the bias of v: torch's is theirs divided by this root.
        update = step_size * state["m"] / (state["v"].sqrt() + EPS * math.sqrt(1 - 0.999**t))
        anneal = 1.0
        if group["recalled"]:
            anneal = min(1.0, t / T0) if self.curve == "linear" else 1 / (1 + math.exp(-K * (t - T0)))
        pull = eta * (1 - anneal) * GAMMA
        old = p.clone()
        p.sub_(anneal * update)
        p.sub_(pull * ((old if self.order == "paper" else p.clone()) - self.start[p]))
        p.sub_(eta * DECAY * (old if self.order == "paper" else p.clone()))


class Plain(Filtered):
    """In float64, without dropout; AdamW in one group and a scheduler."""

    fused: bool | None = None

    def __init__(self) -> None:
        super().__init__(dropout=0)
        self.double()

    def make(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=RATE, eps=EPS, weight_decay=DECAY, fused=self.fused)

    def configure_optimizers(self) -> Any:
        optimizer = self.make()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Reference(Plain):
    def __init__(self, factor: float = 1.0, fresh: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__()
        self.factor, self.fresh, self.options = factor, fresh, options

    def make(self) -> torch.optim.Optimizer:
        groups = []
        for name, p in self.named_parameters():
            depth = next((i + 1 for i, prefix in enumerate(DEPTHS) if name.startswith(prefix)), 0)
            recalled = not name.startswith(("classifier", *self.fresh))
            groups.append({"params": [p], "lr": RATE * self.factor**depth, "recalled": recalled})
        return ByHand(groups, **self.options)


def close(left: Any, right: Any, rtol: float = 1e-10, atol: float = 1e-12) -> bool:
    left, right = weights(left.lightning_module), weights(right.lightning_module)
    return all(torch.allclose(left[name], right[name], rtol=rtol, atol=atol) for name in right)


def run(*callbacks: Any, **options: Any) -> Any:
    return FILTERED.fit(*callbacks, module=options.pop("module", None) or Plain(), **options)


# --- the formula -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("legacy_order", "expected"), [(False, 0.9641635), (True, 0.9641840)])
def test_closed_form_of_the_first_step(legacy_order: bool, expected: float) -> None:
    theta = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    theta.grad = torch.ones_like(theta)
    optimizer = torch.optim.AdamW([theta], lr=1e-3, eps=1e-8, weight_decay=0)
    anchor, ages = [torch.full_like(theta, 0.5).detach()], {}
    options = {"strength": 100.0, "annealing": Annealing(10, k=0.1), "ages": ages, "legacy_order": legacy_order}
    AnnealedRecall("RecAdam", optimizer, [("theta", theta)], anchor, **options)
    optimizer.step()
    assert theta.item() == pytest.approx(expected, abs=5e-8)
    assert ages == {"theta": 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.05},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "max_epochs": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("curve", ["sigmoid", "linear"])
def test_equals_the_loop_by_hand(curve: Any, options: dict[str, Any]) -> None:
    """With a scheduler and decoupled weight decay, to 1e-10."""
    oracle = run(module=Reference(curve=curve), **options)
    assert close(run(recall(curve=curve), **options), oracle)
    assert not close(run(**options), oracle, rtol=1e-3)


def test_legacy_order_equals_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.callbacks.test_rec_adam.DECAY", 0.0)
    oracle = run(module=Reference(order="code"))
    assert close(run(recall(legacy_order=True)), oracle)
    assert not close(run(recall()), oracle, rtol=1e-3)


def test_in_single_precision_to_the_last_digits() -> None:
    ours, oracle = run(recall(), module=Plain().float()), run(module=Reference().float())
    assert close(ours, oracle, rtol=1e-4, atol=2e-6)


LINEAR: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, RATE),
    "momentum": lambda p: torch.optim.SGD(p, RATE, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, RATE, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, RATE, weight_decay=0, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, RATE, weight_decay=0, foreach=True),
    "adamw-tensor": lambda p: torch.optim.AdamW(p, torch.tensor(RATE), weight_decay=0, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, RATE),
    "radam": lambda p: torch.optim.RAdam(p, RATE),
    "adamax": lambda p: torch.optim.Adamax(p, RATE),
    "rmsprop": lambda p: torch.optim.RMSprop(p, RATE, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, RATE, lr_decay=0.1),
}


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_every_optimiser_let_in_is_annealed_exactly(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """The oracle takes its ηu from the same optimiser at the same gradients, undisturbed."""
    torch.manual_seed(0)
    start = torch.randn(50, dtype=torch.float64)
    ours, probe = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer, plain = make([ours]), make([probe])
    annealing, expected = Annealing(T0, K), start.clone()
    AnnealedRecall("RecAdam", optimizer, [("theta", ours)], [start.clone()], GAMMA, annealing, {})
    for t in range(1, 30):
        ours.grad = torch.randn(50, dtype=torch.float64)
        probe.grad = ours.grad.clone()
        before = probe.detach().clone()
        optimizer.step()
        plain.step()
        update, share = before - probe.detach(), 1 / (1 + math.exp(-K * (t - T0)))
        expected = expected - share * update - RATE * (1 - share) * GAMMA * (expected - start)
        # A tensor of float32 holds its rate to 7 digits.
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-7, atol=1e-9)
    assert [group["lr"] for group in optimizer.param_groups] == [RATE]


def test_head_and_layers_drawn_anew_take_the_plain_step() -> None:
    """Their rate is the optimiser's from the first step on; nothing pulls them."""
    reinit = LayerReinit(1)
    fresh = ("encoder.layers.2", "encoder.norm")
    start = weights(FILTERED.fit(LayerReinit(1), module=Plain(), max_epochs=0).lightning_module)

    class Redrawn(Reference):
        def make(self) -> torch.optim.Optimizer:
            self.load_state_dict(start)
            return super().make()

    ours = run(reinit, recall())
    assert close(ours, run(module=Redrawn(fresh=("encoder.layers.2",))))
    assert not close(ours, run(module=Redrawn(fresh=fresh)), rtol=1e-6)


# --- with others -------------------------------------------------------------------------------------------------


def test_rates_of_discriminative_lr_in_either_order() -> None:
    first, second = (run(*order) for order in permutations([recall(), DiscriminativeLR(0.5)]))
    assert identical(outcome(first), outcome(second))
    assert close(first, run(module=Reference(0.5)))


def test_layers_that_thaw_late_start_their_own_recall() -> None:
    oracle = run(GradualUnfreezing("2 steps"), module=Reference())
    for order in permutations([recall(), GradualUnfreezing("2 steps")]):
        ours = run(*order)
        assert close(ours, oracle)
        callback = next(c for c in order if isinstance(c, RecAdam))
        steps = callback.state_dict()["steps"]
        assert {steps[f"encoder.layers.{i}.linear1.weight"] for i in range(3)} == {12 - 2, 12 - 4, 12 - 6}
        assert not any(name.startswith("classifier") for name in steps)


def test_with_rates_and_phases_in_every_order() -> None:
    def callbacks() -> list[Callback]:
        phases = [Phase("head"), Phase("all", "3 steps", 0.5, "2 steps")]
        return [recall(), DiscriminativeLR(0.5), GradualUnfreezing(phases=phases)]

    runs = [run(*(callbacks()[i] for i in order)) for order in permutations(range(3))]
    assert all(close(other, runs[0]) for other in runs[1:])  # factors are multiplied in another order
    assert all(t.optimizers[0].param_groups[0]["lr"] == runs[0].optimizers[0].param_groups[0]["lr"] for t in runs)


def test_a_cleared_optimiser_state_begins_the_recall_anew() -> None:
    chain = {"every": "2 steps", "previous": "freeze"}
    assert close(run(recall(), GradualUnfreezing(**chain)), run(GradualUnfreezing(**chain), module=Reference()))


class Overflowing(Plain):
    """The third step's loss is infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (torch.inf if batch_idx == 2 else 1)


class Trace(Callback):
    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(weights(pl_module))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_fp16_scaler_skips_does_not_count(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.callbacks.test_rec_adam.DECAY", 0.0)

    def fp16(module: Plain, callback: RecAdam) -> list[dict[str, Tensor]]:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024)
        module.float().fused, trace = fused, Trace()
        module.configure_optimizers = module.make  # the scheduler would move on
        run(callback, trace, module=module, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_epochs=1)
        return trace.weights

    callback = recall()
    seen = fp16(Overflowing(), callback)
    moved = [not identical(a, b) for a, b in pairwise(seen)]
    assert moved == [True, False, True, True, True]
    assert set(callback.state_dict()["steps"].values()) == {BATCHES - 1}

    # t of the step after the skipped one is 3, not 4: the pull of weights that nothing else moves tells.
    name = "encoder.layers.0.linear1.weight"

    class Still(Overflowing):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0:
                self.get_parameter(name).data.add_(1.0)
            return super().training_step(batch, batch_idx) * 0.0

    seen, start, left = fp16(Still(), recall()), weights(Plain().float())[name], 1.0
    for t, batch in ((1, 0), (2, 1), (2, 2), (3, 3), (4, 4)):
        left *= 1.0 if batch == 2 else 1 - RATE * GAMMA / (1 + math.exp(K * (t - T0)))
        torch.testing.assert_close(seen[batch][name] - start, torch.full_like(start, left), rtol=1e-4, atol=1e-6)


def test_several_optimisers(tmp_path: Path) -> None:
    class Two(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            options = {"lr": RATE, "eps": EPS, "weight_decay": DECAY}
            vectors = [p for p in self.parameters() if p.ndim < 2]
            matrices = [p for p in self.parameters() if p.ndim > 1]
            return [torch.optim.AdamW(vectors, **options), torch.optim.AdamW(matrices, **options)]

    class One(Reference):
        def configure_optimizers(self) -> Any:
            return self.make()

    assert close(run(recall(), module=Two()), run(module=One()))


def test_logs_the_recall(tmp_path: Path) -> None:
    values: list[float] = []

    class Read(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            values.append(trainer.logged_metrics["rec_adam/recall"].item())

    run(recall(), Read(), logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1)
    assert values == pytest.approx([1 / (1 + math.exp(K * (t - T0))) for t in range(1, BATCHES + 1)], rel=1e-6)


@pytest.mark.parametrize(("t0", "steps"), [("4 steps", 4), (0.25, 3), ("0.5 epochs", 3), (4, 4)], ids=str)
def test_t0_is_steps_or_a_stretch_of_training(t0: Any, steps: int) -> None:
    assert identical(outcome(run(recall(t0=t0))), outcome(run(recall(t0=steps))))


# --- the anchor and resuming -------------------------------------------------------------------------------------


def test_a_resumed_run_equals_the_loop_by_hand(tmp_path: Path) -> None:
    """θ⁰ is not what the checkpoint holds, and t goes on."""
    run(recall(), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    resumed = run(recall(), ckpt_path=tmp_path / "first.ckpt", max_epochs=3)
    assert close(resumed, run(module=Reference(), max_epochs=3))


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_a_resumed_run_ends_as_the_uninterrupted_one(stranger: Stranger, tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> Any:
        callbacks = [ExactResume(dirpath=tmp_path), RecAdam(5.0, t0=4, k=0.5), GradualUnfreezing("3 steps")]
        return stranger.fit(*callbacks, max_epochs=epochs, **options)

    whole = outcome(fit(3))
    fit(2)
    assert identical(outcome(fit(3, ckpt_path=tmp_path / "last.ckpt")), whole)


def test_refuses_to_resume_from_other_pretrained_weights(tmp_path: Path) -> None:
    trainer = run(recall(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match=r"fingerprint .* build the model from the same pretrained weights"):
        run(recall(), module=trainer.lightning_module, ckpt_path=tmp_path / "first.ckpt")


# --- refusals ----------------------------------------------------------------------------------------------------


def test_refuses_a_pull_that_jumps_past_the_anchor_and_leaves_the_optimiser_whole() -> None:
    module = Plain()
    with pytest.raises(
        ValueError, match=r"learning rate 0.01 with strength=100 recalls 1 .* take a strength below 100"
    ):
        run(RecAdam(100.0), module=module)
    assert [group["lr"] for group in module.optimizers().param_groups] == [RATE]


class OwnStep(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.LBFGS(p), lambda p: OwnStep(p), lambda p: torch.optim.Adadelta(p)]
)
def test_refuses_an_optimiser_that_is_not_known_to_be_linear(make: Any) -> None:
    module = Plain()
    module.make = lambda: make(list(module.parameters()))
    with pytest.raises(TypeError, match=r"linear in its rate: \w+ is not known to be. Use torch.optim.AdamW"):
        run(recall(), module=module)


def test_a_subclass_that_keeps_the_step_is_let_in() -> None:
    class Renamed(torch.optim.AdamW):
        pass

    module = Plain()
    module.make = lambda: Renamed(module.parameters(), lr=RATE, eps=EPS, weight_decay=DECAY)
    assert close(run(recall(), module=module), run(recall()))


def test_refuses_a_share_of_a_training_whose_length_is_unknown() -> None:
    manual = next(stranger for stranger in STRANGERS if stranger.name == "manual")
    with pytest.raises(ValueError, match=r"t0=0.1 of training is a share of .* length .* unknown"):
        manual.fit(RecAdam(1.0, t0=0.1))
    with pytest.raises(ValueError, match=r"t0=0.1 of training is a share of .* length .* unknown"):
        run(recall(t0=0.1), max_epochs=-1)


def test_warns_of_half_precision() -> None:
    with pytest.warns(UserWarning, match="RecAdam on weights of half precision"):
        run(recall(), module=Plain().bfloat16(), max_epochs=1)


def test_a_model_in_which_no_head_is_found_is_anchored_aloud() -> None:
    class Bare(Filtered):
        """Its first two outputs are the classes: there is no head."""

        def __init__(self) -> None:
            super().__init__()
            del self.classifier

        def forward(self, tokens: Tensor) -> Tensor:
            return self.encoder(tokens)[:, 0, :2]

    with pytest.warns(UserWarning, match=r"RecAdam found no head in Bare .*head=\[\]"):
        FILTERED.fit(RecAdam(1.0), module=Bare(), max_epochs=1)
    FILTERED.fit(RecAdam(1.0, layers=Layers(head=[])), module=Bare(), max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0 must be 0 or more"),
        ({"strength": float("nan")}, "strength=nan must be 0 or more"),
        ({"t0": 0}, "t0=0.0 must be positive"),
        ({"t0": 2.5}, "t0=2.5 is not a stretch of training"),
        ({"t0": "soon"}, "t0='soon' is not a stretch of training"),
        ({"k": 0.0}, "k=0.0 must be positive"),
        ({"curve": "cosine"}, "curve='cosine' must be one of"),
    ],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecAdam(**arguments)
