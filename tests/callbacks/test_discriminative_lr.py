from __future__ import annotations

import csv
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_ft.callbacks import DiscriminativeLR
from tests.strangers import FILTERED, STRANGERS, Filtered, Late, Stranger, identical, outcome, weights
from tests.tiny import tiny

# A power of two: products with it are exact, in whatever order an implementation multiplies.
DECAY = 0.5
FACTORS = {"encoder.tokens": 2.0**-4, "encoder.layers.0": 2.0**-3, "encoder.layers.1": 0.25, "encoder.layers.2": 0.5}


def factor(name: str) -> float:
    """The oracle's own depths, by hand. Final norm and classifier keep the full rate."""
    return next((value for prefix, value in FACTORS.items() if name.startswith(prefix)), 1.0)


class Custom(Filtered):
    """A project with an optimiser and a scheduler to choose, with real groups by depth if ``by_hand``."""

    def __init__(
        self, optimizer: Callable[..., Any], scheduler: Callable[..., Any], *, by_hand: bool, decay: bool
    ) -> None:
        super().__init__()
        self.make_optimizer, self.make_scheduler, self.by_hand, self.decay = optimizer, scheduler, by_hand, decay

    def groups(self, lr: float) -> Iterator[dict[str, Any]]:
        for vectors in (False, True) if self.decay else (None,):
            named = [(n, p) for n, p in self.named_parameters() if vectors is None or vectors == (p.ndim < 2)]
            extra = {} if vectors is None else {"weight_decay": 0.0 if vectors else 0.1}
            by_factor: dict[float, list[nn.Parameter]] = {}
            for name, parameter in named:
                by_factor.setdefault(factor(name) if self.by_hand else 1.0, []).append(parameter)
            for value, parameters in by_factor.items():
                yield {"params": parameters, "lr": lr * value, **extra}

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(list(self.groups(1e-2)), lr=1e-2)
        scheduler = self.make_scheduler(optimizer)
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step"
        return [optimizer], [{"scheduler": scheduler, "interval": interval, "monitor": "val_loss"}]


def one_cycle(optimizer: Any) -> OneCycleLR:
    return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=20)


def sequential(optimizer: Any) -> SequentialLR:
    parts = [LinearLR(optimizer, 0.25, total_iters=4), CosineAnnealingLR(optimizer, 20)]
    return SequentialLR(optimizer, parts, milestones=[4])


lambda_lr = partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
fused = partial(torch.optim.AdamW, fused=True)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "options"),
    [
        (fused, lambda_lr, {}),
        (fused, one_cycle, {}),
        (fused, sequential, {"accumulate_grad_batches": 4}),
        (fused, partial(CosineAnnealingLR, T_max=20), {}),
        (fused, partial(ReduceLROnPlateau, patience=0, threshold=0.5), {"max_epochs": 4}),
        (torch.optim.AdamW, lambda_lr, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (partial(torch.optim.Adam, amsgrad=True), lambda_lr, {}),
        (partial(torch.optim.SGD, momentum=0.9, nesterov=True), one_cycle, {}),
        (torch.optim.RMSprop, lambda_lr, {}),
    ],
)
@pytest.mark.parametrize("decay", [False, True], ids=["one group", "two groups"])
def test_equals_real_groups_by_depth_to_the_bit(optimizer: Any, scheduler: Any, options: Any, decay: bool) -> None:
    def run(*callbacks: Any, by_hand: bool) -> Any:
        module = Custom(optimizer, scheduler, by_hand=by_hand, decay=decay)
        return FILTERED.fit(*callbacks, module=module, **{"max_epochs": 2, **options})

    ours, reference = run(DiscriminativeLR(DECAY), by_hand=False), run(by_hand=True)
    assert identical(weights(ours.lightning_module), weights(reference.lightning_module))

    # The optimiser is the project's own: a checkpoint of it fits with the callback and without it.
    plain, (state,) = outcome(run(by_hand=False)), outcome(ours)["optimizers"]
    assert state["param_groups"] == plain["optimizers"][0]["param_groups"]
    assert state["state"].keys() == plain["optimizers"][0]["state"].keys()
    assert not identical(plain["weights"], weights(reference.lightning_module))
    if not isinstance(ours.lr_scheduler_configs[0].scheduler, ReduceLROnPlateau):
        assert outcome(ours)["schedulers"] == plain["schedulers"]


def variants() -> Iterator[Any]:
    """Every optimiser of torch in each of its implementations that run here, and transformers' Adafactor."""
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ELSEWHERE:
            flags = inspect.signature(kind).parameters.keys() & {"foreach", "fused"}
            for flag in [None, *sorted(flags)]:
                options = {flag: True} if flag else {}
                yield pytest.param(partial(kind, **options), id="-".join(filter(None, [name, flag])))
    relative = {"relative_step": False, "scale_parameter": False}
    yield pytest.param(partial(hf.Adafactor, **relative), id="Adafactor of transformers")


