"""Tokens from exported decoders: the most probable, drawn, or of a beam search. It needs numpy and sessions alone.

Results equal those of transformers' ``generate`` with the same settings (sampling: in distribution).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any
LOW = np.float32(-1e9)


class GenerationSettings(NamedTuple):
    """How tokens are chosen; names and meanings are those of transformers' ``GenerationConfig``.

    Args:
        max_new_tokens: Tokens that are written at most.
        num_beams: Beams of the search; 1 for none.
        do_sample: Draw tokens, and do not take the most probable ones.
        temperature: Logits are divided by it before drawing.
        top_k: Draw from so many tokens; 0 for all.
        top_p: Draw from the most probable tokens that together have this probability.
        min_p: Draw from tokens at least so probable, relative to the most probable one.
        repetition_penalty: What logits of tokens that came already are divided by (multiplied with below 0).
        no_repeat_ngram_size: No n-gram of this many tokens comes twice; 0 allows all.
        min_length: No end before so many tokens, those of a decoder's prompt among them.
        min_new_tokens: No end before so many new tokens.
        bad_words_ids: Sequences of tokens that are never written.
        suppress_tokens: Tokens that are never written.
        begin_suppress_tokens: Tokens that are not written first.
        forced_bos_token_id: What an encoder-decoder writes first.
        forced_eos_token_id: What is written last where the text would go on.
        length_penalty: Beam search divides log p by length to this power.
        early_stopping: Beam search ends with as many texts as beams; or ``"never"`` before none can be better.
        eos_token_id: Tokens that end a text.
        pad_token_id: What follows the end.
        decoder_start_token_id: What an encoder-decoder begins with.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Sequence[int] = ()
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: Sequence[int] = ()
    pad_token_id: int = 0
    decoder_start_token_id: Sequence[int] = ()


# ---- graphs


