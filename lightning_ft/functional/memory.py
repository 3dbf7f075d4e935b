"""How much memory training will take, by part, before it takes any; and what would bring it down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.activation_checkpointing import chosen_blocks
from lightning_ft.functional.batch_shapes import batch_size, cut_batch, example_batch, is_shapes
from lightning_ft.functional.live_memory import PARTS
from lightning_ft.functional.memory_use import MakeOptimizer, MemoryUse, Precision, Step, predict_memory_use

EIGHT_BIT = 0.27
"""Bytes of 8-bit states, with their block-wise scales, over those of 32-bit ones."""


def predict_memory(
    module: nn.Module,
    batch: Any,
    *,
    optimizer: Optimizer | MakeOptimizer | None = None,
    precision: Precision = "32-true",
    step: Step | None = None,
    layers: Layers | None = None,
    switches: bool = True,
) -> Report:
    """A table of the memory that training will take, and of what would bring it down by how much.

    Args:
        module: As in :func:`predict_memory_use`.
        batch: As there.
        optimizer: As there.
        precision: As there.
        step: As there.
        layers: Where the blocks are, if they are not found by themselves.
        switches: Also predict checkpointed blocks, a halved batch, bf16 and an 8-bit optimiser.

    Returns:
        Rows by part, with bytes at the most and at the peak; under ``switches``, the peak with each of them.

    Raises:
        ValueError: As there.
    """

    def use(**changed: Any) -> MemoryUse:
        given = {"optimizer": optimizer, "precision": precision, "step": step, **changed}
        return predict_memory_use(module, given.pop("batch", batch), **given)

    now = use()
    facts: dict[str, Any] = {"peak bytes": now.total, "peak GiB": now.total / 2**30, "precision": precision}
    facts["biggest part"] = max(now.peak, key=lambda part: now.peak[part])
    if now.fit:
        facts["activations"] = "extrapolated from small forward passes"
    if switches:
        facts["with"] = {
            name: {"peak GiB": peak / 2**30, "saves %": round(100 * (1 - peak / now.total), 1)}
            for name, peak in sorted(_switches(module, batch, now, use, precision, layers), key=lambda item: item[1])
        }
    return Report("Memory of a training step", facts, table(now))


def table(use: MemoryUse) -> list[dict[str, Any]]:
    """Rows by part."""
    return [{"part": part, "bytes": use.parts[part], "at the peak": use.peak[part]} for part in PARTS]


def _switches(
    module: nn.Module,
    batch: Any,
    now: MemoryUse,
    use: Callable[..., MemoryUse],
    precision: Precision,
    layers: Layers | None,
) -> Iterator[tuple[str, int]]:
    try:
        blocks = chosen_blocks(module, layers=layers)
    except ValueError:  # there are none
        blocks = []
    if blocks:
        yield "ActivationCheckpointing", use(checkpointed=blocks).total
    example = example_batch(batch, torch.device("cpu")) if is_shapes(batch) else batch
    size = batch_size(example)
    if size is not None and size[0] > 1:
        yield "half the batch, accumulated twice", use(batch=cut_batch(example, (size[0] + 1) // 2)).total
    if precision == "32-true":
        yield 'precision="bf16-mixed"', use(precision="bf16-mixed").total
    if now.peak["optimiser"]:
        yield "an 8-bit optimiser", now.total - round((1 - EIGHT_BIT) * now.peak["optimiser"])
