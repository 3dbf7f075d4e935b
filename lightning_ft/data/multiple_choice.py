"""Data for choosing the right continuation, answer or alternative among several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from lightning_ft.data.base import Rows, TextData
from lightning_ft.data.curriculum import Curriculum
from lightning_ft.data.encoding import EncodedRows, encode_once
from lightning_ft.data.sources import Source, first_true, is_list, is_text

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


class MultipleChoiceData(TextData):
    """Contexts with two choices or more, of which one is right; tokenised once, batched by length, resumable.

    Each choice makes a pair of texts, (context, choice); of a pair that is too long the context is cut. A batch is a
    dictionary of ``input_ids``, ``attention_mask`` and ``token_type_ids`` (where the tokenizer makes them), each
    ``(batch, choices, width)``, ``labels``, the number of the right choice, ``(batch,)``, and ``row``, the row's number
    in its source, ``(batch,)``; both count from 0. All rows of a split have the same number of choices.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``. One without a pad token pads with its
            end-of-sequence token (see `Padding.of`).
        train: Training rows: a file, a ``hub://`` address or a ``datasets.Dataset``, see `read_source`.
        val: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        context: Column of the text that all choices share.
        question: Column that is added to the context after a space (COPA: "cause" or "effect").
        choices: Column of lists of texts, or the names of two columns or more (SWAG: ``[ending0, …, ending3]``).
        prefix: Column that begins each choice of a row, before a space (SWAG: ``sent2``).
        label: Column of the right choice's number, from 0: integers, or strings of them; or a ``datasets.ClassLabel``
            column, whatever its names.
        max_length: Tokens kept of a pair of context and choice.
        batch_size: Rows of a training batch on one process; it holds as many pairs for each choice.
        eval_batch_size: Rows of another batch; by default ``batch_size``.
        bucket: Batch rows of similar length in training. If false, batches are drawn at random.
        seed: Seed of the training order and of ``val_fraction``.
        num_workers: Worker processes of each loader. Few are needed: a batch is two array operations.
        val_fraction: Without ``val``, the share of ``train`` that becomes it.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.
        curriculum: Train on easy rows first, see `Curriculum`.

    Raises:
        ValueError: Arguments that contradict each other; later, data that is at fault, with its file and line.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"context": ["It rained."], "choices": [["I got wet.", "I sang."]], "label": [0]})
        >>> MultipleChoiceData("bert-base-uncased", train=rows).columns("train")
        ['context', 'choices', 'label']
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        context: str = "context",
        question: str | None = None,
        choices: str | Sequence[str] = "choices",
        prefix: str | None = None,
        label: str = "label",
        max_length: int = 128,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        bucket: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        val_fraction: float | None = None,
        pad_to_multiple_of: int = 1,
        id: str | None = None,
        trust_remote_code: bool = False,
        curriculum: Curriculum | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            {"train": train, "val": val, "test": test, "predict": predict},
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            bucket=bucket,
            seed=seed,
            num_workers=num_workers,
            val_fraction=val_fraction,
            pad_to_multiple_of=pad_to_multiple_of,
            id=id,
            trust_remote_code=trust_remote_code,
            curriculum=curriculum,
        )
        self.choices = choices if isinstance(choices, str) else list(choices)
        if len(self.choices) < 2 and not isinstance(choices, str):
            raise ValueError(f"choices={choices!r} must name one column of lists, or two columns or more")
        self.contexts = [name for name in (context, question) if name is not None]
        self.prefix = prefix
        self.label = label
        named = [*self._texts, label]
        if len(set(named)) < len(named):
            raise ValueError(f"context, question, choices, prefix and label must be different columns, got {named}")

    @property
    def _texts(self) -> list[str]:
        choices = [self.choices] if isinstance(self.choices, str) else self.choices
        return [*self.contexts, *choices, *([] if self.prefix is None else [self.prefix])]

    @override
    def columns(self, split: str) -> list[str]:
        return self._texts if split == "predict" else [*self._texts, self.label]

    @override
    def prepare(self, split: str) -> None:
        self._pairs(split)

    @override
    def encode(self, split: str) -> ChoiceRows:
        pairs, count = self._pairs(split)
        labels = None if split == "predict" else read_choice_labels(self.source(split), self.label, count)
        return ChoiceRows(EncodedRows(pairs, self.padding), count, labels, self.part(split))

    @override
    def rarity(self, rows: Rows) -> Tensor:
        assert isinstance(rows, ChoiceRows)
        return super().rarity(rows.pairs).view(-1, rows.count).sum(1)[rows.rows]

    @override
    def facts(self) -> dict[str, Any]:
        return {"choices": {split: rows.count for split, rows in self._rows.items() if isinstance(rows, ChoiceRows)}}

    def _pairs(self, split: str) -> tuple[Dataset, int]:
        """A table with a row for each choice, those of a source row one after another; and the number of choices."""
        import pyarrow as pa
        import pyarrow.compute as pc

        source = self.source(split)
        choices, count = read_choices(source, self.choices)
        contexts = pc.binary_join_element_wise(
            *(_texts(source, name) for name in self.contexts), pa.scalar(" ", pa.large_string())
        )
        of = pa.array(torch.arange(len(source)).repeat_interleave(count).numpy())
        if self.prefix is not None:
            choices = pc.binary_join_element_wise(
                _texts(source, self.prefix).take(of), choices, pa.scalar(" ", pa.large_string())
            )
        table = pa.table({"context": contexts.take(of), "choice": choices})
        return _tokenize(source, table, count, self.tokenizer, self.max_length), count


