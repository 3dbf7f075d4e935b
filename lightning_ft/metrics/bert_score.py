"""BERTScore: how well the words of two texts match in an encoder's space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def greedy_f1(made: Tensor, wanted: Tensor, made_mask: Tensor, wanted_mask: Tensor) -> Tensor:
    """F1 of greedy matching: each token counts with its best cosine on the other side.

    P = mean over tokens x of the text of max over y of cos(x, y), R the other way round, F1 = 2·P·R / (P + R).

    Args:
        made: Token vectors of the texts, ``(batch, tokens, width)``; vectors of zeros match nothing.
        wanted: Those of the references, ``(batch, other tokens, width)``.
        made_mask: Which tokens are counted, ``(batch, tokens)``.
        wanted_mask: The same for the references.

    Returns:
        ``(batch,)``; 0 where there is no token to count.

    Example:
        >>> a, b = torch.eye(2)[None], torch.tensor([[[1.0, 0.0]]])
        >>> greedy_f1(a, b, torch.ones(1, 2), torch.ones(1, 1))  # P = 1/2, R = 1
        tensor([0.6667])
    """
    made, wanted = torch.nn.functional.normalize(made, dim=-1), torch.nn.functional.normalize(wanted, dim=-1)
    cosines = made @ wanted.mT
    precision = (cosines.amax(2) * made_mask).sum(1) / made_mask.sum(1).clamp(min=1)
    recall = (cosines.amax(1) * wanted_mask).sum(1) / wanted_mask.sum(1).clamp(min=1)
    total = precision + recall
    return torch.where(total > 0, 2 * precision * recall / torch.where(total > 0, total, 1), 0.0)


class BERTScore(Metric):
    """Mean BERTScore F1 of texts, without idf weights and rescaling; of several references the best counts.

    The encoder is loaded at the first update, kept out of checkpoints, and run in fp32. As in the authors' package the
    first and last special tokens may be matched but are not counted.

    Args:
        model: Folder or hub name of the encoder. Scores of different encoders, or layers, cannot be compared.
        layer: Which hidden states: 0 is the embeddings; by default the last. The authors name the best one for each
            encoder (17 for roberta-large).
        batch_size: Texts encoded at a time.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Reference:
        Zhang et al. 2020, "BERTScore: Evaluating Text Generation with BERT".
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    f1: Tensor
    texts: Tensor

    def __init__(
        self, model: str, *, layer: int | None = None, batch_size: int = 64, allow_pickle: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.batch_size = batch_size
        self.allow_pickle = allow_pickle
        # In a list: as a submodule the encoder would be trained and saved with the model that is measured.
        self._loaded: list[Any] = []
        # Not `total`: a MetricCollection takes metrics for one whose states have the same names and first values.
        self.add_state("f1", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("texts", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts.

        Args:
            texts: The generated texts.
            references: One reference or more for each of them.

        Raises:
            OSError: The encoder is not there.
        """
        pairs = [(text, other) for text, known in zip(texts, references, strict=True) for other in known]
        # Alike in length, so that batches hold little padding.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        scores = torch.empty(len(pairs))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            made, wanted = zip(*(pairs[i] for i in chosen), strict=True)
            scores[chosen] = self._f1(made, wanted)
        for part in torch.split(scores, [len(known) for known in references]):
            self.f1 += part.max().to(self.device)
        self.texts += len(texts)

    @override
    def compute(self) -> Tensor:
        """The mean, a scalar."""
        return self.f1 / self.texts

    def _f1(self, made: Sequence[str], wanted: Sequence[str]) -> Tensor:
        (a, a_mask), (b, b_mask) = self._vectors(made), self._vectors(wanted)
        return greedy_f1(a, b, a_mask, b_mask).cpu()

    @torch.no_grad()
    def _vectors(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token vectors, zero where there is no token, and which of them count."""
        encoder, tokenizer = self._encoder()
        batch = tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=min(tokenizer.model_max_length, _positions(encoder)),
            return_tensors="pt",
            return_special_tokens_mask=True,
        ).to(self.device)
        special = batch.pop("special_tokens_mask")
        with torch.autocast(self.device.type, enabled=False):
            states = encoder(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"]
        vectors = states[-1 if self.layer is None else self.layer] * mask[..., None]
        return vectors, mask * (1 - special)

    def _encoder(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if not self._loaded:
            from transformers import AutoModel, AutoTokenizer

            try:
                safe = None if self.allow_pickle else True
                encoder = AutoModel.from_pretrained(self.model, dtype=torch.float32, use_safetensors=safe)
                self._loaded = [encoder.eval().requires_grad_(False), AutoTokenizer.from_pretrained(self.model)]
            except OSError as error:
                raise OSError(
                    f"bertscore model {self.model!r} could not be loaded from safetensors: give an encoder's folder, "
                    "or allow_pickle=True if it holds pickle weights alone and you trust them"
                ) from error
        encoder, tokenizer = self._loaded
        return encoder.to(self.device), tokenizer


def _positions(encoder: PreTrainedModel) -> int:
    """Tokens that the encoder takes at most. RoBERTa's table of positions begins behind its padding index."""
    size: int = getattr(encoder.config, "max_position_embeddings", 512)
    tables = [m for m in encoder.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == size]
    return size - max((1 + m.padding_idx for m in tables if m.padding_idx is not None), default=0)
