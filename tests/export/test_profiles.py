"""Shapes that engines are built for, from lengths; and which of them a batch takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from datasets import Dataset
from onnx import TensorProto, helper

from lightning_ft.data import ClassificationData
from lightning_ft.export.profiles import Profile, choose_profile, graph_axes, token_lengths
from tests.export.test_gate import sentences
from tests.pretrained import tokenizer


def test_profiles_cover_every_shape_once() -> None:
    lengths = np.random.default_rng(0).lognormal(3, 0.6, 1000).astype(int) + 1
    profiles = Profile.of(lengths.tolist(), (1, 4, 16), count=4, longest=256)
    assert len(profiles) == 4 * 3
    for batch in range(1, 17):
        for length in range(1, 257):
            taking = [
                p
                for p in profiles
                if p.axes["batch"][0] <= batch <= p.axes["batch"][2]
                and p.axes["sequence"][0] <= length <= p.axes["sequence"][2]
            ]
            assert len(taking) == 1
    # About as many texts in each part, whose ends are multiples of 8; and each is tuned for what lies in its middle.
    ends = sorted({p.axes["sequence"] for p in profiles})
    counts = [int(((lengths >= low) & (lengths <= high)).sum()) for low, _, high in ends]
    assert min(counts) > 150
    assert all(high % 8 == 0 for _, _, high in ends)
    for low, tuned, high in ends:
        inside = lengths[(lengths >= low) & (lengths <= high)]
        assert abs(tuned - np.median(inside)) <= 8
    assert {p.axes["batch"] for p in profiles} == {(1, 1, 1), (2, 4, 4), (5, 16, 16)}


def test_lengths_that_are_all_alike_make_one_part() -> None:
    assert [p.axes["sequence"] for p in Profile.of([128] * 9, (1,))] == [(1, 128, 128)]
    assert [p.axes["sequence"] for p in Profile.of([3], (1,))] == [(1, 3, 3)]


def test_a_profile_by_hand_and_sums_of_axes() -> None:
    profile = Profile({"batch": (1, 2, 4), "sequence": (1, 1, 8), "past": (0, 10, 30)})
    axes = {"mask": ["batch", "past + sequence"], "past.0": ["batch", 2, "past", 8], "twice": ["2*batch"]}
    assert profile.shapes(axes) == {
        "mask": ((1, 1), (2, 11), (4, 38)),
        "past.0": ((1, 2, 0, 8), (2, 2, 10, 8), (4, 2, 30, 8)),
        "twice": ((2,), (4,), (8,)),
    }
    with pytest.raises(ValueError, match="axes: source of the input mask has no range, only batch, sequence, past has"):
        profile.shapes({"mask": ["batch", "source"]})
    with pytest.raises(ValueError, match=r"past - sequence of the input mask has no range"):
        profile.shapes({"mask": ["past - sequence"]})


def test_decoders_have_profiles_for_prompts_and_for_tokens() -> None:
    found = Profile.of_decoder([20, 40, 60], (1, 8), longest=64)
    assert len(found) == 4
    for profile in found:
        for i in range(3):
            assert profile.axes["total"][i] == profile.axes["sequence"][i] + profile.axes["past"][i]
    inputs = {"input_ids": ["batch", "sequence"], "past": ["batch", "past"], "mask": ["batch", "total"]}
    shapes = [profile.shapes(inputs) for profile in found]
    assert choose_profile(shapes, {"input_ids": (1, 30), "past": (1, 0), "mask": (1, 30)}) == 0
    assert choose_profile(shapes, {"input_ids": (1, 1), "past": (1, 30), "mask": (1, 31)}) == 1
    assert choose_profile(shapes, {"input_ids": (5, 1), "past": (5, 30), "mask": (5, 31)}) == 3


def test_the_nearest_profile_is_chosen() -> None:
    narrow, wide = {"x": ((1, 1), (1, 16), (8, 128))}, {"x": ((1, 1), (8, 128), (32, 512))}
    assert choose_profile([narrow, wide], {"x": (1, 20)}) == 0
    assert choose_profile([narrow, wide], {"x": (8, 100)}) == 1
    assert choose_profile([narrow, wide], {"x": (1, 300)}) == 1
    with pytest.raises(ValueError, match=r"x: no profile of the engine takes the shape \(33, 4\); they take "):
        choose_profile([narrow, wide], {"x": (33, 4)})
    # Each input is taken by one of them, and no one takes both.
    first = {"x": ((1,), (1,), (1,)), "y": ((2,), (2,), (2,))}
    second = {"x": ((2,), (2,), (2,)), "y": ((1,), (1,), (1,))}
    with pytest.raises(ValueError, match=r"x: no profile of the engine takes the shape \(1,\)"):
        choose_profile([first, second], {"x": (1,), "y": (1,)})


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match=r"axes: batch=\(4, 2, 8\) must be the smallest size, the one to tune for"):
        Profile({"batch": (4, 2, 8)})
    with pytest.raises(ValueError, match=r"axes: past=\(0, 0, 0\) must be"):
        Profile({"past": (0, 0, 0)})
    for lengths in ([], [0, 4]):
        with pytest.raises(ValueError, match="lengths: expected numbers of tokens from 1 on"):
            Profile.of(lengths)
    with pytest.raises(ValueError, match="count=0 must be 1 or more"):
        Profile.of([3], count=0)
    with pytest.raises(ValueError, match=r"batch_sizes=\(0, 4\) must be one or more numbers from 1 on"):
        Profile.of([3], (0, 4))
    with pytest.raises(ValueError, match="longest=8 is less than the 9 tokens of the longest text"):
        Profile.of([3, 9], longest=8)


def test_lengths_are_counted_as_the_model_reads_texts(tmp_path: Path) -> None:
    words = tokenizer("bert")
    words.save_pretrained(tmp_path)
    texts = sentences(30)
    wanted = [len(words(text)["input_ids"]) for text in texts]
    assert token_lengths(texts, tmp_path) == wanted
    (tmp_path / "head.json").write_text('{"max_length": 7}')
    assert token_lengths(texts, tmp_path) == [min(length, 7) for length in wanted]
    table = Dataset.from_dict({"text": texts, "label": ["a", "b"] * 15})
    data = ClassificationData(str(tmp_path), train=table, val=table.select([0]), labels=["a", "b"], max_length=100)
    assert sorted(token_lengths(data)) == sorted(wanted)
    data = ClassificationData(str(tmp_path), val=table.select([0]), labels=["a", "b"], max_length=100)
    assert token_lengths(data) == wanted[:1]
    with pytest.raises(ValueError, match="folder: texts are counted by the tokenizer of an exported folder: name it"):
        token_lengths(texts)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist: give a folder that lightning-ft"):
        token_lengths(texts, tmp_path / "none")


def test_axes_without_a_name_are_refused(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None, 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", inputs, outputs)
    onnx.save(helper.make_model(made), tmp_path / "graph.onnx")
    with pytest.raises(ValueError, match="input x has an axis with neither a size nor a name: export it anew"):
        graph_axes(tmp_path / "graph.onnx")
