"""DiffPruning on strangers: its phases, rates and price, exact resume in each phase, and what its checkpoints hold."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from lightning_ft.callbacks import DiscriminativeLR
from lightning_ft.callbacks.diff_pruning import DiffPruning
from lightning_ft.functional.alterations import load_altered
from lightning_ft.functional.diff_pruning import sparse_offsets
from lightning_ft.functional.hard_concrete import HardConcrete
from lightning_ft.functional.sparse_delta import load_sparse_delta, save_sparse_delta
from tests.callbacks.test_exact_resume import STRANGER
from tests.resuming import Resuming
from tests.strangers import FILTERED, STILL, STRANGERS, Filtered, HeadFirst, Stranger, identical, weights

VALUES = sum(p.numel() for p in Filtered().encoder.parameters())


class Trace(Callback):
    """What the callback does, batch by batch."""

    def __init__(self) -> None:
        self.alphas: list[torch.Tensor] = []
        self.drawn: list[bool] = []
        self.validated: list[bool] = []
        self.states: list[set[str]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        (offset, *_) = sparse_offsets(module)
        self.alphas.append(offset.log_alpha.detach().clone())
        self.drawn.append(offset.training and offset.log_alpha.requires_grad)
        state = trainer.optimizers[0].state
        self.states.append({name for name, p in offset.named_parameters() if p in state})

    def on_validation_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.validated.append(sparse_offsets(module)[0].training)


def callback(**arguments: Any) -> DiffPruning:
    return DiffPruning(0.05, **{"relaxed": "4 steps", "seed": 3, **arguments})


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_goes_through_its_phases() -> None:
    trace, method, module = Trace(), callback(relaxed=0.5), Filtered().eval()
    trainer = FILTERED.fit(method, trace, module=module)
    # 12 batches and steps. The model came in eval mode; gates are drawn all the same, and never in validation.
    assert trace.drawn == [True] * 6 + [False] * 6
    assert not any(trace.validated)
    assert [bool(a.isinf().all()) for a in trace.alphas] == [False] * 6 + [True] * 6
    # What the optimiser knew of other gradients is dropped, and of δ it begins anew.
    both = {"delta", "log_alpha", "group_log_alpha"}
    assert trace.states == [set(), *[both] * 5, set(), *[{"delta"}] * 5]
    deltas = [offset.delta for offset in sparse_offsets(module)]
    assert {int(trainer.optimizers[0].state[delta]["step"]) for delta in deltas} == {6}

    assert method.report is not None
    assert method.report.facts["kept"] == round(0.05 * VALUES)
    changed = sum(int(((o.gate() * o.delta) != 0).sum()) for o in sparse_offsets(module))
    assert changed == round(0.05 * VALUES)
    assert all(not o.delta[o.log_alpha < 0].any() for o in sparse_offsets(module))


def first_step(*more: Callback, module: Any = None, **options: Any) -> tuple[Any, Any]:
    """A module after its first optimiser step, and how it would be built."""
    module = module or HeadFirst(dropout=0)
    STILL.fit(*more, module=module, limit_val_batches=0, **{"max_steps": 1, **options})
    return module, sparse_offsets(module)


class Fp16(MixedPrecision):
    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.filterwarnings("ignore:.*training ended within its first phase")
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"plugins": [Fp16()]}], ids=["plain", "accumulation", "fp16"]
)
def test_price_of_open_gates_is_paid_once_a_step_and_in_full(options: dict[str, Any]) -> None:
    """δ is zero in the first step, so a feels the price alone: a ← a − ηₐ λ p_group p (1−p), and SGD shows it."""
    gates = HardConcrete(-0.1, 1.1, 2 / 3, 0.0)
    _, offsets = first_step(callback(gates=gates, penalty=2.0, gate_rate=0.1), **options)
    p = 0.8318222
    for offset in offsets:
        moved = torch.full_like(offset.log_alpha, -0.1 * 2.0 * p * p * (1 - p))
        torch.testing.assert_close(offset.log_alpha.detach(), moved, rtol=1e-4, atol=0)
        whole = -0.1 * 2.0 * offset.log_alpha.numel() * p * p * (1 - p)
        torch.testing.assert_close(offset.group_log_alpha.detach(), torch.tensor([whole]), rtol=1e-4, atol=0)
    # But for tensors whose gate was drawn shut, δ has moved.
    assert sum(bool(offset.delta.any()) for offset in offsets) > len(offsets) / 2


@pytest.mark.filterwarnings("ignore:.*training ended within its first phase")
@pytest.mark.parametrize("order", ["alone", "before", "after"])
def test_gates_and_offsets_have_rates_and_schedules_of_their_own(order: str) -> None:
    """Adam's steps are the rate: 0.1 for a and 0.01 for δ, both times 1/(1 + 0.1 t); nothing decays a.

    Factors of depth multiply both: the embedding is three blocks and one more below the head's rate.
    """
    trace, method, rival = Trace(), callback(penalty=100.0), DiscriminativeLR(0.5)
    others = {"alone": [method], "before": [rival, method], "after": [method, rival]}[order]
    module = Filtered(dropout=0)
    trainer = STILL.fit(*others, trace, module=module, max_epochs=1, max_steps=3, limit_val_batches=0)
    (offset, *_) = sparse_offsets(module)
    factor = 1 if order == "alone" else 0.5**4
    values = [*trace.alphas[:3], offset.log_alpha.detach()]
    for step, (before, after) in enumerate(pairwise(values)):
        expected = torch.full_like(before, factor * 0.1 / (1 + 0.1 * step))
        torch.testing.assert_close(before - after, expected, rtol=0.02, atol=0)
    # The groups are as the module made them.
    (group,) = trainer.optimizers[0].param_groups
    assert len(group["params"]) == len({id(p) for p in group["params"]})
    assert {id(o.log_alpha) for o in sparse_offsets(module)} <= {id(p) for p in group["params"]}
    steps = sum(1 / (1 + 0.1 * t) for t in range(3))
    assert 0 < offset.delta.detach().abs().max().item() <= 1.05 * factor * 0.01 * steps


RUN = Resuming(callback, epochs=3)


# Three steps an epoch: the mask is fixed in the middle of the second, before its batch 2.
@pytest.mark.parametrize(
    ("name", "hook", "epoch", "batch"),
    [
        ("filtered", "on_after_backward", 0, 3),
        ("filtered", "on_train_batch_end", 0, 5),
        ("filtered", "on_train_batch_start", 1, 2),
        ("filtered", "on_after_backward", 1, 2),
        ("filtered", "on_after_backward", 1, 4),
        ("filtered", "on_train_batch_end", 1, 5),
        ("filtered", "on_validation_end", 2, 2),
        *((stranger.name, "on_after_backward", 1, batch) for stranger in STRANGERS[1:] for batch in (1, 4)),
    ],
)
def test_resumed_run_ends_as_if_it_had_never_stopped(
    name: str, hook: str, epoch: int, batch: int, tmp_path: Path
) -> None:
    RUN.check(name, hook, epoch, batch, tmp_path)


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_checkpoint_is_small_and_opens_over_the_base(stranger: Stranger, tmp_path: Path) -> None:
    module = RUN.fit(stranger.name, tmp_path).lightning_module.eval()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    saved = {t.data_ptr(): t.numel() * t.element_size() for t in state.values()}
    head = sum(p.numel() for n, p in module.named_parameters() if "parametrizations" not in n)
    values = sum(o.delta.numel() for o in sparse_offsets(module))
    assert sum(saved.values()) <= 8 * round(0.05 * values) + 4 * head

    def built() -> Any:
        fresh = stranger.module()
        fresh.configure_model()
        return fresh.eval()

    tokens = torch.randint(20, (3, 5))
    again, plain = built(), built()
    load_altered(again, tmp_path / "last.ckpt")
    save_sparse_delta(module, tmp_path / "task.safetensors")
    load_sparse_delta(plain, tmp_path / "task.safetensors")
    with torch.no_grad():
        assert torch.equal(again(tokens), module(tokens))
        torch.testing.assert_close(plain(tokens), module(tokens), rtol=0, atol=1e-6)
    assert identical(weights(again), weights(module))


def test_validation_changes_no_number() -> None:
    module = Filtered(dropout=0)
    before = STILL.trainer()
    before.validate(module, verbose=False)
    trainer = STILL.trainer([callback()])
    trainer.validate(module, verbose=False)
    assert trainer.callback_metrics["val_loss"] == before.callback_metrics["val_loss"]


def test_a_second_fit_goes_on_with_the_mask() -> None:
    module = Filtered()
    FILTERED.fit(method := callback(), module=module)
    masks = [o.log_alpha.clone() for o in sparse_offsets(module)]
    FILTERED.fit(method, trace := Trace(), module=module, max_epochs=1)
    assert not any(trace.drawn)
    assert all(torch.equal(o.log_alpha, mask) for o, mask in zip(sparse_offsets(module), masks, strict=True))
    assert method.report is None  # it fixed nothing


def test_bf16_autocast_trains() -> None:
    module = FILTERED.fit(callback(), precision="bf16-mixed").lightning_module
    assert all(o.delta.dtype == torch.float32 and o.fixed for o in sparse_offsets(module))


class Before(Callback):
    """Reads a weight just before a step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        read(module)


