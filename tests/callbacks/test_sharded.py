"""Two processes with sharded models against one process with a whole model, on the same global batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_ft.callbacks import L2SP, DiscriminativeLR, GradualUnfreezing
from lightning_ft.core.anchor import Anchor
from tests.ranks import run_ranks
from tests.sharded_worker import PENALISED, RESUMED, RUNS, SCENARIOS, SHARDINGS, depth, train
from tests.strangers import FILTERED, pretrained

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
TENSORS = [4, 16, 28, 40, 41]
"""That train in each phase: head and final norm, three blocks, the embedding."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.sharded_worker:run", tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    return {scenario: train(None, scenario)[1].result() for scenario in [*SCENARIOS, *PENALISED]}


@pytest.mark.parametrize(("sharding", "scenario"), RUNS)
def test_two_sharded_processes_do_what_one_does(
    sharding: str, scenario: str, ranks: list[dict[str, Any]], single: dict[str, dict[str, Any]]
) -> None:
    first, second = (rank[f"{sharding}/{scenario}"] for rank in ranks)
    alone = single[scenario]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    for a, b in zip(first["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert first["trainable"] == second["trainable"] == alone["trainable"]
    assert sorted(set(first["trainable"])) == TENSORS
    assert first["trainable"][-1] == TENSORS[-1]
    # A frozen block has no gradient, a training one has.
    assert first["wrong"] == second["wrong"] == alone["wrong"] == []
    assert first["penalty"] == pytest.approx(alone["penalty"], rel=1e-5)
    assert len(first["penalty"]) == (len(first["weights"]) if scenario in PENALISED else 0)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_depth_is_told_as_of_the_whole_model(sharding: str, ranks: list[dict[str, Any]]) -> None:
    whole = depth(None)
    assert ranks[0]["depth"][sharding] == ranks[1]["depth"][sharding] == whole
    # Registration order would give it to the embeddings.
    assert whole["members"]["tail"] == ["thing_from_paris.inner.norm.weight", "thing_from_paris.inner.norm.bias"]
    assert whole["members"]["head"] == ["verdict.weight", "verdict.bias"] == whole["by_regex"]


def test_a_penalty_of_sharded_weights_is_that_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    layer = pretrained(nn.Linear, 5, 3)
    start = [p.detach() for p in layer.parameters()]
    for found in (rank["anchored"] for rank in ranks):
        for i, value in enumerate(start):
            torch.testing.assert_close(found["autograd"][i], 0.5 * value.sin())
            torch.testing.assert_close(found["added"][i], 0.5 * value.sin())
            torch.testing.assert_close(found["pulled"][i], value + (1 - 0.1 * 0.5) * value.sin())
        distance = sum(float(value.sin().square().sum()) for value in start)
        assert found["value"] == pytest.approx(0.25 * 0.95**2 * distance)
        assert found["fingerprint"] == pytest.approx(Anchor.capture(layer.named_parameters()).fingerprint(), rel=1e-12)
        assert "anchor of weight was taken before the model was sharded" in found["early"]
        assert "capture it after sharding" in found["early"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        straight, again = rank["resumed"][name]["straight"], rank["resumed"][name]["again"]
        assert len(again["weights"]) == len(straight["weights"]) - 5
        assert again["trainable"] == straight["trainable"][5:]
        assert again["trainable"][0] == TENSORS[2]
        assert again["penalty"] == straight["penalty"][5:]
        assert all(torch.equal(a, b) for a, b in zip(again["weights"], straight["weights"][5:], strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flat", "use_orig_params=True"),
        ("l2-sp", "L2SP does not run under FullyShardedDataParallel .* use FSDP2"),
        ("ewc", "fisher is data, and the parameters are sharded .*compute a file beforehand on one device"),
        ("disk", r'storage="disk" does not serve thing_from_paris.*sharded over processes'),
        ("decay", r"decay_groups\(model, weight_decay\)"),
        ("anchor", "build the model from the same pretrained weights"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(name: str, message: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        with pytest.raises(ValueError, match=message):
            raise ValueError(rank["refusals"][name])


@pytest.mark.parametrize("callback", [GradualUnfreezing, DiscriminativeLR, lambda: L2SP(0.1)])
def test_deepspeed_is_refused(callback: Any) -> None:
    class DeepSpeedStrategy(SingleDeviceStrategy):
        """By this name alone it is known."""

    with pytest.raises(ValueError, match=r"does not run under DeepSpeed.*use FSDP2"):
        FILTERED.fit(callback(), strategy=DeepSpeedStrategy("cpu"))
