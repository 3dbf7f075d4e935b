import csv
import gzip
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from lightning_ft.data import read_source
from lightning_ft.data.sources import text_rows

ROWS = [{"text": "123", "label": 1}, {"text": 'say "hä"', "label": 0}, {"text": "", "label": 1}]
TEXTS = [row["text"] for row in ROWS]


def write(path: Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


JSONL = "\n".join(json.dumps(row) for row in ROWS)
GOOD = '{"text": "a", "label": 1}'
CSV = 'label,text,note\r\n1,123,\r\n0,"say ""hä""",x\r\n1,"",\r\n'
TSV = 'text\tlabel\n123\t1\nsay "hä"\t0\n\t1\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.csv", CSV),
        ("a.tsv", TSV),
        ("v1.0.jsonl.gz", JSONL),
        ("a.csv.gz", CSV),
        ("a.tsv.gz", TSV),
    ],
)
def test_text_formats_agree(tmp_path: Path, name: str, content: str) -> None:
    source = read_source(write(tmp_path / name, content), ["text", "label"])
    assert source.texts("text").to_pylist() == TEXTS
    assert [int(label) for label in source.table["label"].to_pylist()] == [1, 0, 1]
    assert source.dataset.column_names == ["text", "label"]
    assert source.where(1) == f"{tmp_path / name}, line {2 if 'jsonl' in name else 3}"


def test_arrow_formats_agree(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS, Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])}))
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    [stream] = (tmp_path / "saved").glob("*.arrow")
    with pa.ipc.new_file(tmp_path / "b.arrow", dataset.data.table.schema) as file:
        file.write(dataset.data.table)
    for given in (
        tmp_path / "a.parquet",
        stream,
        tmp_path / "b.arrow",
        dataset,
        dataset.select([2, 0, 1]).select([1, 2, 0]),
    ):
        source = read_source(given, ["label", "text"])
        assert source.texts("text").to_pylist() == TEXTS
        assert source.table["label"].to_pylist() == ["pos", "neg", "pos"]
        assert source.class_names == {"label": ["neg", "pos"]}
        assert source.where(1).endswith("row 1 (from 0)")


def test_lists_of_class_numbers_become_names() -> None:
    features = Features({"label": List(ClassLabel(names=["a", "b"]))})
    dataset = Dataset.from_dict({"label": [[1], None, [], [0, 1], [1, 0]]}, features)
    for rows in (dataset, dataset.select([0, 1, 2, 3, 4])):
        assert read_source(rows, ["label"]).table["label"].to_pylist() == [["b"], None, [], ["a", "b"], ["b", "a"]]
    assert read_source(dataset.select(range(3, 5)), ["label"]).table["label"].to_pylist() == [["a", "b"], ["b", "a"]]


def test_categories_and_unknown_classes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert read_source(str(tmp_path / "a.parquet"), ["text"]).texts("text").to_pylist() == ["x", "y", "x"]
    dataset = Dataset.from_dict({"label": [1, -1]}, Features({"label": ClassLabel(names=["a", "b"])}))
    assert read_source(dataset, ["label"]).table["label"].to_pylist() == ["b", None]


