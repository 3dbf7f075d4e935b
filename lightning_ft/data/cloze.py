"""Texts put into patterns with a gap, whose filling says the label; with demonstrations where wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ft.core.counter_random import random_key
from lightning_ft.core.pattern import encode_pattern, parse_patterns
from lightning_ft.core.special_tokens import around
from lightning_ft.core.verbaliser import is_decoder, parse_verbalizer, word_tokens
from lightning_ft.data.base import Rows, TextData
from lightning_ft.data.cloze_rows import Demonstrations, EvaluationRows, MaskedTexts, TrainRows
from lightning_ft.data.curriculum import Curriculum
from lightning_ft.data.encoding import EncodedRows, encode_once, token_counts
from lightning_ft.data.labels import encode_labels, read_labels
from lightning_ft.data.masking import Masking
from lightning_ft.data.sources import first_true
from lightning_ft.data.windows import source_rows, windows_of
from lightning_ft.functional.cloze_windows import Contexts, Frame, cloze_windows, content_free

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


class ClozeData(TextData):
    """Texts in patterns such as ``"{text} It was {mask} ."``, whose gap the label's words fill.

    For masked language models (PET, LM-BFF) and, where the tokenizer has no mask token, for decoders, whose patterns
    end in the gap. A text too long for ``max_length`` loses its end; pattern and gap stay whole.

    In training every row under every pattern is an item of its own. In validation, test and prediction a batch holds
    all patterns (and all draws of demonstrations) of its rows: ``batch_size`` counts rows, and each is
    ``len(patterns) * demonstration_draws`` windows.

    A batch is a dictionary of ``input_ids``, ``attention_mask``, ``token_type_ids`` (where the tokenizer makes them)
    and ``mask_positions`` (1 where the logits of the gap lie), all ``(windows, width)``; ``pattern``, its number, and
    ``labels``: ``(windows,)``. In evaluation ``row`` is ``(rows,)`` and ``example`` ``(windows,)``; the windows of a
    row stand together, draw by draw and in each pattern by pattern. ``content_free`` (with ``calibrate``) and
    ``unlabelled`` (in training, with ``unlabelled``) are batches in the batch, the latter masked at random, with
    ``labels`` to restore.

    Demonstrations (LM-BFF) are training rows with their label's first word in the gap, ``demonstrations`` of each
    label: after the row for a masked model, before it for a decoder (in-context learning). In training they are drawn
    anew for each row, pattern and epoch. In evaluation ``demonstration_draws`` sets serve all rows alike, so that
    calibration can tell what each set prefers; LM-BFF draws sets for each row, and near it in meaning. A demonstration
    has ``max_length / (1 + demonstrations * labels)`` tokens at most, the row has the rest.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``; a fast one.
        train: Training rows: a file, a ``hub://`` address or a ``datasets.Dataset``, see `read_source`.
        val: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        patterns: One pattern or several, see :class:`~lightning_ft.core.pattern.Pattern`.
        verbalizer: The word or words of each label; the order of labels is the order of their numbers.
        label: Column of the label.
        decoder: Whether the model is a decoder; by default, whether the tokenizer has no mask token.
        demonstrations: Rows of each label to show beside a row.
        demonstration_draws: Sets of demonstrations whose results are averaged in evaluation.
        calibrate: Give evaluation batches the inputs without content that calibration needs.
        unlabelled: Rows (of the same columns, without labels) for the auxiliary masked language modelling loss.
        max_length: Tokens kept of a row.
        batch_size: Rows of a training batch on one process.
        eval_batch_size: Rows of another batch; by default ``batch_size``.
        bucket: Batch rows of similar length in training. If false, batches are drawn at random.
        seed: Seed of the training order, of ``val_fraction``, and of demonstrations and masks.
        num_workers: Worker processes of each loader. Few are needed: a batch is two array operations.
        val_fraction: Without ``val``, the share of ``train`` that becomes it; each class in proportion.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.
        curriculum: Train on easy rows first, see `Curriculum`.

    Raises:
        ValueError: Arguments that contradict each other; later, words that are no tokens, or data that is at fault,
            with its file and line.

    Example:
        >>> words = {"pos": "great", "neg": ["terrible", "dull"]}
        >>> ClozeData("bert-base-uncased", patterns="{text} It was {mask} .", verbalizer=words).labels
        ['pos', 'neg']

    Reference:
        Schick and Schütze 2021, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language
        Inference"; Gao, Fisch and Chen 2021, "Making Pre-trained Language Models Better Few-shot Learners".
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        patterns: str | Sequence[str],
        verbalizer: Mapping[str, str | Sequence[str]],
        label: str = "label",
        decoder: bool | None = None,
        demonstrations: int = 0,
        demonstration_draws: int = 16,
        calibrate: bool = False,
        unlabelled: str | Dataset | None = None,
        max_length: int = 128,
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
            {"train": train, "val": val, "test": test, "predict": predict, "unlabelled": unlabelled},
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
        self.patterns = parse_patterns(patterns)
        self.verbalizer = parse_verbalizer(verbalizer)
        self.texts = list(dict.fromkeys(column for pattern in self.patterns for column in pattern.columns))
        if label in self.texts:
            raise ValueError(f"label={label!r} is a column that a pattern shows: the gap must not be told its filling")
        if demonstrations < 0 or demonstration_draws < 1:
            raise ValueError(
                f"demonstrations must be 0 or more and demonstration_draws 1 or more, got {demonstrations} and "
                f"{demonstration_draws}"
            )
        if demonstrations and train is None:
            raise ValueError(f"demonstrations={demonstrations} are rows of train: give train=...")
        self.label = label
        self.demonstrations = demonstrations
        self.demonstration_draws = demonstration_draws
        self.calibrate = calibrate
        self._decoder = decoder

    @property
    def labels(self) -> list[str]:
        """Names of the labels, in the order of their numbers."""
        return list(self.verbalizer)

    @cached_property
    def decoder(self) -> bool:
        """Whether the gap is the next token, and not a mask. Also checks that every word is a token."""
        decoder = is_decoder(self.tokenizer, self.patterns, self._decoder)
        for pattern in self.patterns:
            word_tokens(self.verbalizer, pattern, self.tokenizer, decoder=decoder)
        if decoder and self.sources["unlabelled"] is not None:
            raise ValueError("unlabelled texts are masked, which a decoder does not learn from: leave unlabelled out")
        return decoder

    @override
    def columns(self, split: str) -> list[str]:
        return self.texts if split in ("predict", "unlabelled") else [*self.texts, self.label]

    @override
    def encode(self, split: str) -> Rows:
        tokens = self._windows(split, [] if split == "train" else self._contexts)
        labels = None if split == "predict" else self._encoded_labels(split).take(source_rows(tokens).numpy())
        windows = EncodedRows(tokens, self.padding, labels=labels, rows=windows_of(tokens, self.part(split)))
        if split != "train":
            return EvaluationRows(windows, self._content_free() if self.calibrate else None)
        unlabelled = self._unlabelled() if self.sources["unlabelled"] is not None else None
        if not self.demonstrations and unlabelled is None:
            return windows
        shown = self._pool if self.demonstrations else None
        return TrainRows(windows, self._frame, self.seed, demonstrations=shown, unlabelled=unlabelled)

    @override
    def rarity(self, rows: Rows) -> Tensor:
        return super().rarity(rows.queries if isinstance(rows, TrainRows) else rows)

    @override
    def prediction_identity(self) -> str:
        """Changes when the rows to predict, their tokens, or the words do."""
        from datasets.fingerprint import Hasher

        return str(Hasher.hash([super().prediction_identity(), self._settings, self._contexts]))

    @override
    def strata(self) -> Tensor | None:
        return torch.tensor(self._encoded_labels("train").to_pylist())

    @override
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "patterns": [pattern.template for pattern in self.patterns],
            "words": self.verbalizer,
            "model": "decoder" if self.decoder else "masked",
        }
        if "train" in self._rows:
            rows = torch.arange(len(self.source("train"))) if (part := self.part("train")) is None else part
            classes = torch.tensor(self._encoded_labels("train").to_pylist())[rows]
            facts["labels"] = dict(
                zip(self.labels, torch.bincount(classes, minlength=len(self.labels)).tolist(), strict=True)
            )
        return facts

    def evaluation_contexts(self) -> tuple[Contexts, int]:
        """The demonstrations of evaluation, ``[draw][pattern][demonstration][token]``, and the tokens kept for them."""
        return self._contexts, self._shown * self._demonstration_room

    # ---- parts

    @cached_property
    def _frame(self) -> Frame:
        before, after = around(self.tokenizer)
        if self.decoder:  # what ends a text would end the prompt; demonstrations stand apart by a blank line
            after = self.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        return Frame(before, after, self.decoder)

    @property
    def _shown(self) -> int:
        return self.demonstrations * len(self.verbalizer)

    @property
    def _demonstration_room(self) -> int:
        """Tokens of a demonstration, with those that end it."""
        return self.max_length // (1 + self._shown)

    @property
    def _settings(self) -> list[Any]:
        return [[p.template for p in self.patterns], self.verbalizer, self.decoder, self.max_length, self._shown]

    def _windows(self, split: str, contexts: Contexts) -> Dataset:
        """The rows of a split under every pattern and in every context, framed."""
        import pyarrow as pa

        source = self.source(split)
        table = pa.table({column: source.texts(column) for column in self.texts})
        tokens = encode_once(
            table,
            lambda batch, rows: self._framed(batch, rows, contexts),
            self.tokenizer,
            ["cloze", *self._settings, contexts],
            f"Tokenising {source.name}",
            with_rows=True,
        )
        if (window := first_true(pa.array((token_counts(tokens) == 0).numpy()))) is not None:
            raise ValueError(
                f"{source.where(int(source_rows(tokens)[window]))}: nothing stands before {{mask}} for a decoder to go "
                "on from: let the pattern begin with a word, or remove the row"
            )
        return tokens

    def _framed(self, batch: Mapping[str, Sequence[str]], rows: Sequence[int], contexts: Contexts) -> dict[str, Any]:
        room = self.max_length - self._shown * self._demonstration_room - len(self._frame.before)
        room -= 0 if self.decoder else len(self._frame.after)
        out = cloze_windows(
            *(self.patterns, self.tokenizer, self._frame, batch, rows),
            room=room,
            word=next(iter(self.verbalizer.values()))[0],
            contexts=contexts,
        )
        if "token_type_ids" in self.tokenizer.model_input_names:
            out["token_type_ids"] = [[0] * len(ids) for ids in out["input_ids"]]
        return out

    @cached_property
    def _pool(self) -> Demonstrations:
        """The training rows as demonstrations."""
        import pyarrow as pa

        source, labels = self.source("train"), self._encoded_labels("train")
        room = self._demonstration_room - len(self._frame.after)
        words = [given[0] for given in self.verbalizer.values()]

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            said = [words[number] for number in batch["labels"]]
            filled = [encode_pattern(pattern, self.tokenizer, batch, room, words=said) for pattern in self.patterns]
            return {"input_ids": [body.ids for bodies in zip(*filled, strict=True) for body in bodies]}

        table = pa.table({**{column: source.texts(column) for column in self.texts}, "labels": labels})
        settings = ["cloze demonstrations", *self._settings]
        return Demonstrations(
            encode_once(table, encode, self.tokenizer, settings, f"Tokenising demonstrations of {source.name}"),
            torch.tensor(labels.to_pylist()),
            torch.arange(len(source)) if (part := self.part("train")) is None else part,
            patterns=len(self.patterns),
            per_label=self.demonstrations,
            names=self.labels,
        )

    @cached_property
    def _contexts(self) -> Contexts:
        """The demonstrations of evaluation; no context at all without them."""
        if not self.demonstrations:
            return []
        keys = [random_key(self.seed, 0, draw) for draw in range(self.demonstration_draws)]
        return [[self._pool.draw(key, pattern) for pattern in range(len(self.patterns))] for key in keys]

    def _content_free(self) -> dict[str, Any]:
        """A batch of inputs without content, in every context: those of Zhao et al. 2021."""
        from datasets import Dataset

        texts = content_free(self.tokenizer.mask_token)
        rows = Dataset.from_dict(self._framed(dict.fromkeys(self.texts, texts), range(len(texts)), self._contexts))
        if not all(rows["input_ids"]):
            raise ValueError("calibrate shows the model an empty text: let every pattern begin with a word")
        batch = EncodedRows(rows, self.padding)[range(len(rows))]
        del batch["row"]
        return batch

    def _unlabelled(self) -> MaskedTexts:
        texts = EncodedRows(self._windows("unlabelled", []), self.padding)
        return MaskedTexts(texts, Masking(self.tokenizer, seed=self.seed))

    def _encoded_labels(self, split: str) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        source = self.source(split)
        values = read_labels(source, self.label, "single_label")
        if (row := first_true(pc.invert(pc.is_in(values, pa.array(self.labels, values.type))))) is not None:
            raise ValueError(
                f"{source.where(row)}: the verbalizer gives no word for the label {values[row].as_py()!r} of column "
                f"{self.label!r}; it has {', '.join(map(repr, self.labels))}: add a word, or correct the row"
            )
        return encode_labels(source, self.label, values, self.labels)
