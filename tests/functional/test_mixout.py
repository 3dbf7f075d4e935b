from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ft.functional.mixout import mixout

ROWS, COLUMNS = 5, 400


def drawn(mixed: Tensor, reference: Tensor) -> Tensor:
    """M, seen from outside: what is not the reference was kept."""
    return (mixed != reference).to(mixed.dtype)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_closed_form_and_mean(p: float) -> None:
    """W = 3, W⁰ = 1: put back to 1, kept at (3 − p)/(1 − p), 5 for p = 0.5; 3 in the mean."""
    torch.manual_seed(0)
    weight, reference = torch.full((1, 200_000), 3.0), torch.ones(1, 200_000)
    mixed = mixout(weight, reference, p)
    assert sorted(mixed.unique().tolist()) == pytest.approx([1, (3 - p) / (1 - p)])
    assert mixed.mean().item() == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("output_dim", [-2, -1])
def test_equals_the_formula_with_one_draw_an_input_unit(output_dim: int) -> None:
    weight, reference = torch.randn(2, ROWS, COLUMNS).double()
    if output_dim == -1:
        weight, reference = weight.T.contiguous(), reference.T.contiguous()
    mixed = mixout(weight, reference, 0.3, output_dim=output_dim)
    mask = drawn(mixed, reference)
    assert 0.55 < mask.mean() < 0.85
    assert (mask.amin(output_dim) == mask.amax(output_dim)).all()
    expected = (mask * weight + (1 - mask) * reference - 0.3 * reference) / (1 - 0.3)
    torch.testing.assert_close(mixed, expected)


def test_one_draw_a_weight_where_asked() -> None:
    weight, reference = torch.randn(2, ROWS, COLUMNS)
    mask = drawn(mixout(weight, reference, 0.5, per="element"), reference)
    assert (mask.amin(0) != mask.amax(0)).float().mean() > 0.8


def test_stacked_maps_draw_each_their_own() -> None:
    weight, reference = torch.randn(2, 3, ROWS, COLUMNS)
    mask = drawn(mixout(weight, reference, 0.5), reference)
    assert (mask.amin(1) == mask.amax(1)).all()
    assert 0.3 < (mask[0, 0] != mask[1, 0]).float().mean() < 0.7


def test_without_mixing_it_is_the_weight_itself() -> None:
    weight = torch.randn(ROWS, COLUMNS)
    assert mixout(weight, torch.zeros_like(weight), 0.0) is weight
    # What has not moved stays, whatever is drawn.
    assert torch.equal(mixout(weight, weight.clone(), 0.9), weight)


@pytest.mark.parametrize(("legacy", "scale"), [(False, 1 / (1 - 0.9)), (True, 1.0)])
@pytest.mark.parametrize("per", ["column", "element"])
def test_gradient(per: Any, legacy: bool, scale: float) -> None:
    """M/(1−p), whose mean is 1; the authors' M is ten times smaller at p = 0.9."""
    torch.manual_seed(0)
    weight, reference = torch.randn(2, 50, 4000)
    weight.requires_grad_()
    mixed = mixout(weight, reference, 0.9, per=per, legacy_gradient=legacy)
    mixed.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, drawn(mixed.detach(), reference) * scale)
    assert weight.grad.mean().item() == pytest.approx(0.1 if legacy else 1.0, rel=0.1)


def test_legacy_gradient_changes_no_value() -> None:
    weight, reference = torch.randn(2, ROWS, COLUMNS)
    torch.manual_seed(0)
    ours = mixout(weight, reference, 0.5)
    torch.manual_seed(0)
    assert torch.equal(mixout(weight, reference, 0.5, legacy_gradient=True), ours)


def test_exact_gradient_is_that_of_finite_differences() -> None:
    weight, reference = torch.randn(2, 3, 4).double()

    def same_draws(w: Tensor) -> Tensor:
        torch.manual_seed(0)
        return mixout(w, reference, 0.5)

    assert torch.autograd.gradcheck(same_draws, weight.requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.0}, r"p=1.0 must be in \[0, 1\)"),
        ({"p": -0.1}, r"p=-0.1 must be in \[0, 1\)"),
        ({"p": float("nan")}, r"p=nan must be in \[0, 1\)"),
        ({"p": 0.5, "per": "row"}, "per='row' must be \"column\""),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixout(torch.ones(1, 1), torch.ones(1, 1), **arguments)
