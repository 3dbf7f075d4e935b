"""Texts that are written: what follows a prompt, or what an encoder-decoder makes of a source."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lightning_ft.export.generation import (
    CausalDecoder,
    EncoderDecoder,
    GenerationSettings,
    generate,
    log_softmax,
    stream,
)
from lightning_ft.export.reading.graph import Graph
from lightning_ft.export.reading.reader import Exported, Item, Part, Reader, shown
from lightning_ft.export.reading.tokens import TextEncoder, check_texts, open_tokenizer


class PromptReader(Reader):
    """``{"text"}``, what a decoder writes after a prompt."""

    defaults: ClassVar = {"graphs": {}, "generation": {}, "prompt": {}, "seed": 0}
    groups = ("generation", "prompt")

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        self.generation = read_generation(self.settings["generation"])
        self.tokenizer = open_tokenizer(exported.place)
        graph = exported.open_graph("model.onnx")
        self.decoder = CausalDecoder(graph.session, device=device_of(graph))

    def encode(self, row: Any, where: str) -> Item:
        """A text or ``{"text"}``; ``{"instruction", "input"}``; or ``{"messages"}`` for a chat template."""
        text, chats = self._text(row, where)
        before = [] if chats else self.settings["prompt"]["before"]
        ids = [*before, *self.tokenizer.encode(text, add_special_tokens=False).ids]
        if not ids:
            raise ValueError(f"{where}: the tokenizer makes no token of it: give a text")
        new, limit = self.generation.max_new_tokens, self.exported.max_length
        if limit is not None and len(ids) + new > limit:
            raise ValueError(
                f"{where}: a prompt of {len(ids)} tokens and max_new_tokens={new} exceed the model's {limit} tokens: "
                "shorten it, or lower max_new_tokens"
            )
        return Item([Part([ids], [[0] * len(ids)], self.settings["seed"])])

    def number(self, item: Item, number: int) -> Item:
        """Texts that are drawn depend on the seed and the row's place in a call, not on the batch."""
        return numbered(item, number)

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """The new tokens of each, padding after a text's end."""
        feed = self.close_up(parts, ("input_ids", "attention_mask"))
        seeds = [part.known for part in parts]
        return list(generate(self.decoder, feed["input_ids"], feed["attention_mask"], self.generation, seeds=seeds))

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As the module predicts."""
        return {"text": self.tokenizer.decode(outputs[0].tolist(), skip_special_tokens=True)}

    def columns(self, length: int, width: int) -> slice:
        """What is written follows a row's last token: padding stands before it."""
        return slice(width - length, width)

    def stream(self, item: Item) -> Iterator[str]:
        """Pieces of the text, as they come."""
        feed = self.close_up(item.parts, ("input_ids", "attention_mask"))
        return pieces(self.decoder, self.tokenizer, feed, self.generation, item.parts[0].known)

    def _text(self, row: Any, where: str) -> tuple[str, bool]:
        """The text of a row, and whether a chat template made it."""
        prompt = self.settings["prompt"]
        if isinstance(row, Mapping) and "messages" in row:
            return render_chat(prompt, row["messages"], where), True
        if isinstance(row, Mapping) and "instruction" in row:
            texts = [row["instruction"], row.get("input") or ""]
            parts = check_texts(where, row, texts, "texts as instruction and input")
            if not prompt["chat_template"]:
                return fill_template(prompt["template"], *parts), False
            content = "\n\n".join(part for part in parts if part)
            return render_chat(prompt, [{"role": "user", "content": content}], where), True
        text = row.get("text") if isinstance(row, Mapping) else row
        return check_texts(where, row, [text], "a text or a mapping with text")[0], False


