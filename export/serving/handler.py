"""The model beside this file as a Hugging Face Inference Endpoint.

An endpoint's toolkit imports ``handler.py`` from the root of a model repository, makes one ``EndpointHandler`` and
calls it with the parsed JSON of each request (https://huggingface.co/docs/inference-endpoints/guides/custom_handler).
What is raised goes back to the client as an error. Choose "Custom" as the endpoint's framework: of a PyTorch model the
toolkit leaves out ``*.onnx`` when it fetches the repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_ft.export.predictor import Predictor
from lightning_ft.export.serving.rows import Limits, RefusalError, read_rows, task_of

LIMITS = Limits()


class EndpointHandler:
    """Answers as a ``transformers`` pipeline of the same task does, where there is one.

    Args:
        path: The model's folder; by default where this file lies.
    """

    def __init__(self, path: str = "") -> None:
        folder = Path(path) if path else Path(__file__).parent
        self.predict, self.task = Predictor(folder), task_of(folder)

    def __call__(self, data: Any) -> Any:
        """Answer a request.

        Args:
            data: A mapping with ``inputs``, a row or a list of rows, and optionally ``parameters``: ``top_k`` for
                text classification, the number of labels to return, best first; null for all.

        Returns:
            For text classification ``{"label", "score"}``: in a list for a single text, a list of them for a list; a
            list of labels for each text where ``top_k`` is given. For token classification a list of ``{"entity_group",
            "score", "word", "start", "end"}`` for each text, for question answering ``{"score", "start", "end",
            "answer"}``, for feature extraction the embedding of the text (a pipeline has those of its tokens). For
            other tasks what ``lightning-ft predict`` writes. One for a row, a list for a list.

        Raises:
            ValueError: Something in the request is not as it should be.
        """
        if not isinstance(data, Mapping) or "inputs" not in data:
            raise ValueError('expected {"inputs": …}, with "parameters" beside it or not')
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        self._check(parameters)
        many = isinstance(inputs, list)
        try:
            rows = read_rows({"rows": inputs if many else [inputs]}, self.task, LIMITS).rows
        except RefusalError as refusal:
            raise ValueError(str(refusal).replace("rows", "inputs", 1)) from None
        answers = self.predict.answer(self.predict.encode(rows))
        if self.task.name == "text-classification":
            return self._classes(answers, parameters, inputs)
        answers = [self._as_pipeline(answer) for answer in answers]
        return answers if many else answers[0]

    def _as_pipeline(self, answer: dict[str, Any]) -> Any:
        if self.task.name == "feature-extraction":
            return answer["embedding"]
        if self.task.name == "question-answering":
            return {name: answer.get(name) for name in ("score", "start", "end", "answer")}
        if self.task.name != "token-classification":
            return answer
        group = "entity_group" if "entities" in answer else "entity"  # without a scheme, words that have a tag
        found = answer.get("entities", [word for word in answer.get("words", ()) if word["label"] != "O"])
        renamed = {"label": group, "score": "score", "text": "word", "start": "start", "end": "end"}
        return [{new: span[old] for old, new in renamed.items()} for span in found]

    def _check(self, parameters: Any) -> None:
        known = {"top_k"} if self.task.name == "text-classification" else set()
        if not isinstance(parameters, Mapping) or set(parameters) - known:
            got = f"{len(set(parameters) - known)} others" if isinstance(parameters, Mapping) else "no object"
            raise ValueError(f"parameters: expected {', '.join(known) or 'none for this task'}, got {got}")
        top = parameters.get("top_k")
        if top is not None and (not isinstance(top, int) or isinstance(top, bool) or top < 1):
            raise ValueError("parameters: top_k must be a whole number, 1 or more, or null for all labels")

    def _classes(self, answers: list[dict[str, Any]], parameters: Mapping[str, Any], inputs: Any) -> Any:
        ranked = [self._ranked(answer) for answer in answers]
        if "top_k" in parameters:
            found: list[Any] = [labels[: parameters["top_k"]] for labels in ranked]
            return found if isinstance(inputs, list) else found[0]
        found = [labels[0] for labels in ranked]
        return found[0] if isinstance(inputs, Mapping) else found

    def _ranked(self, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
        shares = answer.get("probabilities", [answer["score"]])  # of a regression the score alone
        labels = self.predict.labels or [f"LABEL_{number}" for number in range(len(shares))]
        pairs = [{"label": label, "score": share} for label, share in zip(labels, shares, strict=True)]
        return sorted(pairs, key=lambda pair: -pair["score"])
