"""FP16 in two processes, of which one overflows: :func:`run`, for ``tests.ranks``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_ft.plugins.fp16 import FP16
from tests.plugins.test_fp16 import Injected, Trace
from tests.ranks import RANKS
from tests.strangers import FILTERED


def run() -> dict[str, Any]:
    trace, plugin = Trace(), FP16(init_scale=1024.0)
    rank = int(__import__("os").environ["RANK"])
    module = Injected(at={2, 5} if rank == 1 else set(), dropout=0)
    strategy = DDPStrategy(process_group_backend="gloo")
    torch.manual_seed(0)
    FILTERED.fit(trace, module=module, plugins=[plugin], strategy=strategy, devices=RANKS, limit_val_batches=0)
    return {"rates": trace.rates, "weights": trace.weights, "report": plugin.report.to_json()}
