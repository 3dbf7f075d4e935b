from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ft.callbacks import EWC, L2SP, DiscriminativeLR, GradualUnfreezing, LayerReinit
from lightning_ft.callbacks._anchoring import _KEPT
from lightning_ft.core.fisher import Fisher
from lightning_ft.core.layers import Layers
from lightning_ft.functional.fisher import fisher_diagonal
from lightning_ft.functional.likelihood import Likelihood
from tests.callbacks.test_l2_sp import Gradients, Overflowing, Plain
from tests.strangers import BATCH, FILTERED, STILL, STRANGERS, Stranger, dataset, identical, outcome, weights

LAMBDA = 0.5


def body(module: Any) -> dict[str, Tensor]:
    groups = Layers().of(module)
    return {name: p for group in groups if group != "head" for name, p in groups.named_parameters(group)}


def invented(module: Any, seed: int = 3, **facts: Any) -> Fisher:
    """Any non-negative values do: what they are is the Fisher information's own test."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.rand(p.shape, generator=generator) for name, p in body(module).items()}
    squares = {name: p.detach().double().square().sum().item() for name, p in body(module).items()}
    return Fisher(tensors, 7, "exact", squares, **facts)


@pytest.fixture
def files(tmp_path: Path) -> Any:
    """A file of each stranger's F."""

    def write(stranger: Stranger, **facts: Any) -> Path:
        module = stranger.module()
        if hasattr(module, "configure_model"):
            module.configure_model()
        invented(module, **facts).save(path := tmp_path / f"{stranger.name}.safetensors")
        return path

    return write


# --- the penalty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_coupled_adds_the_closed_form_and_leaves_the_head_alone(stranger: Stranger, files: Any) -> None:
    path = files(stranger)
    fisher = Fisher.load(path).tensors
    before, after = Gradients(), Gradients()
    stranger.fit(before, EWC(LAMBDA, path), after, max_epochs=1)
    start = before.weights[0]
    moved = 0.0
    for theta, old, new in zip(before.weights, before.seen, after.seen, strict=True):
        for name, gradient in new.items():
            if gradient is None:
                continue
            pull = LAMBDA * fisher[name] * (theta[name] - start[name]) if name in fisher else torch.zeros(())
            moved = max(moved, float(pull.abs().max()))
            torch.testing.assert_close(gradient, old[name] + pull, rtol=1e-6, atol=1e-7)
    assert moved > 1e-4
    assert not _KEPT


class Penalised(Plain):
    """Ω in the loss, by autograd: the oracle."""

    def __init__(self, fisher: Fisher, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.fisher = fisher.tensors

    def omega(self) -> Tensor:
        named = dict(self.named_parameters())
        return 0.5 * LAMBDA * sum((f * (named[n] - self.start[n]).square()).sum() for n, f in self.fisher.items())


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_coupled_equals_autograd_of_the_penalty_in_the_loss(clip: Any, accumulation: int, tmp_path: Path) -> None:
    fisher = invented(Plain())
    fisher.save(path := tmp_path / "f.safetensors")
    oracle = Penalised(fisher, torch.optim.SGD)
    oracle.in_loss = True
    options = {"accumulate_grad_batches": accumulation, "gradient_clip_val": clip}
    ours = FILTERED.fit(EWC(LAMBDA, path), module=Plain(), **options)
    theirs = weights(FILTERED.fit(module=oracle, **options).lightning_module)
    free = weights(FILTERED.fit(module=Plain(), **options).lightning_module)
    for name, value in weights(ours.lightning_module).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(theirs[name], free[name], rtol=1e-4, atol=1e-6) for name in free)