# LBFGS is refused; SparseAdam takes sparse gradients alone and Muon matrices alone: they have tests of their own.
ELSEWHERE = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}


@pytest.mark.parametrize("optimizer", list(variants()))
def test_equals_real_groups_under_every_optimiser(optimizer: Any) -> None:
    def run(*callbacks: Any, by_hand: bool) -> Any:
        module = Custom(optimizer, lambda_lr, by_hand=by_hand, decay=False)
        return FILTERED.fit(*callbacks, module=module, max_epochs=1, limit_val_batches=0)

    ours, reference = run(DiscriminativeLR(DECAY), by_hand=False), run(by_hand=True)
    assert identical(weights(ours.lightning_module), weights(reference.lightning_module))
    assert not identical(weights(run(by_hand=False).lightning_module), weights(reference.lightning_module))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon is in torch from 2.9 on")
def test_equals_real_groups_under_muon_beside_adam() -> None:
    class Two(Filtered):
        def __init__(self, *, by_hand: bool) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.by_hand = by_hand

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            def groups(dimensions: int) -> list[dict[str, Any]]:
                named = [(n, p) for n, p in self.named_parameters() if p.ndim == dimensions]
                return [{"params": [p], "lr": 1e-2 * (factor(n) if self.by_hand else 1.0)} for n, p in named]

            return torch.optim.Muon(groups(2), lr=1e-2), torch.optim.Adam(groups(1), lr=1e-2)

    ours = FILTERED.fit(DiscriminativeLR(DECAY), module=Two(by_hand=False), max_epochs=1)
    reference = FILTERED.fit(module=Two(by_hand=True), max_epochs=1)
    assert identical(weights(ours.lightning_module), weights(reference.lightning_module))


def test_equals_real_groups_under_sparse_adam() -> None:
    class Sparse(Filtered):
        def __init__(self, *, by_hand: bool) -> None:
            super().__init__()
            self.encoder.tokens.sparse = True
            self.by_hand = by_hand

        def configure_optimizers(self) -> Any:
            rate = 1e-2 * (2.0**-4 if self.by_hand else 1.0)
            return torch.optim.SparseAdam(self.encoder.tokens.parameters(), lr=rate)

    ours = FILTERED.fit(DiscriminativeLR(DECAY), module=Sparse(by_hand=False), max_epochs=1)
    reference = FILTERED.fit(module=Sparse(by_hand=True), max_epochs=1)
    assert identical(weights(ours.lightning_module), weights(reference.lightning_module))


def test_factors_written_out_take_the_place_of_those_of_decay() -> None:
    callback = DiscriminativeLR(DECAY, rates={"embeddings": 1.0, "top:2": 0.125, "head": 8})
    assert callback.multipliers(FILTERED.module()) == {
        "embeddings": 1.0,
        "block.0": 0.125,
        "block.1": 0.125,
        "block.2": 0.125,
        "tail": 1.0,
        "head": 8.0,
    } | {"block.0": DECAY**3}
    others = DiscriminativeLR(1.0, rates={"blocks": 0.5}).multipliers(FILTERED.module())
    assert list(others.values()) == [1.0, 0.5, 0.5, 0.5, 1.0, 1.0]


def test_steps_are_those_of_the_written_out_factors() -> None:
    def moved(*callbacks: Any) -> Any:
        module = Custom(torch.optim.SGD, lambda_lr, by_hand=False, decay=False)
        before = weights(module)
        after = weights(FILTERED.fit(*callbacks, module=module, max_epochs=1, max_steps=1).lightning_module)
        return {name: after[name] - before[name] for name in after}

    plain, ours = moved(), moved(DiscriminativeLR(1.0, rates={"embeddings": 0.25, "head": 4.0}))
    for name, step in plain.items():
        expected = {"encoder.tokens.weight": 0.25, "classifier.weight": 4, "classifier.bias": 4}.get(name, 1)
        torch.testing.assert_close(ours[name], step * expected, rtol=1e-3, atol=1e-6)


def test_factors_are_logged_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    FILTERED.fit(DiscriminativeLR(DECAY), logger=logger, log_every_n_steps=1, max_epochs=1)
    lines = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    logged = [{k: float(v) for k, v in line.items() if k.startswith("lr_factor/") and v} for line in lines]
    assert [line for line in logged if line] == [
        {f"lr_factor/{name}": value for name, value in DiscriminativeLR(DECAY).multipliers(FILTERED.module()).items()}
    ]


