import re
from pathlib import Path

import pyarrow as pa
import pytest

from lightning_ft.data import Source, encode_labels, infer_labels, read_labels


def source(values: list, kind: pa.DataType | None = None) -> Source:
    return Source("a.jsonl", pa.table({"y": pa.array(values, kind)}), lines=range(1, len(values) + 1))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 9, 9, -1], ["-1", "9", "10"]),
        (["10", "9"], ["9", "10"]),
        (["b", "10", "a"], ["10", "a", "b"]),
        ([True, False], ["false", "true"]),
    ],
)
def test_single_labels_are_sorted_as_what_they_are(values: list, names: list[str]) -> None:
    read = read_labels(source(values), "y", "single_label")
    assert infer_labels(read) == names
    assert [names[i] for i in encode_labels(source(values), "y", read, names).to_pylist()] == read.to_pylist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([["b", "a"], [], ["a"]], [[1, 0], [], [0]]),
        (["b|a", "", " a "], [[1, 0], [], [0]]),
        ([[1, 0], [], [0]], [[1, 0], [], [0]]),
    ],
)
def test_multi_labels_as_lists_or_joined(values: list, expected: list) -> None:
    read = read_labels(source(values), "y", "multi_label")
    assert encode_labels(source(values), "y", read, infer_labels(read)).to_pylist() == expected


def test_multi_labels_of_sliced_and_large_lists() -> None:
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string())):
        column = pa.array([["x"], ["b", "a"], [], ["a"]], kind).slice(1)
        sliced = Source("s", pa.table({"y": column}))
        read = read_labels(sliced, "y", "multi_label")
        assert encode_labels(sliced, "y", read, ["a", "b"]).to_pylist() == [[1, 0], [], [0]]
    assert infer_labels(read_labels(source([[], []]), "y", "multi_label")) == []


@pytest.mark.parametrize("values", [[1, -2, 3], [1.0, -2.0, 3.0], ["1", " -2.0", "3e0"]])
def test_regression_labels_are_32_bit_numbers(values: list) -> None:
    read = read_labels(source(values), "y", "regression")
    assert read.type == pa.float32()
    assert read.to_pylist() == [1, -2, 3]


@pytest.mark.parametrize(
    ("problem", "values", "error", "message"),
    [
        ("single_label", ["a", None], ValueError, "line 2: column 'y' holds None: every row needs a label"),
        ("single_label", ["a", " "], ValueError, "line 2: column 'y' holds ' ': a label must not be empty"),
        ("single_label", [0.5, 1.0], TypeError, "line 1: column 'y' must hold strings.*got 0.5 (double).*'regression'"),
        ("single_label", [["a"]], TypeError, "got ['a'] (list"),
        ("multi_label", [["a"], None], ValueError, "line 2: column 'y' holds None"),
        ("multi_label", [["a"], ["b", None]], ValueError, "line 2: column 'y' holds None: a label must not be empty"),
        ("multi_label", ["a", "", "a||b"], ValueError, "line 3: column 'y' holds '': a label must not be empty"),
        ("multi_label", [1, 2], TypeError, "line 1: column 'y' must hold lists of labels, or strings joined by '|'"),
        ("multi_label", [[], [0.5]], TypeError, "line 2: column 'y' must hold strings, integers or booleans, got 0.5"),
        ("regression", ["1", "abc"], ValueError, "line 2: column 'y' holds 'abc': not a number"),
        ("regression", ["1", "nan"], ValueError, "line 2: column 'y' holds nan: not a finite 32-bit number"),
        ("regression", [1.0, float("nan")], ValueError, "line 2: column 'y' holds nan: not a finite"),
        ("regression", [1.0, float("-inf")], ValueError, "line 2: column 'y' holds -inf: not a finite"),
        ("regression", [1.0, 1e300], ValueError, "line 2: column 'y' holds 1e+300: not a finite"),
        ("regression", [True], TypeError, "line 1: column 'y' must hold numbers .* got True (bool)"),
        ("regression", [1.0, None], ValueError, "line 2: column 'y' holds None"),
    ],
)
def test_faults_are_named(problem: str, values: list, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message).replace(r"\.\*", ".*")):
        read_labels(source(values), "y", problem)


@pytest.mark.parametrize(("problem", "values"), [("single_label", ["a", "z"]), ("multi_label", [["a"], ["b", "z"]])])
def test_unknown_labels_are_named(problem: str, values: list) -> None:
    read = read_labels(source(values), "y", problem)
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: column 'y' holds the unknown label 'z'; known: 'a', 'b'\."
    ):
        encode_labels(source(values), "y", read, ["a", "b"])
    with pytest.raises(ValueError, match=r"'l19' and 5 more"):
        encode_labels(source(values), "y", read, [f"l{i}" for i in range(25)])


def test_real_labels(real_data: Path) -> None:
    from lightning_ft.data import read_source

    trec = read_source(str(real_data / "trec6" / "train.jsonl"), ["label"])
    assert len(infer_labels(read_labels(trec, "label", "single_label"))) == 6
