"""What the plan of a training costs and tells; how it is printed is in test_cli.py."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ft.callbacks import DiscriminativeLR, Freeze, GradualUnfreezing
from lightning_ft.core import LayerGroups, Layers
from lightning_ft.plan import plan
from tests.strangers import FILTERED


@pytest.mark.parametrize(("layers", "times"), [(None, 1), (Layers(head="classifier"), 2)])
def test_layers_are_found_once_for_callbacks_that_say_the_same(
    layers: Layers | None, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    find = LayerGroups.of
    monkeypatch.setattr(LayerGroups, "of", lambda *args, **options: calls.append(args) or find(*args, **options))
    callbacks = [DiscriminativeLR(0.5, layers=layers), Freeze(groups="embeddings"), GradualUnfreezing("1 epoch")]
    phases, groups = plan(FILTERED.trainer(callbacks), FILTERED.module())
    assert len(calls) == times
    assert [row["trains"] for row in phases.rows][:2] == ["tail, head", "block.2, tail, head"]
    assert [row["LR"] for row in groups.rows] == [0.5**4, 0.5**3, 0.5**2, 0.5, 1.0, 1.0]
