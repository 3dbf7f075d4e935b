from __future__ import annotations

import math

import pytest
import torch

from lightning_ft.functional.hard_concrete import ExpectedL0, HardConcrete, logistic_noise

AUTHORS = HardConcrete()
LOUIZOS = HardConcrete(-0.1, 1.1, 2 / 3, 0.0)


def test_open_probability_is_the_closed_form() -> None:
    assert AUTHORS.open_probability(torch.tensor(5.0, dtype=torch.double)).item() == pytest.approx(0.993307, abs=1e-6)
    assert LOUIZOS.open_probability(torch.tensor(0.0, dtype=torch.double)).item() == pytest.approx(0.8318222, abs=1e-7)


@pytest.mark.parametrize("gates", [AUTHORS, LOUIZOS])
@pytest.mark.parametrize("a", [-2.0, 0.0, 1.5])
def test_draws_are_open_and_wide_open_as_often_as_they_should(gates: HardConcrete, a: float) -> None:
    log_alpha = torch.full((200_000,), a)
    z = gates.sample(log_alpha, logistic_noise(log_alpha, 3))
    open_, wide = (z > 0).double().mean().item(), (z == 1).double().mean().item()
    assert z.min() >= 0
    assert z.max() <= 1
    assert open_ == pytest.approx(gates.open_probability(torch.tensor(a)).item(), abs=0.005)
    # P(s(r-l)+l ≥ 1) = σ(a + β ln((r-1)/(1-l))), by inverting s.
    above = 1 / (1 + math.exp(-(a + gates.temperature * math.log((gates.upper - 1) / (1 - gates.lower)))))
    assert wide == pytest.approx(above, abs=0.005)


def test_value_without_noise_is_the_stretched_sigmoid() -> None:
    # σ(ln 3) = 0.75: 0.75 · 1.2 - 0.1 = 0.8.
    assert LOUIZOS.value(torch.tensor(math.log(3))).item() == pytest.approx(0.8)
    assert AUTHORS.value(torch.tensor([5.0, -5.0, torch.inf, -torch.inf])).tolist() == [1, 0, 1, 0]


def test_noise_is_a_function_of_the_key_and_leaves_the_generator_alone() -> None:
    like = torch.zeros(5)
    state = torch.get_rng_state()
    one, same, other = (logistic_noise(like, key) for key in (1, 1, -2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert logistic_noise(torch.zeros(5, device="meta"), 1).is_meta


def test_a_gate_without_doubt_is_never_drawn_otherwise() -> None:
    sure = torch.tensor([torch.inf, -torch.inf]).repeat(50_000)
    z = AUTHORS.sample(sure, logistic_noise(sure, 1))
    assert torch.equal(z, torch.tensor([1.0, 0.0]).repeat(50_000))


@pytest.mark.parametrize("structured", [True, False])
def test_gradient_of_the_penalty_is_autograd_of_its_value(structured: bool) -> None:
    penalty = ExpectedL0(LOUIZOS, 0.3)
    elements = [torch.randn(3, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    groups = [torch.randn(1, dtype=torch.double, requires_grad=True) if structured else None for _ in range(2)]
    every = [*elements, *(g for g in groups if g is not None)]
    expected = torch.autograd.grad(penalty.value(elements, groups), every)
    for parameter in every:
        parameter.grad = torch.ones_like(parameter)
    penalty.add_grad_(elements, groups, scale=torch.tensor(2.0))
    for parameter, gradient in zip(every, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + 2 * gradient)


def test_penalty_multiplies_probabilities_and_does_not_add_them() -> None:
    elements, groups = [torch.full((10,), 5.0)], [torch.tensor([0.0])]
    value = ExpectedL0(AUTHORS, 1.0).value(elements, groups).item()
    assert value == pytest.approx(10 * 0.993307 * 0.5, abs=1e-4)


def test_gates_without_a_gradient_take_no_part() -> None:
    gate = torch.zeros(2, requires_grad=True)
    ExpectedL0(AUTHORS, 1.0).add_grad_([gate], [None])
    assert gate.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lower": 0.0}, r"lower=0.0 must be below 0"),
        ({"upper": 1.0}, r"upper=1.0 must be above 1"),
        ({"temperature": 0.0}, r"temperature=0.0 must be above 0"),
        ({"start": math.inf}, r"start=inf must be a finite number"),
    ],
)
def test_refuses_bad_numbers(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardConcrete(**arguments)


def test_refuses_a_negative_price() -> None:
    with pytest.raises(ValueError, match=r"strength=-1 must be 0 or more"):
        ExpectedL0(AUTHORS, -1)
