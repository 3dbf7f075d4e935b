"""Reads tables from files, the hub or memory; every fault is named with its place."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_HUB = re.compile(r"hub://(?P<name>[^@:#]+)(?:@(?P<revision>[^:#]+))?(?::(?P<config>[^#]+))?#(?P<split>.+)")
_LONGEST_CELL = 2**31 - 1  # the largest that every platform takes


@dataclass(frozen=True)
class Source:
    """Chosen columns of a table, which can say where each row stands in what it was read from.

    Args:
        name: The file, the hub address, or what the table is ("train").
        table: The columns, as an Arrow table. Class numbers (``datasets.ClassLabel``) are replaced by their names.
        lines: Line, from 1, on which each row begins; None where rows are not lines.
        class_names: The names, in their order, of each column that held class numbers.
    """

    name: str
    table: pa.Table
    lines: Sequence[int] | None = None
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def dataset(self) -> Dataset:
        """The table as a ``datasets.Dataset``."""
        from datasets import Dataset

        return Dataset(self.table)

    def where(self, row: int) -> str:
        """The place of a row (counted from 0), for messages."""
        return f"{self.name}, {f'row {row} (from 0)' if self.lines is None else f'line {self.lines[row]}'}"

    def texts(self, column: str) -> pa.ChunkedArray:
        """A column of strings, none of them null.

        Raises:
            TypeError: The column holds something else.
            ValueError: A null.
        """
        values = self.table[column]
        if (row := first_true(values.is_null())) is not None:
            raise ValueError(f"{self.where(row)}: column {column!r} is null: give a text, or remove the row")
        if not is_text(values.type):
            raise TypeError(
                f"{self.where(0)}: column {column!r} must hold text, got {values[0].as_py()!r} ({values.type}): "
                "name another column, or write strings"
            )
        return values


def read_source(source: str | Dataset, columns: Sequence[str], *, name: str = "the data set") -> Source:
    """Read columns of a table.

    Args:
        source: One of

            - a file by its ending: ``.jsonl`` (one JSON object a line), ``.csv`` (comma, first line names the columns,
              RFC 4180 quotes), ``.tsv`` (tab, quotes are ordinary characters, as in GLUE), each also with ``.gz``;
              ``.parquet``; ``.arrow``. Text is UTF-8. Blank lines are no rows. Cells of csv and tsv stay strings.
            - ``hub://NAME[@REVISION][:CONFIG]#SPLIT``, as in ``hub://nyu-mll/glue:sst2#train[:1000]``.
            - a ``datasets.Dataset``.
        columns: Names of the columns to read; others are never looked at.
        name: What to call a ``datasets.Dataset`` in messages.

    Raises:
        FileNotFoundError: No such file.
        TypeError: A source of another type, or a column of mixed types.
        ValueError: An ending that is not read, a file that is damaged, no row, or a column that is not there. The
            message names the file and the line (from 1), or the row (from 0) where rows are not lines.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train.csv"
        >>> _ = path.write_text("text,label\\nfine,1\\ndull,0\\n")
        >>> source = read_source(str(path), ["text", "label"])
        >>> source.table["label"].to_pylist(), source.where(1).endswith("train.csv, line 3")
        (['1', '0'], True)
    """
    from datasets import Dataset

    if isinstance(source, Dataset):
        read = _from_dataset(name, source, columns)
    elif not isinstance(source, str | Path):
        raise TypeError(
            f"{name} must be a path, a hub:// address or a datasets.Dataset, got {type(source).__name__}"
            + (": choose one split of it" if hasattr(source, "keys") else "")
        )
    elif str(source).startswith("hub://"):
        read = _from_dataset(str(source), load_hub(str(source)), columns)
    else:
        read = _from_file(Path(source), columns)
    if not len(read):
        raise ValueError(f"{read.name} has no rows")
    return read


def first_true(mask: pa.ChunkedArray | pa.Array) -> int | None:
    """The first index at which a boolean column is true."""
    import pyarrow.compute as pc

    index = pc.index(mask, True).as_py()
    return None if index < 0 else index


def parse_number(text: str | None) -> float | None:
    """The number that a text spells; None where it spells none."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of the string types."""
    return str(kind) in ("string", "large_string", "string_view")


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of the list types."""
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def as_lists(lists: pa.Array, flat: pa.Array) -> pa.ListArray:
    """Lists of the lengths (and nulls) of ``lists`` with other content: ``flat`` in place of ``lists.flatten()``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Not `lists.offsets`: those of a slice do not begin at 0, and a null may span elements that flatten() drops.
    ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(lists), 0).cast(pa.int32()))
    return pa.ListArray.from_arrays(pa.concat_arrays([pa.array([0], pa.int32()), ends]), flat, mask=lists.is_null())


def _from_file(path: Path, columns: Sequence[str]) -> Source:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (from {Path.cwd()})")
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    readers: dict[str, Callable[[Path, Sequence[str]], Source]] = {
        ".jsonl": _from_text,
        ".csv": _from_text,
        ".tsv": _from_text,
        ".jsonl.gz": _from_text,
        ".csv.gz": _from_text,
        ".tsv.gz": _from_text,
        ".parquet": _from_arrow,
        ".arrow": _from_arrow,
    }
    if ending not in readers:
        raise ValueError(f"{path}: cannot read {ending or 'a file without an ending'}; it can be {', '.join(readers)}")
    return readers[ending](path, columns)