class SourceReader(Reader):
    """``{"text", "score"}``, what an encoder-decoder makes of a source; or the ``label`` that it finds the likeliest.

    The score is the mean log-probability of the text's tokens under the model, in nats.
    """

    files: ClassVar = ("encoder.onnx", "decoder.onnx")
    defaults: ClassVar = {"graphs": {}, "generation": {}, "seed": 0, "label_ids": [], "length_normalised": True}
    groups = ("generation",)

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        self.generation = read_generation(self.settings["generation"])
        self.tokens = TextEncoder(exported)
        encoder, decoder = (exported.open_graph(name) for name in self.files)
        start = self.generation.decoder_start_token_id
        self.decoder = EncoderDecoder(encoder.session, decoder.session, start=start, device=device_of(decoder))

    def encode(self, row: Any, where: str) -> Item:
        """A text or ``{"text"}``."""
        text = row.get("text") if isinstance(row, Mapping) else row
        encoding = self.tokens(where, *check_texts(where, row, [text], "a text or a mapping with text"))
        return Item([Part([encoding.ids], [encoding.type_ids], self.settings["seed"])])

    def number(self, item: Item, number: int) -> Item:
        """As of a prompt."""
        return numbered(item, number)

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """Of each its new tokens and their score, or the log-probability of each label."""
        feed = self.close_up(parts, ("input_ids", "attention_mask"))
        ids, mask = feed["input_ids"], feed["attention_mask"]
        if self.exported.labels:
            return list(self._likelihoods(ids, mask))
        new = generate(self.decoder, ids, mask, self.generation, seeds=[part.known for part in parts])
        self.decoder.encode(ids, mask)
        return list(zip(new, self._scores(new), strict=True))

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As the module predicts."""
        if labels := self.exported.labels:
            shares = np.exp(log_softmax(outputs[0]))
            best = int(shares.argmax())
            return {"label": labels[best], "score": float(shares[best]), "probabilities": shares.tolist()}
        new, score = outputs[0]
        text = self.tokens.tokenizer.decode(new.tolist(), skip_special_tokens=True)
        return {"text": text.strip(), "score": float(score)}

    def stream(self, item: Item) -> Iterator[str]:
        """Pieces of the text, as they come."""
        if self.exported.labels:
            raise ValueError("this model chooses among labels and writes nothing: call it")
        feed = self.close_up(item.parts, ("input_ids", "attention_mask"))
        return pieces(self.decoder, self.tokens.tokenizer, feed, self.generation, item.parts[0].known)

    def _scores(self, new: Any) -> Any:
        """The mean log p of each row's tokens, to its end, under the model itself."""
        ends = np.isin(new, list(self.generation.eos_token_id))
        counts = ends.cumsum(1) - ends == 0
        return (self._log_p(new) * counts).sum(1) / counts.sum(1)

    def _log_p(self, targets: Any) -> Any:
        start = np.tile(np.array([self.generation.decoder_start_token_id], np.int64), (len(targets), 1))
        logits = self.decoder.decode(np.concatenate([start, targets[:, :-1]], 1))[:, start.shape[1] - 1 :]
        return np.take_along_axis(log_softmax(logits), targets[..., None], 2)[..., 0]

    def _likelihoods(self, ids: Any, mask: Any) -> Any:
        """log p of each label, or its mean over tokens, ``(batch, labels)``."""
        self.decoder.encode(ids, mask)
        columns = []
        for label in self.settings["label_ids"]:
            terms = self._log_p(np.tile(np.array([label], np.int64), (len(ids), 1)))
            columns.append(terms.mean(1) if self.settings["length_normalised"] else terms.sum(1))
        return np.stack(columns, 1)


def read_generation(settings: Mapping[str, Any]) -> GenerationSettings:
    """How tokens are chosen.

    Raises:
        ValueError: A setting is unknown, or out of range.
    """
    if unknown := sorted(settings.keys() - set(GenerationSettings._fields)):
        raise ValueError(f"settings: {', '.join(unknown)} is none of {', '.join(GenerationSettings._fields)}")
    chosen = GenerationSettings(**settings)
    for name, value in {"max_new_tokens": chosen.max_new_tokens, "num_beams": chosen.num_beams}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    return chosen


def device_of(graph: Graph) -> str:
    """Where a decoder's cache is to stay."""
    providers = getattr(graph.session, "get_providers", lambda: ["CPUExecutionProvider"])()
    return "cpu" if providers[0] == "CPUExecutionProvider" else "cuda"


def numbered(item: Item, number: int) -> Item:
    """An item whose seed is that of its place in a call."""
    return item._replace(parts=[part._replace(known=part.known + number) for part in item.parts])


def pieces(
    decoder: Any, tokenizer: Any, feed: Mapping[str, Any], settings: GenerationSettings, seed: int
) -> Iterator[str]:
    """A text in pieces, as its tokens come; joined they are the text."""
    ids: list[int] = []
    said = ""
    for tokens in stream(decoder, feed["input_ids"], feed["attention_mask"], settings, seeds=[seed]):
        ids.append(int(tokens[0]))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # Half a character, which the next token completes.
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(said):
            continue
        if text != said:
            yield text[len(said) :]
        said = text
    rest = tokenizer.decode(ids, skip_special_tokens=True)
    if rest.startswith(said) and rest != said:
        yield rest[len(said) :]


def render_chat(prompt: Mapping[str, Any], messages: Any, where: str) -> str:
    """A conversation in the model's chat template.

    Raises:
        ImportError: jinja2 is missing.
        ValueError: There is no template, or it refuses the conversation.
    """
    if not prompt["chat_template"]:
        raise ValueError(f"{where}: the model has no chat template: give a text or an instruction")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("messages are put into a template with jinja2: pip install jinja2") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        text: str = environment.from_string(prompt["chat_template"]).render(
            messages=messages, add_generation_prompt=True, **prompt["special"]
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"{where}: the chat template refuses the conversation ({error}), got {shown(messages)}"
        ) from None
    return text


def fill_template(template: str, instruction: str, extra: str) -> str:
    """A template's text; its paragraph that holds ``{input}`` is left out where there is no input."""
    kept = [text for text in template.split("\n\n") if extra or "{input}" not in text or "{instruction}" in text]
    values = {"instruction": instruction, "input": extra}
    return re.sub(r"\{(\w*)\}", lambda match: values[match[1]], "\n\n".join(kept))
