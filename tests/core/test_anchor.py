from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from lightning_ft.core.anchor import Anchor


def test_keeps_what_was_while_the_parameters_move() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    anchor = Anchor.capture(layer.named_parameters())
    layer.weight.data.add_(1)
    (reference,) = anchor.like([("weight", layer.weight)])
    assert torch.equal(reference, before)
    assert not reference.requires_grad


def test_like_follows_order_and_dtype() -> None:
    layer = nn.Linear(3, 2)
    anchor = Anchor.capture(layer.named_parameters())
    bias, weight = anchor.like([("bias", layer.bias), ("weight", layer.weight.double())])
    assert (bias.shape, weight.shape, weight.dtype) == ((2,), (2, 3), torch.float64)


def test_like_refuses_other_shapes_and_names() -> None:
    anchor = Anchor.capture(nn.Linear(3, 2).named_parameters())
    with pytest.raises(
        ValueError, match=r"anchor of weight has shape \(2, 3\), the parameter \(3, 2\): capture it where"
    ):
        anchor.like([("weight", torch.zeros(3, 2))])
    with pytest.raises(ValueError, match="scale trains now and did not when the anchor was taken"):
        anchor.like([("scale", torch.zeros(3))])


def test_fingerprint_is_a_closed_form_that_any_checkpoint_holds() -> None:
    anchor = Anchor({"a": torch.tensor([3.0, 4.0]), "b": torch.full((2, 2), 0.5, dtype=torch.bfloat16)})
    fingerprint = anchor.fingerprint()
    assert fingerprint == {"tensors": 2, "values": 6, "sum_of_squares": pytest.approx(26.0, rel=1e-12)}
    file = io.BytesIO()
    torch.save(fingerprint, file)
    file.seek(0)
    anchor.check(torch.load(file, weights_only=True))


def test_check_tells_weights_apart() -> None:
    layer = nn.Linear(30, 20)
    expected = Anchor.capture(layer.named_parameters()).fingerprint()
    layer.weight.data.mul_(1 + 1e-8)  # as far as the order of a sum may differ
    Anchor.capture(layer.named_parameters()).check(expected)
    layer.weight.data.mul_(1 + 1e-4)
    with pytest.raises(
        ValueError, match=r"starts from weights with fingerprint .* build the model from the same pretrained"
    ):
        Anchor.capture(layer.named_parameters()).check(expected)
    with pytest.raises(ValueError, match="fingerprint"):
        Anchor.capture([("weight", layer.weight)]).check(expected)
