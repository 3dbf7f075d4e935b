from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ft.core import penalty
from lightning_ft.core.penalty import QuadraticPenalty, weighted_rows

ALPHA = 0.3


def odd_tensors() -> list[Tensor]:
    """Shapes and strides that a loop over pieces could get wrong; float64, so that comparisons are sharp."""
    shapes = [(7, 5), (7, 5), (7, 5), (11,), (), (0, 3)]
    flat, turned, sliced, *others = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [nn.Parameter(tensor) for tensor in (flat, turned.T, sliced[:, ::2], *others)]


FORMS = ["zero", "reference", "weights"]


def form(name: str, theta: list[Tensor]) -> QuadraticPenalty:
    if name == "zero":
        return QuadraticPenalty(ALPHA)
    reference = [torch.randn_like(p).detach() for p in theta]
    weights = [torch.rand_like(p).detach() for p in theta] if name == "weights" else None
    return QuadraticPenalty(ALPHA, reference, weights)


@pytest.fixture(params=[1, 3, 1 << 20])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalty, "_PIECE", request.param)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("name", FORMS)
def test_add_grad_is_autograd_of_value(name: str, scale: float | None) -> None:
    theta = odd_tensors()
    quadratic = form(name, theta)
    expected = torch.autograd.grad(quadratic.value(theta), theta)

    task = [torch.randn_like(p) for p in theta]
    for p, gradient in zip(theta, task, strict=True):
        p.grad = gradient.clone()
    before = [p.detach().clone() for p in theta]
    quadratic.add_grad_(theta, scale=None if scale is None else torch.tensor(scale))
    for p, gradient, pull, old in zip(theta, task, expected, before, strict=True):
        torch.testing.assert_close(p.grad, gradient + (scale or 1) * pull)
        assert torch.equal(p, old)


def test_value_is_the_closed_form() -> None:
    theta = odd_tensors()
    reference = [torch.randn_like(p).detach() for p in theta]
    squares = sum(((p - r) ** 2).sum() for p, r in zip(theta, reference, strict=True))
    torch.testing.assert_close(QuadraticPenalty(ALPHA, reference).value(theta), 0.5 * ALPHA * squares)
    assert QuadraticPenalty(ALPHA, []).value([]).item() == 0


def test_weights_price_each_value() -> None:
    theta = nn.Parameter(torch.tensor([2.0, 2.0]))
    quadratic = QuadraticPenalty(0.5, [torch.ones(2)], [torch.tensor([3.0, 0.0])])
    assert quadratic.value([theta]).item() == pytest.approx(0.5 * 0.5 * 3)
    theta.grad = torch.zeros(2)
    quadratic.add_grad_([theta])
    assert theta.grad.tolist() == [1.5, 0.0]
    quadratic.pull_([theta], learning_rate=0.1)
    assert theta.tolist() == pytest.approx([2 - 0.1 * 1.5, 2.0])


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_references_and_weights_of_less_precision(rate: Any) -> None:
    theta = [nn.Parameter(torch.full((5, 3), 2.0))]
    theta[0].grad = torch.zeros(5, 3)
    quadratic = QuadraticPenalty(0.5, [torch.ones(5, 3).bfloat16()], [torch.full((5, 3), 0.5).bfloat16()])
    (expected,) = torch.autograd.grad(quadratic.value(theta), theta)
    torch.testing.assert_close(expected, torch.full((5, 3), 0.25))
    quadratic.add_grad_(theta)
    assert torch.equal(theta[0].grad, torch.full((5, 3), 0.25))
    quadratic.pull_(theta, learning_rate=rate)
    torch.testing.assert_close(theta[0].detach(), torch.full((5, 3), 1.975))
    plain = QuadraticPenalty(0.5, [torch.ones(5, 3).bfloat16()])
    plain.pull_(theta, learning_rate=rate)
    torch.testing.assert_close(theta[0].detach(), torch.full((5, 3), 1 + 0.95 * 0.975))


