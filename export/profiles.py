"""Which input shapes an engine is built for, found from the lengths of real texts."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.export.extras import require

if TYPE_CHECKING:
    from lightning_ft.data import TextData

Range = tuple[int, int, int]
"""The smallest size of an axis, the one that kernels are tuned for, and the largest."""

Axes = Sequence[int | str]
"""Of an input: sizes that are fixed, and names of axes that are not, or sums of such names."""

MULTIPLE = 8  # of tensor cores
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Of each input its smallest, its tuned and its largest shape."""


@dataclass(frozen=True)
class Profile:
    """Ranges of a graph's dynamic axes, for which one set of kernels is chosen.

    Args:
        axes: ``(smallest, tuned for, largest)`` by the axis's name in the graph, such as ``"batch"``, ``"sequence"``,
            ``"choices"`` or ``"past"``. Axes that a graph does not have are passed over: one profile fits all graphs
            of a model.

    Raises:
        ValueError: The three numbers are not in order, or the largest is below 1.

    Example:
        >>> Profile({"batch": (1, 8, 32), "sequence": (1, 64, 512)}).shapes({"input_ids": ["batch", "sequence"]})
        {'input_ids': ((1, 1), (8, 64), (32, 512))}
    """

    axes: Mapping[str, Range]

    def __post_init__(self) -> None:
        for name, sizes in self.axes.items():
            if len(sizes) != 3 or not 0 <= sizes[0] <= sizes[1] <= sizes[2] or sizes[2] < 1:
                raise ValueError(
                    f"axes: {name}={tuple(sizes)} must be the smallest size, the one to tune for and the largest, in "
                    "this order, such as (1, 64, 512)"
                )

    @classmethod
    def of(
        cls,
        lengths: Iterable[int],
        batch_sizes: Sequence[int] = (1, 32),
        *,
        count: int = 3,
        longest: int | None = None,
        others: Mapping[str, Range] | None = None,
    ) -> tuple[Profile, ...]:
        """Profiles that fit the lengths of real texts: as many texts fall into each.

        Sequences are divided at quantiles of the lengths, rounded up to multiples of 8; each part is tuned for the
        median of what falls into it, rounded likewise. Batches are divided at ``batch_sizes``, each tuned for its upper
        end. Together the profiles take every batch up to the largest and every sequence up to the longest.

        Args:
            lengths: Tokens in each text, as :func:`token_lengths` gives them.
            batch_sizes: Sizes that shall be fast; up to the largest of them, others work too.
            count: Parts of the lengths, at most: equal quantiles are one.
            longest: Tokens that must be taken; by default as many as were seen.
            others: Ranges of further axes.

        Returns:
            A profile for each part of lengths and each batch size.

        Raises:
            ValueError: There are no lengths, or a number is out of range.

        Example:
            >>> for profile in Profile.of([5, 7, 20, 21, 60, 110], count=3, longest=128):
            ...     print(profile.axes)
            {'batch': (1, 1, 1), 'sequence': (1, 8, 8)}
            {'batch': (2, 32, 32), 'sequence': (1, 8, 8)}
            {'batch': (1, 1, 1), 'sequence': (9, 24, 24)}
            {'batch': (2, 32, 32), 'sequence': (9, 24, 24)}
            {'batch': (1, 1, 1), 'sequence': (25, 64, 128)}
            {'batch': (2, 32, 32), 'sequence': (25, 64, 128)}
        """
        seen = sorted(lengths)
        if not seen or seen[0] < 1:
            raise ValueError(f"lengths: expected numbers of tokens from 1 on, got {seen[:3] or 'none'}")
        if count < 1:
            raise ValueError(f"count={count} must be 1 or more")
        sizes = sorted(set(batch_sizes))
        if not sizes or sizes[0] < 1:
            raise ValueError(f"batch_sizes={tuple(batch_sizes)} must be one or more numbers from 1 on")
        top = seen[-1] if longest is None else longest
        if top < seen[-1]:
            raise ValueError(f"longest={longest} is less than the {seen[-1]} tokens of the longest text: truncate it")
        return tuple(
            cls({"batch": batch, "sequence": sequence, **(others or {})})
            for sequence in _parts(seen, count, top)
            for batch in ((low + 1, high, high) for low, high in zip([0, *sizes], sizes, strict=False))
        )

    @classmethod
    def of_decoder(
        cls, lengths: Iterable[int], batch_sizes: Sequence[int] = (1,), *, longest: int | None = None
    ) -> tuple[Profile, ...]:
        """Profiles of a graph with a cache of keys and values: for prompts, and for single tokens after them.

        Axes are named as ``export_onnx`` names them: ``sequence`` of the new tokens, ``past`` of those in the cache,
        ``total`` of both, ``kept`` of the tokens whose logits are wanted, and ``source`` of what an encoder read.

        Args:
            lengths: Tokens in each text, with what is written on it: :func:`token_lengths` of whole texts.
            batch_sizes: As in :meth:`of`.
            longest: Tokens that must be taken in all; by default as many as were seen.

        Returns:
            Two profiles for each batch size.

        Raises:
            ValueError: There are no lengths, or a number is out of range.

        Example:
            >>> prompt, step = Profile.of_decoder([40, 64, 100], longest=128)
            >>> prompt.axes["sequence"], prompt.axes["past"]
            ((1, 64, 128), (0, 0, 128))
            >>> step.axes["sequence"], step.axes["past"]
            ((1, 1, 1), (1, 64, 128))
        """
        found = []
        for whole in cls.of(lengths, batch_sizes, count=1, longest=longest):
            batch, (_, tuned, top) = whole.axes["batch"], whole.axes["sequence"]
            source = (1, tuned, top)
            for sequence, past in (((1, tuned, top), (0, 0, top)), ((1, 1, 1), (1, tuned, top))):
                total = (sequence[0] + past[0], sequence[1] + past[1], sequence[2] + past[2])
                axes = {"batch": batch, "sequence": sequence, "past": past, "total": total}
                found.append(cls({**axes, "kept": (1, 1, sequence[2]), "source": source}))
        return tuple(found)

    def shapes(self, inputs: Mapping[str, Axes]) -> Shapes:
        """The smallest, the tuned and the largest shape of each input.

        Args:
            inputs: The axes of each.

        Raises:
            ValueError: An axis has no range here.
        """
        return {name: tuple(self._shape(name, axes, i) for i in range(3)) for name, axes in inputs.items()}  # type: ignore[misc]

    def _shape(self, name: str, axes: Axes, which: int) -> tuple[int, ...]:
        sizes = {axis: sizes[which] for axis, sizes in self.axes.items()}
        return tuple(axis if isinstance(axis, int) else _size(axis, sizes, name) for axis in axes)