def test_lines_are_counted_over_blank_lines_and_quoted_line_ends(tmp_path: Path) -> None:
    source = read_source(write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\n  \n{"text": "b"}\n'), ["text"])
    assert [source.where(row).split()[-1] for row in (0, 1)] == ["1", "4"]
    source = read_source(write(tmp_path / "a.csv", 'text\n"a\nb"\n\nc\n'), ["text"])
    assert source.texts("text").to_pylist() == ["a\nb", "c"]
    assert [source.where(row).split()[-1] for row in (0, 1)] == ["2", "5"]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.xlsx", "", ValueError, r"cannot read \.xlsx; it can be \.jsonl, \.csv"),
        ("a.parquet.gz", "", ValueError, r"cannot read \.parquet\.gz"),
        ("noending", "", ValueError, "cannot read a file without an ending"),
        ("a.jsonl", "", ValueError, r"a\.jsonl has no rows"),
        ("a.csv", "", ValueError, r"no column 'text'; there are: none"),
        ("a.csv", "text,label\n", ValueError, r"a\.csv has no rows"),
        ("a.csv", "sentence,label\nx,1\n", ValueError, r"a\.csv has no column 'text'; there are: 'sentence', 'label'"),
        ("a.csv", "text,text,label\nx,y,1\n", ValueError, "more than one column 'text'"),
        ("a.csv", "text,label\nx,1\ny,1,2\n", ValueError, r"a\.csv, line 3: 3 fields, but the first line names 2"),
        ("a.csv", 'text,label\nx,1\n"y,1\n', ValueError, r"row that begins on line 3 cannot be read"),
        ("a.tsv", "text\tlabel\nx\n", ValueError, r"a\.tsv, line 2: 1 fields"),
        ("a.jsonl", JSONL + "\n{'text': 1}", ValueError, r"a\.jsonl, line 4: not JSON \(Expecting property name"),
        ("a.jsonl", GOOD + '\n["x"]', ValueError, r"line 2: must be a JSON object, got list"),
        ("a.jsonl", JSONL + '\n{"txt": 1}', ValueError, r"line 4 has no column 'text'; there are: 'txt'"),
        ("a.jsonl", GOOD + '\n{"text": "b", "label": "x"}', TypeError, r"line 2: column 'label' holds 'x' \(str\)"),
        ("a.jsonl", GOOD + '\n{"text": 5, "label": 1}', TypeError, r"line 2: column 'text' holds 5 \(int\)"),
        ("a.jsonl", GOOD + '\n{"text": NaN, "label": 1}', TypeError, r"line 2: column 'text' holds nan \(float\)"),
        ("a.jsonl", GOOD + '\n{"text": "\\ud800", "label": 1}', TypeError, r"line 2: column 'text' holds '\\ud800'"),
        ("a.jsonl", JSONL.encode() + b'\n{"text": "\xff"}', ValueError, r"a\.jsonl, line 4: not UTF-8"),
        ("a.csv", b"text,label\na,1\n\xe4,1\n", ValueError, r"a\.csv, line 3: not UTF-8"),
        ("a.parquet", b"PAR1 nothing", ValueError, r"a\.parquet is not a whole parquet file"),
        ("a.arrow", b"nothing at all", ValueError, r"a\.arrow is not a whole arrow file"),
    ],
)  # fmt: skip
def test_faults_of_files_are_named(tmp_path: Path, name: str, content: str | bytes, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        read_source(write(tmp_path / name, content), ["text", "label"])


@pytest.mark.parametrize("quote", ['"', ""])
def test_long_cells_are_read_and_the_limit_of_others_stays(tmp_path: Path, quote: str) -> None:
    long = "a film " * 40_000
    name, separator = ("a.csv", ",") if quote else ("a.tsv", "\t")
    path = write(tmp_path / name, f"text{separator}label\n{quote}{long}{quote}{separator}1\nb{separator}0\n")
    before = csv.field_size_limit()
    rows = text_rows(Path(path), ["text", "label"])
    assert next(rows) == (2, [long, "1"])
    assert csv.field_size_limit() == before
    assert list(rows) == [(3, ["b", "0"])]
    assert read_source(path, ["text"]).texts("text").to_pylist() == [long, "b"]
    broken = write(tmp_path / f"broken_{name}", f'text{separator}label\nx{separator}"1\n' * 2)
    if quote:
        with pytest.raises(ValueError, match="cannot be read"):
            read_source(broken, ["text"])
    assert csv.field_size_limit() == before


def test_faults_of_texts_are_named(tmp_path: Path) -> None:
    source = read_source(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": null}'), ["text"])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: column 'text' is null: give a text"):
        source.texts("text")
    source = read_source(Dataset.from_dict({"text": [7, 8]}), ["text"], name="train")
    with pytest.raises(TypeError, match=r"train, row 0 \(from 0\): column 'text' must hold text, got 7 \(int64\)"):
        source.texts("text")


def test_faults_of_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist \(from /"):
        read_source(str(tmp_path / "gone.jsonl"), ["text"])
    with pytest.raises(ValueError, match="is a folder: name a file"):
        read_source(str(tmp_path), ["text"])
    whole = gzip.compress((JSONL + "\n").encode() * 300)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged after line \d+ \(Compressed file ended"):
        read_source(str(tmp_path / "a.jsonl.gz"), ["text"])
    (tmp_path / "b.csv.gz").write_bytes(b"text\nplain\n")
    with pytest.raises(ValueError, match=r"b\.csv\.gz: damaged after line 0 \(Not a gzipped file"):
        read_source(str(tmp_path / "b.csv.gz"), ["text"])
    with pytest.raises(TypeError, match=r"train must be a path.*got DatasetDict: choose one split"):
        read_source(DatasetDict(), ["text"], name="train")
    with pytest.raises(ValueError, match=r"val has no column 'label'; there are: 'text'"):
        read_source(Dataset.from_dict({"text": ["a"]}), ["text", "label"], name="val")
    with pytest.raises(ValueError, match="val has no rows"):
        read_source(Dataset.from_dict({"text": []}), ["text"], name="val")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hub://imdb#test", ("imdb", None, "test", None)),
        ("hub://nyu-mll/glue:sst2#train[:10%]", ("nyu-mll/glue", "sst2", "train[:10%]", None)),
        ("hub://nyu-mll/glue@v1:sst2#train", ("nyu-mll/glue", "sst2", "train", "v1")),
    ],
)
def test_hub_addresses(monkeypatch: pytest.MonkeyPatch, address: str, expected: tuple) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Dataset:
        asked.append((name, config, split, revision))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = read_source(address, ["text"])
    assert asked == [expected]
    assert (source.texts("text").to_pylist(), source.name) == (TEXTS, address)


@pytest.mark.parametrize("address", ["hub://imdb", "hub://imdb:train", "hub://#train"])
def test_hub_address_without_its_parts_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form hub://NAME"):
        read_source(address, ["text"])


def test_good_files_are_read_fast(tmp_path: Path) -> None:
    line = json.dumps({"text": "a sentence of some twenty words " * 4, "label": 1})
    path = write(tmp_path / "a.jsonl", "\n".join([line] * 100_000))
    start = time.perf_counter()
    assert len(read_source(path, ["text", "label"])) == 100_000
    assert time.perf_counter() - start < 5  # 0.4 s on an idle core
