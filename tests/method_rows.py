"""The rows of the methods' table: every method that trains a part of a model, or changes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback

from lightning_ft.callbacks import PEFT, LayerDrop, MovementPruning
from lightning_ft.plugins import EightBit, FourBit
from tests.callbacks.test_bottleneck_adapters import ROWS as BOTTLENECK
from tests.callbacks.test_peft import METHODS as CONFIGS
from tests.callbacks.test_peft import PROMPTS
from tests.callbacks.test_subspace_table import ROWS as SUBSPACE
from tests.methods import Method

NO_WEIGHTS = {("all", "merges"): "which no weights can take in"}
ROUNDED = {("all", "exports"): "the ONNX graph differs from the model by more than tolerance"}
WHY = {
    ROUNDED["all", "exports"]: "LLM.int8 rounds activations, too, which a graph of floats does not",
    NO_WEIGHTS["all", "merges"]: "prompts are vectors before the text; in the graph they are constants",
    "BitFit trains biases": "of which such models have none",
}
"""What an error's words leave open."""


def _peft(name: str, plugin: Callable[[], Any] | None = None, **options: Any) -> Method:
    def make() -> tuple[list[Callback], list[Any]]:
        return [PEFT(CONFIGS[name]())], [] if plugin is None else [plugin()]

    return Method(make, **{"impossible": NO_WEIGHTS if name in PROMPTS else None, **options})


def _pruned(make: Callable[[], Callback]) -> Method:
    return Method(lambda: ([make()], []), freezes=False)


METHODS: dict[str, Method] = {
    **{f"PEFT {name}": _peft(name) for name in CONFIGS},
    "QLoRA nf4": _peft("all-linear", partial(FourBit, compute="bf16-mixed", block_size=64), tolerance=0.05),
    "LoRA int8": _peft("all-linear", EightBit, tolerance=0.05, impossible=ROUNDED),
    **BOTTLENECK,
    **SUBSPACE,
    "movement pruning": _pruned(partial(MovementPruning, 0.3)),
    "soft movement pruning": _pruned(partial(MovementPruning, mode="soft")),
    "magnitude pruning": _pruned(partial(MovementPruning, 0.3, "magnitude")),
    "LayerDrop": _pruned(partial(LayerDrop, 0.3)),
}