def load_hub(address: str, *, streaming: bool = False) -> Dataset:
    """What a ``hub://`` address names (see :func:`read_source`): a ``datasets.IterableDataset`` for ``streaming``.

    Raises:
        ValueError: The address is not of that form.
    """
    from datasets import load_dataset

    if (match := _HUB.fullmatch(address)) is None:
        raise ValueError(
            f"{address!r} is not of the form hub://NAME[@REVISION][:CONFIG]#SPLIT, as in hub://nyu-mll/glue:sst2#train"
        )
    options = {"streaming": True} if streaming else {}
    return load_dataset(match["name"], match["config"], split=match["split"], revision=match["revision"], **options)


def _from_dataset(name: str, dataset: Dataset, columns: Sequence[str]) -> Source:
    _require(name, columns, dataset.column_names)
    table = dataset.select_columns(list(columns)).with_format("arrow")[:]
    class_names = {}
    for position, column in enumerate(columns):
        feature = dataset.features[column]
        if names := getattr(getattr(feature, "feature", feature), "names", None):
            class_names[column] = names
            table = table.set_column(position, column, _named(table[column], names))
    # The table's metadata still declares class numbers.
    return Source(name, table.replace_schema_metadata(), None, class_names)


def _named(numbers: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
    """Class numbers, or lists of them, as names; -1 (the hub's sign for an unknown class) becomes null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = numbers.combine_chunks()
    if is_list(values.type):
        return as_lists(values, _named(pa.chunked_array([values.flatten()]), names))
    return pa.array(names).take(pc.if_else(pc.less(values, 0), None, values))


def _from_arrow(path: Path, columns: Sequence[str]) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        if path.suffix == ".parquet":
            _require(str(path), columns, pq.read_schema(path).names)
            table = pq.read_table(path, columns=list(columns))
        else:
            mapped = pa.memory_map(str(path))
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            table = (pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)).read_all()
            _require(str(path), columns, table.column_names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole {path.suffix[1:]} file ({error}): write it again") from error
    for position, (column, kind) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        if pa.types.is_dictionary(kind):  # pandas' categories, which `datasets` does not know
            table = table.set_column(position, column, table[column].cast(kind.value_type))
    return _from_dataset(str(path), Dataset(table), columns)


def text_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """The line on which a row begins, from 1, and its cells: of a ``.jsonl``, ``.csv`` or ``.tsv`` file, one at a time.

    Raises:
        ValueError: A fault of the file, with its line.
    """
    return (_jsonl_rows if ".jsonl" in path.suffixes else _delimited_rows)(path, columns)


def _from_text(path: Path, columns: Sequence[str]) -> Source:
    cells: list[list[Any]] = [[] for _ in columns]
    lines = array("q")
    for line, row in text_rows(path, columns):
        for values, value in zip(cells, row, strict=True):
            values.append(value)
        lines.append(line)
    return _from_cells(path, dict(zip(columns, cells, strict=True)), lines)


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    for number, line in text_lines(path):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); every line must be one object") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, got {type(record).__name__}")
        try:
            row = [record[column] for column in columns]
        except KeyError:
            _require(f"{path}, line {number}", columns, list(record))
        yield number, row


def _delimited_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    tabs = ".tsv" in path.suffixes
    rows = csv.reader(
        (line for _, line in text_lines(path)),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    start = 1
    try:
        header = next(_whole_cells(rows), [])
        _require(str(path), columns, header)
        picks = [header.index(column) for column in columns]
        start = rows.line_num + 1
        for row in _whole_cells(rows):
            if row:
                if len(row) != len(header):
                    raise ValueError(f"{path}, line {start}: {len(row)} fields, but the first line names {len(header)}")
                yield start, [row[pick] for pick in picks]
            start = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: the row that begins on line {start} cannot be read ({error})") from None


def _whole_cells(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows of a csv reader, whose cells may be long texts."""
    while True:
        # The limit, of 128 KiB, is one of the whole process: raised for a row at a time, others do not see it.
        before = csv.field_size_limit(_LONGEST_CELL)
        try:
            row = next(rows, None)
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        yield row


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text, which may be compressed, with their numbers, from 1.

    Raises:
        ValueError: The file is damaged, or not UTF-8.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error}): convert the file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged after line {number} ({error}): copy the file again") from None


def _from_cells(path: Path, cells: Mapping[str, list[Any]], lines: Sequence[int]) -> Source:
    import pyarrow as pa

    arrays = {}
    for column, values in cells.items():
        try:
            arrays[column] = pa.array(values)
        except (pa.ArrowException, UnicodeError, OverflowError):
            # Types are inferred from the front, so the first row that cannot be added is at fault.
            row = bisect_left(range(len(values)), True, key=lambda row: not _is_column(values[: row + 1]))
            raise TypeError(
                f"{path}, line {lines[row]}: column {column!r} holds {values[row]!r} ({type(values[row]).__name__}), "
                "which does not fit the rows before it: give one type to the whole column"
            ) from None
    return Source(str(path), pa.table(arrays), lines)


def _is_column(values: list[Any]) -> bool:
    import pyarrow as pa

    try:
        pa.array(values)
    except (pa.ArrowException, UnicodeError, OverflowError):
        return False
    return True


def _require(name: str, columns: Sequence[str], there: Sequence[str]) -> None:
    for column in columns:
        if there.count(column) != 1:
            problem = "no column" if column not in there else "more than one column"
            raise ValueError(f"{name} has {problem} {column!r}; there are: {', '.join(map(repr, there)) or 'none'}")
