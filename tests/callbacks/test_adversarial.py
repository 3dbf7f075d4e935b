"""FreeLB, FGM, PGD and NEFTune against loops written out with ``inputs_embeds``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_ft.callbacks.fgm import FGM
from lightning_ft.callbacks.free_lb import FreeLB
from lightning_ft.callbacks.neftune import NEFTune
from lightning_ft.callbacks.pgd import PGD
from lightning_ft.core.token_inputs import TokenInputs
from lightning_ft.functional.perturbation import even_noise
from tests.perturbing import SEED, Project, assert_same, backward, batch, bert, gpt2, gradients_of, step, t5

Losses = Callable[[Tensor], Tensor]


def embedded(model: Any, rows: dict[str, Tensor]) -> tuple[Tensor, Losses]:
    """The embedded tokens, and the loss where they are moved."""
    rest = {name: value for name, value in rows.items() if name != "input_ids"}
    words = model.get_input_embeddings()

    def loss(delta: Tensor) -> Tensor:
        result: Tensor = model(inputs_embeds=words(rows["input_ids"]) + delta, **rest).loss
        return result

    return words(rows["input_ids"]).detach(), loss


def authors_free_lb(
    model: Any, rows: dict[str, Tensor], delta: Tensor, steps: int, alpha: float, max_norm: float, state: Tensor
) -> dict[str, Tensor]:
    """FreeLB as its authors run it: a backward pass in each step, and gradients that add up."""
    _, loss_at = embedded(model, rows)
    model.zero_grad()
    for k in range(steps):
        delta.requires_grad_()
        torch.set_rng_state(state)  # their dropout keeps its mask over the steps
        (loss_at(delta) / steps).backward()
        if k == steps - 1:
            break
        # Theirs moves padding, too, where it has a gradient (a label on it).
        gradient = delta.grad * rows["attention_mask"].unsqueeze(-1)
        norm = gradient.view(len(gradient), -1).norm(dim=1).view(-1, 1, 1).clamp(min=1e-8)
        delta = (delta + alpha * gradient / norm).detach()
        if max_norm > 0:
            size = delta.view(len(delta), -1).norm(dim=1)
            outside = (size > max_norm).float()
            delta = (delta * (max_norm / size * outside + 1 - outside).view(-1, 1, 1)).detach()
    return gradients_of(model)


def start_of(rows: dict[str, Tensor], magnitude: float, width: int = 16) -> tuple[Tensor, Tensor]:
    """δ₀ that FreeLB draws, and the state in which the first pass runs."""
    torch.manual_seed(SEED)
    if not magnitude:
        return torch.zeros(*rows["input_ids"].shape, width), torch.get_rng_state()
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    state = torch.get_rng_state()
    return even_noise(magnitude, rows["attention_mask"] != 0, width, generator=generator), state


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "bert": (bert, batch),
    "bert-dropout": (lambda: bert(dropout=0.2), batch),
    "gpt2": (gpt2, lambda: batch(labels=torch.randint(50, (4, 6)).index_fill(1, torch.tensor([0, 1]), -100))),
    "t5": (t5, lambda: batch(labels=torch.randint(3, 50, (4, 5)))),
    "tokens": (lambda: bert("TokenClassification", num_labels=3), lambda: batch(labels=torch.randint(3, (4, 6)))),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("steps", "magnitude", "max_norm"), [(3, 0.6, 0.0), (2, 0.0, 0.05)])
def test_free_lb_has_the_gradients_of_the_authors_loop(
    name: str, steps: int, magnitude: float, max_norm: float
) -> None:
    make, rows = MODELS[name][0], MODELS[name][1]()
    model = make()
    found = step(Project(model, rows), FreeLB(0.3, steps, magnitude=magnitude, max_norm=max_norm))
    reference = make()
    delta, state = start_of(rows, magnitude)
    assert_same(found, authors_free_lb(reference, rows, delta, steps, 0.3, max_norm, state))


def test_free_lb_of_one_step_from_where_it_is_is_plain_training_to_the_bit() -> None:
    rows = batch()
    found = step(Project(bert(dropout=0.2), rows), FreeLB(0.1, 1, magnitude=0.0))
    plain = step(Project(bert(dropout=0.2), rows))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_free_lb_that_does_not_climb_is_plain_training() -> None:
    rows = batch()
    assert_same(step(Project(bert(), rows), FreeLB(0.0, 2, magnitude=0.0)), step(Project(bert(), rows)))


def test_free_lb_is_exact_under_accumulation_and_clipping() -> None:
    rows = batch()
    halves = [{name: value[i : i + 2] for name, value in rows.items()} for i in (0, 2)]

    class Halves(Project):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(halves, batch_size=None)

    callback = {"step_size": 0.3, "steps": 3, "magnitude": 0.0}
    whole = step(Project(bert(), rows), FreeLB(**callback))
    assert_same(step(Halves(bert(), rows), FreeLB(**callback), accumulate_grad_batches=2), whole)


def fp16(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def test_under_fp16_the_loss_scale_is_no_part_of_the_perturbation() -> None:
    rows = batch()
    exact = step(Project(bert(), rows), FGM(0.5))
    for scale in (1.0, 2.0**12):
        found = step(Project(bert(), rows), FGM(0.5), plugins=fp16(scale))
        for name, value in exact.items():
            torch.testing.assert_close(found[name], value, rtol=0.1, atol=0.02)


def written_out_pgd(
    model: Any, rows: dict[str, Tensor], epsilon: float, alpha: float, steps: int, mask: Tensor
) -> dict[str, Tensor]:
    start, loss_at = embedded(model, rows)
    delta = torch.zeros_like(start)
    for _ in range(steps):
        delta.requires_grad_()
        [gradient] = torch.autograd.grad(loss_at(delta), delta)
        gradient = gradient * mask.unsqueeze(-1)
        delta = delta.detach() + alpha * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
        size = delta.flatten(1).norm(dim=1).view(-1, 1, 1)
        delta = torch.where(size > epsilon, delta * epsilon / size, delta)
    return backward(model, loss_at(torch.zeros_like(start)) + 0.5 * loss_at(delta))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "tokens"])
def test_pgd_has_the_gradients_of_the_loop_written_out(name: str) -> None:
    make, rows = MODELS[name][0], MODELS[name][1]()
    found = step(Project(make(), rows), PGD(0.5, 0.3, steps=3, weight=0.5))
    assert_same(found, written_out_pgd(make(), rows, 0.5, 0.3, 3, rows["attention_mask"]))


def test_fgm_is_pgd_of_one_step_to_the_border() -> None:
    rows = batch()
    found = step(Project(bert(), rows), FGM(0.7, weight=0.5))
    assert_same(found, written_out_pgd(bert(), rows, 0.7, 0.7, 1, rows["attention_mask"]))


@pytest.mark.parametrize("callback", [FGM, PGD, lambda **options: FreeLB(magnitude=0.0, **options)])
def test_tokens_that_are_excluded_stay_where_they_are(callback: Any) -> None:
    rows, seen = batch(), []
    rows["input_ids"][:, 0] = 7
    module = Project(bert(), rows)
    words = module.net.bert.embeddings.word_embeddings
    attached = callback(inputs=TokenInputs(exclude=[7]))

    class Spy(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.extend(attached._perturbing.words.deltas)
            return loss

    step(Spy(module.net, rows), attached)
    assert words.weight.requires_grad
    still = (rows["attention_mask"] == 0) | (rows["input_ids"] == 7)
    assert seen[-1].abs().sum() > 0
    for delta in seen:
        assert delta[still].abs().max() == 0


def test_each_example_moves_by_its_own_gradient() -> None:
    rows, deltas = batch(), []

    class Spy(Project):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            deltas.append(callback._perturbing.words.deltas[0].detach())
            return loss

    callback = FGM(0.7)
    step(Spy(bert(), rows), callback)
    assert deltas[0].abs().max() == 0
    torch.testing.assert_close(deltas[1].flatten(1).norm(dim=1), torch.full((4,), 0.7))


def test_a_frozen_and_tied_table_serves_as_well() -> None:
    rows = MODELS["gpt2"][1]()
    frozen, trained = gpt2(), gpt2()
    assert frozen.lm_head.weight is frozen.transformer.wte.weight
    frozen.transformer.wte.weight.requires_grad_(False)
    found = step(Project(frozen, rows), FreeLB(0.3, 3, magnitude=0.0))
    wanted = step(Project(trained, rows), FreeLB(0.3, 3, magnitude=0.0))
    del wanted["transformer.wte.weight"]
    assert_same(found, wanted)


def test_each_choice_of_a_row_is_an_example() -> None:
    rows = batch(labels=torch.tensor([0, 1]))
    choices = {name: rows[name].view(2, 2, -1) if name != "labels" else rows[name] for name in rows}
    found = step(Project(bert("MultipleChoice"), choices), FGM(0.7))
    model = bert("MultipleChoice")
    words, flat = model.bert.embeddings.word_embeddings, rows["input_ids"]
    rest = {"attention_mask": choices["attention_mask"], "labels": choices["labels"]}

    def loss_at(delta: Tensor) -> Tensor:
        result: Tensor = model(inputs_embeds=(words(flat) + delta).view(2, 2, 6, -1), **rest).loss
        return result

    delta = torch.zeros(4, 6, 16, requires_grad=True)
    [gradient] = torch.autograd.grad(loss_at(delta), delta)
    moved = 0.7 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    assert_same(found, backward(model, loss_at(torch.zeros_like(moved)) + loss_at(moved)))


def test_neftune_is_noise_on_the_real_tokens_of_training_alone() -> None:
    rows = batch()
    found = step(Project(bert(), rows), NEFTune(5.0))
    model = bert()
    torch.manual_seed(SEED)
    noise = even_noise(5.0, rows["attention_mask"] != 0, 16)
    _, loss_at = embedded(model, rows)
    assert_same(found, backward(model, loss_at(noise)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FreeLB(-1.0), "step_size=-1.0 must be a number, 0 or more"),
        (lambda: FreeLB(steps=0), "steps=0 must be a whole number, 1 or more"),
        (lambda: FreeLB(magnitude=-1.0), "magnitude=-1.0 must be"),
        (lambda: FreeLB(max_norm=float("nan")), "max_norm=nan must be"),
        (lambda: FGM(float("inf")), "epsilon=inf must be"),
        (lambda: FGM(dropout="none"), 'dropout=\'none\' must be "independent" or "shared"'),  # type: ignore[arg-type]
        (lambda: PGD(step_size=-0.1), "step_size=-0.1 must be"),
        (lambda: PGD(steps=True), "steps=True must be a whole number"),
        (lambda: NEFTune(-5.0), "alpha=-5.0 must be"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
