"""Documents cut into rows of tokens for language modelling."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from lightning_ft.core.special_tokens import around
from lightning_ft.data.masking import WORD_START

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

Objective = Literal["mlm", "clm"]
RowKind = Literal["chunks", "documents"]


class RowCutter:
    """Tokenises documents, batch after batch, and cuts them into rows of at most ``max_length`` tokens.

    ``"chunks"``: the documents one after another, across the borders of batches, cut into rows of full length; the
    rest is a short last row. ``"documents"``: each document begins a row of its own, and takes as many as it needs.
    No token is lost and none comes twice. Documents without a token are left out.

    For ``"mlm"`` each row is framed as the tokenizer frames a text (``[CLS] … [SEP]``), and documents in a chunk are
    kept apart by the separator token (RoBERTa's FULL-SENTENCES). For ``"clm"`` each document begins as the tokenizer
    begins a text and ends with the end-of-sequence token, and rows have no frame.

    Args:
        tokenizer: The tokenizer.
        objective: ``"mlm"`` or ``"clm"``.
        rows: ``"chunks"`` or ``"documents"``.
        max_length: Tokens of a row, its frame among them.
        words: Whether to say where words begin. A word is what the tokenizer splits a text into before it splits
            words into tokens; a token of nothing but punctuation or symbols is always a word of its own.

    Raises:
        ValueError: ``max_length`` has no room for a token, or the tokenizer does not know words or has no
            end-of-sequence token where one is needed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, objective: Objective, rows: RowKind, max_length: int, *, words: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.objective = objective
        self.rows = rows
        self.max_length = max_length
        self.words = words
        if words and not tokenizer.is_fast:
            raise ValueError(
                "whole_words=True needs a fast tokenizer, which knows the words of its tokens; "
                f"{tokenizer.name_or_path!r} is a {type(tokenizer).__name__}: use a model with a tokenizer.json, or "
                "whole_words=False"
            )
        before, after = around(tokenizer)
        separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        row: tuple[list[int], list[int]] = (before, after)
        document: tuple[list[int], list[int]] = ([separator] if rows == "chunks" and separator is not None else [], [])
        if objective == "clm":
            row, document = ([], []), (before, [end_of_text(tokenizer)])
        self._row_frame = [self._special(ids) for ids in row]
        self._document_frame = [self._special(ids) for ids in document]
        self._width = max_length - len(row[0]) - len(row[1])
        if self._width < (1 if objective == "mlm" else 2):
            raise ValueError(
                f"max_length={max_length} leaves no room for text beside {max_length - self._width} special tokens "
                f"(objective={objective!r}): raise it"
            )
        # The separator stands between documents, not before the first one.
        self._skip = len(document[0]) if objective == "mlm" else 0
        self._rest = self._special([])

    def identity(self) -> dict[str, int | str]:
        """What decides the rows, beside the tokenizer."""
        kind = {"objective": self.objective, "rows": self.rows}
        return {**kind, "max_length": self.max_length, "whole_words": int(self.words)}

    def __call__(self, texts: Sequence[str], numbers: Sequence[int], *, last: bool) -> pa.Table:
        """The rows that some documents complete.

        Args:
            texts: The documents.
            numbers: Their numbers in the source.
            last: Whether no more will come: a chunk that is not full is then given, too.

        Returns:
            A table of ``input_ids``; ``word_start``, 0 or 1 for each token, with ``words``; and for rows of
            ``"documents"`` ``row``, the document's number.
        """
        import pyarrow as pa

        documents = [(n, tokens) for n, tokens in zip(numbers, self._tokens(texts), strict=True) if tokens.shape[1]]
        if self.rows == "documents":
            cut = [(n, piece) for n, tokens in documents for piece in self._cut(tokens)]
            return self._table([piece for _, piece in cut]).append_column(
                "row", pa.array([n for n, _ in cut], pa.int64())
            )
        return self._table(self._chunks([tokens for _, tokens in documents], last))

    def _chunks(self, documents: list[np.ndarray], last: bool) -> list[np.ndarray]:
        import numpy as np

        if documents and self._skip:
            documents[0] = documents[0][:, self._skip :]
            self._skip = 0
        pieces = self._cut(np.concatenate([self._rest, *documents], axis=1))
        self._rest = self._rest[:, :0]
        if pieces and not last and pieces[-1].shape[1] < self._width:
            self._rest = pieces.pop()
        return pieces

    def _cut(self, tokens: np.ndarray) -> list[np.ndarray]:
        return [tokens[:, start : start + self._width] for start in range(0, tokens.shape[1], self._width)]

    def _tokens(self, texts: Sequence[str]) -> Iterable[np.ndarray]:
        """Each document's tokens in its frame: ``(1, tokens)``, or ``(2, tokens)`` with word starts."""
        import numpy as np

        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for index, ids in enumerate(encoded["input_ids"]):
            tokens = np.array([ids], dtype=np.int32)
            if self.words:
                # -1 for what belongs to no word: a special token that stands in the text.
                word = np.array([-1 if w is None else w for w in encoded.word_ids(index)], dtype=np.int64)
                tokens = np.concatenate([tokens, self._starts(word, tokens[0])[None]])
            yield np.concatenate([self._document_frame[0], tokens, self._document_frame[1]], axis=1) if ids else tokens

    def _starts(self, word: np.ndarray, ids: np.ndarray) -> np.ndarray:
        import numpy as np

        starts = np.ones(len(word), dtype=np.int32)
        alone = self._punctuation[ids]
        starts[1:] = (word[1:] != word[:-1]) | alone[1:] | alone[:-1]
        return starts

    @cached_property
    def _punctuation(self) -> np.ndarray:
        """Of each token id, whether it is punctuation or symbols alone."""
        import numpy as np

        vocabulary = self.tokenizer.get_vocab()
        table = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
        for token, index in vocabulary.items():
            text = token.strip("▁")  # SentencePiece's space
            table[index] = bool(text) and all(unicodedata.category(sign)[0] in "PS" for sign in text)
        return table

    def _special(self, ids: Sequence[int]) -> np.ndarray:
        """Special tokens, each a word of its own."""
        import numpy as np

        return np.array([ids, [1] * len(ids)] if self.words else [ids], dtype=np.int32)

    def _table(self, pieces: list[np.ndarray]) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        before, after = self._row_frame
        framed = [np.concatenate([before, piece, after], axis=1) for piece in pieces]
        flat = np.concatenate([self._special([]), *framed], axis=1)
        ends = pa.array(np.cumsum([0, *(row.shape[1] for row in framed)]), pa.int32())
        kinds = {"input_ids": pa.int32(), WORD_START: pa.int8()}
        return pa.table(
            {
                name: pa.ListArray.from_arrays(ends, pa.array(values).cast(kind))
                for (name, kind), values in zip(kinds.items(), flat, strict=False)
            }
        )


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the end-of-sequence token.

    Raises:
        ValueError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, which objective='clm' puts "
            "between documents: use a decoder's tokenizer, or add an eos_token to its files"
        )
    return int(tokenizer.eos_token_id)
