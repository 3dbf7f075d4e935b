from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ft.core.activation_store import ActivationStore, parse_size

KEYS = [bytes([i]) * 16 for i in range(4)]


def filled(folder: Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[ActivationStore, list[Tensor]]:
    rows = [torch.randn(length, 3) for length in (2, 5, 1)]
    store = ActivationStore(3, 9, dtype, folder=folder)
    assert all(store.add(key, row) for key, row in zip(KEYS, rows, strict=False))
    return store, rows


@pytest.mark.parametrize(
    ("text", "size"), [("2 GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("10kb", 10**4), (7, 7), ("7 B", 7)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text, "budget") == size


@pytest.mark.parametrize("text", ["2", "2 G", "GB", "-1 GB", 0, -3, True, "0 MB", "1e9"])
def test_refuses_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match=r'budget=.* must be a size: write "500 MB"'):
        parse_size(text, "budget")


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_come_back_side_by_side_where_they_belong(on_disk: bool, tmp_path: Path) -> None:
    store, rows = filled(tmp_path / "store" if on_disk else None)
    got = store.gather(store.find([KEYS[1], KEYS[3], KEYS[0]]), [1, 0, 4], 6)
    wanted = torch.zeros(3, 6, 3)
    wanted[0, 1:6], wanted[2, 4:6] = rows[1], rows[0]
    assert torch.equal(got, wanted)
    assert store.find([KEYS[3]]) == [None]
    assert store.nbytes == 8 * 3 * 4
    assert len(store) == 3


def test_nothing_is_added_beyond_the_capacity_and_nothing_evicted() -> None:
    store, rows = filled()
    assert not store.add(KEYS[3], torch.ones(2, 3))
    assert store.add(KEYS[3], torch.ones(1, 3))
    assert store.add(KEYS[0], torch.zeros(2, 3))  # held already: stays as it is
    assert torch.equal(store.gather(store.find(KEYS[:1]), [0], 2)[0], rows[0])
    assert store.nbytes == 9 * 3 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_published_store_is_read_by_others(dtype: torch.dtype, tmp_path: Path) -> None:
    store, rows = filled(tmp_path / "temporary", dtype)
    published = store.publish(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    for one in (published, ActivationStore.open(tmp_path / "store")):
        assert one is not None
        got = one.gather(one.find(KEYS[:3]), [0, 0, 0], 5)
        assert got.dtype == dtype
        assert all(torch.equal(got[i, : len(row)], row.to(dtype)) for i, row in enumerate(rows))
        assert not one.add(KEYS[3], torch.ones(1, 3))
    assert (tmp_path / "store" / "values.bin").stat().st_size == 9 * 3 * dtype.itemsize


def test_slower_process_takes_the_store_of_the_faster(tmp_path: Path) -> None:
    first = filled(tmp_path / "a")[0].publish(tmp_path / "store")
    second = filled(tmp_path / "b")[0].publish(tmp_path / "store")
    spans = first.find(KEYS[:3])
    assert torch.equal(first.gather(spans, [0] * 3, 5), second.gather(spans, [0] * 3, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("damage", ["no index", "no values", "short values", "broken index"])
def test_half_a_store_is_none_and_is_replaced(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    filled(tmp_path / "a")[0].publish(folder)
    if damage == "no index":
        (folder / "index.pt").unlink()
    elif damage == "no values":
        (folder / "values.bin").unlink()
    elif damage == "short values":
        (folder / "values.bin").write_bytes(b"1234")
    else:
        (folder / "index.pt").write_bytes(b"1234")
    assert ActivationStore.open(folder) is None
    assert ActivationStore.open(tmp_path / "nowhere") is None
    assert len(filled(tmp_path / "b")[0].publish(folder)) == 3


def test_unpublished_files_are_removed_and_published_ones_not(tmp_path: Path) -> None:
    filled(tmp_path / "a")[0].remove()
    assert not list(tmp_path.iterdir())
    store = filled(tmp_path / "a")[0].publish(tmp_path / "store")
    store.remove()
    assert (tmp_path / "store" / "values.bin").is_file()


def test_is_never_copied() -> None:
    store, _ = filled()
    assert copy.deepcopy(store) is store
