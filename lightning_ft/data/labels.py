"""Labels of a table: checked, named and numbered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning_ft.data.sources import Source, as_lists, first_true, is_list, is_text, parse_number

if TYPE_CHECKING:
    import pyarrow as pa

Problem = Literal["single_label", "multi_label", "regression"]
SEPARATOR = "|"


def read_labels(source: Source, column: str, problem: Problem) -> pa.Array:
    """The labels of every row: names, lists of names, or numbers.

    Args:
        source: The rows.
        column: Its label column: strings, integers or booleans for single_label; lists of them, or strings joined by
            ``|``, for multi_label (empty means no label); numbers, or strings of them, for regression.
        problem: What the labels are.

    Returns:
        ``(rows,)`` strings, lists of strings, or 32-bit floats.

    Raises:
        TypeError: The column holds another type.
        ValueError: A label that is null or empty, or a number that is not finite.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = source.table[column].combine_chunks()
    _refuse(source, column, values.is_null(), values, "every row needs a label (-1 in a hub data set means none)")
    if problem == "regression":
        return _numbers(source, column, values)
    if problem == "single_label":
        return _names(source, column, values)
    if is_text(values.type):
        values = _split(values)
    if not is_list(values.type):
        raise TypeError(
            f"{source.where(0)}: column {column!r} must hold lists of labels, or strings joined by {SEPARATOR!r}, "
            f"for problem='multi_label'; got {values[0].as_py()!r} ({values.type})"
        )
    flat = values.flatten()
    if not len(flat):  # only empty lists, whose elements have no type
        flat = flat.cast(pa.string())
    return as_lists(values, _names(source, column, flat, pc.list_parent_indices(values)))


def infer_labels(values: pa.Array) -> list[str]:
    """The distinct labels, sorted: as numbers where all are integers, else as text.

    Example:
        >>> import pyarrow as pa
        >>> infer_labels(pa.array(["10", "9", "10"])), infer_labels(pa.array([["b"], [], ["a", "b"]]))
        (['9', '10'], ['a', 'b'])
    """
    names = (values.flatten() if is_list(values.type) else values).unique().to_pylist()
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def encode_labels(source: Source, column: str, values: pa.Array, labels: Sequence[str]) -> pa.Array:
    """Names, or lists of names, as numbers: positions in ``labels``.

    Args:
        source: The rows, for messages.
        column: Its label column, for messages.
        values: From `read_labels`.
        labels: The known labels.

    Raises:
        ValueError: A label that is not known.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    nested = is_list(values.type)
    flat = values.flatten() if nested else values
    numbers = pc.index_in(flat, value_set=pa.array(labels, flat.type)).cast(pa.int64())
    if (index := first_true(numbers.is_null())) is not None:
        row = pc.list_parent_indices(values)[index].as_py() if nested else index
        known = ", ".join(map(repr, labels[:20])) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
        raise ValueError(
            f"{source.where(row)}: column {column!r} holds the unknown label {flat[index].as_py()!r}; known: {known}. "
            "Correct the row, or give labels=..."
        )
    return as_lists(values, numbers) if nested else numbers


def _refuse(
    source: Source, column: str, bad: pa.Array, values: pa.Array, why: str, rows: pa.Array | None = None
) -> None:
    """Raise about the first bad value; ``rows`` are the values' rows where they are elements of lists."""
    if (index := first_true(bad)) is not None:
        place = source.where(index if rows is None else rows[index].as_py())
        raise ValueError(f"{place}: column {column!r} holds {values[index].as_py()!r}: {why}")


def _names(source: Source, column: str, values: pa.Array, rows: pa.Array | None = None) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise TypeError(
            f"{source.where(0 if rows is None else rows[0].as_py())}: column {column!r} must hold strings, integers or "
            f"booleans, got {values[0].as_py()!r} ({kind}); for numbers to predict there is problem='regression', for "
            "lists 'multi_label'"
        )
    names = values.cast(pa.string())
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(names), ""), True)
    _refuse(source, column, empty, values, "a label must not be empty", rows)
    return names


def _numbers(source: Source, column: str, values: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if is_text(values.type):
        parsed = [parse_number(text) for text in values.to_pylist()]
        _refuse(source, column, pa.array([number is None for number in parsed]), values, "not a number")
        values = pa.array(parsed)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise TypeError(
            f"{source.where(0)}: column {column!r} must hold numbers for problem='regression', "
            f"got {values[0].as_py()!r} ({values.type})"
        )
    numbers = values.cast(pa.float32(), safe=False)
    _refuse(source, column, pc.invert(pc.is_finite(numbers)), values, "not a finite 32-bit number")
    return numbers


def _split(texts: pa.Array) -> pa.Array:
    import pyarrow as pa

    parts = ([part.strip() for part in text.split(SEPARATOR)] if text.strip() else [] for text in texts.to_pylist())
    return pa.array(parts, pa.list_(pa.string()))
