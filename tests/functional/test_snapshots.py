from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ft.functional.snapshots import (
    apply_delta,
    cycle_length,
    cyclic_cosine,
    delta,
    ensemble_probabilities,
    holding,
    mean_answer,
)
from lightning_ft.schedulers import CyclicCosine
from tests.strangers import identical


def paper(t: int, total: int, cycles: int) -> float:
    """The formula as it is printed, t from 1, η₀ = 0.1."""
    length = math.ceil(total / cycles)
    return 0.1 / 2 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)


def test_closed_form_of_the_cyclic_rate() -> None:
    rates = [0.1 * cyclic_cosine(step, 20, cycles=4) for step in range(20)]
    assert rates[:6] == pytest.approx([0.1, 0.0905, 0.0655, 0.0345, 0.0095, 0.1], abs=5e-5)
    assert rates == pytest.approx([paper(t, 20, 4) for t in range(1, 21)], rel=1e-12)
    assert [0.1 * cyclic_cosine(step, 23, cycles=4) for step in range(23)] == pytest.approx(
        [paper(t, 23, 4) for t in range(1, 24)]
    )


def test_warm_up_rises_at_the_beginning_of_each_cycle() -> None:
    plain = [cyclic_cosine(step, 20, cycles=2) for step in range(20)]
    warm = [cyclic_cosine(step, 20, cycles=2, warmup=3) for step in range(20)]
    for start in (0, 10):
        rise = [w / p for w, p in zip(warm[start : start + 4], plain[start : start + 4], strict=True)]
        assert rise == pytest.approx([0.25, 0.5, 0.75, 1])
        assert warm[start + 3 : start + 10] == plain[start + 3 : start + 10]


@pytest.mark.parametrize("warmup", [0.0, 0.4])
def test_scheduler_gives_the_function(warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = CyclicCosine(optimizer, 4, warmup=warmup, total_steps=20)
    for step in range(20):
        expected = 0.1 * cyclic_cosine(step, 20, cycles=4, warmup=int(warmup * 5))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


def test_delta_round_trip_is_exact_and_leaves_out_what_did_not_change() -> None:
    base = {name: torch.randn(50) * 10**i for i, name in enumerate("abc")} | {"n": torch.tensor(3), "z": torch.zeros(1)}
    state = {
        **base,
        "a": torch.randn(50),
        "n": torch.tensor(4),
        "z": torch.tensor([-0.0]),
        "new": torch.ones(2, dtype=torch.bfloat16),
    }
    changed = delta(state, base)
    assert sorted(changed) == ["a", "n", "new", "z"]
    restored = apply_delta(changed, base)
    assert identical(dict(sorted(restored.items())), dict(sorted(state.items())))
    assert math.copysign(1, restored["z"].item()) == -1
    # Why tensors are kept whole: their difference does not bring them back.
    assert not torch.equal(base["a"] + (state["a"] - base["a"]), state["a"])
    assert delta(base, base) == {}


def test_mean_answer_is_of_probabilities() -> None:
    logits = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) * 5 for i in range(3)]
    mean = torch.stack([z.double().softmax(-1) for z in logits]).mean(0)
    torch.testing.assert_close(mean_answer(logits).double().softmax(-1), mean, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(torch.stack(logits).mean(0).double().softmax(-1), mean, atol=1e-2)
    mean = torch.stack([z.double().sigmoid() for z in logits]).mean(0)
    torch.testing.assert_close(mean_answer(logits, "multi_label").double().sigmoid(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mean_answer(logits, "regression"), torch.stack(logits).mean(0))
    # Far from 0 as well, where a probability in fp32 would be 1.
    assert mean_answer([torch.tensor([200.0]), torch.tensor([200.0])], "multi_label").item() == pytest.approx(200)
    assert mean_answer([torch.tensor([0.0, -300.0])] * 2)[1].item() == pytest.approx(-300)


@pytest.mark.parametrize("answer", ["single_label", "multi_label", "regression"])
def test_ensemble_probabilities(answer: Any) -> None:
    module = nn.Linear(3, 2)
    members = [{"weight": torch.randn(2, 3)} for _ in range(3)]
    before = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.randn(5, 3)
    squash = {"single_label": lambda z: z.softmax(-1), "multi_label": torch.sigmoid, "regression": lambda z: z}[answer]
    expected = torch.stack([squash(x @ m["weight"].T + module.bias) for m in members]).mean(0)
    with torch.no_grad():
        found = ensemble_probabilities(module, members, lambda: module(x), answer=answer)
    torch.testing.assert_close(found, expected.detach())
    assert identical(dict(module.state_dict()), before)


def test_holding_gives_back_also_after_an_error() -> None:
    module = nn.Linear(3, 2)
    pointer = module.weight.data_ptr()

    def fail() -> None:
        with holding(module, {"weight": torch.zeros(2, 3)}):
            assert module.weight.sum() == 0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module.weight.data_ptr() == pointer


def refusals() -> list[tuple[Any, str]]:
    output: Tensor = torch.zeros(1)
    return [
        (lambda: cyclic_cosine(0, 20, cycles=0), "cycles=0 must be a whole number, 1 or more"),
        (
            lambda: cyclic_cosine(0, 20, cycles=4, warmup=5),
            r"warmup=5 must be steps, .* fewer than those of a cycle \(5\)",
        ),
        (lambda: cycle_length(math.inf, 2), "total=inf must be the number of optimiser steps"),
        (lambda: CyclicCosine(torch.optim.SGD([output], 0.1), 2, warmup=1.0), "warmup=1.0 must be a share of a cycle"),
        (lambda: CyclicCosine(torch.optim.SGD([output], 0.1), 0), "cycles=0 must be"),
        (lambda: delta({}, {"a": output}), "state lacks a of base"),
        (lambda: mean_answer([]), "logits is empty"),
        (lambda: mean_answer([output], "other"), "answer='other' must be"),  # type: ignore[arg-type]
        (lambda: holding(nn.Linear(1, 1), {"w": output}).__enter__(), r"the module has no w of the shape \(1,\)"),
    ]


@pytest.mark.parametrize(("call", "message"), refusals())
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_an_output_without_logits() -> None:
    with pytest.raises(TypeError, match=r"forward returned a tuple, .* through=\.\.\."):
        ensemble_probabilities(nn.Linear(1, 1), [{}], lambda: (1, 2))