def test_decoupled_moves_by_the_closed_form_beside_the_step(tmp_path: Path) -> None:
    fisher = invented(Plain())
    fisher.save(path := tmp_path / "f.safetensors")
    pulled, free = Gradients(), Gradients()
    FILTERED.fit(EWC(LAMBDA, path, mode="decoupled"), pulled, module=Plain(), max_epochs=1)
    FILTERED.fit(free, module=Plain(), max_epochs=1)
    start, stepped = pulled.weights[0], free.weights[1]
    for name, value in pulled.weights[1].items():  # the first step's gradient is the same in both
        f = fisher.tensors.get(name, torch.zeros(()))
        expected = stepped[name] - 0.1 * LAMBDA * f * (stepped[name] - start[name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_with_f_of_one_it_is_l2_sp(tmp_path: Path) -> None:
    module = Plain()
    ones = {name: torch.ones_like(p) for name, p in body(module).items()}
    Fisher(ones, 1, "exact").save(path := tmp_path / "ones.safetensors")
    ours = FILTERED.fit(EWC(LAMBDA, path), module=Plain())
    assert identical(outcome(ours), outcome(FILTERED.fit(L2SP(LAMBDA, kernels_only=False), module=Plain())))


@pytest.mark.parametrize("storage", ["device", "cpu", "bf16", "disk"])
def test_storage(storage: Any, tmp_path: Path) -> None:
    invented(Plain()).save(path := tmp_path / "f.safetensors")
    exact = weights(FILTERED.fit(EWC(LAMBDA, path), module=Plain()).lightning_module)
    stored = FILTERED.fit(EWC(LAMBDA, path, storage=storage), module=Plain(), default_root_dir=tmp_path)
    tolerance = 1e-2 if storage == "bf16" else 1e-6
    for name, value in weights(stored.lightning_module).items():
        torch.testing.assert_close(value, exact[name], rtol=tolerance, atol=tolerance)


def test_normalised_and_clipped(tmp_path: Path) -> None:
    fisher = invented(Plain())
    fisher.save(path := tmp_path / "f.safetensors")
    prepared = Fisher(fisher.tensors, 7, "exact").clipped(0.9).normalised()
    prepared.save(other := tmp_path / "prepared.safetensors")
    ours = FILTERED.fit(EWC(LAMBDA, path, quantile=0.9, normalize=True), module=Plain(), max_epochs=1)
    assert identical(outcome(ours), outcome(FILTERED.fit(EWC(LAMBDA, other), module=Plain(), max_epochs=1)))


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_that_the_scaler_skips_pulls_nothing(mode: Any, tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    invented(Plain()).save(path := tmp_path / "f.safetensors")
    seen = Gradients()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024))
    module = Overflowing(torch.optim.SGD)
    FILTERED.fit(EWC(LAMBDA, path, mode=mode), seen, module=module, plugins=[plugin], max_epochs=1)
    seen.weights.append(weights(module))
    steps = [not identical(a, b) for a, b in zip(seen.weights, seen.weights[1:], strict=False)]
    assert steps == [True, True, False, True, True, True]


def test_logs_the_penalty_and_tells_the_contraction(tmp_path: Path) -> None:
    fisher = invented(Plain())
    fisher.save(path := tmp_path / "f.safetensors")
    oracle = Penalised(fisher, torch.optim.SGD)
    values: list[float] = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            values.append(pl_module.omega().item())

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            assert trainer.logged_metrics["ewc"].item() == pytest.approx(values[-1], rel=1e-4, abs=1e-9)

    callback = EWC(LAMBDA, path)
    FILTERED.fit(callback, Watch(), module=oracle, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1)
    total = sum(f.numel() for f in fisher.tensors.values())
    mean = fisher.trace() / total
    assert callback.report is not None
    assert callback.report.facts["total contraction"] == pytest.approx(math.prod([1 - 0.1 * LAMBDA * mean] * 6))


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("other", [lambda: GradualUnfreezing("2 steps"), lambda: DiscriminativeLR(0.5)])
def test_order_does_not_matter(other: Any, mode: Any, files: Any) -> None:
    path = files(FILTERED)
    runs = [
        FILTERED.fit(*order)
        for order in ([EWC(LAMBDA, path, mode=mode), other()], [other(), EWC(LAMBDA, path, mode=mode)])
    ]
    assert identical(*map(outcome, runs))


def test_layers_drawn_anew_are_free(files: Any) -> None:
    path = files(FILTERED)
    seen: list[str] = []

    class Look(EWC):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.extend(self._anchoring.take().tensors)

    module = FILTERED.module()
    module.encoder.layers[2].linear1.weight.data.add_(1)
    with pytest.raises(ValueError, match="computed at other weights"):  # nothing was drawn anew: a changed block
        FILTERED.fit(EWC(LAMBDA, path), module=module)
    FILTERED.fit(LayerReinit(1), Look(LAMBDA, path), max_epochs=1)
    assert seen
    assert not any(name.startswith("encoder.layers.2") for name in seen)


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_resumed_run_is_anchored_to_the_old_solution(stranger: Stranger, files: Any, tmp_path: Path) -> None:
    path = files(stranger)
    stranger.fit(EWC(LAMBDA, path), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    straight, resumed = Gradients(), Gradients()
    stranger.fit(EWC(LAMBDA, path), straight)
    stranger.fit(EWC(LAMBDA, path), resumed, ckpt_path=tmp_path / "first.ckpt")
    before, start = resumed.weights[0], straight.weights[0]
    fisher = Fisher.load(path).tensors
    # θ⁰ is not what the checkpoint restored.
    assert any(not torch.equal(before[name], start[name]) for name in fisher)
    free = Gradients()
    stranger.fit(free, EWC(LAMBDA, path), ckpt_path=tmp_path / "first.ckpt")
    for name, f in fisher.items():
        pull = LAMBDA * f * (before[name] - start[name])
        torch.testing.assert_close(resumed.seen[0][name], free.seen[0][name] + pull, rtol=1e-5, atol=1e-6)


# --- F of the old task's data --------------------------------------------------------------------------------------


class OldTask(LightningDataModule):
    def __init__(self, rows: int = 12) -> None:
        super().__init__()
        self.rows, self.calls = rows, []  # type: ignore[var-annotated]

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.utils.data.Subset(dataset(), range(self.rows)), BATCH)


class Told(Plain):
    def log_likelihood_terms(self, batch: Any) -> Likelihood:
        return Likelihood(self(batch[0]), batch[1])


def test_f_is_computed_of_the_old_data_at_the_start_and_kept_for_a_resume(tmp_path: Path) -> None:
    old = OldTask()
    straight = FILTERED.fit(EWC(LAMBDA, old, examples=10), module=Told(), default_root_dir=tmp_path)
    assert old.calls == ["prepare", "fit"]
    (file,) = tmp_path.glob("fisher/*.safetensors")
    expected = fisher_diagonal(Told(), OldTask().train_dataloader(), limit=10, parameters=list(body(Told())))
    found = Fisher.load(file)
    assert found.examples == 10
    for name, value in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=1e-5, atol=1e-9)
    by_file = FILTERED.fit(EWC(LAMBDA, file), module=Told())
    assert identical(outcome(straight), outcome(by_file))

    first = FILTERED.fit(EWC(LAMBDA, OldTask(), examples=10), module=Told(), default_root_dir=tmp_path, max_epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    again = OldTask()
    resumed = FILTERED.fit(
        EWC(LAMBDA, again, examples=10), module=Told(), default_root_dir=tmp_path, ckpt_path=tmp_path / "first.ckpt"
    )
    assert again.calls == []
    assert identical(outcome(straight), outcome(resumed))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"is gone, .*EWC\(fisher=\.\.\.\), that lightning-ft fisher wrote"):
        FILTERED.fit(EWC(LAMBDA, OldTask()), module=Told(), ckpt_path=tmp_path / "first.ckpt")