class _Graph:
    """A session whose cache stays where it was computed, where the session can bind its outputs.

    Args:
        session: An ``onnxruntime.InferenceSession``, or what has ``get_inputs()`` and ``run(names, feed)``.
        device: Where the outputs shall stay: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, session: Any, device: str) -> None:
        self.session, self.device = session, device
        self.inputs = {entry.name: entry for entry in session.get_inputs()}
        self.binds = hasattr(session, "io_binding")

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> dict[str, Any]:
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        if not self.binds:
            values = self.session.run(list(names), {name: as_array(value) for name, value in feed.items()})
            return dict(zip(names, values, strict=True))
        binding = self.session.io_binding()
        for name, value in feed.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, "cpu" if name == "logits" else self.device)
        self.session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def empty(self, name: str, rows: int) -> Array:
        """A cache of no tokens."""
        _, heads, _, width = self.inputs[name].shape
        return np.zeros((rows, heads, 0, width), np.float32)


def as_array(value: Any) -> Array:
    """An array, also of what lies in ONNX Runtime."""
    return value if isinstance(value, np.ndarray) else value.numpy()


class CausalDecoder:
    """A decoder with its cache, as ``model.onnx`` of text generation holds it; for one batch at a time.

    Args:
        session: Of the graph.
        device: Where the cache stays, ``"cpu"`` or ``"cuda"``.
    """

    reads_prompt = True

    def __init__(self, session: Any, *, device: str = "cpu") -> None:
        self._graph = _Graph(session, device)
        self._past = [name for name in self._graph.inputs if name.startswith("past.")]
        self._present = [name.replace("past.", "present.", 1) for name in self._past]
        self._cache: dict[str, Any] = {}
        self._mask: Array = None

    def begin(self, input_ids: Array, attention_mask: Array, *, every: bool = False) -> Array:
        """Read prompts.

        Args:
            input_ids: ``(batch, sequence)``, int64, padded on the left.
            attention_mask: ``(batch, sequence)``, int64.
            every: Give the logits of all positions, ``(batch, sequence, vocabulary)``.

        Returns:
            Logits of what comes next, ``(batch, vocabulary)``.
        """
        self._cache = {name: self._graph.empty(name, len(input_ids)) for name in self._past}
        self._mask = attention_mask[:, :0]
        return self.extend(input_ids, attention_mask, every=every)

    def extend(self, input_ids: Array, attention_mask: Array | None = None, *, every: bool = False) -> Array:
        """Read on, one token a row or several; as :meth:`begin`."""
        new = np.ones_like(input_ids) if attention_mask is None else attention_mask
        self._mask = np.concatenate([self._mask, new], 1)
        length = input_ids.shape[1]
        feed = {
            "input_ids": input_ids,
            "attention_mask": self._mask,
            "position_ids": np.maximum(self._mask.cumsum(1) - 1, 0)[:, -length:],
            "logits_to_keep": np.arange(0 if every else length - 1, length),
        }
        found = self._graph.run(["logits", *self._present], {**feed, **self._cache})
        self._cache = dict(zip(self._past, (found[name] for name in self._present), strict=True))
        logits = as_array(found["logits"])
        # A graph without `logits_to_keep` gives all of them.
        return logits if every else logits[:, -1]

    def expand(self, times: int) -> None:
        """Each row so many times."""
        self._mask = np.repeat(self._mask, times, 0)
        self.reorder(np.repeat(np.arange(len(self._mask) // times), times))

    def reorder(self, rows: Array) -> None:
        """Go on with other rows; each takes the place of one with the same prompt."""
        self._cache = _take(self._cache, rows)


class EncoderDecoder:
    """An encoder and a decoder with its caches, ``encoder.onnx`` and ``decoder.onnx``; for one batch at a time.

    Args:
        encoder: Session of the encoder, whose outputs are the keys and values that the decoder attends to.
        decoder: Session of the decoder.
        start: Tokens that it begins with.
        device: Where the caches stay, ``"cpu"`` or ``"cuda"``.
    """

    reads_prompt = False

    def __init__(self, encoder: Any, decoder: Any, *, start: Sequence[int], device: str = "cpu") -> None:
        self._encoder, self._decoder = _Graph(encoder, device), _Graph(decoder, device)
        self._past = [name for name in self._decoder.inputs if name.startswith("past.")]
        self._cross = [name for name in self._decoder.inputs if name.startswith("cross.")]
        self._present = [name.replace("past.", "present.", 1) for name in self._past]
        self._start = list(start)
        self._cache: dict[str, Any] = {}
        self._source: dict[str, Any] = {}

    def begin(self, input_ids: Array, attention_mask: Array) -> Array:
        """Read sources.

        Args:
            input_ids: ``(batch, sequence)``, int64.
            attention_mask: ``(batch, sequence)``, int64.

        Returns:
            Logits of the first token, ``(batch, vocabulary)``.
        """
        self.encode(input_ids, attention_mask)
        return self.decode(np.tile(np.array([self._start], np.int64), (len(input_ids), 1)))[:, -1]

    def encode(self, input_ids: Array, attention_mask: Array) -> None:
        """Read sources, and nothing of what is to be written."""
        feed = {"input_ids": input_ids, "attention_mask": attention_mask}
        self._source = {**self._encoder.run(self._cross, feed), "encoder_attention_mask": attention_mask}

    def decode(self, input_ids: Array) -> Array:
        """Logits of all positions of targets from their beginning on, ``(batch, sequence, vocabulary)``."""
        self._cache = {name: self._decoder.empty(name, len(input_ids)) for name in self._past}
        return self.extend(input_ids, every=True)

    def extend(self, input_ids: Array, *, every: bool = False) -> Array:
        """Read on, one token a row or several."""
        feed = {"input_ids": input_ids, **self._source, **self._cache}
        found = self._decoder.run(["logits", *self._present], feed)
        self._cache = dict(zip(self._past, (found[name] for name in self._present), strict=True))
        logits = as_array(found["logits"])
        return logits if every else logits[:, -1]

    def expand(self, times: int) -> None:
        """Each row so many times."""
        rows = np.repeat(np.arange(len(self._source["encoder_attention_mask"])), times)
        self._source = _take(self._source, rows)
        self._cache = _take(self._cache, rows)

    def reorder(self, rows: Array) -> None:
        """Go on with other rows; each takes the place of one with the same source."""
        self._cache = _take(self._cache, rows)


def _take(cache: Mapping[str, Any], rows: Array) -> dict[str, Any]:
    if np.array_equal(rows, np.arange(len(rows))):
        return dict(cache)
    return {name: as_array(value)[rows] for name, value in cache.items()}


Decoder = CausalDecoder | EncoderDecoder


# ---- scores


def _penalise(settings: GenerationSettings, written: Array, scores: Array, prompt: int, mask: Array) -> Array:
    """Scores of the next token as the settings bend them, in transformers' order.

    Args:
        settings: The settings.
        written: What each row holds, ``(rows, length)``, the prompt included.
        scores: ``(rows, vocabulary)``.
        prompt: Tokens of the prompt.
        mask: 1 where the prompt is no padding, ``(rows, prompt)``.
    """
    scores = scores.copy()
    length, last = written.shape[1], prompt + settings.max_new_tokens - 1
    if settings.repetition_penalty != 1:
        for row, (ids, real) in enumerate(zip(written, mask, strict=True)):
            seen = np.unique(np.concatenate([ids[:prompt][real > 0], ids[prompt:]]))
            values = scores[row, seen]
            scores[row, seen] = np.where(
                values < 0, values * settings.repetition_penalty, values / settings.repetition_penalty
            )
    if 0 < settings.no_repeat_ngram_size <= length:
        for row, ids in enumerate(written):
            scores[row, _completions(ids, settings.no_repeat_ngram_size)] = -np.inf
    for word in settings.bad_words_ids:
        if list(word) in [[end] for end in settings.eos_token_id] or len(word) > length + 1:
            continue
        begins = (written[:, length - len(word) + 1 :] == np.array(word[:-1], np.int64)).all(1)
        scores[begins, word[-1]] = -np.inf
    if length < settings.min_length or length - prompt < settings.min_new_tokens:
        scores[:, list(settings.eos_token_id)] = -np.inf
    if settings.forced_bos_token_id is not None and length == 1:
        scores = _only(scores, [settings.forced_bos_token_id])
    if settings.forced_eos_token_id and length == last:
        scores = _only(scores, settings.forced_eos_token_id)
    scores[:, list(settings.suppress_tokens)] = -np.inf
    if length == prompt + (prompt == 1 and settings.forced_bos_token_id is not None):
        scores[:, list(settings.begin_suppress_tokens)] = -np.inf
    return scores


def _completions(ids: Array, size: int) -> list[int]:
    """Tokens that would end an n-gram which is there already."""
    if size == 1:
        return [int(token) for token in ids]
    windows = np.lib.stride_tricks.sliding_window_view(ids, size)
    return [int(token) for token in windows[(windows[:, :-1] == ids[-size + 1 :]).all(1), -1]]


def _only(scores: Array, tokens: Sequence[int]) -> Array:
    result = np.full_like(scores, -np.inf)
    result[:, list(tokens)] = 0
    return result


def _warp(settings: GenerationSettings, scores: Array, keep: int) -> Array:
    """Scores to draw by: temperature, then top-k, top-p and min-p; at least ``keep`` tokens are left."""
    scores = scores / np.float32(settings.temperature)
    if settings.top_k:
        count = min(max(settings.top_k, keep), scores.shape[-1])
        scores = np.where(scores < np.partition(scores, -count)[:, -count, None], -np.inf, scores)
    if settings.top_p < 1:
        order = np.argsort(scores, -1, kind="stable")
        shares = np.exp(log_softmax(np.take_along_axis(scores, order, -1))).cumsum(-1)
        out = shares <= 1 - settings.top_p
        out[:, -keep:] = False
        scores = np.where(_unsorted(out, order), -np.inf, scores)
    if settings.min_p:
        shares = np.exp(log_softmax(scores))
        out = shares < settings.min_p * shares.max(-1, keepdims=True)
        np.put_along_axis(out, np.argsort(-scores, -1, kind="stable")[:, :keep], False, -1)
        scores = np.where(out, -np.inf, scores)
    return scores


def _unsorted(values: Array, order: Array) -> Array:
    result = np.empty_like(values)
    np.put_along_axis(result, order, values, -1)
    return result


def log_softmax(scores: Array) -> Array:
    """log p over the last axis, in fp32."""
    shifted = scores.astype(np.float32) - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _gumbel(generators: Sequence[Any], scores: Array) -> Array:
    """Scores with noise: the largest k are k tokens drawn without replacement by their softmax."""
    noise = np.stack([generator.gumbel(size=scores.shape[-1]) for generator in generators])
    return scores + noise.astype(np.float32)


# ---- loops


def generate(
    decoder: Decoder,
    input_ids: Array,
    attention_mask: Array,
    settings: GenerationSettings,
    *,
    seeds: Sequence[int] | None = None,
) -> Array:
    """Write on.

    Args:
        decoder: What gives the logits.
        input_ids: Prompts (padded on the left) or sources, ``(batch, sequence)``, int64.
        attention_mask: ``(batch, sequence)``, int64.
        settings: How tokens are chosen.
        seeds: Where tokens are drawn, a number for each row: its text is the same in every batch. By default the row's
            own number.

    Returns:
        The new tokens, ``(batch, new)``, int64; after a text's end, padding.
    """
    if settings.num_beams > 1:
        return _beam_search(decoder, input_ids, attention_mask, settings, seeds)
    return np.stack(list(stream(decoder, input_ids, attention_mask, settings, seeds=seeds)), 1)


def stream(
    decoder: Decoder,
    input_ids: Array,
    attention_mask: Array,
    settings: GenerationSettings,
    *,
    seeds: Sequence[int] | None = None,
) -> Iterator[Array]:
    """Write on, token by token; as :func:`generate`, without beams.

    Yields:
        A token for each row, ``(batch,)``; padding for those whose text has ended.

    Raises:
        ValueError: The settings are those of a beam search, which knows no text before its end.
    """
    if settings.num_beams > 1:
        raise ValueError(
            f"num_beams={settings.num_beams}: a beam search knows its text at the end only: set num_beams=1"
        )
    rows = len(input_ids)
    generators = _generators(seeds, rows)
    logits = decoder.begin(input_ids, attention_mask)
    written, mask = _prompt(decoder, input_ids, attention_mask, settings)
    prompt = written.shape[1]
    going = np.ones(rows, bool)
    for number in range(settings.max_new_tokens):
        if number:
            logits = decoder.extend(written[:, -1:])
        scores = _penalise(settings, written, logits, prompt, mask)
        if settings.do_sample:
            scores = _gumbel(generators, _warp(settings, scores, 1))
        tokens = np.where(going, scores.argmax(-1), settings.pad_token_id)
        yield tokens
        written = np.concatenate([written, tokens[:, None]], 1)
        going &= ~np.isin(tokens, settings.eos_token_id)
        if not going.any():
            return


def _generators(seeds: Sequence[int] | None, rows: int) -> list[Any]:
    return [np.random.default_rng(seed) for seed in (range(rows) if seeds is None else seeds)]


def _prompt(
    decoder: Decoder, input_ids: Array, attention_mask: Array, settings: GenerationSettings
) -> tuple[Array, Array]:
    """What the new tokens follow, and where it is no padding."""
    if decoder.reads_prompt:
        return input_ids, attention_mask
    start = np.tile(np.array([settings.decoder_start_token_id], np.int64), (len(input_ids), 1))
    return start, np.ones_like(start)


def _beam_search(
    decoder: Decoder, input_ids: Array, attention_mask: Array, settings: GenerationSettings, seeds: Sequence[int] | None
) -> Array:
    """The most probable texts that a search of some width finds, as transformers defines it.

    Of each row are kept ``beams`` texts that go on, and the ``beams`` best of those that have ended. Arrays are
    ``(batch, beams, …)``.
    """
    batch, beams = len(input_ids), settings.num_beams
    generators = _generators(seeds, batch)
    # One beam of a row first, then its copies: the prompt is read once.
    logits = np.repeat(decoder.begin(input_ids, attention_mask), beams, 0)
    decoder.expand(beams)
    prompts, mask = _prompt(decoder, input_ids, attention_mask, settings)
    prompt = prompts.shape[1]
    mask = np.repeat(mask, beams, 0)
    fill = settings.pad_token_id or (settings.eos_token_id[0] if settings.eos_token_id else -1)
    running = np.full((batch, beams, prompt + settings.max_new_tokens), fill, np.int64)
    running[:, :, :prompt] = prompts[:, None]
    # Only the first beam counts at the beginning, where all are the same.
    scores = np.tile(np.where(np.arange(beams) == 0, np.float32(0), LOW), (batch, 1))
    ended = _Ended(
        running.copy(), np.full((batch, beams), LOW), np.zeros((batch, beams), bool), np.zeros((batch, beams), int)
    )
    open_rows = np.ones((batch, 1), bool)
    keep = max(2, 1 + len(settings.eos_token_id)) * beams
    for length in range(prompt, prompt + settings.max_new_tokens):
        if length > prompt:
            logits = decoder.extend(running[:, :, length - 1].reshape(-1, 1))
        flat = running[:, :, :length].reshape(batch * beams, length)
        chances = _penalise(settings, flat, log_softmax(logits), prompt, mask)
        if settings.do_sample:
            chances = _warp(settings, chances, len(settings.eos_token_id) + 1)
        total = (chances.reshape(batch, beams, -1) + scores[:, :, None]).reshape(batch, -1)
        best = _top(_gumbel(generators, total) if settings.do_sample else total, keep)
        values = np.take_along_axis(total, best, 1)
        origins, tokens = best // chances.shape[-1], best % chances.shape[-1]
        texts = np.take_along_axis(running, origins[..., None], 1)
        texts[:, :, length] = tokens
        stops = np.isin(tokens, settings.eos_token_id) | (length + 1 == running.shape[2])
        chosen = _top(values + stops * LOW, beams)
        running = np.take_along_axis(texts, chosen[..., None], 1)
        scores = np.take_along_axis(values + stops * LOW, chosen, 1)
        ended.add(texts, values, stops, length + 1 - prompt, open_rows, settings)
        open_rows &= ended.can_improve(scores, length + 1 - prompt, settings)
        enough = settings.early_stopping is True and ended.there.all()
        if not open_rows.any() or enough or stops.all():
            break
        sources = np.take_along_axis(origins, chosen, 1) + beams * np.arange(batch)[:, None]
        decoder.reorder(sources.reshape(-1))
    width = int(ended.lengths[:, 0].max())
    return ended.texts[:, 0, prompt : prompt + width]


class _Ended:
    """The best texts of each row that have ended, best first."""

    def __init__(self, texts: Array, scores: Array, there: Array, lengths: Array) -> None:
        self.texts, self.scores, self.there, self.lengths = texts, scores, there, lengths

    def add(
        self, texts: Array, values: Array, stops: Array, new: int, open_rows: Array, settings: GenerationSettings
    ) -> None:
        """Take in texts that end here; only the first ``beams`` of those may."""
        beams = self.scores.shape[1]
        stops = stops & (np.arange(stops.shape[1]) < beams)
        values = (values / np.float32(float(new) ** settings.length_penalty)).astype(np.float32)
        full = (settings.early_stopping is True) & self.there.all(1, keepdims=True)
        values = values + (full * LOW + ~open_rows * LOW + ~stops * LOW)
        merged = np.concatenate([self.scores, values], 1)
        best = _top(merged, beams)
        lengths = np.concatenate([self.lengths, np.full(stops.shape, new)], 1)
        self.texts = np.take_along_axis(np.concatenate([self.texts, texts], 1), best[..., None], 1)
        self.scores = np.take_along_axis(merged, best, 1)
        self.there = np.take_along_axis(np.concatenate([self.there, stops], 1), best, 1)
        self.lengths = np.take_along_axis(lengths, best, 1)

    def can_improve(self, scores: Array, new: int, settings: GenerationSettings) -> Array:
        """Whether the best text that goes on could still beat the worst that has ended, ``(batch, 1)``."""
        forever = settings.early_stopping == "never" and settings.length_penalty > 0
        length = float(settings.max_new_tokens if forever else new)
        hoped = scores[:, :1] / np.float32(length**settings.length_penalty)
        worst = np.where(self.there, self.scores.min(1, keepdims=True), LOW)
        return (hoped > worst).any(1, keepdims=True)


def _top(values: Array, count: int) -> Array:
    """Places of the largest values of each row, the largest first."""
    count = min(count, values.shape[1])
    some = (
        np.argpartition(-values, count - 1, 1)[:, :count]
        if count < values.shape[1]
        else np.tile(np.arange(count), (len(values), 1))
    )
    some.sort(1)  # equal values in the order of their places
    order = np.argsort(-np.take_along_axis(values, some, 1), 1, kind="stable")
    return np.take_along_axis(some, order, 1)
