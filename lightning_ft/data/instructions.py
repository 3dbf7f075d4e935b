"""Instructions with their answers, or conversations, for causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ft.core.special_tokens import around
from lightning_ft.data.answer_tokens import OverLong, check_prompt, encode_answers, fit_answer, fit_prompt, frame
from lightning_ft.data.base import Rows, TextData
from lightning_ft.data.curriculum import Curriculum
from lightning_ft.data.encoding import EncodedRows, Padding, encode_once, token_counts
from lightning_ft.data.packing import PackedRows, PackSampler
from lightning_ft.data.prompts import (
    TEMPLATE,
    check_template,
    check_turns,
    fill_template,
    lacks_answer,
    render_chat,
)
from lightning_ft.data.sampler import LengthBucketSampler, padding_waste
from lightning_ft.data.sources import is_text

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

EmptyAnswers = Literal["error", "drop"]


class InstructionData(TextData):
    """Instructions and answers, or conversations, of which the answers are learned; tokenised once, resumable.

    A batch has ``input_ids``, ``attention_mask``, ``labels`` (the tokens; -100 in prompts and padding) and ``row``, the
    row's number in its source, from 0; padding is on the right. Every answer is learned together with its end: the
    end-of-sequence token, or what the chat template puts there; after a conversation whose last turn has no
    end-of-sequence token follows one. To predict, there is the prompt alone, ``input_ids`` and ``attention_mask``, and
    rows need no answer; a conversation's last answer is left out.

    A prompt is tokenised as it will be when the model is asked, see `encode_answers`; let a template of your own end
    with a line break, at which no token reaches over into the answer.

    With ``packing``, training batches are ``batch_size`` sequences of up to ``max_length`` tokens, each of several
    rows, see `PackedRows` and `PackSampler`: as many real tokens with less padding. The model must keep them apart, as
    ``CausalLM`` checks. Validation and test are not packed.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``. One without a pad token pads with its
            end-of-sequence token (see `Padding.of`), which is learned all the same.
        train: Training rows: a file, a ``hub://`` address or a ``datasets.Dataset``, see `read_source`.
        val: Validation rows.
        test: Test rows.
        predict: Rows to answer.
        instruction: Column of the instruction.
        input: Column of what the instruction is about, which may be empty; None if there is none.
        output: Column of the answer.
        messages: Column of conversations, lists of ``{"role": "user", "content": …}`` with the roles system (first, if
            at all), user and assistant in turn, in place of the three columns above.
        template: ``"chat"`` for the tokenizer's chat template (with columns, instruction and input are the user's turn
            and the output is the assistant's); or a text with ``{instruction}`` and ``{input}`` that the answer
            follows, whose paragraph with ``{input}`` is left out where a row has none; for ``messages``, a chat
            template in Jinja. ``"auto"`` is ``"chat"`` where the tokenizer has one, else an Alpaca-like text.
        mask_prompt: Learn the answers only. If false, prompts are learned, too.
        over_long: What to do with rows of more than ``max_length`` tokens: ``"truncate"`` cuts the end off, and with
            it the answer's; ``"drop"`` leaves the row out, as :meth:`describe` tells; ``"error"`` names it. A prompt
            that leaves no room for its answer is an error unless dropped; to predict, always.
        empty_answers: What to do with rows whose answer is empty, in a conversation any of its answers: ``"error"``
            names the first one; ``"drop"`` leaves them out, as :meth:`describe` tells. Rows to predict need none.
        packing: Pack several rows into one sequence in training.
        max_length: Tokens kept of a row, prompt and answer; with ``packing``, of a sequence.
        batch_size: Rows of a training batch on one process; with ``packing``, sequences.
        eval_batch_size: Rows of another batch; by default ``batch_size``.
        bucket: Batch rows of similar length in training. If false, batches are drawn at random.
        seed: Seed of the training order and of ``val_fraction``.
        num_workers: Worker processes of each loader. Few are needed: a batch is two array operations.
        val_fraction: Without ``val``, the share of ``train`` that becomes it.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        curriculum: Train on easy rows first, see `Curriculum`; not with ``packing``.
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.

    Raises:
        ValueError: Arguments that contradict each other; later, data that is at fault, with its file and line.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"instruction": ["Add."], "input": ["1 + 1"], "output": ["2"]})
        >>> InstructionData("gpt2", train=rows, packing=True).columns("train")
        ['instruction', 'input', 'output']
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        instruction: str = "instruction",
        input: str | None = "input",
        output: str = "output",
        messages: str | None = None,
        template: str = "auto",
        mask_prompt: bool = True,
        over_long: OverLong = "truncate",
        empty_answers: EmptyAnswers = "error",
        packing: bool = False,
        max_length: int = 512,
        batch_size: int = 8,
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
            curriculum=curriculum,
            id=id,
            trust_remote_code=trust_remote_code,
        )
        if over_long not in get_args(OverLong):
            raise ValueError(f"over_long must be one of {get_args(OverLong)}, got {over_long!r}")
        if empty_answers not in get_args(EmptyAnswers):
            raise ValueError(f"empty_answers must be one of {get_args(EmptyAnswers)}, got {empty_answers!r}")
        if len({instruction, input, output}) < 3:
            raise ValueError(
                f"instruction, input and output must be different columns, got {instruction!r}, {input!r}, {output!r}"
            )
        if packing and curriculum is not None:
            raise ValueError("curriculum orders rows, and packing their packs: choose one of them")
        if template not in ("auto", "chat"):
            if messages is None:
                check_template(template, with_input=input is not None)
            elif "messages" not in template:
                raise ValueError(f"template must be a chat template in Jinja, over `messages`, got {template!r}")
        self.instruction = instruction
        self.input = input
        self.output = output
        self.messages = messages
        self.template = template
        self.mask_prompt = mask_prompt
        self.over_long = over_long
        self.empty_answers = empty_answers
        self.packing = packing
        self._dropped: dict[str, dict[str, int]] = {"over max_length": {}, "empty answer": {}}

    @override
    def columns(self, split: str) -> list[str]:
        if self.messages is not None:
            return [self.messages]
        asked = [self.instruction] if self.input is None else [self.instruction, self.input]
        return asked if split == "predict" else [*asked, self.output]

    @property
    @override
    def padding(self) -> Padding:
        """On the right, whatever the tokenizer's side: absolute positions count from the first token."""
        return replace(super().padding, left=False)

    @override
    def prepare(self, split: str) -> None:
        self._tokens(split)

    @override
    def encode(self, split: str) -> Rows:
        tokens, part = self._tokens(split), self.part(split)
        kept = torch.arange(len(tokens)) if part is None else part
        counts = token_counts(tokens)[kept]
        long, empty = counts > self.max_length, self._empty(split)[kept]  # only where they are dropped
        self._dropped["over max_length"][split] = int(long.sum())
        self._dropped["empty answer"][split] = int(empty.sum())
        if long.all():
            raise ValueError(f"every row of {split} is longer than max_length={self.max_length}: raise it")
        if (long | empty).all():
            raise ValueError(
                f"every row of {split} is left out: {int(empty.sum())} have an empty answer, and {int(long.sum())} are "
                f"longer than max_length={self.max_length}"
            )
        rows = EncodedRows(tokens, self.padding, rows=kept[~(long | empty)])
        return PackedRows(rows) if self.packing and split == "train" else rows

    @override
    def sampler(self, rows: Rows, *, train: bool = False) -> LengthBucketSampler:
        plain = super().sampler(rows, train=train)
        if not (train and isinstance(rows, PackedRows)):
            return plain
        return PackSampler(
            rows.lengths,
            self.batch_size,
            self.max_length,
            seed=self.seed,
            num_replicas=plain.num_replicas,
            rank=plain.rank,
        )

    @override
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"template": "chat" if self._chats else "text", "packing": self.packing}
        for reason, counts in self._dropped.items():
            if any(counts.values()):
                facts[f"dropped, {reason}"] = {split: count for split, count in counts.items() if count}
        if "train" in self._rows:
            facts["share of tokens learned"] = self._learned(self.need("train"))
        return facts

    def _learned(self, rows: PackedRows | EncodedRows) -> float:
        import pyarrow.compute as pc

        documents = rows.documents if isinstance(rows, PackedRows) else rows
        labels = documents.tokens.data["labels"].combine_chunks().take(documents.rows.numpy()).flatten()
        share: float = pc.mean(pc.not_equal(labels, -100)).as_py()
        return share

    @override
    def _summary(self, split: str, rows: Rows) -> dict[str, Any]:
        if not isinstance(rows, PackedRows):
            return super()._summary(split, rows)
        sampler = self.sampler(rows, train=True)
        assert isinstance(sampler, PackSampler)
        packs = [pack for batch in sampler for pack in batch]
        totals = torch.tensor([int(rows.lengths[pack].sum()) for pack in packs])
        sizes = [len(batch) for batch in sampler]
        batches = [part.tolist() for part in torch.split(torch.arange(len(packs)), sizes)]
        summary = super()._summary(split, rows.documents)
        return {**summary, "packs": sampler.packs, "padding": padding_waste(totals, batches)}

    # ---- tokens

    @property
    def _chats(self) -> bool:
        has = self.tokenizer.chat_template is not None
        return self.messages is not None or self.template == "chat" or (self.template == "auto" and has)

    def _used_template(self) -> str:
        """The text or the chat template that rows are put into.

        Raises:
            ValueError: There is no chat template.
        """
        if self.template not in ("auto", "chat"):
            return self.template
        if not self._chats:
            return TEMPLATE
        if self.tokenizer.chat_template is None:
            remedy = "template=(one in Jinja)" if self.messages is not None else 'template="auto" or a text'
            raise ValueError(f"the tokenizer {self.tokenizer_name!r} has no chat template: give it one, or {remedy}")
        own: str = self.tokenizer.get_chat_template()
        return own

    def _tokens(self, split: str) -> Dataset:
        """Of each source row ``input_ids`` and, unless to predict, ``labels`` and ``truncated``.

        Rows to leave out are longer than ``max_length``, or those of :meth:`_empty`.

        Raises:
            ValueError: A row, or the tokenizer, is at fault.
        """
        tokenizer, source, asks, template = (
            self.tokenizer,
            self.source(split),
            split == "predict",
            self._used_template(),
        )
        end = tokenizer.eos_token_id
        if end is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer_name!r} has no end-of-sequence token, which answers end with: add an "
                "eos_token to its files"
            )
        before = [] if self._chats else around(tokenizer)[0]
        empty = self._empty(split)

        def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
            cells = zip(*batch.values(), strict=True)
            records = {row: dict(zip(batch, values, strict=True)) for row, values in zip(rows, cells, strict=True)}
            full = [row for row in rows if not empty[row]]
            places = [source.where(row) for row in full]
            texts = [self._texts(source.where(row), records[row], template, asks) for row in full]
            encoded = [check_prompt(*row) for row in zip(places, encode_answers(tokenizer, texts), strict=True)]
            if asks:
                prompts = [[*before, *ids] for ids, _ in encoded]
                return {"input_ids": [fit_prompt(*row, self.max_length) for row in zip(places, prompts, strict=True)]}
            framed = [frame(tokens, before, end, always=not self._chats) for tokens in encoded]
            answered = {
                row: fit_answer(place, tokens, self.max_length, over_long=self.over_long, mask_prompt=self.mask_prompt)
                for row, place, tokens in zip(full, places, framed, strict=True)
            }
            # Rows keep their numbers: one to leave out keeps its place.
            nothing = {"input_ids": [end], "labels": [-100], "truncated": False}
            return {name: [answered.get(row, nothing)[name] for row in rows] for name in nothing}

        settings = ["instructions", template, self._chats, end, before, asks, self.columns(split)]
        settings += [self.mask_prompt, self.over_long, self.empty_answers, self.max_length]
        return encode_once(self._table(split), encode, tokenizer, settings, f"Tokenising {source.name}", with_rows=True)

    def _table(self, split: str) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        source = self.source(split)
        if self.messages is not None:
            return pa.table({self.messages: source.table[self.messages]})
        columns = {}
        for name in self.columns(split):
            given = source.table[name]
            given = given.cast(pa.string()) if pa.types.is_null(given.type) else given
            # Data sets write "no input" as a null, too.
            may_lack = name == self.input or (name == self.output and self.empty_answers == "drop")
            columns[name] = pc.fill_null(given, "") if may_lack and is_text(given.type) else source.texts(name)
        return pa.table(columns)

    def _empty(self, split: str) -> Tensor:
        """Which source rows are left out for want of an answer, ``(source rows,)``."""
        import pyarrow.compute as pc

        table = self._table(split)
        if self.empty_answers == "error" or split == "predict":
            return torch.zeros(len(table), dtype=torch.bool)
        if self.messages is not None:
            return torch.tensor([lacks_answer(turns) for turns in table[self.messages].to_pylist()])
        return torch.tensor(pc.equal(pc.utf8_trim_whitespace(table[self.output]), "").to_pylist())

    def _texts(self, where: str, row: Mapping[str, Any], template: str, asks: bool) -> list[str]:
        """The prompt, prompt + answer, and so on; to predict, the prompt alone."""
        try:
            if self.messages is not None:
                turns = check_turns(row[self.messages], learned=not asks)
            else:
                asked, about = row[self.instruction], "" if self.input is None else row[self.input]
                answer = None if asks else row[self.output]
                if answer is not None and not answer.strip():
                    raise ValueError(
                        f"column {self.output!r} is empty, and there is no answer to learn: remove the row"
                    )
                if not self._chats:
                    prompt = fill_template(template, asked, about)
                    return [prompt] if answer is None else [prompt, prompt + answer]
                turns = [{"role": "user", "content": f"{asked}\n\n{about}" if about else asked}]
                turns += [] if answer is None else [{"role": "assistant", "content": answer}]
            texts = render_chat(self.tokenizer, turns, template)
        except ValueError as error:
            column = "" if self.messages is None else f"column {self.messages!r}: "
            raise ValueError(f"{where}: {column}{error}") from None
        return texts[-1:] if asks else texts
