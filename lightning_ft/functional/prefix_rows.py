"""The rows of a batch of token ids without their padding: what a frozen prefix computes depends on them alone."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SCALARS = (type(None), bool, int, float, str, torch.dtype)
MASK = "attention_mask"
"""The argument that says which positions are padding. Without it, every position counts."""


class Unsuited(Exception):  # noqa: N818 - no failure: the model runs as it is
    """Why a call, or a model, must go through as it is."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call.

    Args:
        columns: Tensors ``(batch, seq)`` by argument: token ids, token types, positions, the mask.
        options: All other arguments: numbers, strings, flags.
    """

    columns: Mapping[str, Tensor]
    options: Mapping[str, Any]

    @property
    def form(self) -> tuple[Any, ...]:
        """Equal for calls that differ in the content of their columns only."""
        names = [(name, column.dtype) for name, column in self.columns.items()]
        return *sorted(names, key=repr), *sorted(self.options.items(), key=repr)


class Row(NamedTuple):
    """One row: its content up to the last real position, and which positions are real."""

    key: bytes
    start: int
    stop: int
    columns: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Real positions."""
        return self.stop - self.start


def arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name to value of the arguments of a call, as they could be passed by keyword.

    Raises:
        Unsuited: They do not fit, or some can be passed by position only.
    """
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise Unsuited(f"the call does not fit the signature of forward ({error})") from None
    values: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            values |= value
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise Unsuited(f"argument {name!r} of forward can be passed by position only")
        else:
            values[name] = value
    return values


def read_inputs(values: Mapping[str, Any]) -> Inputs:
    """Tell the columns of token ids from the other arguments.

    Raises:
        Unsuited: There are no token ids, or an argument is neither a column nor a number, string or flag: embeddings
            in their place, a mask of more dimensions, a key-value cache.
    """
    tables = {name: v for name, v in values.items() if isinstance(v, Tensor) and v.ndim == 2 and name != MASK}
    ids = next((table for table in tables.values() if not table.is_floating_point()), None)
    if ids is None:
        raise Unsuited("no token ids (batch, seq) among the arguments")
    columns: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.ndim != 2 or value.shape[1] != ids.shape[1] or value.shape[0] not in (1, ids.shape[0]):
                raise Unsuited(f"argument {name!r} has the shape {tuple(value.shape)}, not that of the token ids")
            if value.requires_grad:
                raise Unsuited(f"argument {name!r} requires gradients")
            columns[name] = value if value.shape == ids.shape else value.expand(ids.shape)
        elif isinstance(value, _SCALARS):
            options |= {} if value is None else {name: value}
        else:
            raise Unsuited(f"argument {name!r} is a {type(value).__name__}")
    return Inputs(columns, options)


def rows_of(columns: Mapping[str, Tensor]) -> list[Row]:
    """The rows of a batch, each with a key: a hash of its content up to the last real position.

    The key covers ids, token types, positions, the mask, and with them the padding on the left, on which absolute
    positions depend. Padding on the right is no part of it, so that a row is the same row in every batch.

    Args:
        columns: Tensors ``(batch, seq)`` by argument.
    """
    host = {name: column.detach().to("cpu") for name, column in sorted(columns.items())}
    # One type for keys, whatever type the ids came in; bytes of floats are compared as they are.
    arrays = {name: (c.double() if c.is_floating_point() else c.long()).numpy() for name, c in host.items()}
    rows, width = next(iter(host.values())).shape
    starts, stops = [0] * rows, [width] * rows
    if MASK in arrays:
        real = arrays[MASK] != 0
        some = real.any(1)
        starts = [int(start) if any_ else 0 for start, any_ in zip(real.argmax(1), some, strict=True)]
        stops = [width - int(last) if any_ else width for last, any_ in zip(real[:, ::-1].argmax(1), some, strict=True)]
    header = "|".join(arrays).encode()
    result = []
    for i in range(rows):
        digest = hashlib.blake2b(header, digest_size=16)
        digest.update(stops[i].to_bytes(4, "big"))
        for array in arrays.values():
            digest.update(array[i, : stops[i]].tobytes())
        views = {name: column[i, : stops[i]] for name, column in host.items()}
        result.append(Row(digest.digest(), starts[i], stops[i], views))
    return result


def detach_rows(rows: Sequence[Row]) -> list[Row]:
    """Copies that do not keep the batch alive from which they came; integers are kept in 32 bits."""

    def small(column: Tensor) -> Tensor:
        return column.clone() if column.is_floating_point() else column.to(torch.int32, copy=True)

    return [row._replace(columns={name: small(c) for name, c in row.columns.items()}) for row in rows]


def batch_of(rows: Sequence[Row], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns ``(rows, longest)``, padded on the right with zeros, in the types and on the device of ``like``."""
    width = max(row.stop for row in rows)
    columns = {}
    for name, model in like.items():
        column = torch.zeros(len(rows), width, dtype=model.dtype)
        for i, row in enumerate(rows):
            column[i, : row.stop] = row.columns[name]
        columns[name] = column.to(model.device)
    return columns


def by_length(rows: Sequence[Row], *, tokens: int = 4096, most: int = 256) -> Iterator[list[Row]]:
    """Batches of rows of similar length: the same ones, whatever the order of ``rows``.

    Args:
        rows: Rows with distinct keys.
        tokens: Positions of a batch, padding included; a longer row is a batch by itself.
        most: Rows of a batch.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.stop, row.start, row.key)):
        # Without a mask nothing could tell padding from content.
        other = bool(batch) and MASK not in row.columns and row.stop != batch[-1].stop
        if batch and (other or len(batch) == most or (len(batch) + 1) * row.stop > tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def signature_of(module: nn.Module) -> inspect.Signature:
    """The arguments of a module's ``forward``."""
    return inspect.signature(module.forward)
