"""Mixout and RecAdam in two processes, replicated (DDP) and sharded (FSDP2): :func:`run`, for ``tests.ranks``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_ft.callbacks import DiscriminativeLR, ExactResume, GradualUnfreezing
from lightning_ft.callbacks.mixout import Mixout
from lightning_ft.callbacks.rec_adam import RecAdam
from tests.ranks import RANKS
from tests.sharded_worker import SHARDINGS, HeadFirst, SaveAt, Trace, error, fsdp1, let_be, model_parallel
from tests.strangers import FILTERED

Callbacks = Callable[[], list[Callback]]
CALLBACKS: dict[str, Callbacks] = {
    "mixout": lambda: [Mixout(0.5), GradualUnfreezing("2 steps")],
    "rec-adam": lambda: [RecAdam(5.0, t0=4, k=0.5), GradualUnfreezing("2 steps"), DiscriminativeLR(0.5)],
}
SHARED = ["ddp", "fsdp2", "fsdp2-whole"]
ADAMW = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)


def even(shape: Tensor, *_: Any) -> Tensor:
    """Every second input unit is kept: the same on all ranks."""
    kept = torch.zeros_like(shape)
    kept[..., ::2] = 1
    return shape.copy_(kept)


def train(sharding: str | None, name: str, *more: Callback, even_draws: bool = True, **options: Any) -> Trace:
    """All weights after each batch; in one process without ``sharding``."""
    shard, strategy = SHARDINGS[sharding] if sharding else (lambda module: None, lambda: "auto")
    trace = Trace()
    defaults = {"strategy": strategy(), "devices": RANKS if sharding else 1, "use_distributed_sampler": False}
    with patch.object(Tensor, "bernoulli_", even if even_draws else Tensor.bernoulli_):
        module = HeadFirst(shard, ADAMW)
        settings = {**defaults, "limit_val_batches": 0, **options}
        FILTERED.fit(*CALLBACKS[name](), trace, *more, module=module, **settings)
    return trace


class Draws(Callback):
    """The first number that this process draws in each batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_after_backward(self, trainer: Any, *args: Any) -> None:
        self.seen.append(torch.rand(()).item())


def run() -> dict[str, Any]:
    results: dict[str, Any] = {f"{s}/{n}": train(s, n).weights for s in SHARED for n in CALLBACKS}
    shared = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(shared)
    folder, draws = Path(shared[0]), Draws()
    exact = ExactResume(dirpath=folder / "exact", seed=3)
    results["own draws"] = train("ddp", "mixout", exact, draws, even_draws=False).weights
    results["draws"] = draws.seen
    for name in CALLBACKS:
        path = str(folder / name)
        parallel = {"strategy": model_parallel()}
        results[f"straight/{name}"] = train("fsdp2-whole", name, SaveAt(5, path), **parallel).weights[5:]
        results[f"again/{name}"] = train(
            "fsdp2-whole", name, **{**parallel, "strategy": model_parallel()}, ckpt_path=path
        ).weights
    results["fsdp1"] = [
        error(lambda c=c: FILTERED.fit(c, module=HeadFirst(fsdp1, ADAMW), devices=RANKS, strategy=let_be()))
        for c in (Mixout(0.5), RecAdam(5.0))
    ]
    return results
