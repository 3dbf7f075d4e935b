"""Data for text-to-text models: sources with targets, or plain text with spans taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor
from typing_extensions import override

from lightning_ft.data.base import Rows, TextData
from lightning_ft.data.curriculum import Curriculum
from lightning_ft.data.encoding import EncodedRows, Padding, encode_once, tokenize
from lightning_ft.data.sources import Source, first_true, is_list, is_text
from lightning_ft.data.target_rows import IGNORED, CorruptedRows, TargetRows
from lightning_ft.data.windows import windows_of
from lightning_ft.functional.span_corruption import corrupted_lengths, raw_length, sentinel_ids

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Objective = Literal["text_to_text", "span_corruption"]


class Seq2SeqData(TextData):
    """Source texts with target texts, or plain texts for T5's span corruption; tokenised once, resumable.

    A batch is a dictionary of ``input_ids`` and ``attention_mask``, ``(batch, width)``; ``labels``, the target's tokens
    with -100 on padding, ``(batch, target width)``; and ``row``, the row's number in its source, from 0. Validation and
    test have ``references``, too: the texts, uncut, that a generated one is measured by, a list for each row.

    With ``objective="span_corruption"``, for going on with T5's pretraining, ``source`` is the column of the texts.
    None is lost: a long one is cut into pieces of about the same length, of which inputs of at most ``max_length`` are
    made. What is taken out depends on ``seed``, the epoch and the row alone, and is the same in every validation. Rows
    to predict are read as they are, with the sentinels that they hold.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``.
        train: Training rows: a file, a ``hub://`` address or a ``datasets.Dataset``, see `read_source`.
        val: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        source: Column of the source text. A dot goes into a column of records: ``"translation.en"``.
        target: Column of the target text, likewise.
        references: Column of lists of texts to measure by, in validation and test; by default the target.
        prefix: What is put before each source, such as ``"summarize: "`` for T5.
        source_language: Code of the sources' language, for tokenizers of many languages (``"eng_Latn"`` for NLLB).
        target_language: Code of the targets' language.
        objective: ``"text_to_text"`` or ``"span_corruption"``.
        noise: Share of tokens in spans (span corruption).
        mean_span: Mean length of a span, in tokens (span corruption).
        max_length: Tokens kept of a source.
        max_target_length: Tokens kept of a target. What is cut, its end, is not learnt.
        batch_size: Rows of a training batch on one process.
        eval_batch_size: Rows of another batch; by default ``batch_size``.
        bucket: Batch rows of similar length (source or target, the longer) in training. If false, batches are drawn at
            random.
        seed: Seed of the training order, of the spans and of ``val_fraction``.
        num_workers: Worker processes of each loader. Few are needed.
        val_fraction: Without ``val``, the share of ``train`` that becomes it.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.
        curriculum: Train on easy rows first, see `Curriculum`.

    Raises:
        ValueError: Arguments that contradict each other; later, data that is at fault, with its file and line.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"article": ["A long text."], "summary": ["Short."]})
        >>> data = Seq2SeqData("google-t5/t5-small", rows, source="article", target="summary", prefix="summarize: ")
        >>> data.columns("train"), data.columns("predict")
        (['article', 'summary'], ['article'])
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        source: str = "source",
        target: str = "target",
        references: str | None = None,
        prefix: str = "",
        source_language: str | None = None,
        target_language: str | None = None,
        objective: Objective = "text_to_text",
        noise: float = 0.15,
        mean_span: float = 3.0,
        max_length: int = 512,
        max_target_length: int = 128,
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
        if objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {get_args(Objective)}, got {objective!r}")
        if objective == "span_corruption" and (prefix or references):
            raise ValueError("objective='span_corruption' makes targets of the texts: leave prefix and references out")
        if objective == "text_to_text" and source == target:
            raise ValueError(f"source and target must be different columns, got {source!r} for both")
        least, parts = (
            (3, "a sentinel, a token and the end") if objective == "span_corruption" else (2, "a token and the end")
        )
        if max_target_length < least:
            raise ValueError(f"max_target_length={max_target_length} must be {least} or more: {parts}")
        if max_length < 2 and objective == "span_corruption":
            raise ValueError(f"max_length={max_length} must be 2 or more: a sentinel and the end")
        self.source_column = source
        self.target = target
        self.references = references
        self.prefix = prefix
        self.source_language = source_language
        self.target_language = target_language
        self.objective: Objective = objective
        self.noise = noise
        self.mean_span = mean_span
        self.max_target_length = max_target_length

    @override
    def columns(self, split: str) -> list[str]:
        return list(dict.fromkeys(name.split(".")[0] for name in self._paths(split)))

    @override
    def source(self, split: str) -> Source:
        """The table of a split's source, read once; with a column for each dotted name."""
        home = self.home(split)
        if home not in self._read:
            self._read[home] = _with_fields(super().source(home), self._paths(home))
        return self._read[home]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, set to the languages, loaded on first use."""
        from transformers import AutoTokenizer

        given = {"src_lang": self.source_language, "tgt_lang": self.target_language}
        languages = {name: code for name, code in given.items() if code is not None}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.tokenizer_name, trust_remote_code=self.trust_remote_code, **languages
        )
        vocabulary = tokenizer.get_vocab() if languages else {}
        for code in languages.values():
            if not hasattr(type(tokenizer), "src_lang") or not {code, f"__{code}__"} & vocabulary.keys():
                raise ValueError(
                    f"the tokenizer {self.tokenizer_name!r} does not know the language {code!r}: give the code as it "
                    "spells it, or leave source_language and target_language out for a model of one pair"
                )
        return tokenizer

    @override
    def prepare(self, split: str) -> None:
        if self._corrupts(split):
            self._pieces(split)
        else:
            self._sources(split)
            if split != "predict":
                self._targets(split)

    @override
    def encode(self, split: str) -> Rows:
        if self._corrupts(split):
            pieces = self._pieces(split)
            return CorruptedRows(
                EncodedRows(pieces, self.padding, rows=windows_of(pieces, self.part(split))),
                sentinel_ids(self.tokenizer),
                self._end,
                noise=self.noise,
                mean_span=self.mean_span,
                seed=self.seed,
                redraw=split == "train",
            )
        sources = EncodedRows(self._sources(split), self.padding, rows=self.part(split))
        if split == "predict":
            return TargetRows(sources)
        padding = Padding(IGNORED, multiple=self.pad_to_multiple_of)  # on the right, where decoders have it
        targets = EncodedRows(self._targets(split), padding, rows=self.part(split))
        return TargetRows(sources, targets, None if split == "train" else self._references(split))

    @override
    def facts(self) -> dict[str, Any]:
        cut = {
            split: int(rows.targets.truncated.sum())
            for split, rows in self._rows.items()
            if isinstance(rows, TargetRows) and rows.targets is not None and rows.targets.truncated is not None
        }
        facts: dict[str, Any] = {"objective": self.objective, "max_target_length": self.max_target_length}
        return {**facts, "targets cut": cut} if cut else facts

    @override
    def rarity(self, rows: Rows) -> Tensor:
        return super().rarity(rows.sources if isinstance(rows, TargetRows) else getattr(rows, "texts", rows))

    # ---- parts

    def _corrupts(self, split: str) -> bool:
        return self.objective == "span_corruption" and split != "predict"

    def _paths(self, split: str) -> list[str]:
        """The columns of a split, dotted names in full."""
        if split == "predict" or self._corrupts(split):
            return [self.source_column]
        measured = split != "train" or self.val_fraction is not None
        return [self.source_column, self.target, *([self.references] if self.references and measured else [])]

    @property
    def _end(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer_name!r} has no end-of-sequence token: add one to its files"
            )
        return int(self.tokenizer.eos_token_id)

    def _sources(self, split: str) -> Dataset:
        import pyarrow.compute as pc

        source = self.source(split)
        texts = source.texts(self.source_column)
        if self.prefix:
            texts = pc.binary_join_element_wise(self.prefix, texts, "")
        return tokenize(_only(source, "source", texts), ["source"], self.tokenizer, self.max_length)

    def _targets(self, split: str) -> Dataset:
        import pyarrow.compute as pc

        source, longest, tokenizer = self.source(split), self.max_target_length, self.tokenizer
        texts = source.texts(self.target)
        if (row := first_true(pc.equal(pc.utf8_trim_whitespace(texts), ""))) is not None:
            raise ValueError(f"{source.where(row)}: column {self.target!r} is empty: give a target, or remove the row")

        if (special := tokenizer.num_special_tokens_to_add()) >= longest:
            raise ValueError(
                f"max_target_length={longest} leaves no room for text beside {special} special tokens: raise it"
            )

        def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
            ids = tokenizer(text_target=batch["target"], return_attention_mask=False, verbose=False)["input_ids"]
            cut = tokenizer(
                text_target=batch["target"], truncation=True, max_length=longest, return_attention_mask=False
            )["input_ids"]
            return {"input_ids": cut, "truncated": [len(row) > longest for row in ids]}

        table = _only(source, "target", texts).table
        settings = ["targets", longest, self.target_language]
        return encode_once(table, encode, tokenizer, settings, f"Tokenising targets of {source.name}")

    def _pieces(self, split: str) -> Dataset:
        """Texts without special tokens, in pieces that fit once their spans are sentinels."""
        _ = sentinel_ids(self.tokenizer), self._end  # a tokenizer without them is refused before it has tokenised
        longest = raw_length(self.max_length, noise=self.noise, mean_span=self.mean_span)
        while corrupted_lengths(longest, noise=self.noise, mean_span=self.mean_span)[1] > self.max_target_length:
            longest -= 1
        source, tokenizer = self.source(split), self.tokenizer

        def encode(batch: dict[str, list[str]], rows: list[int]) -> dict[str, list[Any]]:
            texts = tokenizer(batch["source"], add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            cut = [(row, piece) for row, ids in zip(rows, texts, strict=True) for piece in _even_pieces(ids, longest)]
            return {"input_ids": [piece for _, piece in cut], "row": [row for row, _ in cut]}

        table = _only(source, "source", source.texts(self.source_column)).table
        settings = ["span corruption", longest]
        pieces = encode_once(table, encode, tokenizer, settings, f"Tokenising {source.name}", with_rows=True)
        if not len(pieces):
            raise ValueError(f"{source.name}: column {self.source_column!r} holds only empty texts")
        return pieces

    def _references(self, split: str) -> pa.Array:
        """Lists of texts, by source row."""
        import pyarrow as pa
        import pyarrow.compute as pc

        source, column = self.source(split), self.references or self.target
        values = source.table[column].combine_chunks()
        if is_text(values.type):
            texts = source.texts(column).combine_chunks()
            return pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), texts)
        if not is_list(values.type) or not (
            is_text(values.type.value_type) or pa.types.is_null(values.type.value_type)
        ):
            raise TypeError(
                f"{source.where(0)}: column {column!r} must hold lists of texts, or texts, got {values[0].as_py()!r} "
                f"({values.type}): name another column as references"
            )
        counts = pc.fill_null(pc.list_value_length(values), 0)
        if (row := first_true(pc.equal(counts, 0))) is not None:
            raise ValueError(f"{source.where(row)}: column {column!r} has no text to measure by: give one or more")
        if (index := first_true(values.flatten().is_null())) is not None:
            row = pc.list_parent_indices(values)[index].as_py()
            raise ValueError(f"{source.where(row)}: column {column!r} holds a null: give texts")
        return values


def _only(source: Source, name: str, texts: pa.ChunkedArray) -> Source:
    """A source of one column, named after its use: the cache of tokens shall not depend on the file's names."""
    import pyarrow as pa

    return replace(source, table=pa.table({name: texts}))


def _even_pieces(ids: Sequence[int], longest: int) -> list[Sequence[int]]:
    """As few pieces as there can be of at most ``longest`` tokens, of nearly the same length; none of no tokens."""
    count = -(-len(ids) // longest)
    cuts = [len(ids) * k // count for k in range(count + 1)] if count else []
    return [ids[start:end] for start, end in pairwise(cuts)]


def _with_fields(source: Source, paths: Sequence[str]) -> Source:
    """The source, with a column for each path such as ``translation.en``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = source.table
    for path in paths:
        name, *inner = path.split(".")
        values = table[name]
        for depth, field in enumerate(inner, 1):
            kind = values.type
            fields = [part.name for part in kind] if pa.types.is_struct(kind) else []
            if field not in fields:
                holder = ".".join([name, *inner[: depth - 1]])
                raise ValueError(
                    f"{source.name}: column {holder!r} has no field {field!r}, of {path!r}; there are: "
                    f"{', '.join(map(repr, fields)) or f'none ({kind})'}"
                )
            values = pc.struct_field(values, field)
        if inner:
            table = table.append_column(path, values)
    return replace(source, table=table)
