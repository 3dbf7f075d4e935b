"""A process that runs one model and says how long it takes: ``python -m lightning_ft.export.latency onnx FOLDER``.

:class:`lightning_ft.export.timing.Stopwatch` starts it and talks to it in lines of JSON. It stays out of the package's
``__init__``, since running a module that its own package has imported draws a warning.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_ft.export.extras import require
from lightning_ft.export.generation import CausalDecoder, EncoderDecoder, GenerationSettings, generate
from lightning_ft.export.heads import open_source
from lightning_ft.export.parity import open_graph
from lightning_ft.export.reading.graph import SLOW_FUSIONS
from lightning_ft.export.timing import Runtime
from lightning_ft.export.wrappers import GraphWrapper, graph_inputs

SMALLEST = 32
"""Tokens that any vocabulary has, for a graph that lies alone."""

CHOICES = 2
NEW_TOKENS = 32
GENERATES = ("text-generation", "text2text-generation")

Step = Callable[[], object]
Prepare = Callable[[int, int], Step]
"""Makes what is timed, of a batch's rows and their tokens."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a model, then time what each line of standard input asks for."""
    parser = argparse.ArgumentParser(description="Time batches of a model.")
    parser.add_argument("runtime", choices=get_args(Runtime))
    parser.add_argument("path", type=Path)
    parser.add_argument("--task", default="")
    parser.add_argument("--threads", type=int, required=True)
    chosen = parser.parse_args(arguments)
    # What libraries print is no answer: it goes to standard error, in Python and below.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(chosen.threads)
    if chosen.runtime != "onnx":
        prepare = of_model(chosen.path, chosen.runtime, chosen.task)
    elif (chosen.path / "genai_config.json").is_file():
        prepare = of_genai(chosen.path, chosen.threads)
    elif (head := _head(chosen.path)).get("task") in GENERATES:
        prepare = of_generator(chosen.path, head["settings"], chosen.threads)
    else:
        prepare = of_graph(chosen.path, chosen.threads)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        step = prepare(asked["batch"], asked["length"])
        print(json.dumps(_milliseconds(step, asked["warmup"], asked["repeats"])), file=answers, flush=True)


def of_graph(path: Path, threads: int) -> Prepare:
    """A folder's graph as :func:`~lightning_ft.export.load_session` opens it, a file's as ONNX Runtime does itself."""
    graph = path / "model.onnx" if path.is_dir() else path
    session = open_graph(graph, threads=threads, fusions_off=SLOW_FUSIONS if path.is_dir() else ())
    vocabulary = _vocabulary(graph.parent)

    def prepare(batch: int, length: int) -> Step:
        feed = {}
        for entry in session.get_inputs():
            # Rows come first and tokens last, whatever others call these axes.
            sizes = [
                CHOICES if name == "choices" else length if axis else batch for axis, name in enumerate(entry.shape)
            ]
            shape = [known if isinstance(known, int) else size for known, size in zip(entry.shape, sizes, strict=True)]
            feed[entry.name] = _values(entry.name, shape, vocabulary).numpy()
        return lambda: session.run(None, feed)

    return prepare


def of_generator(folder: Path, settings: Mapping[str, Any], threads: int) -> Prepare:
    """A decoder's graphs with their cache: :data:`NEW_TOKENS` tokens are written, each the most probable one."""
    sessions = {part: open_graph(folder / name, threads=threads) for part, name in settings["graphs"].items()}
    start = settings["generation"]["decoder_start_token_id"]
    chosen = GenerationSettings(max_new_tokens=NEW_TOKENS, decoder_start_token_id=start)

    def prepare(batch: int, length: int) -> Step:
        ids = _values("input_ids", [batch, length], _vocabulary(folder)).numpy()
        mask = _values("attention_mask", [batch, length], 0).numpy()
        encoder = sessions.get("encoder")
        decoder = (
            CausalDecoder(sessions["decoder"])
            if encoder is None
            else EncoderDecoder(encoder, sessions["decoder"], start=start)
        )
        return lambda: generate(decoder, ids, mask, chosen)

    return prepare


def of_genai(folder: Path, threads: int) -> Prepare:
    """The same in onnxruntime-genai."""
    runtime: Any = require("onnxruntime_genai", extra="genai")
    config = runtime.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = runtime.Model(config)

    def prepare(batch: int, length: int) -> Step:
        ids = _values("input_ids", [batch, length], _vocabulary(folder)).int().numpy()

        def step() -> object:
            params = runtime.GeneratorParams(model)
            whole = length + NEW_TOKENS
            params.set_search_options(max_length=whole, min_length=whole, do_sample=False, batch_size=batch)
            generator = runtime.Generator(model, params)
            generator.append_tokens(ids)
            for _ in range(NEW_TOKENS):
                generator.generate_next_token()
            return generator

        return step

    return prepare


def of_model(path: Path, runtime: str, task: str) -> Prepare:
    """What a checkpoint or a Hugging Face folder holds, in PyTorch."""
    part = open_source(path)[task]
    names = graph_inputs(part.model, part.tokenizer)
    vocabulary = getattr(getattr(part.model, "config", None), "vocab_size", SMALLEST)
    model: Any = part.model.bfloat16() if runtime == "torch bf16" else part.model
    wrapper = part.head.wrap(model.eval())
    if not isinstance(wrapper, GraphWrapper):
        return _written(model, runtime, vocabulary)
    run: Callable[..., Any] = torch.compile(wrapper, dynamic=True) if runtime == "torch.compile" else wrapper

    def prepare(batch: int, length: int) -> Step:
        tokens = {name: _values(name, [batch, length], vocabulary) for name in names}
        inputs = wrapper.sample(tokens, torch.Generator().manual_seed(0))

        def step() -> object:
            with torch.inference_mode():
                return run(**inputs)

        return step

    return prepare


def _written(model: Any, runtime: str, vocabulary: int) -> Prepare:
    """``generate`` of transformers, with no end but :data:`NEW_TOKENS` tokens."""
    if runtime == "torch.compile":
        raise RuntimeError("generate() compiles with a static cache only, which is another algorithm")
    from transformers import GenerationConfig

    known = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=known.pad_token_id or 0,
        bos_token_id=known.bos_token_id,
        decoder_start_token_id=known.decoder_start_token_id,
    )

    def prepare(batch: int, length: int) -> Step:
        ids = _values("input_ids", [batch, length], vocabulary)

        def step() -> object:
            with torch.inference_mode():
                return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))

        return step

    return prepare


def _head(path: Path) -> dict[str, Any]:
    file = path / "head.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _vocabulary(folder: Path) -> int:
    config = folder / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return int(known.get("vocab_size", SMALLEST))


def _values(name: str, shape: Sequence[int], vocabulary: int) -> Tensor:
    """Random tokens, all of them read; of other inputs zeros."""
    if name == "input_ids":
        return torch.randint(vocabulary, tuple(shape), generator=torch.Generator().manual_seed(0))
    return torch.ones(*shape, dtype=torch.long) if name == "attention_mask" else torch.zeros(*shape, dtype=torch.long)


def _milliseconds(step: Step, warmup: int, repeats: int) -> list[float]:
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    return times


if __name__ == "__main__":
    main()
