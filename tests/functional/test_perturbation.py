from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_ft.functional.perturbation import (
    corner,
    direction,
    disagreement,
    draw,
    even_noise,
    gradient_of,
    mean_over,
    mtdnn_corner,
    mtdnn_divergence,
    project,
    symmetric_kl,
)
from lightning_ft.functional.smart import Ascent, uncached_no_grad
from lightning_ft.functional.snapshots import holding
from lightning_ft.functional.spectral_norm import NormalisedLayer, normalised, spectral_norm


def test_the_symmetric_kl_is_the_closed_form() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
    assert symmetric_kl(p.log(), q.log()).item() == pytest.approx(0.4158883, abs=1e-7)
    assert symmetric_kl(p.log() + 3, q.log() - 7).item() == pytest.approx(0.4158883, abs=1e-6)


def test_the_symmetric_kl_is_torch_s_both_ways_and_so_is_its_gradient() -> None:
    one, other = (torch.randn(5, 3, dtype=torch.float32, requires_grad=True) for _ in range(2))
    a, b = F.log_softmax(one, -1), F.log_softmax(other, -1)
    wanted = (
        F.kl_div(a, b, reduction="none", log_target=True) + F.kl_div(b, a, reduction="none", log_target=True)
    ).sum(-1)
    torch.testing.assert_close(symmetric_kl(one, other), wanted)
    found = torch.autograd.grad(symmetric_kl(one, other).sum(), [one, other])
    for left, right in zip(found, torch.autograd.grad(wanted.sum(), [one, other]), strict=True):
        torch.testing.assert_close(left, right)


def test_half_precision_logits_are_compared_in_fp32() -> None:
    one = torch.tensor([[10.0, 0.0]], dtype=torch.float16)
    assert symmetric_kl(one, one).dtype == torch.float32
    assert symmetric_kl(one, one).item() == 0


def test_what_logits_mean_decides_how_they_are_compared() -> None:
    one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(4), 0.0]])
    bernoulli = (0.8 - 0.5) * math.log(4)  # (p − q)(logit p − logit q)
    assert disagreement(one, other, "multi_label").item() == pytest.approx(bernoulli)
    assert disagreement(one, other, "regression").item() == pytest.approx(math.log(4) ** 2)
    assert disagreement(one, other).item() == pytest.approx(symmetric_kl(one, other).item())
    assert disagreement(one[:, :1], other[:, :1]).item() == pytest.approx(math.log(4) ** 2)
    assert disagreement(torch.zeros(3), torch.ones(3)).tolist() == [1, 1, 1]


def test_rows_that_do_not_count_are_no_part_of_the_mean() -> None:
    rows = torch.tensor([[1.0, 5.0], [3.0, 7.0]])
    assert mean_over(rows).item() == 4
    assert mean_over(rows, rows < 4).item() == 2
    assert mean_over(rows, rows < 0).item() == 0


def test_a_direction_has_length_one_and_none_where_there_is_no_gradient() -> None:
    gradient = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[math.inf, 1.0]], [[math.nan, 1.0]]])
    torch.testing.assert_close(direction(gradient), torch.tensor([[[0.6, 0.8]], [[0, 0]], [[0, 0]], [[0, 0]]]))


def test_the_length_is_that_of_each_example_over_its_whole_sequence() -> None:
    gradient = torch.tensor([[[3.0], [4.0]], [[30.0], [40.0]]])
    torch.testing.assert_close(direction(gradient), torch.tensor([[[0.6], [0.8]], [[0.6], [0.8]]]))


def test_projection_moves_what_is_outside_of_the_ball_alone() -> None:
    delta = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]], [[0.0, 0.0]]])
    torch.testing.assert_close(project(delta, 1.0), torch.tensor([[[0.6, 0.8]], [[0.3, 0.4]], [[0.0, 0.0]]]))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_step_of_smart_lands_on_the_corner_that_the_noise_points_to(sign: int) -> None:
    delta = torch.full((1, 1, 1), sign * 1e-3, requires_grad=True)
    logits = torch.stack([0.3 + delta.flatten(), torch.zeros(1)], -1)
    clean = torch.tensor([[0.3, 0.0]])
    [gradient] = gradient_of(disagreement(logits, clean).mean(), [delta], scale=2.0**16)
    assert gradient.sign().item() == sign
    assert corner(delta.detach(), gradient, 1e-3, 1e-5).item() == pytest.approx(sign * 1e-5)