def test_gradient_of_value_is_finite_at_the_anchor() -> None:
    theta = nn.Parameter(torch.ones(3))
    QuadraticPenalty(ALPHA, [torch.ones(3)]).value([theta]).backward()
    assert torch.equal(theta.grad, torch.zeros(3))


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", FORMS)
def test_pull_is_a_step_of_gradient_descent(name: str, rate: Any) -> None:
    theta = odd_tensors()
    quadratic = form(name, theta)
    expected = [p - 0.1 * g for p, g in zip(theta, torch.autograd.grad(quadratic.value(theta), theta), strict=True)]
    for p in theta:
        p.grad = torch.zeros_like(p)
    quadratic.pull_(theta, learning_rate=rate)
    for p, value in zip(theta, expected, strict=True):
        torch.testing.assert_close(p.detach(), value.detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("coupled", [True, False])
def test_number_of_the_paper(coupled: bool) -> None:
    theta = nn.Parameter(torch.tensor([1.0]))
    theta.grad = torch.zeros(1)
    quadratic = QuadraticPenalty(0.01, [torch.tensor([0.5])])
    if coupled:
        quadratic.add_grad_([theta])
        torch.optim.SGD([theta], lr=0.1).step()
    else:
        torch.optim.SGD([theta], lr=0.1).step()
        quadratic.pull_([theta], learning_rate=0.1)
    assert theta.item() == pytest.approx(0.9995, abs=1e-7)


@pytest.mark.parametrize("referenced", [True, False])
def test_what_has_no_gradient_takes_no_part(referenced: bool) -> None:
    live, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    live.grad = torch.zeros(2)
    quadratic = QuadraticPenalty(ALPHA, [torch.zeros(2), torch.zeros(2)] if referenced else None)
    quadratic.add_grad_([frozen, live])
    quadratic.pull_([frozen, live], learning_rate=0.5)
    assert frozen.grad is None
    torch.testing.assert_close(live.grad, torch.full((2,), ALPHA))
    torch.testing.assert_close(live.detach(), torch.full((2,), 1 - 0.5 * ALPHA))
    assert torch.equal(frozen, torch.ones(2))


def test_members_alone_are_pulled() -> None:
    theta = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    for p in theta:
        p.grad = torch.zeros(1)
    QuadraticPenalty(1.0, [torch.full((1,), float(i)) for i in range(3)]).pull_(
        theta, learning_rate=0.5, members=[2, 0]
    )
    assert [p.item() for p in theta] == [0.5, 1.0, 1.5]


@pytest.mark.usefixtures("piece")
def test_mixed_dtypes() -> None:
    theta = [
        nn.Parameter(torch.full((4,), 2.0, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    for p in theta:
        p.grad = torch.zeros_like(p)
    QuadraticPenalty(0.5, [torch.ones_like(p) for p in theta]).add_grad_(theta)
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in theta)


def test_at_the_anchor_no_bit_of_the_gradient_changes() -> None:
    theta = nn.Parameter(torch.randn(100))
    theta.grad = torch.randn(100)
    before = theta.grad.clone()
    QuadraticPenalty(ALPHA, [theta.detach().clone()]).add_grad_([theta])
    assert torch.equal(theta.grad, before)


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_refuses_a_negative_strength(strength: float) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        QuadraticPenalty(strength)


def test_refuses_weights_without_a_reference() -> None:
    with pytest.raises(ValueError, match="weights need a reference"):
        QuadraticPenalty(1.0, None, [torch.ones(1)])


def test_refuses_rows_without_weights() -> None:
    with pytest.raises(ValueError, match="rows need weights"):
        QuadraticPenalty(1.0, [torch.ones(1)], None, [torch.zeros(1, dtype=torch.int64)])


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_rows_that_weigh_nothing_are_left_out_and_nothing_changes(scale: float | None, rate: Any) -> None:
    theta = [nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(9))]
    reference = [torch.randn_like(p) for p in theta]
    weights = [torch.rand_like(p) for p in theta]
    weights[0][[0, 2, 3, 5, 6, 7]] = 0
    rows = [weighted_rows(weight) for weight in weights]
    assert rows[1] is rows[2] is None
    assert rows[0] is not None
    assert rows[0].tolist() == [1, 4, 8]
    some = QuadraticPenalty(ALPHA, reference, [weights[0][rows[0]], *weights[1:]], rows)
    whole = QuadraticPenalty(ALPHA, reference, weights)
    torch.testing.assert_close(some.value(theta), whole.value(theta))
    results = []
    for penalty_ in (some, whole):
        copies = [nn.Parameter(p.detach().clone()) for p in theta]
        for p in copies:
            p.grad = torch.ones_like(p)
        penalty_.add_grad_(copies, scale=None if scale is None else torch.tensor(scale))
        penalty_.pull_(copies, learning_rate=rate)
        results.append([tensor for p in copies for tensor in (p.grad, p.detach())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_most_rows_weigh_something() -> None:
    weight = torch.zeros(4, 2)
    weight[:3, 0] = 1
    assert weighted_rows(weight) is None
    assert weighted_rows(torch.zeros(4)) is None
    rows = weighted_rows(torch.zeros(4, 2))
    assert rows is not None
    assert not len(rows)


def test_members_alone_get_a_gradient() -> None:
    theta = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    for p in theta:
        p.grad = torch.zeros(1)
    QuadraticPenalty(1.0, [torch.zeros(1)] * 3).add_grad_(theta, members=[2, 0])
    assert [p.grad.item() for p in theta if p.grad is not None] == [1.0, 0.0, 1.0]
