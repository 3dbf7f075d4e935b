"""Texts as token rows: tokenised once onto disk, padded batch by batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_ft.data.sources import Source, first_true, is_list

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
"""To be raised whenever encoding the same texts gives something else, or in another form: see `encode_once`."""


@dataclass(frozen=True)
class Padding:
    """How rows of tokens become a rectangle.

    Args:
        token: Fills ``input_ids``.
        token_type: Fills ``token_type_ids``.
        left: Whether the filling goes before the tokens.
        multiple: The width is rounded up to a multiple of it.
    """

    token: int
    token_type: int = 0
    left: bool = False
    multiple: int = 1

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, multiple: int = 1) -> Padding:
        """A tokenizer's own padding; without a pad token (GPT-2, Llama) its end-of-sequence token.

        Such padding is hidden by the attention mask all the same, but a model that finds a row's last token by its pad
        token must be told the same one (``config.pad_token_id``). The side is that of the tokenizer's class, on which
        its models were trained (left for XLNet), and not one set on a tokenizer for generation: absolute positions
        count from the first column.

        Raises:
            ValueError: The tokenizer has neither token.
        """
        token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if token is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has neither a pad token nor an end-of-sequence token: "
                "add a pad_token to its files"
            )
        return cls(token, tokenizer.pad_token_type_id, type(tokenizer).padding_side == "left", multiple)

    def of_column(self, name: str) -> int:
        """What fills up a column of lists."""
        return {"input_ids": self.token, "token_type_ids": self.token_type, "labels": -100}.get(name, 0)

    def mask(self, lengths: Tensor) -> Tensor:
        """Where the tokens of rows of these lengths lie, ``(rows, width)``."""
        width = -(-int(lengths.max()) // self.multiple) * self.multiple
        column = torch.arange(width)
        return column >= width - lengths[:, None] if self.left else column < lengths[:, None]


class EncodedRows(TorchDataset[dict[str, Any]]):
    """Rows of tokens; a list of positions gives one padded batch.

    A batch is cut out of the memory-mapped table and filled into the rectangle by two array operations: 0.06 ms for 32
    rows of SST-2, where ``tokenizer.pad`` takes 1.3 ms.

    Args:
        tokens: A table with ``input_ids`` and what else the batches shall hold: columns of lists as long as
            ``input_ids`` become ``(batch, width)``, filled up on the same side (``labels`` with -100, others with 0
            where ``padding`` has no value for them); columns of numbers become ``(batch,)``. ``truncated`` is left out.
        padding: How to fill up.
        labels: ``(source rows,)`` class numbers (64-bit integers), lists of them, or 32-bit floats; None for none.
        num_labels: Width of the 0/1 rows that lists of class numbers become.
        rows: Numbers of the table's rows that are in the set, ``(rows,)``; None for all.
    """

    def __init__(
        self,
        tokens: Dataset,
        padding: Padding,
        *,
        labels: pa.Array | None = None,
        num_labels: int = 0,
        rows: Tensor | None = None,
    ) -> None:
        self.tokens = tokens.with_format("arrow")
        self.padding = padding
        self.labels = labels
        self.num_labels = num_labels
        self.rows = torch.arange(len(tokens)) if rows is None else rows
        self.lengths = token_counts(tokens)[self.rows]

    @property
    def truncated(self) -> Tensor | None:
        """Which rows were cut, ``(rows,)``, where the table says so."""
        if "truncated" not in self.tokens.column_names:
            return None
        return torch.tensor(self.tokens.data["truncated"].to_pylist())[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A batch of tensors.

        Args:
            positions: Positions in the set, ``(batch,)``.

        Returns:
            ``input_ids``, ``attention_mask`` and the table's other columns; ``row``, the row's number in the source:
            ``(batch,)``, unless the table has a column ``row``; ``labels``: ``(batch,)``, or ``(batch, num_labels)``
            where they are lists.
        """
        rows = self.rows[torch.as_tensor(positions)]
        table = self.tokens[rows.tolist()]
        lengths = self.lengths[torch.as_tensor(positions)]
        mask = self.padding.mask(lengths)
        batch: dict[str, Any] = {"attention_mask": mask.long(), "row": rows}
        for name in table.column_names:
            if name != "truncated":
                values = table[name].combine_chunks()
                batch[name] = (
                    fill(values, mask, self.padding.of_column(name)) if is_list(values.type) else _tensor(values)
                )
        if self.labels is not None:
            batch["labels"] = self._labels(rows)
        return batch

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__

    def _labels(self, rows: Tensor) -> Tensor:
        assert self.labels is not None
        labels = self.labels.take(rows.numpy())
        if not is_list(labels.type):
            return _tensor(labels)
        hot = torch.zeros(len(rows), self.num_labels)
        hot[_tensor(labels.value_parent_indices()), _tensor(labels.flatten())] = 1
        return hot


