"""Texts as windows of tokens that know which word they begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_ft.data.encoding import encode_once, token_counts
from lightning_ft.data.sources import Source, first_true
from lightning_ft.data.tags import Words
from lightning_ft.data.windows import source_rows
from lightning_ft.functional.word_windows import word_windows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def tokenize_words(
    source: Source,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    words: pa.Array | None = None,
) -> Dataset:
    """Tokenise texts, or rows of words, into overlapping windows; what was tokenised before is read from the disk.

    Rows of words are joined by single spaces and tokenised as the text that makes, so that byte-level tokenizers see
    words as in pretraining, with the space before them (they need no ``add_prefix_space``). In texts, words are what
    the tokenizer's own pre-tokeniser makes, divided further at white space and punctuation, and in scripts without
    spaces at every token: a pre-tokeniser that leaves ``Paris.`` or a whole text in one piece does not decide where
    entities can end. No word is divided between two tokens of one character.

    Args:
        source: The rows.
        column: Its column of texts or of words.
        tokenizer: A fast tokenizer.
        max_length: Tokens of a window, special ones included.
        stride: Tokens that a window shares with the next.
        words: The rows' words, lists of strings; None for texts.

    Returns:
        A row for each window, those of a source row one after another: ``row``, the source row's number;
        ``input_ids`` and, where the tokenizer makes them, ``token_type_ids``; ``words``, as long: at the first token
        that holds characters of a word, 1 + the word's number in its row, negative in windows where it has less
        context than in another; 0 elsewhere. ``starts`` and ``ends``: the character offsets of all words of a row, in
        its first window; empty lists in others.

    Raises:
        TypeError: Texts that are no text.
        ValueError: A tokenizer that is not fast, windows without room beside ``stride``, a null, or a row of which the
            tokenizer makes no token at all.
    """
    import pyarrow as pa

    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} is a slow one ({type(tokenizer).__name__}), which does not tell "
            "where tokens lie in the text: choose a model with a fast tokenizer (tokenizer.json)"
        )
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room <= stride:
        raise ValueError(
            f"max_length={max_length} leaves {room} tokens of text in a window, of which stride={stride} would be "
            "those of the one before: give a smaller stride or a greater max_length"
        )

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
        windows = word_windows(
            batch[column], rows, lambda texts: tokenizer(texts, verbose=False).encodings, max_length, stride
        )
        if "token_type_ids" not in tokenizer.model_input_names:
            del windows["token_type_ids"]
        return windows

    table = pa.table({column: source.texts(column) if words is None else words})
    tokens = encode_once(
        table, encode, tokenizer, ["words", max_length, stride], f"Tokenising {source.name}", with_rows=True
    )
    if (window := first_true(pa.array((token_counts(tokens) == 0).numpy()))) is not None:
        row = int(source_rows(tokens)[window])
        raise ValueError(
            f"{source.where(row)}: the tokenizer makes no token of {table[column][row].as_py()!r}: remove the row"
        )
    return tokens


def words_of(tokens: Dataset) -> Words:
    """Where the words of each source row lie, from a table of :func:`tokenize_words`."""
    import pyarrow.compute as pc

    starts, ends = (tokens.data[name].combine_chunks() for name in ("starts", "ends"))
    rows = source_rows(tokens)
    counts = torch.zeros(int(rows.max()) + 1, dtype=torch.int64)
    counts.index_add_(0, rows, torch.tensor(pc.list_value_length(starts).to_numpy()).long())
    offsets = torch.stack([torch.tensor(part.flatten().to_numpy()).long() for part in (starts, ends)], 1)
    return Words(counts, offsets)
