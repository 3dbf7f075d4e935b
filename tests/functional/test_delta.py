"""Deltas give back every bit, in the smallest form, and only on their own base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_ft.functional.delta import content_hash, decode_delta, delta_bytes, encode_delta
from lightning_ft.functional.delta_checkpoint import DELTA, Base, from_delta, restore_delta, save_base, to_delta

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool]


def bits_equal(left: Tensor, right: Tensor) -> bool:
    same = left.dtype == right.dtype and left.shape == right.shape
    return same and left.contiguous().numpy(force=True).tobytes() == right.contiguous().numpy(force=True).tobytes()


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def matrix(dtype: torch.dtype = torch.float32, rows: int = 40, columns: int = 30) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 100
    return values.to(dtype) if dtype != torch.bool else values > 0


def changed(start: Tensor, count: int) -> Tensor:
    places = torch.randperm(start.numel(), generator=torch.Generator().manual_seed(2))[:count]
    result = start.clone()
    flat = raw(result).view(-1)
    flat[places] = flat[places] ^ 1
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 30, 600, 1199, 1200])
def test_gives_back_every_bit_in_no_more_than_it_needs(dtype: torch.dtype, count: int) -> None:
    base = {"encoder.w": matrix(dtype)}
    tensors = {"model.encoder.w": changed(base["encoder.w"], count)}
    entries = encode_delta(tensors, base)
    (found,) = decode_delta(entries, base).values()
    assert found.dtype == dtype
    assert torch.equal(raw(found), raw(tensors["model.encoder.w"]))
    size = tensors["model.encoder.w"].element_size()
    least = min(1200 * size, count * (size + 4), count * size + 150) if count else 0
    assert delta_bytes(entries) <= least
    kind = entries["model.encoder.w"]["kind"]
    if size == 4:
        assert kind == {0: "base", 1: "elements", 30: "elements", 600: "mask", 1199: "whole", 1200: "whole"}[count]


def test_few_rows_of_an_embedding_are_kept_as_rows() -> None:
    base = {"tokens.weight": matrix()}
    now = base["tokens.weight"].clone()
    now[[3, 17]] += 1
    entries = encode_delta({"tokens.weight": now}, base)
    assert entries["tokens.weight"]["kind"] == "rows"
    assert entries["tokens.weight"]["index"].tolist() == [3, 17]
    assert delta_bytes(entries) == 2 * (30 * 4 + 4)
    assert torch.equal(decode_delta(entries, base)["tokens.weight"], now)


def test_what_equality_does_not_tell_apart() -> None:
    """-0.0 is not 0.0, and one NaN not another."""
    base = {"a.b": torch.tensor([0.0, torch.nan, 1.0, 2.0] * 40)}
    now = base["a.b"].clone()
    now[0] = -0.0
    entries = encode_delta({"a.b": now, "same.a.b": base["a.b"].clone()}, base)
    assert [entry["kind"] for entry in entries.values()] == ["elements", "base"]
    assert torch.equal(raw(decode_delta(entries, base)["a.b"]), raw(now))


def test_a_base_of_less_precision_is_converted() -> None:
    base = {"a.b": matrix(torch.bfloat16)}
    entries = encode_delta({"a.b": base["a.b"].float()}, base)
    assert entries["a.b"] == {"kind": "base", "name": "a.b", "dtype": "float32"}
    assert torch.equal(decode_delta(entries, base)["a.b"], base["a.b"].float())


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3.0), torch.zeros(0, 4), torch.zeros(3, 4, 2), torch.randn(6, 5).T],
    ids=lambda t: str(list(t.shape)),
)
def test_odd_shapes(tensor: Tensor) -> None:
    base = {"a.b": tensor.clone()}
    for now in (tensor, tensor + 1):
        (found,) = decode_delta(encode_delta({"a.b": now}, base), base).values()
        assert found.shape == now.shape
        assert torch.equal(found, now)


def test_names_of_the_base_are_found_by_their_longest_common_end() -> None:
    base = {"bert.layer.0.w": torch.zeros(2), "bert.layer.1.w": torch.ones(2), "bert.shape.w": torch.zeros(3)}
    tensors = {
        "model.bert.layer.1.w": torch.ones(2),
        "body.layer.0.w": torch.zeros(2),
        "shape.w": torch.zeros(2),
        "w": torch.zeros(3),
    }
    entries = encode_delta(tensors, base)
    assert [entry.get("name") for entry in entries.values()] == ["bert.layer.1.w", "bert.layer.0.w", None, None]


def test_tied_weights_are_kept_once() -> None:
    weight = torch.randn(50, 4)
    entries = encode_delta({"embed.w": weight, "out.w": weight}, {})
    assert delta_bytes(entries) == 800
    assert entries["embed.w"] is entries["out.w"]


def test_results_share_no_memory_with_the_base() -> None:
    base = {"a.b": torch.ones(3)}
    decode_delta(encode_delta({"a.b": torch.ones(3)}, base), base)["a.b"].zero_()
    assert base["a.b"].tolist() == [1, 1, 1]


def test_hash_is_of_names_types_shapes_and_bytes() -> None:
    one = {"a": torch.ones(4), "b": torch.zeros(2)}
    others = [
        {"a": torch.ones(4), "c": torch.zeros(2)},
        {"a": torch.ones(2, 2), "b": torch.zeros(2)},
        {"a": torch.ones(4), "b": -torch.zeros(2)},
        {"a": torch.ones(4), "b": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.ones(4)},
    ]
    assert content_hash(dict(reversed(one.items()))) == content_hash(one)
    assert len({content_hash(other) for other in [one, *others]}) == 6


def test_an_unknown_form_is_told() -> None:
    with pytest.raises(ValueError, match="keeps a tensor as 'wavelets'"):
        decode_delta({"a": {"kind": "wavelets"}}, {})


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint() -> dict[str, object]:
    return {
        "state_dict": {"net.a.w": matrix() + 1, "net.b.w": matrix()},
        "optimizer_states": [{"x": torch.ones(2)}],
        "epoch": 3,
    }


@pytest.fixture
def base(tmp_path: Path) -> Base:
    save_base({"a.w": matrix(), "b.w": matrix()}, tmp_path / "base.safetensors")
    return Base(tmp_path / "base.safetensors")


def test_round_trip_through_a_file(checkpoint: dict[str, object], base: Base, tmp_path: Path) -> None:
    delta, report = to_delta(checkpoint, base)
    assert "state_dict" not in delta
    assert delta["optimizer_states"] is checkpoint["optimizer_states"]
    assert report.facts["weights, bytes"] == 9600
    assert report.facts["kept, bytes"] == 4800
    torch.save(delta, tmp_path / "d.ckpt")
    for given in (None, base.path):
        whole = restore_delta(tmp_path / "d.ckpt", given, out=tmp_path / "whole.ckpt")
        assert whole["epoch"] == 3
        for name, tensor in checkpoint["state_dict"].items():  # type: ignore[attr-defined]
            assert bits_equal(whole["state_dict"][name], tensor)
    assert DELTA not in torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert from_delta(whole) is whole


def test_another_base_is_refused(checkpoint: dict[str, object], base: Base, tmp_path: Path) -> None:
    torch.save(to_delta(checkpoint, base)[0], tmp_path / "d.ckpt")
    save_base({"a.w": matrix(), "b.w": changed(matrix(), 1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"and those in .*other.safetensors have .*: give the base that it was saved"):
        restore_delta(tmp_path / "d.ckpt", tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(base.path)
    with pytest.raises(ValueError, match="give the base that it was saved with"):
        restore_delta(tmp_path / "d.ckpt")
    base.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"which is not there any more: say where it is now, .*restore_delta"):
        restore_delta(tmp_path / "d.ckpt")


def test_a_folder_in_parts_is_a_base(tmp_path: Path) -> None:
    save_base({"a.w": matrix()}, tmp_path / "one.safetensors")
    save_base({"b.w": matrix()}, tmp_path / "two.safetensors")
    index = '{"weight_map": {"a.w": "one.safetensors", "b.w": "two.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert sorted(Base(tmp_path).tensors) == ["a.w", "b.w"]
    with pytest.raises(FileNotFoundError, match=r"base=.* must be a .safetensors file, or a folder"):
        Base(tmp_path / "nowhere")