def whole_batch(batch: Any) -> Any:
    """The ``collate_fn`` of a DataLoader over `EncodedRows`, whose batches are whole already."""
    return batch


def token_counts(tokens: Dataset) -> Tensor:
    """Tokens of each row, ``(rows,)``."""
    import pyarrow.compute as pc

    return torch.from_numpy(_writable(pc.list_value_length(tokens.data["input_ids"]))).long()


def tokenize(source: Source, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenise one text column, or two as pairs; what was tokenised before is read from the disk.

    The cache lies in ``lightning_ft`` in the cache folder of ``datasets`` and is found by the texts and the tokenizer
    themselves, wherever they came from.

    Args:
        source: The rows.
        columns: Its text column or columns.
        tokenizer: The tokenizer.
        max_length: Tokens kept of a row. Of a pair, the longer text is cut first.

    Returns:
        ``input_ids``, ``token_type_ids`` where the tokenizer makes them, and ``truncated`` of each row.

    Raises:
        TypeError: A column that does not hold text.
        ValueError: ``max_length`` has no room for text, a null, or a text of which the tokenizer makes no token at all.
    """
    import pyarrow as pa

    # Tokenizers then cut nothing at all, and say nothing.
    if (special := tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)) >= max_length:
        raise ValueError(f"max_length={max_length} leaves no room for text beside {special} special tokens: raise it")
    table = pa.table({column: source.texts(column) for column in columns})

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(
            *(batch[column] for column in columns), truncation=True, max_length=max_length, return_attention_mask=False
        )
        if encoded.encodings is None:  # a tokenizer in Python does not tell: count rows of full length
            truncated = [len(ids) >= max_length for ids in encoded["input_ids"]]
        else:
            truncated = [bool(encoding.overflowing) for encoding in encoded.encodings]
        return {**encoded, "truncated": truncated}

    tokens = encode_once(table, encode, tokenizer, [max_length], f"Tokenising {source.name}")
    if (row := first_true(pa.array((token_counts(tokens) == 0).numpy()))) is not None:
        raise ValueError(
            f"{source.where(row)}: the tokenizer makes no token of {source.table[columns[0]][row].as_py()!r}: "
            "remove the row"
        )
    return tokens


def encode_once(
    table: pa.Table,
    encode: Callable[..., Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Any],
    description: str,
    *,
    with_rows: bool = False,
) -> Dataset:
    """Encode a table in batches onto the disk; what was encoded before is found there.

    The cache lies in ``lightning_ft`` in the cache folder of ``datasets``; it is found by the table's content, the
    tokenizer, the settings and the version of this package, wherever they came from.

    Args:
        table: The texts.
        encode: Takes a batch of columns (and with ``with_rows`` the numbers of its rows), returns the encoded columns,
            of any common length.
        tokenizer: The tokenizer that ``encode`` uses.
        settings: All else that decides what comes out, the name of the task first where others might share the table.
        description: Shown beside the progress bar.
        with_rows: Hand ``encode`` the row numbers, too.
    """
    import datasets
    from datasets.fingerprint import Hasher

    key = Hasher.hash([_FORMAT, version("lightning-ft"), table, _identity(tokenizer), *settings])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lightning_ft"
    folder.mkdir(parents=True, exist_ok=True)
    return datasets.Dataset(table).map(
        encode,
        batched=True,
        with_indices=with_rows,
        remove_columns=table.column_names,
        new_fingerprint=key,
        cache_file_name=str(folder / f"{key}.arrow"),
        load_from_cache_file=True,
        desc=description,
    )


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides the tokens. Not the side of padding, which is done batch by batch, nor the chat template, which is
    a setting of what uses it.
    """
    # Which tokens play which part (mask, separator, end) is not written in a fast tokenizer's own file.
    roles = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    shared = [
        roles,
        sorted(tokenizer.all_special_ids),
        bool(getattr(tokenizer, "split_special_tokens", False)),
        tokenizer.model_input_names,
        tokenizer.truncation_side,
        # The languages of a tokenizer of many decide its special tokens.
        [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
    ]
    if not tokenizer.is_fast:
        files = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), repr(tokenizer.init_kwargs)]
        return [*shared, *files]
    # A fast tokenizer keeps the truncation and padding of its last call: they must not decide what is found.
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return [*shared, json.dumps(state, sort_keys=True)]


def fill(lists: pa.Array, mask: Tensor, value: int) -> Tensor:
    """Lists of numbers as a rectangle: their elements where ``mask`` is true, ``value`` elsewhere."""
    flat = torch.from_numpy(_writable(lists.flatten()))
    return torch.full(mask.shape, value).masked_scatter_(mask, flat.long())


def _tensor(values: pa.Array) -> Tensor:
    return torch.from_numpy(_writable(values))


def _writable(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    # torch warns about read-only memory, which is what Arrow hands out.
    array: np.ndarray = values.to_numpy() if hasattr(values, "chunks") else values.to_numpy(zero_copy_only=False)
    return array if array.flags.writeable else array.copy()
