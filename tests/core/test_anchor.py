from __future__ import annotations

import io
from typing import Any

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


def test_like_follows_order() -> None:
    layer = nn.Linear(3, 2)
    anchor = Anchor.capture(layer.named_parameters())
    bias, weight = anchor.like([("bias", layer.bias), ("weight", layer.weight)])
    assert (bias.shape, weight.shape) == ((2,), (2, 3))


@pytest.mark.parametrize(
    ("storage", "stored", "moved"),
    [
        ("device", torch.float32, torch.float64),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("cpu", torch.float32, torch.float32),
    ],
)
def test_storage(storage: Any, stored: torch.dtype, moved: torch.dtype) -> None:
    """How it is kept, and that the fingerprint is that of the weights at their full precision all the same."""
    layer = nn.Linear(30, 20)
    anchor = Anchor.capture(layer.named_parameters(), storage)
    assert anchor.fingerprint() == Anchor.capture(layer.named_parameters()).fingerprint()
    assert {t.dtype for t in anchor.tensors.values()} == {stored}
    tolerance = {"rtol": 2**-8, "atol": 0.0} if storage == "bf16" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(anchor.tensors["weight"].float(), layer.weight.detach(), **tolerance)
    layer.weight.data.zero_()
    assert anchor.tensors["weight"].any()
    anchor.move(layer.double().named_parameters())
    assert {t.dtype for t in anchor.tensors.values()} == {moved}


def test_select_shares_the_tensors() -> None:
    layer = nn.Linear(3, 2)
    anchor = Anchor.capture(layer.named_parameters())
    part = anchor.select(["bias"])
    assert part.tensors["bias"] is anchor.tensors["bias"]
    assert part.fingerprint() == Anchor.capture([("bias", layer.bias)]).fingerprint()


def test_refuses_an_unknown_storage() -> None:
    with pytest.raises(ValueError, match="storage='tape' must be one of"):
        Anchor.capture([], "tape")  # type: ignore[arg-type]


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
