"""SMART against a loop written out, its moving average, and what it keeps of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ft.callbacks.exact_resume import ExactResume
from lightning_ft.callbacks.free_lb import FreeLB
from lightning_ft.callbacks.smart import SMART
from lightning_ft.functional.smart import Ascent
from lightning_ft.modules.token_mean import TokenMean
from tests.callbacks.test_consistency import both_ways
from tests.perturbing import SEED, Project, assert_same, backward, batch, bert, logged, step, trainer
from tests.strangers import FILTERED, Filtered, identical, outcome, weights

BIG = Ascent(epsilon=0.02, sigma=0.01, step=0.05, steps=2)


def written_out(model: Any, rows: dict[str, Tensor], old: Any, *, shared: bool) -> dict[str, Tensor]:
    """λ = 2, μ = 0.5, two steps in a box of 0.02; θ̃ is ``old``, in eval mode unless dropout is shared."""
    rest = {name: value for name, value in rows.items() if name not in ("input_ids", "labels")}
    words, mask = model.get_input_embeddings(), rows["attention_mask"].unsqueeze(-1)
    torch.manual_seed(SEED)
    state = torch.get_rng_state()

    def at(delta: Tensor, net: Any = model) -> Tensor:
        if shared:
            torch.set_rng_state(state)
        logits: Tensor = net(inputs_embeds=words(rows["input_ids"]) + delta, **rest).logits
        return logits

    clean = at(torch.zeros(()))
    loss = F.cross_entropy(clean, rows["labels"])
    before = torch.get_rng_state()
    delta = torch.randn(4, 6, 16) * 0.01 * mask
    for _ in range(2):
        if shared:
            torch.set_rng_state(state)
        delta.requires_grad_()
        logits = model(inputs_embeds=words(rows["input_ids"]).detach() + delta, **rest).logits
        [g] = torch.autograd.grad(both_ways(clean.detach(), logits).mean(), delta)
        g = g / g.abs().flatten(1).amax(1).view(-1, 1, 1)
        delta = (delta.detach() + 0.05 * g).clamp(-0.02, 0.02) * mask
    loss = loss + 2 * both_ways(clean, at(delta)).mean()
    assert before is not None
    if not shared:
        old.eval()
    elif shared:
        old.train()
    with torch.no_grad():
        if shared:
            torch.set_rng_state(state)
        there = old(**{**rest, "input_ids": rows["input_ids"]}).logits
    return backward(model, loss + 0.5 * both_ways(clean, there).mean())


@pytest.mark.parametrize("dropout", ["independent", "shared"])
def test_smart_has_the_gradients_of_the_loop_written_out(dropout: Any) -> None:
    rows = batch()

    found = step(Project(bert(dropout=0.2), rows), SMART(2.0, 0.5, ascent=BIG, dropout=dropout), Moved())
    model, old = bert(dropout=0.2), bert(dropout=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    assert_same(found, written_out(model, rows, old, shared=dropout == "shared"))


def test_the_average_agrees_with_the_iterate_it_was_taken_from() -> None:
    rows = batch()
    values = logged(Project(bert(dropout=0.3), rows, batches=2, lr=0.1), SMART(0.0, 1.0, dropout="shared"))
    assert values["bregman"][0] == 0
    assert values["bregman"][1] > 0
    assert "smart" not in values


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_average_is_what_runs_under_autocast_too(precision: Any) -> None:
    """Autocast keeps its casts of weights by parameter: it would hand out those of the iterate."""
    net = bert()
    net.requires_grad_(False)
    net.classifier.weight.requires_grad_(True)
    module = Project(net, batch(), batches=3, lr=1.0)
    values = logged(module, SMART(0.0, 1.0, dropout="shared"), precision=precision)
    assert values["bregman"][0] == 0
    assert values["bregman"][2] > 1e-4


def test_weights_of_zero_are_the_base_loss() -> None:
    rows = batch()
    found = step(Project(bert(dropout=0.2), rows), SMART(0.0, 0.0))
    plain = step(Project(bert(dropout=0.2), rows))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_mtdnn_s_perturbation_is_of_size_one_and_its_kl_has_constant_targets() -> None:
    rows = batch()
    callback = SMART(1.0, mtdnn_compat=True, dropout="shared")
    assert callback.mu == 0
    deltas: list[Tensor] = []

    class Spy(Project):
        def on_before_backward(self, loss: Tensor) -> None:
            deltas.extend(callback._perturbing.words.deltas)

    found = step(Spy(bert(), rows), callback)
    [delta] = deltas
    assert delta[rows["attention_mask"] == 0].abs().max() == 0
    largest = delta.abs().amax(-1)[rows["attention_mask"] == 1]
    assert 0.5 < float(largest.median()) <= 1
    model = bert()
    clean = model(**rows)
    words = model.get_input_embeddings()
    rest = {"attention_mask": rows["attention_mask"]}
    logits = model(inputs_embeds=words(rows["input_ids"]) + delta, **rest).logits
    a, b = (F.log_softmax(x, -1) for x in (clean.logits, logits))
    there = F.kl_div(a, b.exp().detach(), reduction="batchmean") + F.kl_div(b, a.exp().detach(), reduction="batchmean")
    assert_same(found, backward(model, clean.loss + there))


class Still(Filtered):
    def __init__(self) -> None:
        super().__init__(dropout=0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Trace(Callback):
    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def test_the_average_follows_the_iterates_with_two_rates() -> None:
    trace, callback, module = Trace(), SMART(0.0, 1.0, betas=(0.5, 0.9), switch="2 steps"), Still()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    FILTERED.fit(callback, trace, module=module, max_epochs=1)
    for name, value in callback.state_dict()["mean"].items():
        wanted = start[name]
        for i, weight in enumerate(trace.weights):
            beta = 0.5 if i < 2 else 0.9
            wanted = beta * wanted + (1 - beta) * weight[name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)


class Moved(Callback):
    """The iterate has left the average, which is what the model was at the start."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(1.2)


