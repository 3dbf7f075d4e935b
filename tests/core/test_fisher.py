"""The Fisher information as a value: sums over tasks, scales, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_ft.core.fisher import Fisher


def fisher(*values: float, **options: object) -> Fisher:
    settings: dict[str, object] = {"examples": 4, "variant": "exact", **options}
    return Fisher({"a": torch.tensor(values[:2]), "b": torch.tensor([list(values[2:])])}, **settings)  # type: ignore[arg-type]


def test_trace_mean_and_quantile() -> None:
    found = fisher(1, 2, 3, 10)
    assert found.trace() == 16
    assert found.normalised().trace() == 4
    assert torch.allclose(found.normalised().tensors["a"], torch.tensor([0.25, 0.5]))
    clipped = found.clipped(0.75)
    assert clipped.tensors["b"].tolist() == [[3, 3]]
    assert clipped.tensors["a"].tolist() == [1, 2]
    assert found.clipped(1).trace() == 16
    with pytest.raises(ValueError, match=r"quantile=0 must lie in \(0, 1\]"):
        found.clipped(0)
    with pytest.raises(ValueError, match=r"the trace is 0\.0"):
        fisher(0, 0, 0, 0).normalised()


def test_online_ewc_keeps_a_share_of_earlier_tasks() -> None:
    third = fisher(1, 0, 0, 0).merge(fisher(0, 1, 0, 0, examples=2), 0.5).merge(fisher(0, 0, 1, 0), 0.9)
    torch.testing.assert_close(third.tensors["a"], torch.tensor([0.45, 0.9]))
    assert third.tensors["b"].tolist() == [[1, 0]]
    assert third.examples == 10
    assert third.gammas == (0.5, 0.9)
    with pytest.raises(ValueError, match=r"gamma=1.5 must lie in \[0, 1\]"):
        fisher(1, 1, 1, 1).merge(fisher(1, 1, 1, 1), 1.5)
    with pytest.raises(ValueError, match="variant='sampled' cannot be added to variant='exact'"):
        fisher(1, 1, 1, 1).merge(fisher(1, 1, 1, 1, variant="sampled"))
    with pytest.raises(ValueError, match=r"different parameters, among them \['b'\]"):
        fisher(1, 1, 1, 1).merge(fisher(1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="variant='batched' must be one of exact, sampled, empirical"):
        fisher(1, 1, 1, 1, variant="batched")


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    weights = {"tensors": 2, "values": 4, "sum_of_squares": 1.25}
    saved = fisher(1, 2, 3, 1 / 3, weights=weights, gammas=(0.9, 1.0))
    saved.save(tmp_path / "below" / "fisher.safetensors")
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["fisher.safetensors"]
    loaded = Fisher.load(tmp_path / "below" / "fisher.safetensors")
    assert {name: tensor.tolist() for name, tensor in loaded.tensors.items()} == {
        name: tensor.tolist() for name, tensor in saved.tensors.items()
    }
    assert (loaded.examples, loaded.variant, loaded.weights, loaded.gammas) == (4, "exact", weights, (0.9, 1.0))


def test_no_file_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fisher.safetensors"
    fisher(1, 2, 3, 4).save(path)

    def interrupted(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fisher(5, 6, 7, 8).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert Fisher.load(path).trace() == 10


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is no Fisher information"):
        Fisher.load(tmp_path / "model.safetensors")
