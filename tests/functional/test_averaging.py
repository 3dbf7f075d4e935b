from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ft.functional.averaging import average, interpolate


def state(value: float, dtype: torch.dtype = torch.float32, count: int = 7) -> dict[str, Tensor]:
    return {"w": torch.full((2, 3), value, dtype=dtype), "steps": torch.tensor(count), "mask": torch.tensor([True])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_mean_of_one_and_three_is_two_and_integers_are_the_firsts(dtype: torch.dtype) -> None:
    mean = average([state(1, dtype), state(3, dtype, count=9)])
    assert torch.equal(mean["w"], torch.full((2, 3), 2.0, dtype=dtype))
    assert mean["w"].dtype == dtype
    assert mean["steps"].item() == 7
    assert mean["steps"].dtype == torch.int64
    assert mean["mask"].item() is True


def test_mean_is_that_of_float64_and_accumulates_beyond_half_precision() -> None:
    values = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    expected = torch.stack(values).double().mean(0)
    torch.testing.assert_close(average([{"w": v} for v in values])["w"].double(), expected, rtol=1e-6, atol=1e-7)
    # A mean kept in bf16 would stop at 2.9, where a further member moves it by less than half a unit.
    assert average({"w": torch.tensor([3.0 if i else 1.0]).bfloat16()} for i in range(1000))["w"].item() == 3
    doubles = [{"w": v.double() * torch.pi} for v in values]
    oracle = torch.stack([d["w"] for d in doubles]).mean(0)
    torch.testing.assert_close(average(doubles)["w"], oracle, rtol=1e-14, atol=1e-15)


def test_weights_and_what_is_the_same_in_all_stays_to_the_bit() -> None:
    assert torch.equal(average([state(1), state(3)], [3, 1])["w"], torch.full((2, 3), 1.5))
    assert torch.equal(average([state(1), state(3), state(100)], [1, 1, 0])["w"], torch.full((2, 3), 2.0))
    same = torch.randn(1000)
    assert torch.equal(average([{"w": same.clone()} for _ in range(11)], [0.1 * i for i in range(1, 12)])["w"], same)


def test_arguments_are_not_changed_and_only_one_member_is_alive() -> None:
    members = [state(1), state(3)]
    result = average(members)
    result["w"].add_(1)
    result["steps"].add_(1)
    assert members[0]["w"][0, 0] == 1
    assert members[0]["steps"] == 7

    alive: list[Any] = []

    def one_by_one() -> Iterator[dict[str, Tensor]]:
        import weakref

        for i in range(4):
            made = torch.full((2,), float(i))
            alive.append(weakref.ref(made))
            yield {"w": made}
            del made
            assert sum(reference() is not None for reference in alive) <= 1  # the loop variable of `average`

    assert average(one_by_one())["w"].tolist() == [1.5, 1.5]


def test_interpolation() -> None:
    one, other = state(1), state(3, count=9)
    assert [interpolate(one, other, alpha)["w"][0, 0].item() for alpha in (0, 0.25, 0.5, 1, 1.5)] == [1, 1.5, 2, 3, 4]
    assert interpolate(one, other, 1)["steps"] == 7
    assert interpolate(state(1, torch.bfloat16), other, 0.5)["w"].dtype == torch.bfloat16
    assert one["w"][0, 0] == 1


def test_statistics_of_batch_norms_are_told() -> None:
    norms = [torch.nn.BatchNorm1d(2).state_dict() for _ in range(2)]
    with pytest.warns(UserWarning, match=r"running_mean and 1 more are statistics of batch norms.*update_bn"):
        mean = average(norms)
    assert mean["num_batches_tracked"].item() == 0


@pytest.mark.parametrize(
    ("states", "weights", "message"),
    [
        ([], None, "states is empty"),
        ([state(1), {"w": torch.ones(2, 3)}], None, r"same keys: the second lacks mask, steps and has nothing beyond"),
        ([state(1), {**state(1), "w": torch.ones(3)}], None, r"w has the shape \(2, 3\) in one .* \(3,\) in another"),
        ([state(1), {**state(1), "steps": torch.tensor(1.0)}], None, "steps is torch.int64 in one .* torch.float32"),
        ([state(1), state(2)], [1.0], "weights has 1 values and there are more"),
        ([state(1)], [1.0, 2.0], "weights has 2 values for 1 state dicts"),
        ([state(1), state(2)], [1.0, -1.0], "must be 0 or more"),
        ([state(1), state(2)], [0.0, 0.0], "one of them above 0"),
        ([state(1), state(2)], [0.0, 1.0], "must begin with a number above 0"),
        ([state(1), {**state(1), "w": torch.ones(3)}], [1.0, 0.0], "has the shape"),
    ],
)
def test_refusals(states: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average(states, weights)


def test_refuses_an_alpha_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="alpha=nan must be a number"):
        interpolate(state(1), state(2), float("nan"))
