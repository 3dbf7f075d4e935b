"""Milliseconds a token, in a process of its own: ``python -m lightning_ft.export.token_latency FOLDER --runtime onnx``.

:func:`lightning_ft.export.measure_tokens` runs this module and reads its line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np

from lightning_ft.export.extras import require
from lightning_ft.export.timing import TokenRuntime

Write = Callable[[list[int], int], Iterator[float | None]]
"""Takes a prompt and a number of tokens; gives, for each as it comes, None, or the moment when it came."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the greedy tokens after a prompt, one by one, and print one line of JSON."""
    parser = argparse.ArgumentParser(description="Time the tokens of a decoder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", choices=get_args(TokenRuntime), required=True)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    vocabulary = json.loads((chosen.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    prompt = np.random.default_rng(0).integers(0, vocabulary, chosen.prompt).tolist()
    prepare = {"torch": _torch, "torch-bf16": _torch_bf16, "onnx": _onnx, "genai": _genai}[chosen.runtime]
    write = prepare(chosen.folder, chosen.threads)
    list(write(prompt, 8))  # warms up
    first, steps = _time(write(prompt, chosen.tokens))
    known = {name: getattr(chosen, name) for name in ("runtime", "prompt", "tokens", "threads")}
    found = {"first_ms": first, "median_ms": statistics.median(steps), "mean_ms": statistics.fmean(steps)}
    print(json.dumps({**known, **found, "min_ms": min(steps)}))


def _time(tokens: Iterator[float | None]) -> tuple[float, list[float]]:
    """Milliseconds of the first token, with the prompt, and of each that follows."""
    moments = [time.perf_counter()]
    moments += [time.perf_counter() if moment is None else moment for moment in tokens]
    times = [1e3 * (after - before) for before, after in pairwise(moments)]
    return times[0], times[1:]


def _torch(folder: Path, threads: int, dtype: str = "float32") -> Write:
    """As ``generate`` runs it, to the last token."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None

    class Clock(StoppingCriteria):
        """Notes when each token came."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def write(prompt: list[int], tokens: int) -> Iterator[float | None]:
        clock, ids = Clock(), torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        yield from clock.times

    return write


def _torch_bf16(folder: Path, threads: int) -> Write:
    return _torch(folder, threads, "bfloat16")


def _onnx(folder: Path, threads: int) -> Write:
    from lightning_ft.export.generation import CausalDecoder, GenerationSettings, stream
    from lightning_ft.export.parity import load_session

    decoder = CausalDecoder(load_session(folder, threads=threads))

    def write(prompt: list[int], tokens: int) -> Iterator[float | None]:
        ids = np.array([prompt], np.int64)
        for _ in stream(decoder, ids, np.ones_like(ids), GenerationSettings(max_new_tokens=tokens)):
            yield None

    return write


def _genai(folder: Path, threads: int) -> Write:
    onnxruntime_genai = require("onnxruntime_genai", extra="genai")

    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def write(prompt: list[int], tokens: int) -> Iterator[float | None]:
        params = onnxruntime_genai.GeneratorParams(model)
        longest = len(prompt) + tokens
        params.set_search_options(max_length=longest, min_length=longest, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            yield None

    return write


if __name__ == "__main__":
    main()
