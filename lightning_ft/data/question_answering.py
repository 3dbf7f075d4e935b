"""Data for extractive question answering: windows over contexts, with the answers' tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ft.data.base import Rows, TextData
from lightning_ft.data.context_windows import ContextWindows
from lightning_ft.data.curriculum import Curriculum
from lightning_ft.data.encoding import EncodedRows, Padding, encode_once
from lightning_ft.data.sources import Source
from lightning_ft.data.squad import Answers, read_answers, read_squad
from lightning_ft.data.windows import WindowRows, source_rows, windows_of

if TYPE_CHECKING:
    from datasets import Dataset


class QuestionAnsweringData(TextData):
    """Questions about contexts, with the answers' places in them; long contexts as overlapping windows.

    Rows are those of SQuAD 1.1 and 2.0: ``answers`` holds ``{"text": [...], "answer_start": [...]}``, or a list of
    ``{"text": ..., "answer_start": ...}``; character offsets count from 0, and empty lists mean that the context does
    not answer the question. A file ``.json`` (or ``.json.gz``) is read as an official SQuAD file, with the columns
    ``id``, ``title``, ``context``, ``question`` and ``answers``.

    A training batch is windows: ``input_ids``, ``attention_mask``, ``token_type_ids`` (where the tokenizer makes them),
    ``start_positions`` and ``end_positions``, the first and last token of the first answer, and ``row``, all
    ``(windows,)`` or ``(windows, width)``. A window that does not hold the whole answer is labelled with its CLS token
    in both; where the tokenizer makes no CLS (GPT-2, Llama, T5), with the first token that is not the context's.

    Other batches hold all windows of their rows and in addition ``example`` ``(windows,)``, the row of the batch that a
    window belongs to; ``cls`` ``(windows,)``, the position that stands for no answer; ``char_starts`` and
    ``char_ends`` ``(windows, width)``, the characters of the context, without white space, that a token stands for,
    both 0 outside the context; and the lists ``context`` and, but for prediction, ``answers`` (the texts of each row).
    ``row`` is ``(rows,)`` in them. Batches are padded on the right whatever the tokenizer does elsewhere.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``; one of the fast kind. One without a pad token pads with
            its end-of-sequence token.
        train: Training rows: a file, a ``hub://`` address or a ``datasets.Dataset``, see `read_source`; or an official
            SQuAD file.
        val: Validation rows.
        test: Test rows.
        predict: Rows to predict; they need no answers.
        question: Column of the question.
        context: Column of the text that answers are parts of.
        answers: Column of the answers.
        max_length: Tokens of a window, question included.
        stride: Tokens of the context that neighbouring windows share; no shorter than the longest answer.
        context_first: Put the context before the question, as published XLNet models expect. A decoder would then read
            the context without knowing the question.
        batch_size: Windows of a training batch on one process.
        eval_batch_size: Rows of another batch, which holds all their windows; by default ``batch_size``.
        bucket: Batch windows of similar length in training. If false, batches are drawn at random.
        seed: Seed of the training order and of ``val_fraction``.
        num_workers: Worker processes of each loader. Few are needed: a batch is two array operations.
        val_fraction: Without ``val``, the share of ``train`` that becomes it, of the rows with and without an answer in
            proportion. Questions about one context can fall on both sides: give ``val`` to measure on new contexts.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.
        curriculum: Train on easy rows first, see `Curriculum`.

    Raises:
        ValueError: Arguments that contradict each other; later, data that is at fault, with its file and line.

    Example:
        >>> from datasets import Dataset
        >>> answers = [{"text": ["Paris"], "answer_start": [10]}, {"text": [], "answer_start": []}]
        >>> rows = {"question": ["Where?", "When?"], "context": ["It was in Paris."] * 2, "answers": answers}
        >>> data = QuestionAnsweringData("bert-base-uncased", train=Dataset.from_dict(rows))
        >>> data.strata().tolist()  # which rows have an answer
        [1, 0]
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        max_length: int = 384,
        stride: int = 128,
        context_first: bool = False,
        batch_size: int = 32,
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
        if len({question, context, answers}) < 3:
            raise ValueError(
                f"question, context and answers must be different columns, got {question!r}, {context!r}, {answers!r}"
            )
        if not 0 <= stride < max_length:
            raise ValueError(f"stride={stride} must be 0 or more and below max_length={max_length}: windows share it")
        self.question = question
        self.context = context
        self.answers = answers
        self.stride = stride
        self.context_first = context_first
        self._files: dict[str, str] = {}
        self._gold: dict[str, Answers] = {}

    @property
    @override
    def padding(self) -> Padding:
        # On the right also where a tokenizer pads on the left: that is for generating, and decoders count their
        # positions from the left.
        return replace(super().padding, left=False)

    @override
    def columns(self, split: str) -> list[str]:
        return [self.question, self.context] if split == "predict" else [self.question, self.context, self.answers]

    @override
    def source(self, split: str) -> Source:
        split = self.home(split)
        given = self.sources[split]
        if isinstance(given, str) and given.endswith((".json", ".json.gz")):
            self._files[split], self.sources[split] = given, read_squad(Path(given))
        return super().source(split)

    @override
    def source_name(self, split: str) -> str:
        return self._files.get(split) or super().source_name(split)

    @override
    def prepare(self, split: str) -> None:
        self._windows(split)

    @override
    def encode(self, split: str) -> Rows:
        table = self._windows(split)
        windows = EncodedRows(table, self.padding, rows=windows_of(table, self.part(split)))
        if split == "train":
            return windows
        columns = {"context": self.source(split).table[self.context].to_pylist()}
        if split != "predict":
            columns["answers"] = self._answers(split).texts
        return WindowRows(windows, columns)

    @override
    def strata(self) -> Tensor:
        return torch.tensor(self._answers("train").starts).ge(0).long()

    @override
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"stride": self.stride}
        if "train" in self._rows:
            windows = self.need("train")
            of = source_rows(windows.tokens)[windows.rows]
            questions = torch.unique(of)
            answered = int(self.strata()[questions].sum())
            starts, cls = (torch.tensor(windows.tokens.data[n].to_numpy()) for n in ("start_positions", "cls"))
            held = len(torch.unique(of[(starts != cls)[windows.rows]]))
            facts |= {
                "training questions": len(questions),
                "without an answer": len(questions) - answered,
                "whose answer is longer than fits a window": answered - held,
            }
        return facts

    def _answers(self, split: str) -> Answers:
        split = self.home(split)
        if split not in self._gold:
            self._gold[split] = read_answers(self.source(split), self.answers, self.context)
        return self._gold[split]

    def _windows(self, split: str) -> Dataset:
        import pyarrow as pa

        source = self.source(split)
        table = pa.table({"question": source.texts(self.question), "context": source.texts(self.context)})
        if split != "predict":
            answers = self._answers(split)
            table = table.append_column("start", pa.array(answers.starts))
            table = table.append_column("end", pa.array(answers.ends))
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {self.tokenizer_name!r} does not tell which characters its tokens stand for: answers "
                "need a fast one (tokenizer.json)"
            )
        offsets = split != "train"
        windows = ContextWindows(source, self.tokenizer, self.max_length, self.stride, self.context_first, offsets)
        settings = ["question answering", self.max_length, self.stride, self.context_first, offsets]
        return encode_once(table, windows, self.tokenizer, settings, f"Tokenising {source.name}", with_rows=True)
