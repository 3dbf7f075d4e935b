"""Predictions as JSON Lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.core.files import atomic_file


class WritePredictions(Callback):
    """Write what ``predict_step`` returns to one file, a line for each input row.

    ``predict_step`` must return a mapping from column name to one JSON-able value a row, as the modules of
    lightning_ft do. Lines are in the order of the loaders and, in each, of the column ``row``; where there is none, in
    the order in which they came, and not under several processes, whose rows cannot be told apart without it. The
    file is whole or absent.

    Args:
        path: The file to write or replace.

    Raises:
        TypeError: ``predict_step`` returned something else.
        ValueError: Several processes predict rows without a column ``row``.
    """

    def __init__(self, path: str | os.PathLike[str] = "predictions.jsonl") -> None:
        self.path = Path(path)
        self._rows: list[tuple[int, dict[str, Any]]] = []

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = []

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows = _rows(outputs)
        if trainer.world_size > 1 and not all("row" in row for row in rows):
            raise ValueError("WritePredictions under several processes needs predict_step to return a column `row`")
        self._rows += [(dataloader_idx, row) for row in rows]

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self._rows
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            # A distributed sampler repeats rows to give all ranks as many: keep one of each.
            rows = list({(loader, row["row"]): (loader, row) for part in parts for loader, row in part}.values())
        if trainer.is_global_zero:
            rows.sort(key=lambda item: (item[0], item[1].get("row", 0)))
            with atomic_file(self.path) as path, path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
            rank_zero_info(f"WritePredictions: {len(rows)} rows in {self.path}")


def _rows(outputs: Any) -> list[dict[str, Any]]:
    if not isinstance(outputs, dict):
        raise TypeError(
            "WritePredictions needs predict_step to return a dict of columns, one value a row; it returned a "
            f"{type(outputs).__name__}"
        )
    columns = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