def test_where_nothing_is_perturbed_the_ascent_has_no_gradient_at_all() -> None:
    delta = torch.zeros(1, 1, 1, requires_grad=True)
    logits = torch.stack([0.3 + delta.flatten(), torch.zeros(1)], -1)
    [gradient] = gradient_of(disagreement(logits, logits.detach()).mean(), [delta], scale=2.0**16)
    assert gradient.item() == 0


def test_mtdnn_s_step_normalises_each_token_to_one() -> None:
    delta, gradient = torch.zeros(1, 2, 2), torch.tensor([[[2.0, -1.0], [1e-1, 0.0]]])
    found = mtdnn_corner(delta, gradient, 1e-3)
    assert found.abs().amax(-1).tolist() == [[pytest.approx(1, abs=1e-3), pytest.approx(1, abs=2e-2)]]


def test_mtdnn_s_divergence_is_its_code() -> None:
    logits, target = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    p, y = logits.softmax(1), target.softmax(1)
    rp, ry = (-(1.0 / (x + 1e-6) - 1 + 1e-6).detach().log() for x in (p, y))
    wanted = (p * (rp - ry) * 2).sum()
    torch.testing.assert_close(mtdnn_divergence(logits, target), wanted)
    found = torch.autograd.grad(mtdnn_divergence(logits, target), logits)[0]
    torch.testing.assert_close(found, torch.autograd.grad(wanted, logits)[0])


def test_even_noise_fills_the_box_of_each_example() -> None:
    real = torch.tensor([[True] * 50 + [False] * 50, [True] * 100])
    noise = even_noise(5.0, real, 64)
    assert noise[0, 50:].abs().max() == 0
    for row, length in enumerate([50, 100]):
        size = 5 / math.sqrt(length * 64)
        assert 0.99 * size < noise[row].abs().max() <= size
    # Variance 1/3: the norm is 5/√3 whatever the length.
    assert noise.flatten(1).norm(dim=1).tolist() == [pytest.approx(5 / math.sqrt(3), rel=0.05)] * 2


@pytest.mark.parametrize(("kind", "deviation"), [("uniform", 0.1 / math.sqrt(3)), ("normal", 0.1)])
def test_noise_has_the_size_that_is_said(kind: str, deviation: float) -> None:
    assert draw(kind, 0.1, torch.empty(20000)).std().item() == pytest.approx(deviation, rel=0.03)


def test_a_gradient_touches_no_parameter() -> None:
    weight, delta = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    assert gradient_of((weight * (2 + delta)).sum(), [delta], scale=1.0)[0].item() == 1
    assert weight.grad is None
    assert delta.grad is None
    assert gradient_of(weight.sum(), [delta])[0].item() == 0


@pytest.mark.parametrize("argument", ["epsilon", "sigma", "step", "steps"])
def test_an_ascent_refuses_numbers_that_lead_nowhere(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0 must be"):
        Ascent(**{argument: 0})


@pytest.mark.parametrize("shape", [(2, 40), (40, 2), (3, 3), (1, 8)])
def test_the_spectral_norm_is_the_largest_singular_value_and_so_is_its_gradient(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, requires_grad=True)
    wanted = torch.linalg.matrix_norm(weight, 2)
    assert spectral_norm(weight).item() == pytest.approx(wanted.item(), rel=1e-4)
    (found,), (right,) = (torch.autograd.grad(value, weight) for value in (spectral_norm(weight), wanted))
    torch.testing.assert_close(found, right, rtol=0, atol=5e-3)


def test_two_equal_singular_values_and_none_at_all() -> None:
    assert spectral_norm(2 * torch.eye(3)).item() == pytest.approx(2)
    assert normalised(torch.zeros(2, 3)).abs().max() == 0


def test_a_normalised_layer_computes_what_it_holds_in_the_end() -> None:
    layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
    before, names = layer.weight.detach().clone(), set(layer.state_dict())
    normal = NormalisedLayer(layer)
    during = layer(x)
    torch.testing.assert_close(during, F.linear(x, before / torch.linalg.matrix_norm(before, 2), layer.bias))
    assert set(layer.state_dict()) == names
    assert torch.equal(layer.weight, before)
    normal.remove()
    torch.testing.assert_close(layer(x), during)


def test_autocast_hands_out_no_casts_of_weights_that_were_there_before() -> None:
    layer, x = torch.nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).abs().max() > 0
        with holding(layer, {"weight": torch.zeros(2, 2)}), uncached_no_grad(torch.device("cpu")):
            assert layer(x).abs().max() == 0