def choose_profile(profiles: Sequence[Shapes], shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of the profile that takes some shapes and is tuned for the nearest ones.

    Args:
        profiles: Of each profile the shapes of each input.
        shapes: The shape of each input.

    Raises:
        ValueError: None takes them.
    """
    fitting = [i for i, profile in enumerate(profiles) if all(_fits(profile[name], s) for name, s in shapes.items())]
    if not fitting:
        # Where each input alone is taken, it is their combination that is not: the first is named.
        alone = (name for name, shape in shapes.items() if not any(_fits(p[name], shape) for p in profiles))
        name = next(alone, next(iter(shapes)))
        known = "; ".join(f"{profile[name][0]} to {profile[name][2]}" for profile in profiles)
        raise ValueError(
            f"{name}: no profile of the engine takes the shape {tuple(shapes[name])}; they take {known}. Send less at "
            "once, or build the engine with a profile for it"
        )
    return min(fitting, key=lambda i: _distance(profiles[i], shapes))


def graph_axes(path: str | os.PathLike[str]) -> dict[str, list[int | str]]:
    """The axes of each input of an ONNX graph.

    Raises:
        ValueError: An axis has neither a size nor a name.
    """
    graph = require("onnx").load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    found: dict[str, list[int | str]] = {}
    for value in graph.input:
        if value.name in weights:
            continue
        sizes = value.type.tensor_type.shape.dim
        found[value.name] = [dim.dim_param or dim.dim_value for dim in sizes]
        if 0 in found[value.name]:
            raise ValueError(f"{path}: input {value.name} has an axis with neither a size nor a name: export it anew")
    return found


def token_lengths(source: TextData | Iterable[str], folder: str | os.PathLike[str] | None = None) -> list[int]:
    """How many tokens real texts have, after truncation: what profiles are made of.

    Args:
        source: A data module of lightning_ft, whose training rows are counted, or its validation rows where it has
            none; or texts.
        folder: Of texts: the exported folder whose tokenizer counts them.

    Raises:
        FileNotFoundError: The folder has no tokenizer.
        ValueError: Texts without a folder.
    """
    from lightning_ft.data import TextData

    if isinstance(source, TextData):
        split = "train" if source.sources["train"] is not None else "val"
        stage = {"train": "fit", "val": "validate"}[split]
        source.prepare_data()
        source.setup(stage)
        return [int(length) for length in source.need(split).lengths]
    if folder is None:
        raise ValueError("folder: texts are counted by the tokenizer of an exported folder: name it")
    place = Path(folder) / "tokenizer.json"
    if not place.is_file():
        raise FileNotFoundError(f"{place} does not exist: give a folder that lightning-ft export wrote")
    tokenizer = require("tokenizers").Tokenizer.from_file(str(place))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    limit = longest_input_of(folder) or math.inf
    return [int(min(len(encoded.ids), limit)) for encoded in tokenizer.encode_batch(list(source))]


def longest_input_of(folder: str | os.PathLike[str]) -> int | None:
    """Tokens that an exported model takes at most; None where nothing says so."""
    import json

    head = Path(folder) / "head.json"
    return json.loads(head.read_text(encoding="utf-8"))["max_length"] if head.is_file() else None


def _parts(lengths: Sequence[int], count: int, top: int) -> list[Range]:
    """Ranges of sequences: as many lengths in each, up to ``top``."""
    ends = {_up(lengths[math.ceil(len(lengths) * part / count) - 1]) for part in range(1, count)}
    edges = [*sorted(end for end in ends if end < top), top]
    parts = []
    for below, end in zip([0, *edges], edges, strict=False):
        inside = [length for length in lengths if below < length <= end] or [end]
        parts.append((below + 1, min(_up(inside[(len(inside) - 1) // 2]), end), end))
    return parts


def _up(length: int) -> int:
    return math.ceil(length / MULTIPLE) * MULTIPLE


def _size(axis: str, sizes: Mapping[str, int], name: str) -> int:
    """Of a name, or a sum such as ``past + sequence``, as the exporter writes it."""

    def value(node: Any) -> int:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = value(node.left), value(node.right)
            return left + right if isinstance(node.op, ast.Add) else left * right
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        raise ValueError(
            f"axes: {ast.unparse(node)} of the input {name} has no range, only {', '.join(sizes) or 'nothing'} has: "
            "add it to the profile, as (smallest, tuned for, largest)"
        )

    if axis in sizes:
        return sizes[axis]
    try:
        tree = ast.parse(axis, mode="eval").body
    except SyntaxError:
        tree = ast.Name(axis)
    return value(tree)


def _fits(ranges: Sequence[Sequence[int]], shape: Sequence[int]) -> bool:
    low, _, high = ranges
    return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def _distance(profile: Shapes, shapes: Mapping[str, Sequence[int]]) -> float:
    """By factors: 64 lies between 32 and 128."""
    return sum(
        abs(math.log((size + 1) / (tuned + 1)))
        for name, shape in shapes.items()
        for size, tuned in zip(shape, profile[name][1], strict=True)
    )
