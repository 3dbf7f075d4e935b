"""Prompts or sources in, texts out, with exported graphs. It needs numpy, tokenizers and the graphs' sessions alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ft.export.generation import (
    CausalDecoder,
    EncoderDecoder,
    GenerationSettings,
    generate,
    log_softmax,
    stream,
)

TASKS = ("text-generation", "text2text-generation")


@dataclass(frozen=True)
class Prompt:
    """An encoded row.

    Args:
        ids: Its tokens.
        seed: Of what is drawn for it.
    """

    ids: Sequence[int]
    seed: int


class TextGenerator:
    """Writes what a model that was exported for ``text-generation`` or ``text2text-generation`` would write.

    Args:
        head: What ``head.json`` holds.
        tokenizer: A ``tokenizers.Tokenizer``.
        sessions: Of the graphs, by their part: ``"decoder"``, and ``"encoder"`` of an encoder-decoder.
        batch_size: Rows that are run at once; rows of similar length are put together.
        max_length: Tokens that are kept of a source, or that a prompt may have with what follows it; by default, and
            at most, as many as the model takes.
        options: Settings in place of those in ``head``, such as ``{"max_new_tokens": 20}``.
        seed: Of what is drawn. A row's text depends on it and on the row's place in a call alone.
        device: Where the caches stay: ``"cpu"`` or ``"cuda"``.

    Raises:
        TypeError: There is no such option.
        ValueError: A number is out of range, or the task is another one.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        tokenizer: Any,
        sessions: Mapping[str, Any],
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.task, self.labels, known = head["task"], list(head["labels"]), head["settings"]
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}: expected one of {', '.join(TASKS)}")
        limit = head["max_length"]
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(f"max_length={max_length} is more than the {limit} tokens that the model takes")
        self.batch_size, self.seed = batch_size, seed
        self.max_length: int | None = limit if max_length is None else max_length
        self.settings = GenerationSettings(**{**known["generation"], **(options or {})})
        for name, value in {
            "max_new_tokens": self.settings.max_new_tokens,
            "num_beams": self.settings.num_beams,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        self._known, self._padding, self._tokenizer = known, head["padding"], tokenizer
        self._pairs = self.task == "text2text-generation"
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if self._pairs and self.max_length is not None:
            tokenizer.enable_truncation(self.max_length)
        self._decoder: CausalDecoder | EncoderDecoder
        if self._pairs:
            start = self.settings.decoder_start_token_id
            self._decoder = EncoderDecoder(sessions["encoder"], sessions["decoder"], start=start, device=device)
        else:
            self._decoder = CausalDecoder(sessions["decoder"], device=device)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], open_session: Callable[[str], Any], **settings: Any) -> TextGenerator:
        """Read an exported folder.

        Args:
            folder: What ``lightning-ft export`` wrote.
            open_session: Makes a session of a graph's file.
            settings: As of the class.
        """
        from tokenizers import Tokenizer

        place = Path(folder)
        head = json.loads((place / "head.json").read_text(encoding="utf-8"))
        sessions = {part: open_session(str(place / name)) for part, name in head["settings"]["graphs"].items()}
        return cls(head, Tokenizer.from_file(str(place / "tokenizer.json")), sessions, **settings)

    def __call__(self, rows: Any) -> Any:
        """Write.

        Args:
            rows: A text, or a list of texts; mappings with ``text`` are taken for texts, too. For a decoder also
                mappings with ``instruction`` (and ``input``), put into the template that instructions are trained
                with, or with ``messages``, put into the model's chat template (which needs the package jinja2).

        Returns:
            What ``lightning-ft predict`` writes, a mapping for each row: ``text``; of an encoder-decoder also
            ``score``, the mean log-probability of its tokens, in nats; with labels ``label``, ``score`` and
            ``probabilities``. One mapping alone for a single row.

        Raises:
            TypeError: A row that is none of these.
            ValueError: A row without a text, or one too long for the model.
        """
        if not isinstance(rows, list):
            return self([rows])[0]
        return self.answer(self.encode(rows))

    def encode(self, rows: Sequence[Any]) -> list[Prompt]:
        """Check and tokenise rows: the first half of a call, which needs no graph."""
        return [Prompt(self._ids(row, number), self.seed + number) for number, row in enumerate(rows)]

    def answer(self, items: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Write on items of :meth:`encode`, which may have come from several calls: the second half of a call."""
        found: list[Any] = [None] * len(items)
        order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            for number, answer in zip(chosen, self._run([items[i] for i in chosen]), strict=True):
                found[number] = answer
        return found

    def stream(self, row: Any) -> Iterator[str]:
        """Write on one row, and give each piece of the text as it comes; joined they are the text.

        Raises:
            ValueError: The settings are those of a beam search, or the model chooses among labels.
        """
        if self.labels:
            raise ValueError("this model chooses among labels and writes nothing: call it")
        (item,) = self.encode([row])
        ids, said = [], ""
        for tokens in stream(self._decoder, *self._batch([item]), self.settings, seeds=[item.seed]):
            ids.append(int(tokens[0]))
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            # Half a character, which the next token completes.
            if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(said):
                continue
            if text != said:
                yield text[len(said) :]
            said = text
        rest = self._tokenizer.decode(ids, skip_special_tokens=True)
        if rest.startswith(said) and rest != said:
            yield rest[len(said) :]

    # ---- rows

    def _ids(self, row: Any, number: int) -> list[int]:
        text, chats = self._text(row, number)
        if self._pairs:
            ids: list[int] = self._tokenizer.encode(text).ids
        else:
            before = [] if chats else self._known["prompt"]["before"]
            ids = [*before, *self._tokenizer.encode(text, add_special_tokens=False).ids]
        if not ids:
            raise ValueError(f"row {number}: the tokenizer makes no token of it: give a text")
        new, limit = self.settings.max_new_tokens, self.max_length
        if not self._pairs and limit is not None and len(ids) + new > limit:
            raise ValueError(
                f"row {number}: a prompt of {len(ids)} tokens and max_new_tokens={new} exceed the model's {limit} "
                "tokens: shorten it, or lower max_new_tokens"
            )
        return ids

    def _text(self, row: Any, number: int) -> tuple[str, bool]:
        """The text of a row, and whether a chat template made it."""
        prompt = self._known.get("prompt", {})
        if isinstance(row, Mapping) and not self._pairs:
            if "messages" in row:
                return self._chat(row["messages"], number), True
            if "instruction" in row:
                parts = [row["instruction"], row.get("input") or ""]
                if not all(isinstance(part, str) for part in parts):
                    raise TypeError(f"row {number}: expected texts as instruction and input, got {parts!r:.80}")
                if prompt["chat_template"]:
                    content = "\n\n".join(part for part in parts if part)
                    return self._chat([{"role": "user", "content": content}], number), True
                return fill_template(prompt["template"], *parts), False
        text = row.get("text") if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise TypeError(f"row {number}: expected a text or a mapping with text, got {row!r:.80}")
        return text, False

    def _chat(self, messages: Any, number: int) -> str:
        template = self._known["prompt"]["chat_template"]
        if not template:
            raise ValueError(f"row {number}: the model has no chat template: give a text or an instruction")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError("messages are put into a template with jinja2: pip install jinja2") from error
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            text: str = environment.from_string(template).render(
                messages=messages, add_generation_prompt=True, **self._known["prompt"]["special"]
            )
        except (TemplateError, _RefusalError) as error:
            raise ValueError(f"row {number}: the chat template refuses the conversation ({error})") from None
        return text

    # ---- graphs

    def _batch(self, items: Sequence[Prompt]) -> tuple[Any, Any]:
        width = max(len(item.ids) for item in items)
        ids = np.full((len(items), width), self._padding["token"], np.int64)
        mask = np.zeros_like(ids)
        left = self._padding["left"] or not self._pairs
        for row, item in enumerate(items):
            begin = width - len(item.ids) if left else 0
            ids[row, begin : begin + len(item.ids)] = item.ids
            mask[row, begin : begin + len(item.ids)] = 1
        return ids, mask

    def _run(self, items: Sequence[Prompt]) -> list[dict[str, Any]]:
        ids, mask = self._batch(items)
        if self.labels:
            return [self._label(row) for row in self._likelihoods(ids, mask)]
        new = generate(self._decoder, ids, mask, self.settings, seeds=[item.seed for item in items])
        texts = self._tokenizer.decode_batch(new.tolist(), skip_special_tokens=True)
        if not isinstance(self._decoder, EncoderDecoder):
            return [{"text": text} for text in texts]
        self._decoder.encode(ids, mask)
        scores = self._scores(self._decoder, new)
        return [{"text": text.strip(), "score": float(score)} for text, score in zip(texts, scores, strict=True)]

    def _scores(self, decoder: EncoderDecoder, new: Any) -> Any:
        """The mean log p of each row's tokens, to its end, under the model itself."""
        ends = np.isin(new, list(self.settings.eos_token_id))
        counts = ends.cumsum(1) - ends == 0
        terms = self._log_p(decoder, new)
        return (terms * counts).sum(1) / counts.sum(1)

    def _log_p(self, decoder: EncoderDecoder, targets: Any) -> Any:
        start = np.tile(np.array([self.settings.decoder_start_token_id], np.int64), (len(targets), 1))
        logits = decoder.decode(np.concatenate([start, targets[:, :-1]], 1))[:, start.shape[1] - 1 :]
        return np.take_along_axis(log_softmax(logits), targets[..., None], 2)[..., 0]

    def _likelihoods(self, ids: Any, mask: Any) -> Any:
        """log p of each label, or its mean over tokens, ``(batch, labels)``."""
        assert isinstance(self._decoder, EncoderDecoder)
        self._decoder.encode(ids, mask)
        columns = []
        for label in self._known["label_ids"]:
            terms = self._log_p(self._decoder, np.tile(np.array([label], np.int64), (len(ids), 1)))
            columns.append(terms.mean(1) if self._known["length_normalised"] else terms.sum(1))
        return np.stack(columns, 1)

    def _label(self, likelihoods: Any) -> dict[str, Any]:
        shares = np.exp(log_softmax(likelihoods))
        best = int(shares.argmax())
        return {"label": self.labels[best], "score": float(shares[best]), "probabilities": shares.tolist()}


class _RefusalError(Exception):
    """What a chat template raises."""


def _refuse(message: str) -> None:
    raise _RefusalError(message)


def fill_template(template: str, instruction: str, extra: str) -> str:
    """A template's text; its paragraph that holds ``{input}`` is left out where there is no input."""
    kept = [text for text in template.split("\n\n") if extra or "{input}" not in text or "{instruction}" in text]
    values = {"instruction": instruction, "input": extra}
    return re.sub(r"\{(\w*)\}", lambda match: values[match[1]], "\n\n".join(kept))