class After(Callback):
    """Reads a weight after a step, as it is computed and as it should be."""

    def __init__(self) -> None:
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        now = read(module)
        sparse_offsets(module)[0].moment.drop()
        self.read.append((now, read(module)))


def read(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.bert.bert.encoder.layer[0].output.dense.weight
    return weight.detach().clone()


def test_who_reads_weights_after_a_fused_step_reads_those_of_now() -> None:
    """Such a step does not tell that it wrote to a parameter."""
    after = After()
    STRANGER["late"].fit(after, callback(), Before(), max_epochs=1)
    assert len(after.read) == 6
    assert all(torch.equal(now, fresh) for now, fresh in after.read)
    assert not torch.equal(after.read[0][0], after.read[1][0])


def test_says_that_it_did_not_come_to_prune() -> None:
    with pytest.warns(UserWarning, match=r"ended within its first phase \(relaxed=50 steps\)"):
        FILTERED.fit(callback(relaxed="50 steps"))


def test_warns_of_half_precision() -> None:
    with pytest.warns(UserWarning, match=r"small steps of δ and a are lost. Use Trainer\(precision=\"bf16-mixed\"\)"):
        FILTERED.fit(callback(), precision="bf16-true", max_epochs=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, r"share=0.0 must lie in \(0, 1\]"),
        ({"gate_rate": 0.0}, r"gate_rate=0.0 must be a learning rate above 0"),
        ({"penalty": -1.0}, r"strength=-1.0 must be 0 or more: the price"),
        ({"relaxed": 3}, r"relaxed=3 has no unit"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffPruning(**arguments)


def test_refuses_a_fraction_of_endless_training() -> None:
    with pytest.raises(ValueError, match="fraction of a training that has no end"):
        FILTERED.fit(DiffPruning(0.1), max_epochs=-1)


def test_refuses_sharded_weights() -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(restore_checkpoint_after_setup=True))
    with pytest.raises(ValueError, match="DiffPruning computes whole weights: SimpleNamespace shards them; use DDP"):
        DiffPruning(0.1).on_fit_start(trainer, Filtered())


def test_refuses_an_optimiser_without_rates() -> None:
    class Wrapped(Filtered):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters())
            optimizer.param_groups[0]["lr"] = None
            return optimizer

    with pytest.raises(ValueError, match="DiffPruning gives some parameters a learning rate of their own, and AdamW"):
        FILTERED.fit(callback(), module=Wrapped())