def test_computing_f_disturbs_no_random_number(tmp_path: Path) -> None:
    class Dropped(Told):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.modules():
                if isinstance(layer, torch.nn.Dropout):
                    layer.p = 0.1

    with_zero = FILTERED.fit(EWC(0.0, OldTask(), examples=8), module=Dropped(), default_root_dir=tmp_path)
    assert identical(outcome(with_zero), outcome(FILTERED.fit(module=Dropped())))


def test_a_stranger_gives_its_loss(tmp_path: Path) -> None:
    callback = EWC(LAMBDA, OldTask(), variant="empirical", examples=4)
    FILTERED.fit(callback, default_root_dir=tmp_path, max_epochs=1)
    (file,) = tmp_path.glob("fisher/*.safetensors")
    assert Fisher.load(file).variant == "empirical"


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0 must be 0 or more"),
        ({"strength": 1.0, "examples": 0}, "examples=0 must be 1 or more"),
        ({"strength": 1.0, "quantile": 1.5}, r"quantile=1.5 must lie in \(0, 1\]"),
        ({"strength": 1.0, "mode": "both"}, "mode='both' must be \"coupled\""),
    ],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EWC(fisher="f.safetensors", **arguments)


def test_refuses_what_is_no_fisher_of_this_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: write it with lightning-ft fisher"):
        FILTERED.fit(EWC(1.0, tmp_path / "none.safetensors"))
    Fisher({"somewhere.weight": torch.ones(2)}, 1, "exact").save(other := tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"of none of the parameters .*\['somewhere.weight'\].*same attributes"):
        FILTERED.fit(EWC(1.0, other))
    Fisher({"encoder.norm.weight": torch.ones(2)}, 1, "exact").save(other)
    with pytest.raises(ValueError, match=r"of encoder.norm.weight has shape \(2,\), the parameter \(8,\)"):
        FILTERED.fit(EWC(1.0, other))
    big = {name: 30 * torch.ones_like(p) for name, p in body(Plain()).items()}
    Fisher(big, 1, "exact").save(other)
    with pytest.raises(ValueError, match=r"pulls 3 of the way back, .*: lower the strength"):
        FILTERED.fit(EWC(1.0, other, mode="decoupled"), module=Plain())
    Fisher({"encoder.norm.weight": torch.ones(8)}, 1, "exact").save(other)
    with pytest.warns(UserWarning, match="have no Fisher information and are free to move"):
        STILL.fit(EWC(1.0, other), max_epochs=1)
    assert not _KEPT