def test_a_step_that_overflowed_moves_no_average() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=100)
    callback, module = SMART(0.0, 1.0), Still()
    start = weights(module)
    FILTERED.fit(
        callback,
        Moved(),
        module=module,
        max_epochs=1,
        limit_train_batches=2,
        plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler),
        limit_val_batches=0,
    )
    assert identical(weights(module), {name: 1.2 * p for name, p in start.items()}), "both steps were to overflow"
    assert all(torch.equal(value, start[name]) for name, value in callback.state_dict()["mean"].items())


class TokenWeighted(Project):
    """Its loss is the mean over all tokens of an optimiser step, as that of our heads is."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        super().__init__(bert("TokenClassification", num_labels=3), {})
        self.parts, self.token_mean = batches, TokenMean()

    @property
    def loss_factor(self) -> Any:
        return self.token_mean.factor

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.net(**batch)
        return self.token_mean.loss(self, output.loss, (batch["labels"] != -100).sum(), batch_idx)

    def on_after_backward(self) -> None:
        self.token_mean.rescale(self)

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts, batch_size=None)


@pytest.mark.parametrize(
    "make", [lambda: SMART(0.0, 3.0), lambda: FreeLB(0.3, 3, magnitude=0.0)], ids=["smart", "free-lb"]
)
def test_a_mean_over_the_tokens_of_a_step_is_one_with_a_term_too(make: Callable[[], Callback]) -> None:
    labels = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(5))
    labels[:2, 1:] = -100
    rows = batch(labels=labels)
    halves = [{name: value[i : i + 2] for name, value in rows.items()} for i in (0, 2)]
    found = step(TokenWeighted(halves), make(), Moved(), accumulate_grad_batches=2)
    assert_same(found, step(TokenWeighted([rows]), make(), Moved()))


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch, self.seen = batch, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            raise Killed


@pytest.mark.parametrize("kill_at", [4, 6, 9])  # mid-epoch, an epoch's last batch, in the second
def test_a_resumed_run_is_the_uninterrupted_one(kill_at: int, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "val_check_interval": 3, "max_epochs": 2, "num_sanity_val_steps": 0}

    def callbacks(folder: str) -> list[Callback]:
        ascent = Ascent(epsilon=0.05, sigma=0.02, step=0.1)
        smart = SMART(1.0, 2.0, ascent=ascent, betas=(0.5, 0.9), switch=0.4)
        return [ExactResume("1 steps", dirpath=tmp_path / folder, seed=3), smart]

    whole = callbacks("whole")
    straight = outcome(FILTERED.fit(*whole, **options))
    with pytest.raises(Killed):
        FILTERED.fit(*callbacks("killed"), KillAt(kill_at), **options)
    again = callbacks("again")
    resumed = FILTERED.fit(*again, ckpt_path=tmp_path / "killed" / "last.ckpt", **options)
    assert identical(outcome(resumed), straight)
    assert identical(again[1].state_dict(), whole[1].state_dict())


def test_what_a_copy_of_the_module_does_is_plain() -> None:
    module = Project(bert(), batch())
    copies: list[Any] = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copies.append(copy.deepcopy(pl_module.net))

    trainer(SMART(), Copy()).fit(module)
    rows = batch()
    assert torch.equal(copies[0](**rows).logits, module.net(**rows).logits)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SMART(-1.0), "weight=-1.0 must be a number, 0 or more"),
        (lambda: SMART(mu=-1.0), "mu=-1.0 must be"),
        (lambda: SMART(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\) must be two numbers in \[0, 1\)"),
        (lambda: SMART(switch=3), "switch=3 has no unit"),
        (lambda: SMART(dropout="off"), "dropout='off' must be"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
