"""Data for masked and causal language modelling."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ft.core.special_tokens import around
from lightning_ft.data.base import Rows, TextData
from lightning_ft.data.chunks import Objective, RowCutter, RowKind
from lightning_ft.data.curriculum import Curriculum
from lightning_ft.data.encoding import EncodedRows, encode_once
from lightning_ft.data.masking import LabelledRows, Labeller, Masking, next_token_labels
from lightning_ft.data.sources import Source
from lightning_ft.data.streaming import StreamedBatches, StreamLoader, open_stream

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset


class LanguageModelingData(TextData):
    """Unlabelled texts for masked (mlm) or causal (clm) language modelling; tokenised once, resumable.

    A batch is a dictionary of ``input_ids``, ``attention_mask``, ``labels``, all ``(batch, width)``, and ``row``
    ``(batch,)``: the chunk's number, or the document's number in its source. Labels are -100 where nothing is to be
    learnt: on all tokens that are not masked (mlm), on padding (clm; the model compares each label with the token
    before it). No text is lost: what does not fit into one row goes on in the next, and the short rest of all chunks is
    a row, too.

    Masks depend on ``seed``, the epoch and the row alone (see `Masking`): not on batch size, order, workers, or
    whether the run was resumed. Validation and test have the same masks in every epoch. With ``streaming``, ``row`` is
    a row's place among those that all processes and workers read in a round, and masks depend on that place: with
    other numbers of processes or workers, or another ``shuffle_buffer``, a text gets other ones.

    Rows to predict are whole texts, one a row, without labels: for mlm texts that hold the tokenizer's mask token, cut
    at ``max_length`` where no mask is lost; for clm the beginnings that the model continues, padded on the left.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``.
        train: Training texts: a file, a ``hub://`` address or a ``datasets.Dataset``, see `read_source`; with
            ``streaming`` see `open_stream`.
        val: Validation texts.
        test: Test texts.
        predict: Texts to complete.
        text: Column of the text. Empty texts are left out.
        objective: ``"mlm"``, for encoders, or ``"clm"``, for decoders.
        rows: ``"chunks"``: texts one after another, cut into rows of ``max_length`` tokens: no padding.
            ``"documents"``: each text begins a row of its own. See `RowCutter`.
        mask_probability: Share of tokens that the model must tell (mlm).
        mask_token_share: Share of these that become the mask token.
        random_token_share: Share of these that become a random token. The rest stays.
        whole_words: Choose whole words, not tokens. The tokenizer must be a fast one.
        streaming: Read ``train`` as it is needed, for texts larger than the memory or the disk. The stream has no
            end: set ``Trainer(max_steps=...)``. A resumed run reads, and throws away, what was trained on.
        shuffle_buffer: Texts of a stream that are drawn from at random.
        max_length: Tokens of a row, special ones among them.
        batch_size: Rows of a training batch on one process.
        eval_batch_size: Rows of another batch; by default ``batch_size``.
        bucket: Batch rows of similar length in training. If false, batches are drawn at random.
        seed: Seed of the training order, of the masks and of ``val_fraction``.
        num_workers: Worker processes of each loader. Few are needed, except for streaming, where they tokenise.
        val_fraction: Without ``val``, the share of ``train``'s texts that becomes it.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        curriculum: Train on easy rows first, see `Curriculum`; not with ``streaming``. Difficulty by a column needs
            ``rows="documents"``.
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.

    Raises:
        ValueError: Arguments that contradict each other; later, data that is at fault, with its file and line.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"text": ["a film", "a story"]})
        >>> LanguageModelingData("bert-base-uncased", train=rows, objective="mlm", max_length=512).rows
        'chunks'
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | Dataset | IterableDataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        text: str = "text",
        objective: Objective = "mlm",
        rows: RowKind = "chunks",
        mask_probability: float = 0.15,
        mask_token_share: float = 0.8,
        random_token_share: float = 0.1,
        whole_words: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        bucket: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        val_fraction: float | None = None,
        pad_to_multiple_of: int = 1,
        curriculum: Curriculum | None = None,
        id: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if streaming and (train is None or val_fraction is not None):
            raise ValueError("streaming=True reads train as it goes: give train, and val in place of val_fraction")
        if not streaming and hasattr(train, "take") and not hasattr(train, "__len__"):
            raise TypeError(f"train is a stream ({type(train).__name__}): set streaming=True")
        super().__init__(
            tokenizer,
            {"train": None if streaming else train, "val": val, "test": test, "predict": predict},
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            bucket=bucket,
            seed=seed,
            num_workers=num_workers,
            val_fraction=val_fraction,
            pad_to_multiple_of=pad_to_multiple_of,
            curriculum=curriculum,
            id=id,
            trust_remote_code=trust_remote_code,
        )
        for name, value, known in (("objective", objective, Objective), ("rows", rows, RowKind)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability={mask_probability} must lie between 0 and 1; 0.15 is usual")
        if min(mask_token_share, random_token_share) < 0 or mask_token_share + random_token_share > 1:
            raise ValueError(
                f"mask_token_share={mask_token_share} and random_token_share={random_token_share} are shares of the "
                "masked tokens: they must be 0 or more, and 1 or less together"
            )
        if whole_words and objective != "mlm":
            raise ValueError("whole_words=True is a way of masking, and objective='clm' masks nothing: leave it out")
        if streaming and curriculum is not None:
            raise ValueError("curriculum sorts all rows by difficulty, and streaming=True never has them all")
        if rows == "chunks" and curriculum is not None and curriculum.column is not None:
            raise ValueError(
                f"curriculum: a chunk holds parts of several texts, so the column {curriculum.column!r} does not tell "
                'its difficulty: set rows="documents", or difficulty="rarity"'
            )
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} must be 1 (no shuffling) or more")
        self.text = text
        self.objective: Objective = objective
        self.rows: RowKind = rows
        self.mask_probability = mask_probability
        self.mask_token_share = mask_token_share
        self.random_token_share = random_token_share
        self.whole_words = whole_words
        self.shuffle_buffer = shuffle_buffer
        self._streamed = train if streaming else None

    @override
    def columns(self, split: str) -> list[str]:
        return [self.text]

    @override
    def prepare(self, split: str) -> None:
        self._prompts() if split == "predict" else self._tokens(split)

    @override
    def encode(self, split: str) -> Rows:
        if split == "predict":
            # A model continues what stands at the right end.
            padding = replace(self.padding, left=True) if self.objective == "clm" else self.padding
            return EncodedRows(self._prompts(), padding)
        return LabelledRows(EncodedRows(self._tokens(split), self.padding), self._label, redraw=split == "train")

    @override
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"objective": self.objective, "rows": self.rows}
        return facts | ({"train": "streamed"} if self._streamed is not None else {})

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of similar length in a shuffled order, resumable; of a stream, without end."""
        if self._streamed is None:
            return super().train_dataloader()
        ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        batches = StreamedBatches(
            open_stream(self._streamed, self.text, max(self.num_workers, 1) * ranks[1]),
            self.text,
            self._cutter,
            self._label,
            self.padding,
            batch_size=self.batch_size,
            bucket=self.bucket,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            rank=ranks[0],
            num_replicas=ranks[1],
            name=str(self._streamed) if isinstance(self._streamed, str) else "train (the given stream)",
        )
        loader = StreamLoader(batches, trainer=self.trainer, num_workers=self.num_workers, pin_memory=self._pin_memory)
        loader.check_trainer(validates="val" in self._rows)
        if self._restored:
            loader.load_state_dict(self._restored)
            self._restored = {}
        self._train_loader = loader
        return loader

    # ---- parts

    @override
    def _difficulty(self, rows: Rows, curriculum: Curriculum) -> Tensor:
        return super()._difficulty(rows.inner if isinstance(rows, LabelledRows) else rows, curriculum)

    @cached_property
    def _label(self) -> Labeller:
        if self.objective == "clm":
            return next_token_labels
        return Masking(
            self.tokenizer,
            probability=self.mask_probability,
            mask_share=self.mask_token_share,
            random_share=self.random_token_share,
            seed=self.seed,
        )

    def _cutter(self) -> RowCutter:
        return RowCutter(self.tokenizer, self.objective, self.rows, self.max_length, words=self.whole_words)

    def _tokens(self, split: str) -> Dataset:
        _ = self._label  # a tokenizer without a mask token is refused before it has tokenised
        source, part = self.source(split), self.part(split)
        texts = source.texts(self.text)
        numbers = list(range(len(source))) if part is None else part.tolist()
        if part is not None:
            texts = texts.take(part.numpy())
        cutter = self._cutter()

        def encode(batch: dict[str, list[str]], rows: list[int]) -> pa.Table:
            last = rows[-1] == len(numbers) - 1
            return cutter(batch[self.text], [numbers[row] for row in rows], last=last)

        # `row` is the number in the source, which the texts of a part do not tell.
        settings = ["rows", self.objective, self.rows, self.max_length, self.whole_words, numbers]
        tokens = _encode(source, self.text, texts, encode, self, settings)
        if not len(tokens):
            raise ValueError(f"{source.name}: column {self.text!r} holds only empty texts")
        return tokens

    def _prompts(self) -> Dataset:
        _ = self._label
        source = self.source("predict")
        before, after = around(self.tokenizer)
        after = after if self.objective == "mlm" else []  # the text goes on
        room = self.max_length - len(before) - len(after)
        if room < 1:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for text beside the special tokens: raise it"
            )

        def encode(batch: dict[str, list[str]], rows: list[int]) -> dict[str, list[Any]]:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            texts: list[list[int]] = self.tokenizer(batch[self.text], **options)["input_ids"]
            for row, ids in zip(rows, texts, strict=True):
                self._check_prompt(source, row, ids, len(before), room)
            return {
                "input_ids": [[*before, *ids[:room], *after] for ids in texts],
                "truncated": [len(ids) > room for ids in texts],
            }

        texts = source.texts(self.text)
        return _encode(source, self.text, texts, encode, self, ["prompts", self.objective, self.max_length])

    def _check_prompt(self, source: Source, row: int, ids: list[int], before: int, room: int) -> None:
        if self.objective == "clm" and not 0 < before + len(ids) <= before + room:
            raise ValueError(
                f"{source.where(row)}: the text to continue has {before + len(ids)} tokens; it must have 1 to "
                f"max_length={self.max_length}"
            )
        if self.objective == "mlm" and self.tokenizer.mask_token_id in ids[room:]:
            place = room + ids[room:].index(self.tokenizer.mask_token_id)
            raise ValueError(
                f"{source.where(row)}: a mask token stands at token {place} (from 0), past max_length="
                f"{self.max_length}: shorten the text before it, or raise max_length"
            )


def _encode(
    source: Source, column: str, texts: pa.ChunkedArray, encode: Any, data: TextData, settings: list[Any]
) -> Dataset:
    import pyarrow as pa

    return encode_once(
        pa.table({column: texts}),
        encode,
        data.tokenizer,
        ["language modeling", *settings],
        f"Tokenising {source.name}",
        with_rows=True,
    )