class ChoiceRows(TorchDataset[dict[str, Any]]):
    """Source rows with a pair of texts for each choice; a list of positions gives one batch.

    Args:
        pairs: The encoded pairs, those of a source row one after another.
        count: Choices of each row.
        labels: Number of the right choice of each source row, ``(source rows,)``; None for none.
        rows: Numbers of the source rows in the set, ``(rows,)``; None for all.
    """

    def __init__(self, pairs: EncodedRows, count: int, labels: Tensor | None, rows: Tensor | None = None) -> None:
        self.pairs = pairs
        self.count = count
        self.labels = labels
        self.rows = torch.arange(len(pairs) // count) if rows is None else rows
        self.lengths = pairs.lengths.view(-1, count).amax(1)[self.rows]

    @property
    def truncated(self) -> Tensor | None:
        """Which rows have a pair that was cut, ``(rows,)``."""
        truncated = self.pairs.truncated
        return None if truncated is None else truncated.view(-1, self.count).any(1)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A batch.

        Args:
            positions: Positions in the set, ``(batch,)``.

        Returns:
            What `EncodedRows` gives for the pairs, ``(batch, choices, width)``; ``row``: ``(batch,)``; and ``labels``
            where there are some: ``(batch,)``.
        """
        rows = self.rows[torch.as_tensor(positions)]
        pairs = self.pairs[(rows[:, None] * self.count + torch.arange(self.count)).flatten().tolist()]
        del pairs["row"]
        batch = {name: values.view(len(rows), self.count, -1) for name, values in pairs.items()}
        if self.labels is not None:
            batch["labels"] = self.labels[rows]
        return {**batch, "row": rows}

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__


def read_choices(source: Source, columns: str | Sequence[str]) -> tuple[pa.Array, int]:
    """The choices of all rows, one after another, ``(rows · choices,)``; and how many a row has.

    Args:
        source: The rows.
        columns: A column of lists of strings, or one column of strings for each choice.

    Raises:
        TypeError: A column of another type.
        ValueError: A null, a single choice, or rows with different numbers of choices.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not isinstance(columns, str):
        texts = pa.concat_arrays([_texts(source, name) for name in columns])
        order = torch.arange(len(texts)).view(len(columns), -1).T.flatten()
        return texts.take(pa.array(order.numpy())), len(columns)
    lists = source.table[columns].combine_chunks()
    if (row := first_true(lists.is_null())) is not None:
        raise ValueError(f"{source.where(row)}: column {columns!r} is null: give its choices, or remove the row")
    if not is_list(lists.type):
        raise TypeError(
            f"{source.where(0)}: column {columns!r} must hold lists of texts, got {lists[0].as_py()!r} ({lists.type}); "
            "where each choice has a column of its own, name them: choices=[...]"
        )
    lengths = pc.list_value_length(lists)
    count = lengths[0].as_py()
    if (row := first_true(pc.not_equal(lengths, count))) is not None:
        raise ValueError(
            f"{source.where(row)}: column {columns!r} holds {lengths[row].as_py()} choices, but the first row has "
            f"{count}: give every row as many"
        )
    if count < 2:
        raise ValueError(f"{source.where(0)}: column {columns!r} holds {count} choices: there must be two or more")
    texts = lists.flatten()
    if (index := first_true(texts.is_null())) is not None:
        raise ValueError(f"{source.where(index // count)}: column {columns!r} holds a null choice: give a text")
    if not is_text(texts.type):
        raise TypeError(
            f"{source.where(0)}: column {columns!r} must hold lists of texts, got {lists[0].as_py()!r} ({lists.type})"
        )
    return texts.cast(pa.large_string()), count


def _texts(source: Source, column: str) -> pa.Array:
    import pyarrow as pa

    # Large: several columns of strings, or one repeated for each choice, may hold more than 2 GB.
    return source.texts(column).cast(pa.large_string()).combine_chunks()


def read_choice_labels(source: Source, column: str, count: int) -> Tensor:
    """The number of each row's right choice, ``(rows,)`` 64-bit integers.

    Args:
        source: The rows.
        column: Its label column: integers from 0, or strings of them; of class numbers, which the source shows by their
            names, the numbers count.
        count: Choices of each row.

    Raises:
        TypeError: The column holds another type.
        ValueError: A label that is null, no number, or not below ``count``.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = source.table[column].combine_chunks()
    if not (is_text(values.type) or pa.types.is_integer(values.type) or pa.types.is_null(values.type)):
        raise TypeError(
            f"{source.where(0)}: column {column!r} must hold the number of the right choice, from 0, as an integer or "
            f"a string of it; got {values[0].as_py()!r} ({values.type})"
        )
    names = [*source.class_names.get(column, map(str, range(count)))][:count]
    numbers = pc.index_in(values.cast(pa.string()), value_set=pa.array(names, pa.string()))
    if (row := first_true(numbers.is_null())) is not None:
        raise ValueError(
            f"{source.where(row)}: column {column!r} holds {values[row].as_py()!r}: a label is the number of the right "
            f"choice, from 0 to {count - 1}"
            + (f" (by its name, one of {', '.join(map(repr, names))})" if column in source.class_names else "")
        )
    return torch.tensor(numbers.to_pylist())


def _tokenize(source: Source, table: pa.Table, count: int, tokenizer: Any, max_length: int) -> Dataset:
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)

    def encode(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, Any]:
        plain = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        contexts, choices = (tokenizer(batch[name], verbose=False, **plain)["input_ids"] for name in batch)
        for number, context, choice in zip(numbers, contexts, choices, strict=True):
            if len(choice) > room - bool(context):  # one token of the context stays
                raise ValueError(
                    f"{source.where(number // count)}: choice {number % count} has {len(choice)} tokens, and "
                    f"max_length={max_length} leaves {room} for it and the context: raise max_length, or shorten it"
                )
        encoded = tokenizer(
            batch["context"],
            batch["choice"],
            truncation="only_first",
            max_length=max_length,
            return_attention_mask=False,
        )
        truncated = [len(a) + len(b) > room for a, b in zip(contexts, choices, strict=True)]
        return {**encoded, "truncated": truncated}

    settings = ["choices", max_length]
    return encode_once(table, encode, tokenizer, settings, f"Tokenising {source.name}", with_rows=True)
