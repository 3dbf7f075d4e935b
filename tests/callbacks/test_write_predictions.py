from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch.utils.data import DataLoader

from lightning_ft.callbacks import WritePredictions


def predict(package: Any, path: Path, loaders: Any, output: Any) -> list[dict[str, Any]]:
    class Module(package.LightningModule):  # type: ignore[misc]
        def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return output(batch)

    trainer = package.Trainer(
        accelerator="cpu", callbacks=[WritePredictions(path)], logger=False, enable_progress_bar=False
    )
    trainer.predict(Module(), loaders)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def columns(batch: torch.Tensor) -> dict[str, Any]:
    return {"row": batch, "label": [f"é{i}" for i in batch.tolist()]}


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_lines_are_in_the_order_of_rows(package: Any, tmp_path: Path) -> None:
    rows = predict(package, tmp_path / "p.jsonl", DataLoader(torch.tensor([3, 1, 2, 0, 4]), batch_size=2), columns)
    assert rows == [{"row": i, "label": f"é{i}"} for i in range(5)]
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_without_rows_the_order_is_the_loaders(tmp_path: Path) -> None:
    loader = DataLoader(torch.tensor([3.0, 1.0, 2.0]), batch_size=2)
    rows = predict(lightning.pytorch, tmp_path / "p.jsonl", loader, lambda batch: {"score": batch})
    assert rows == [{"score": 3.0}, {"score": 1.0}, {"score": 2.0}]


def test_several_loaders_follow_one_another(tmp_path: Path) -> None:
    loaders = [DataLoader(torch.tensor([1, 0])), DataLoader(torch.tensor([0, 1]))]
    rows = predict(lightning.pytorch, tmp_path / "p.jsonl", loaders, columns)
    assert [row["row"] for row in rows] == [0, 1, 0, 1]


def test_refuses_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="dict of columns, one value a row; it returned a Tensor"):
        predict(lightning.pytorch, tmp_path / "p.jsonl", DataLoader(torch.zeros(2)), lambda batch: batch)
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_no_json(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a prediction is no JSON \(Out of range float values.*'score': (nan|inf)"):
        predict(
            lightning.pytorch, tmp_path / "p.jsonl", DataLoader(torch.zeros(2)), lambda batch: {"score": batch + value}
        )
    assert not (tmp_path / "p.jsonl").exists()
