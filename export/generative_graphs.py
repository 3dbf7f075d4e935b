"""The graphs of models that write text, and the proof that they write the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ft.export.generation import CausalDecoder, EncoderDecoder, GenerationSettings, generate
from lightning_ft.export.generative_wrappers import CausalStep, SourceEncoder, TargetStep
from lightning_ft.export.graph import rounded
from lightning_ft.export.graphs import MODEL, Graphs, Sessions, padded
from lightning_ft.export.parity import ParityError, Probe, make_probes
from lightning_ft.export.wrappers import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.modules import TransformerModule
    from lightning_ft.modules.base import Batch

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
STEPS = 5
"""Tokens of a probe that are read from the cache: two at once, then one by one."""
PROMPT = 16
"""Tokens at most of the prompts that are written on in the proof."""


class _Generative(Graphs):
    """What both kinds share: prompts written on greedily, as ``generate`` does."""

    def __init__(self, model: nn.Module, files: Any, settings: GenerationSettings) -> None:
        super().__init__(model, files)
        self.settings = settings

    def decoder(self, sessions: Sessions) -> CausalDecoder | EncoderDecoder:
        """The graphs, to be generated with."""
        raise NotImplementedError

    def rounding(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        """The model's outputs with noise at the size of rounding errors, three times."""
        for seed in range(3):
            with rounded(self.model, seed=seed):
                yield self.expected(probe)

    def prove(self, sessions: Sessions, probes: Sequence[Probe], *, error: float) -> dict[str, Any]:
        """Greedy tokens up to the end equal those of ``generate``."""
        decoder = self.decoder(sessions)

        def write(ids: Tensor, mask: Tensor, settings: GenerationSettings) -> Tensor:
            return torch.from_numpy(generate(decoder, ids.numpy(), mask.numpy(), settings))

        return self.compare_greedy(write, probes, error=error)

    def compare_greedy(
        self, write: Callable[[Tensor, Tensor, GenerationSettings], Tensor], probes: Sequence[Probe], *, error: float
    ) -> dict[str, Any]:
        """Hold tokens that something else writes against those of ``generate``, up to the end.

        Where two tokens are as probable but for rounding, either may come, and the row is not compared from there on.

        Args:
            write: Takes prompts, ``(batch, sequence)``, their mask and settings; gives new tokens, ``(batch, new)``.
            probes: Where prompts come from.
            error: The largest difference between logits.

        Returns:
            How many texts and tokens were compared.

        Raises:
            ParityError: A token is another one.
        """
        longest = max(probe.length for probe in probes)
        chosen = self.settings._replace(do_sample=False, num_beams=1, max_new_tokens=min(PROMPT, max(longest // 2, 1)))
        tried = [probe for probe in probes if probe.length + chosen.max_new_tokens <= longest]
        texts = tokens = 0
        for probe in [p for p in tried if p.length <= PROMPT] or tried[:1]:
            ids, mask = probe.inputs["input_ids"], probe.inputs["attention_mask"]
            wanted, logits = self._greedy(ids, mask, chosen)
            got = write(ids, mask, chosen)
            for row in range(len(ids)):
                tokens += _same(got[row], wanted[row], logits[row], chosen, error, probe, row)
            texts += len(ids)
        return {"texts": texts, "tokens": tokens}

    def _greedy(self, ids: Tensor, mask: Tensor, settings: GenerationSettings) -> tuple[Tensor, Tensor]:
        """What ``generate`` writes, ``(batch, new)``, and by which scores, ``(batch, new, vocabulary)``."""
        config = generation_config(settings, return_dict_in_generate=True, output_scores=True)
        # In place of the model's own, from which `generate` takes whatever another one leaves open.
        own, self.model.generation_config = self.model.generation_config, config
        try:
            found = self.model.generate(input_ids=ids, attention_mask=mask)
        finally:
            self.model.generation_config = own
        scores = torch.stack(found.scores, 1)
        return found.sequences[:, -scores.shape[1] :], scores


def _same(
    got: Tensor, wanted: Tensor, scores: Tensor, settings: GenerationSettings, error: float, probe: Probe, row: int
) -> int:
    """How many tokens of a text were compared.

    Raises:
        ParityError: One of them is another one.
    """
    ends = torch.isin(wanted, torch.tensor(settings.eos_token_id, dtype=torch.long)).nonzero()
    count = int(ends[0]) + 1 if len(ends) else len(wanted)
    for place in range(count):
        mine = int(got[place]) if place < len(got) else settings.pad_token_id
        theirs = int(wanted[place])
        if mine == theirs:
            continue
        if scores[place, theirs] - scores[place, mine] <= 4 * error:
            return place
        raise ParityError(
            f"the graphs write other tokens than the model does: {got[:count].tolist()} instead of "
            f"{wanted[:count].tolist()} in row {row} of a batch of {probe.batch} prompts of {probe.length} tokens; "
            "nothing was written"
        )
    return count


def generation_config(settings: GenerationSettings, **more: Any) -> Any:
    """The settings as transformers has them, without those that have no effect, of which it would warn."""
    from transformers import GenerationConfig

    given: dict[str, Any] = {
        name: _lists(value) for name, value in settings._asdict().items() if value not in ((), None)
    }
    idle = [name for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size", "min_p") if not given[name]]
    idle += () if settings.do_sample else ("temperature", "top_k", "top_p", "min_p")
    idle += () if settings.num_beams > 1 else ("length_penalty", "early_stopping")
    if len(start := settings.decoder_start_token_id) == 1:
        given["decoder_start_token_id"] = start[0]
    return GenerationConfig(**{name: value for name, value in given.items() if name not in idle}, **more)


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, tuple | list) else value


class CausalGraphs(_Generative):
    """A causal language model as one graph, ``model.onnx``, for prompts and for single tokens.

    Args:
        model: A causal language model of transformers.
        settings: How it writes.
    """

    per_token = ("logits",)

    def __init__(self, model: nn.Module, settings: GenerationSettings) -> None:
        self.step = CausalStep(model)
        super().__init__(model, {MODEL: self.step}, settings)

    def decoder(self, sessions: Sessions) -> CausalDecoder:
        """The graph, to be generated with."""
        return CausalDecoder(sessions[MODEL])

    def probes(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Probe]:
        """Prompts, padded on the left, as those that are written on must be."""
        return [_left(probe) for probe in make_probes(tokenizer, TOKENS[:2], max_length=max_length)]

    def samples(self, probes: Sequence[Probe]) -> dict[str, dict[str, Tensor]]:
        """The first padded probe, after a cache."""
        return {MODEL: self.step.sample(padded(probes).inputs, torch.Generator().manual_seed(0))}

    def expected(self, probe: Probe) -> dict[str, Tensor]:
        """Logits of all tokens, read at once."""
        return {"logits": self.model(**probe.inputs, **self._positions(probe.inputs["attention_mask"])).logits}

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        takes = "position_ids" in inspect.signature(self.model.forward).parameters
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes else {}

    def run(self, sessions: Sessions, probe: Probe) -> dict[str, Tensor]:
        """The same, of which the last tokens are read from the cache."""
        decoder = self.decoder(sessions)
        ids, mask = (probe.inputs[name].numpy() for name in TOKENS[:2])
        cuts = [max(1, probe.length - STEPS), *range(max(3, probe.length - STEPS + 2), probe.length + 1)]
        parts = [decoder.begin(ids[:, : cuts[0]], mask[:, : cuts[0]], every=True)]
        for begin, end in zip(cuts, [*cuts[1:], probe.length], strict=True):
            if begin < end:
                parts.append(decoder.extend(ids[:, begin:end], mask[:, begin:end], every=True))
        return {"logits": torch.cat([torch.from_numpy(part) for part in parts], 1)}

    def replacements(self, module: TransformerModule, sessions: Sessions) -> dict[str, Callable[..., Any]]:
        """Its ``forward``: the logits of whole texts."""
        decoder = self.decoder(sessions)

        def forward(batch: Batch) -> Tensor:
            ids = batch["input_ids"]
            if "attention_mask" not in batch and "position_ids" in batch:
                raise ValueError("data: packed validation texts cannot be judged: set packing=False")
            mask = batch.get("attention_mask", torch.ones_like(ids))
            return torch.from_numpy(decoder.begin(ids.numpy(), mask.numpy(), every=True))

        return {"forward": forward}


class Seq2SeqGraphs(_Generative):
    """An encoder-decoder as two graphs, ``encoder.onnx`` and ``decoder.onnx``.

    The usual three (a decoder for the first token, and one for those that follow) hold the decoder's weights twice.
    Here the encoder's graph computes the keys and values of its states, too, which is all in which they differ.

    Args:
        model: An encoder-decoder of transformers.
        settings: How it writes.
    """

    def __init__(self, model: nn.Module, settings: GenerationSettings) -> None:
        self.encoder, self.step = SourceEncoder(model), TargetStep(model)
        super().__init__(model, {ENCODER: self.encoder, DECODER: self.step}, settings)

    def decoder(self, sessions: Sessions) -> EncoderDecoder:
        """The graphs, to be generated with."""
        start = self.settings.decoder_start_token_id
        return EncoderDecoder(sessions[ENCODER], sessions[DECODER], start=start)

    def probes(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Probe]:
        """Sources as they are padded, and targets of other lengths."""
        made = make_probes(tokenizer, TOKENS[:2], max_length=max_length)
        others = make_probes(tokenizer, TOKENS[:1], max_length=max_length, seed=1)
        result = []
        for probe, other in zip(made, [*others[1:], others[0]], strict=True):
            rows = torch.arange(probe.batch) % other.batch
            target = other.inputs["input_ids"][rows]
            result.append(probe._replace(inputs={**probe.inputs, "decoder_input_ids": target}))
        return result

    def samples(self, probes: Sequence[Probe]) -> dict[str, dict[str, Tensor]]:
        """The first padded probe."""
        tokens = {name: padded(probes).inputs[name] for name in TOKENS[:2]}
        return {ENCODER: tokens, DECODER: self.step.sample(tokens, torch.Generator().manual_seed(0))}

    def expected(self, probe: Probe) -> dict[str, Tensor]:
        """Logits of all target tokens, read at once."""
        return {"logits": self.model(**probe.inputs).logits}

    def run(self, sessions: Sessions, probe: Probe) -> dict[str, Tensor]:
        """The same, of which the last tokens are read from the cache."""
        decoder = self.decoder(sessions)
        ids, mask, targets = (probe.inputs[name].numpy() for name in (*TOKENS[:2], "decoder_input_ids"))
        decoder.encode(ids, mask)
        length = targets.shape[1]
        first = max(1, length - STEPS)
        parts = [decoder.decode(targets[:, :first])]
        parts += [decoder.extend(targets[:, place : place + 1], every=True) for place in range(first, length)]
        return {"logits": torch.cat([torch.from_numpy(part) for part in parts], 1)}

    def replacements(self, module: TransformerModule, sessions: Sessions) -> dict[str, Callable[..., Any]]:
        """Its ``forward``, and how it writes texts and finds labels, which its metrics are of."""
        from lightning_ft.functional.label_scoring import decoder_inputs

        decoder = self.decoder(sessions)

        def encode(batch: Batch) -> None:
            decoder.encode(batch["input_ids"].numpy(), batch["attention_mask"].numpy())

        def logits(labels: Tensor) -> Tensor:
            return torch.from_numpy(decoder.decode(decoder_inputs(self.model, labels).numpy()))

        def forward(batch: Batch) -> Tensor:
            encode(batch)
            return logits(batch["labels"])

        def write(batch: Batch) -> tuple[list[str], Tensor]:
            ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
            made = torch.from_numpy(generate(decoder, ids, mask, self.settings))
            return module._texts(made), torch.full((len(made),), torch.nan)  # type: ignore[operator]

        def score(batch: Batch) -> Tensor:
            encode(batch)
            columns = []
            for label in module._label_ids:  # type: ignore[union-attr]
                ids = label[label != -100].expand(len(batch["input_ids"]), -1)
                terms = F.cross_entropy(logits(ids).float().transpose(1, 2), ids, reduction="none")
                columns.append(-terms.mean(1) if module.length_normalised else -terms.sum(1))
            return torch.stack(columns, 1)

        return {"forward": forward, "generate": write, "label_log_likelihoods": score}


def _left(probe: Probe) -> Probe:
    """With its padding on the left."""
    from lightning_ft.functional.packing import move_padding

    mask, ids = move_padding(probe.inputs["attention_mask"], probe.inputs["input_ids"], left=True)
    return probe._replace(inputs={"input_ids": ids, "attention_mask": mask})


def generation_settings(config: Any, **chosen: Any) -> GenerationSettings:
    """The settings of a ``GenerationConfig``, in which what is not said has transformers' default.

    Args:
        config: Of transformers.
        chosen: What comes in place of its own.

    Raises:
        ValueError: It wants something that is not done here.
    """
    defaults = config._get_default_generation_params()
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    known = {**{n: v for n, v in defaults.items() if v is not None}, **given, **chosen}
    _check_known(given, defaults)
    result = {name: known[name] for name in GenerationSettings._fields if known.get(name) is not None}
    for name in ("eos_token_id", "forced_eos_token_id", "decoder_start_token_id"):
        if isinstance(value := result.get(name, []), int):
            result[name] = [value]
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in result.items()}
    return GenerationSettings(**plain)


_NEUTRAL = (
    "bos_token_id", "cache_implementation", "max_length", "output_attentions", "output_hidden_states", "output_logits",
    "output_scores", "return_dict_in_generate", "transformers_version", "use_cache", "_from_model_config",
    "remove_invalid_values", "disable_compile", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size",
    "is_assistant", "low_memory",
)  # fmt: skip
"""Settings that change nothing of what is written, or belong to ways of writing that are chosen by a caller."""


def _check_known(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    known = {*GenerationSettings._fields, *_NEUTRAL}
    for name, value in given.items():
        if name not in known and value != defaults.get(name):
            raise ValueError(
                f"the model's generation_config has {name}={value!r}, which exported text generation does not do: set "
                f"model.generation_config.{name} = None, or give a `head` whose settings leave it out"
            )
