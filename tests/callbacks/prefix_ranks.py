"""Training with a frozen prefix cache, in one of two processes or in a single one."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_ft.callbacks import GradualUnfreezing
from lightning_ft.callbacks.frozen_prefix_cache import FrozenPrefixCache
from tests.ddp_worker import RANKS, Module, Trace
from tests.strangers import FILTERED

SCENARIOS = ("thaws in memory", "thaws on disk", "head only", "rows as they come")


class HeadOnly(Module):
    """All but the head is frozen by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.requires_grad_(False)


def run(name: str, *, cached: bool = True, **options: Any) -> dict[str, Any]:
    """Weights after each batch, and what the cache reports."""
    where: Any = "disk" if name == "thaws on disk" else "memory"
    cache = FrozenPrefixCache(where, dirpath=os.environ["PREFIX_CACHE"] if where == "disk" else None, min_epochs=0)
    thaws = [] if name == "head only" else [GradualUnfreezing("2 epochs")]
    limits = {"limit_train_batches": 5} if name == "rows as they come" else {}
    trace = Trace()
    FILTERED.fit(
        *thaws,
        *([cache] if cached else []),
        trace,
        module=HeadOnly() if name == "head only" else Module(),
        **{"limit_val_batches": 0, "use_distributed_sampler": False, "max_epochs": 5, **limits, **options},
    )
    rows = [[row["cached"], row["rows"], row["hits"] / max(1, row["seen"])] for row in cache.report().rows]
    return {"trace": trace.weights, "rows": rows}


def on_each_rank() -> dict[str, Any]:
    """All scenarios, with DDP."""
    torch.set_num_threads(1)
    ddp = lambda: {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": RANKS}  # noqa: E731
    return {name: run(name, **ddp()) for name in SCENARIOS}