def test_refuses_one_block_at_several_depths() -> None:
    class Shared(Late):
        def configure_model(self) -> None:
            self.bert = tiny("albert").train()

    stranger = Stranger("albert", Shared)
    with pytest.raises(ValueError, match=r"runs block.0 at several depths .* give decay=1 and the factors as rates="):
        stranger.fit(DiscriminativeLR(0.9))
    stranger.fit(DiscriminativeLR(1.0, rates={"embeddings": 0.5}), max_epochs=1)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"head": 2.0, "tail..head": 1.0}, "rates speaks of 'head' twice, as 'head' and as 'tail..head': say it once"),
        ({"stem": 2.0}, "'stem' matches none of the groups embeddings, block.0"),
        ({"top:9": 2.0}, "'top:9' must ask for 1 to 3 blocks"),
    ],
)
def test_refuses_factors_of_no_group_or_twice(rates: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscriminativeLR(rates=rates).multipliers(FILTERED.module())


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_other_hooks_see_the_rates_in_use_and_what_is_outside_does_not(stranger: Stranger) -> None:
    inside: list[set[float]] = []
    outside: list[int] = []

    class Spy(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            (optimizer,) = trainer.optimizers
            self.groups = len(optimizer.param_groups)
            optimizer.register_step_post_hook(
                lambda optimizer, *args: inside.append(
                    {g["lr"] / optimizer.param_groups[-1]["lr"] for g in optimizer.param_groups}
                )
            )

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            outside.append(len(trainer.optimizers[0].param_groups) - self.groups)

    stranger.fit(Spy(), DiscriminativeLR(DECAY), max_epochs=1)
    ratios = {round(value / min(rates), 6) for rates in inside for value in rates}
    assert ratios == {1.0, 2.0, 4.0, 8.0, 16.0}
    assert set(outside) == {0}


def test_clipping_by_norm_sees_all_parameters_together() -> None:
    def norms(*callbacks: Any) -> list[float]:
        found: list[float] = []

        class Clipped(Filtered):
            def on_before_zero_grad(self, optimizer: Any) -> None:
                if grads := [p.grad for p in self.parameters() if p.grad is not None]:
                    found.append(float(torch.nn.utils.get_total_norm(grads)))

        FILTERED.fit(*callbacks, module=Clipped(), gradient_clip_val=0.125, max_epochs=1)
        return found

    assert norms(DiscriminativeLR(DECAY)) == pytest.approx([0.125] * 5, rel=1e-4)


def test_values_that_an_optimiser_keeps_in_its_groups_run_on() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return super().step(closure)

    trainer = FILTERED.fit(
        DiscriminativeLR(DECAY), module=Custom(Counting, lambda_lr, by_hand=False, decay=True), max_epochs=2
    )
    assert [group["count"] for group in trainer.optimizers[0].param_groups] == [12, 12]


def test_step_that_raised_and_was_caught_leaves_no_trace() -> None:
    class Caught(Filtered):
        def __init__(self, *, fails: bool) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.fails = fails

        def training_step(self, batch: Any, batch_idx: int) -> None:
            def out_of_memory() -> None:
                raise MemoryError

            optimizer = self.optimizers()
            if self.fails and batch_idx % 2:
                with pytest.raises(MemoryError):
                    optimizer.step(closure=out_of_memory)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    runs = [FILTERED.fit(DiscriminativeLR(DECAY), module=Caught(fails=fails), max_epochs=1) for fails in (True, False)]
    assert identical(*(outcome(run) for run in runs))
    assert len(runs[0].optimizers[0].param_groups) == 1


@pytest.mark.parametrize("is_fused", [False, True])
def test_fp16_scaler(is_fused: bool) -> None:
    def run(*callbacks: Any, by_hand: bool) -> Any:
        module = Custom(partial(torch.optim.AdamW, fused=is_fused), lambda_lr, by_hand=by_hand, decay=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024)
        return FILTERED.fit(*callbacks, module=module, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])

    ours, reference = run(DiscriminativeLR(DECAY), by_hand=False), run(by_hand=True)
    assert identical(weights(ours.lightning_module), weights(reference.lightning_module))


def test_multipliers_of_a_module() -> None:
    assert DiscriminativeLR(0.5, head_gap=2).multipliers(FILTERED.module()) == {
        "embeddings": 2.0**-5,
        "block.0": 2.0**-4,
        "block.1": 2.0**-3,
        "block.2": 0.25,
        "tail": 1.0,
        "head": 1.0,
    }


def test_refuses_lbfgs() -> None:
    class Newton(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(TypeError, match="LBFGS has one rate"):
        FILTERED.fit(DiscriminativeLR(), module=Newton())


def test_refuses_an_optimiser_of_other_parameters() -> None:
    class Elsewhere(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)

    module = Elsewhere()
    with pytest.raises(ValueError, match=r"SGD holds 1 parameters that are not the LightningModule's.* register"):
        FILTERED.fit(DiscriminativeLR(), module=module)
    FILTERED.fit(module=module, max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 0.0}, r"decay=0.0 must lie in \(0, 1\]"),
        ({"decay": 1.1}, r"decay=1.1 must lie in \(0, 1\]"),
        ({"head_gap": -1}, "head_gap=-1 must be a whole number of 0 or more"),
        ({"rates": {"head": 0.0}}, r"rates\['head'\]=0.0 must be a factor above 0; .* use the callback Freeze"),
        ({"rates": {"head": float("inf")}}, r"rates\['head'\]=inf must be a factor above 0"),
    ],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscriminativeLR(**arguments)
