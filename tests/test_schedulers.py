from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf

from lightning_ft.functional.learning_rates import slanted_triangular
from lightning_ft.schedulers import SlantedTriangular, WarmupThen


def optimizer() -> torch.optim.Optimizer:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    return torch.optim.SGD([{"params": parameters[0]}, {"params": parameters[1], "lr": 0.5}], lr=2.0)


def rates(make: Any, steps: int) -> list[list[float]]:
    scheduler = make(optimizer())
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_slanted_triangular_keeps_the_ratios_of_the_groups() -> None:
    for step, (high, low) in enumerate(rates(partial(SlantedTriangular, total_steps=20, cut=0.2, ratio=8), 25)):
        factor = slanted_triangular(step, 20, cut=0.2, ratio=8)
        assert (high, low) == (pytest.approx(2 * factor), pytest.approx(factor / 2))


@pytest.mark.parametrize(
    ("shape", "reference"),
    [
        ("linear", partial(hf.get_linear_schedule_with_warmup, num_training_steps=20)),
        ("cosine", partial(hf.get_cosine_schedule_with_warmup, num_training_steps=20)),
        ("constant", hf.get_constant_schedule_with_warmup),
    ],
)
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_warmup_then_equals_transformers(shape: Any, reference: Any, warmup: float) -> None:
    ours = rates(partial(WarmupThen, shape=shape, warmup=warmup, total_steps=20), 20)
    theirs = rates(partial(reference, num_warmup_steps=round(warmup * 20)), 20)
    assert ours == [pytest.approx(row, abs=1e-12) for row in theirs]


@pytest.mark.parametrize("make", [SlantedTriangular, WarmupThen])
def test_resumes_with_the_rate_that_came_next(make: Any) -> None:
    whole = rates(partial(make, total_steps=12), 12)
    first = make(optimizer(), total_steps=12)
    for _ in range(7):
        first.optimizer.step()
        first.step()
    file = io.BytesIO()
    torch.save([first.optimizer.state_dict(), first.state_dict()], file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = make(optimizer(), total_steps=12)
    second.optimizer.load_state_dict(state[0])
    second.load_state_dict(state[1])
    assert second.get_last_lr() == whole[7]
    second.optimizer.step()
    second.step()
    assert second.get_last_lr() == whole[8]


@pytest.mark.parametrize("make", [SlantedTriangular, WarmupThen])
def test_without_a_length_the_second_step_says_what_to_pass(make: Any) -> None:
    scheduler = make(optimizer())
    assert scheduler.get_last_lr() == make(optimizer(), total_steps=12).get_last_lr()
    scheduler.optimizer.step()
    with pytest.raises(ValueError, match=r"pass total_steps=int.self.trainer.estimated_stepping_batches. in"):
        scheduler.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(SlantedTriangular, cut=0.0), "cut=0.0 must be a share"),
        (partial(SlantedTriangular, total_steps=-1), "total=-1 must be the number"),
        (partial(WarmupThen, warmup=1.0), r"warmup=1.0 must be a share of training in \[0, 1\)"),
        (partial(WarmupThen, shape="cubic"), "shape='cubic' must be \"linear\""),
        (partial(WarmupThen, total_steps=0), "total_steps=0 must be the number"),
    ],
)
def test_refuses_bad_arguments_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(optimizer())
