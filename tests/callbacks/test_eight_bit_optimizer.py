"""8-bit optimisers in the place of projects' own: the same steps where states are not rounded, exact resume, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.callbacks import L2SP, DiscriminativeLR, ExactResume, GradualUnfreezing
from lightning_ft.callbacks.eight_bit_optimizer import EightBitOptimizer
from lightning_ft.functional.eight_bit_optimizer import eight_bit, embedding_parameters, state_report
from tests.callbacks.test_exact_resume import BATCHES, Kill, Killed, options
from tests.strangers import STILL, STRANGERS, Filtered, Stranger, identical, outcome, weights

each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def step(optimizer: Optimizer, *parameters: nn.Parameter, seed: int = 1) -> None:
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def assert_close(module: nn.Module, other: nn.Module) -> None:
    expected = weights(other)
    for name, found in weights(module).items():
        # The gradient of a key's bias is zero but for rounding, which Adam blows up.
        if not name.endswith(("in_proj_bias", "key.bias")):
            torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4, msg=name)


# ---- the steps


@each_stranger
def test_with_states_of_32_bits_it_takes_the_steps_of_the_projects_own_optimiser(stranger: Stranger) -> None:
    """AdamW with a rate that falls, AdamW in groups, manual steps, SGD with momentum, Adam under OneCycleLR."""
    plain, callback = stranger.fit(), EightBitOptimizer(min_size=10**9)
    trainer = stranger.fit(callback)
    assert_close(trainer.lightning_module, plain.lightning_module)
    assert type(trainer.optimizers[0]).__module__.endswith("eight_bit_optimizer")
    for ours, theirs in zip(trainer.optimizers[0].param_groups, plain.optimizers[0].param_groups, strict=True):
        assert len(ours["params"]) == len(theirs["params"])
        assert {key: ours.get(key) for key in ("lr", "weight_decay", "initial_lr")} == {
            key: theirs.get(key) for key in ("lr", "weight_decay", "initial_lr")
        }


@each_stranger
def test_in_8_bits_it_goes_nearly_where_the_projects_own_goes(stranger: Stranger) -> None:
    start = weights(stranger.fit(max_epochs=0).lightning_module)
    expected = weights(stranger.fit().lightning_module)
    trainer = stranger.fit(EightBitOptimizer(min_size=0))
    found = weights(trainer.lightning_module)
    assert any(state["state1"].dtype == torch.uint8 for state in trainer.optimizers[0].state.values())
    off = sum((found[name] - expected[name]).square().sum() for name in start).sqrt()
    assert off < 0.2 * sum((expected[name] - start[name]).square().sum() for name in start).sqrt()


def test_lion_is_the_papers() -> None:
    p, rate, decay = parameter(8, 8), 1e-2, 0.1
    optimizer = eight_bit(AdamW([p], lr=rate, weight_decay=decay), "lion", min_size=1000)
    expected, m = p.detach().clone(), torch.zeros(8, 8)
    for seed in range(3):
        step(optimizer, p, seed=seed)
        assert p.grad is not None
        expected = expected * (1 - rate * decay) - rate * (0.9 * m + 0.1 * p.grad).sign()
        m = 0.99 * m + 0.01 * p.grad
    torch.testing.assert_close(p.detach(), expected)
    torch.testing.assert_close(optimizer.state[p]["state1"], m)
    assert eight_bit(AdamW([p]), "lion", betas=(0.95, 0.98)).param_groups[0]["betas"] == (0.95, 0.98)


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_learns_what_the_optimiser_in_32_bits_learns(rule: Any) -> None:
    losses = []
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    y = x @ torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    for min_size in (0, 10**9):
        p = parameter(64, 64)
        optimizer = eight_bit(AdamW([p], lr=0.05, weight_decay=0.0), rule, min_size=min_size)
        for _ in range(200):
            loss = (x @ p - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.2
    assert losses[0] == pytest.approx(losses[1], rel=0.2, abs=0.02)


# ---- which states are rounded


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 64)
        self.body = nn.Linear(64, 128)
        self.small = nn.Linear(64, 10)
        self.output = nn.Linear(64, 100, bias=False)
        self.output.weight = self.words.weight


def test_embeddings_and_small_tensors_stay_in_32_bits() -> None:
    module = Tied()
    optimizer = eight_bit(AdamW(module.parameters()), full=embedding_parameters(module))
    step(optimizer, *module.parameters())
    dtypes = {name: optimizer.state[p]["state1"].dtype for name, p in module.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.uint8} == {"body.weight"}
    every = eight_bit(AdamW(module.parameters()), min_size=0)
    step(every, *module.parameters())
    assert {state["state2"].dtype for state in every.state.values()} == {torch.uint8}


def test_bitsandbytes_table_of_overrides_is_neither_read_nor_written() -> None:
    table = bitsandbytes.optim.GlobalOptimManager.get_instance()
    module = Tied()
    leaked = {"optim_bits": 32, "lr": 100.0}
    table.pid2config[id(module.body.weight)] = leaked
    try:
        optimizer = eight_bit(AdamW(module.parameters(), lr=1e-3), full=embedding_parameters(module))
        before = module.body.weight.detach().clone()
        step(optimizer, *module.parameters())
        assert optimizer.state[module.body.weight]["state1"].dtype == torch.uint8
        assert (module.body.weight - before).abs().max() < 2e-3
        assert table.pid2config == {id(module.body.weight): leaked}
        assert not table.index2config
    finally:
        table.pid2config.clear()


@pytest.mark.parametrize(("rule", "share"), [("adamw", 0.254), ("lion", 0.254)])
def test_states_take_a_quarter(rule: Any, share: float) -> None:
    """2 · (1 + 4/256) bytes a weight in the place of 8; Lion 1 in the place of 4."""
    module = nn.ModuleDict({"words": nn.Embedding(100, 64), "body": nn.Linear(256, 256, bias=False)})
    optimizer = eight_bit(AdamW(module.parameters()), rule, full=embedding_parameters(module))
    step(optimizer, *module.parameters())
    report = state_report([optimizer], module)
    eight, embeddings = report.rows
    assert (eight["states"], embeddings["states"]) == ("8 bits", "embeddings")
    assert eight["bytes"] / eight["bytes in 32 bits"] == pytest.approx(share, abs=1e-3)
    assert embeddings["bytes"] == embeddings["bytes in 32 bits"] == 100 * 64 * (8 if rule == "adamw" else 4)
    # Counted another way, tables of codes included, as a file would hold them.
    state = optimizer.state_dict()["state"][1]["__bnb_optimizer_quant_state__"]
    assert sum(t.numel() * t.element_size() for t in state.values()) <= 0.30 * eight["bytes in 32 bits"]


def test_the_report_of_a_run() -> None:
    callback = EightBitOptimizer(min_size=0)
    trainer = STILL.fit(callback, max_epochs=1)
    assert callback.report is not None
    assert [row["states"] for row in callback.report.rows] == ["8 bits", "embeddings"]
    values = sum(p.numel() for p in trainer.lightning_module.parameters())
    assert sum(row["values"] for row in callback.report.rows) == values
    assert callback.report.facts["bytes in 32 bits"] == 8 * values
    assert "States of 8-bit optimisers" in str(callback.report)
    everything = EightBitOptimizer(min_size=0, embedding_bits=8)
    trainer = STILL.fit(everything, max_epochs=1)
    assert {s["state1"].dtype for s in trainer.optimizers[0].state.values()} == {torch.uint8}


# ---- resume


@each_stranger
@pytest.mark.parametrize("rule", ["same", "paged_same"])
@pytest.mark.parametrize(
    ("hook", "epoch", "batch"), [("on_after_backward", 1, 3), ("on_validation_end", 0, BATCHES - 1)]
)
def test_resumes_exactly(
    stranger: Stranger, rule: Any, hook: str, epoch: int, batch: int, tmp_path: Path, whole_runs: dict[str, Any]
) -> None:
    def run(folder: Path, *more: Any, **settings: Any) -> Any:
        callbacks = [ExactResume("1 steps", dirpath=folder), GradualUnfreezing("2 steps"), DiscriminativeLR(0.7)]
        callbacks += [L2SP(0.1, "decoupled" if stranger.name == "late" else "coupled")]
        callbacks += [EightBitOptimizer(rule, min_size=0), *more]
        torch.manual_seed(99)
        return outcome(stranger.fit(*callbacks, **options(stranger, folder), **settings))

    if stranger.name not in whole_runs:
        whole_runs[stranger.name] = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", Kill(hook, epoch, batch))
    resumed = run(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "last.ckpt")
    assert identical(resumed, whole_runs[stranger.name])


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Any]:
    return {}


def test_a_checkpoint_of_the_projects_own_optimiser_is_refused(tmp_path: Path) -> None:
    trainer = STILL.fit(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="states are not those of an 8-bit optimiser: resume with the optimiser that"):
        STILL.fit(EightBitOptimizer(), ckpt_path=tmp_path / "a.ckpt")


# ---- with schedulers, scaling and what a module keeps


class Scheduled(Filtered):
    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__(dropout=0)
        self.make, self.schedule = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        self.kept = self.make(self.parameters())
        return [self.kept], [{"scheduler": self.schedule(self.kept), "interval": "step"}]


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append((group["lr"], group.get("momentum") or group["betas"][0]))


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-2)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.01)


SCHEDULERS = {
    "lambda": (adamw, lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5))),
    "sequential": (
        adamw,
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[3]
        ),
    ),
    "chained": (
        adamw,
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
        ),
    ),
    "one-cycle": (adamw, lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=12)),
    "cyclic-momentum": (sgd, lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=4)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_act_on_it_as_on_the_projects_own(name: str) -> None:
    seen, modules = [], []
    for callback in ([], [EightBitOptimizer(min_size=10**9)]):
        rates, module = Rates(), Scheduled(*SCHEDULERS[name])
        trainer = STILL.fit(*callback, rates, module=module)
        assert module.kept is trainer.optimizers[0]
        assert trainer.lr_scheduler_configs[0].scheduler.optimizer is trainer.optimizers[0]
        seen.append(rates.seen)
        modules.append(module)
    assert seen[0] == seen[1]
    assert len({rate for rate, _ in seen[0]}) > 3
    assert_close(*modules)


def test_hooks_of_the_project_are_kept() -> None:
    calls: list[str] = []
    p = parameter(4)
    own = AdamW([p])
    own.register_step_pre_hook(lambda *args: calls.append("before"))
    own.register_step_post_hook(lambda *args: calls.append("after"))
    step(eight_bit(own), p)
    assert calls == ["before", "after"]


def test_fp16_skips_the_step_that_overflows() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    class Overflow(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 2:
                pl_module.classifier.weight.grad[0, 0] = float("inf")

    module = Filtered(dropout=0)
    trainer = STILL.fit(
        EightBitOptimizer(min_size=0),
        Overflow(),
        module=module,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        gradient_clip_val=0.5,
        max_epochs=1,
    )
    assert {state["step"] for state in trainer.optimizers[0].state.values()} == {BATCHES - 1}
    assert all(p.isfinite().all() for p in module.parameters())
    assert scaler.get_scale() == 2.0**7


@each_stranger
def test_leaves_the_module_as_it_was(stranger: Stranger) -> None:
    class Failure(Callback):
        def on_train_start(self, *args: Any) -> None:
            raise Killed

    module = stranger.module()
    stranger.fit(EightBitOptimizer(), module=module, max_epochs=1)
    assert "configure_optimizers" not in vars(module)
    with pytest.raises(Killed):
        stranger.fit(EightBitOptimizer(), Failure(), module=module)
    stranger.trainer([EightBitOptimizer()]).validate(module, verbose=False)
    assert "configure_optimizers" not in vars(module)


@pytest.mark.filterwarnings("ignore")  # LightningCLI's own use of jsonargparse
def test_an_optimiser_chosen_on_the_command_line_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.ones(4, 64)))

    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    quiet += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_model_summary=false"]
    monkeypatch.setattr("sys.argv", ["fit", *quiet, "--optimizer=torch.optim.AdamW", "--optimizer.lr=0.5"])
    cli = LightningCLI(Bare, run=False, save_config_callback=None, seed_everything_default=False)
    chosen = cli.model.configure_optimizers
    cli.trainer.callbacks.append(EightBitOptimizer("lion"))
    cli.trainer.fit(cli.model)
    assert cli.trainer.optimizers[0].optimizer_name == "lion"
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    assert cli.model.configure_optimizers == chosen
    monkeypatch.setattr("sys.argv", ["fit", *quiet, "--optimizer=bitsandbytes.optim.AdamW8bit"])
    cli = LightningCLI(Bare, run=False, save_config_callback=None, seed_everything_default=False)
    cli.trainer.fit(cli.model)
    assert cli.trainer.optimizers[0].state[cli.model.layer.weight]["state1"].dtype == torch.uint8


# ---- refusals


@pytest.mark.parametrize(
    ("make", "rule", "error", "message"),
    [
        (lambda p: torch.optim.Adagrad(p), "same", TypeError, "takes the place of .* with momentum; this is Adagrad"),
        (lambda p: SGD(p, momentum=0.9), "adamw", TypeError, "'adamw' in 8 bits takes .* AdamW or Adam without decay"),
        (lambda p: AdamW(p, amsgrad=True), "same", ValueError, r"AdamW\(amsgrad=True\) has no counterpart in 8 bits"),
        (lambda p: AdamW(p, maximize=True), "lion", ValueError, r"AdamW\(maximize=True\) has no counterpart"),
        (lambda p: SGD(p, momentum=0.9, nesterov=True), "same", ValueError, r"SGD\(nesterov=True\) has no"),
        (lambda p: SGD(p, momentum=0.9, dampening=0.5), "same", ValueError, r"SGD\(dampening=0.5\) has no"),
        (lambda p: SGD(p), "same", ValueError, "SGD without momentum has no state .* give it momentum=0.9"),
        (lambda p: Adam(p, weight_decay=0.1), "same", ValueError, r"Adam\(weight_decay=0.1\) .* use torch.optim.AdamW"),
        (lambda p: AdamW(p, lr=torch.tensor(0.1)), "same", ValueError, "a rate that is a tensor has no counterpart"),
    ],
)
def test_optimisers_without_a_counterpart(make: Any, rule: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        eight_bit(make([parameter(4)]), rule)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "adafactor"}, r"rule='adafactor' must be one of same, adamw, lion, paged_same"),
        ({"min_size": -1}, r"min_size=-1 must be 0 or more"),
        ({"embedding_bits": 16}, r"embedding_bits=16 must be 8 or 32"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EightBitOptimizer(**arguments)


def test_strategies_that_shard_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class ModelParallelStrategy:
        pass

    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    monkeypatch.setattr(type(trainer), "strategy", ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"does not run under ModelParallelStrategy, whose .* use DDP or one"):
        EightBitOptimizer().setup(trainer, Filtered(), "fit")
