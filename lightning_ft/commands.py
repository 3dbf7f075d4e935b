"""The commands of ``lightning-ft`` that are none of the trainer's: export, benchmark, soup, demo."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from jsonargparse import ArgumentParser, auto_cli
from typing_extensions import override

from lightning_ft.cli import FineTuningCLI, run


class _Built(FineTuningCLI):
    """A command line that makes trainer, model and data, and runs nothing."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


def export(
    source: str,
    out: str,
    *,
    to: Literal["onnx", "hf"] = "onnx",
    precision: Literal["fp32", "fp16", "int8", "int8-weights", "int4"] = "fp32",
    data: str | None = None,
    max_drop: float = 0.005,
    metric: str | None = None,
    opset: int = 20,
    max_length: int = 128,
) -> None:
    """Write a folder for serving, proved equal to the source before anything is left in OUT.

    Args:
        source: A checkpoint of a lightning_ft module (``runs/run_0/checkpoints/last.ckpt``) or a Hugging Face folder.
        out: The folder to create.
        to: ONNX, or a Hugging Face folder.
        precision: Of the ONNX graph. Below fp32 the validation data of ``--data`` judge it.
        data: Configuration of the run: its validation data.
        max_drop: How much of the task's metric a graph in fewer bits may lose; 0.005 is half a point.
        metric: The metric that counts, such as ``val_f1``; by default the usual one of the task.
        opset: ONNX operator set.
        max_length: Longest input, in tokens, for which equality is proved.
    """
    from lightning_ft.export import Gate, export_hf, export_onnx

    if to == "hf":
        print(export_hf(source, out))
        return
    if precision != "fp32" and data is None:
        raise ValueError(
            f"--precision {precision} is judged on validation data: name the run's configuration with --data, such as "
            "runs/run_0/config.yaml"
        )
    gate = None
    if precision != "fp32":
        # A checkpoint's labels are the data's, so that no training file is needed.
        path = ["--ckpt_path", source] if Path(source).is_file() else []
        built = run(["validate", "--config", str(data), *path], cli_class=_Built)
        gate = Gate(built.datamodule, max_drop, metric)
    print(
        export_onnx(
            source,
            out,
            precision=precision,
            gate=gate,
            opset=opset,
            max_length=max_length,
            progress=_say,
        )
    )


def soup(arguments: list[str]) -> None:
    """``lightning-ft soup``: average fine-tuned checkpoints."""
    from lightning_ft.soup import scorer
    from lightning_ft.soup import soup as mix

    parser = ArgumentParser(prog="lightning-ft soup", description=(mix.__doc__ or "").splitlines()[0])
    parser.add_argument("members", nargs="+", type=str, help="Checkpoints, or Hugging Face folders with safetensors.")
    parser.add_argument("--out", type=str, required=True, help="The checkpoint to write.")
    parser.add_argument("--greedy", action="store_true", help="Take in only what improves the score.")
    parser.add_argument("--config", type=str, help="Configuration of a run: its validation data score the weights.")
    parser.add_argument("--monitor", type=str, default="val_accuracy", help="The logged value that is the score.")
    parser.add_argument("--mode", type=Literal["max", "min"], default="max", help="Which score is better.")
    options = parser.parse_args(arguments)
    if options.greedy and options.config is None:
        parser.error("--greedy scores mixtures on validation data: --config names the run's configuration")
    score = None
    if options.config is not None:
        # The labels are the members', so that no training file is needed.
        checkpoint = next((member for member in options.members if Path(member).is_file()), None)
        path = [] if checkpoint is None else ["--ckpt_path", checkpoint]
        built = run(["validate", "--config", options.config, *path], cli_class=_Built)
        score = scorer(built.trainer, built.model, built.datamodule, options.monitor)
    print(
        mix(
            options.members,
            options.out,
            score=score,
            greedy=options.greedy,
            mode=options.mode,
            progress=_say,
        )
    )


def demo(arguments: list[str]) -> None:
    """``lightning-ft demo``: fine-tune a small encoder on film reviews, start to end."""
    from lightning_ft.demo import SENTENCES
    from lightning_ft.demo import demo as show

    parser = ArgumentParser(prog="lightning-ft demo", description=(show.__doc__ or "").splitlines()[0])
    parser.add_argument("sentences", nargs="*", type=str, default=list(SENTENCES), help="What to classify in the end.")
    parser.add_argument("--folder", type=str, default="runs/demo", help="Where everything is written.")
    parser.add_argument("--prepare", action="store_true", help="Only write the data and the model.")
    options = parser.parse_args(arguments)
    show(options.sentences or SENTENCES, folder=options.folder, prepare=options.prepare)


def benchmark(
    folders: list[str],
    *,
    source: str | None = None,
    task: str = "",
    runtimes: list[Literal["torch", "torch.compile", "torch bf16"]] | None = None,
    shapes: list[tuple[int, int]] | None = None,
    rounds: int = 3,
    repeats: int = 10,
    threads: int | None = None,
    plot: str = "latency.png",
    report: str | None = None,
) -> None:
    """Time exported models beside the same model in PyTorch, each in a process of its own.

    Args:
        folders: What ``lightning-ft export`` wrote.
        source: The checkpoint or Hugging Face folder for PyTorch; by default the one that the first folder names.
        task: Which of the source's heads, of several.
        runtimes: What runs the source; all by default.
        shapes: Rows and tokens of the batches, such as ``[[1,32],[32,64]]``.
        rounds: Of A B A' B'.
        repeats: Runs in a pass.
        threads: Of each runtime; by default as many as there are cores.
        plot: The picture to write.
        report: A file of JSON to write, too.
    """
    from lightning_ft.core.files import atomic_file
    from lightning_ft.export import benchmark as measure
    from lightning_ft.export.benchmark import PYTORCH, SHAPES

    named = {Path(folder).name: folder for folder in folders}
    if len(named) < len(folders):
        named = {folder: folder for folder in folders}
    found = measure(
        named if len(folders) > 1 else folders[0],
        source,
        task=task,
        runtimes=PYTORCH if runtimes is None else runtimes,
        shapes=SHAPES if shapes is None else shapes,
        rounds=rounds,
        repeats=repeats,
        threads=threads,
        plot=plot,
        progress=_say,
    )
    if report is not None:
        with atomic_file(report) as path:
            path.write_text(found.to_json() + "\n", encoding="utf-8")
    print(found)


def _benchmark(arguments: list[str]) -> None:
    """Folders one after another, not as a list in brackets."""
    parser = ArgumentParser(prog="lightning-ft benchmark", description=(benchmark.__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=str, help="What lightning-ft export wrote.")
    parser.add_function_arguments(benchmark, skip={"folders"})
    options = parser.parse_args(arguments)
    benchmark(**options.as_dict())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _typed(function: Callable[..., None], arguments: list[str]) -> None:
    """A command whose arguments are those of a function."""
    auto_cli(function, args=arguments, as_positional=True, prog=f"lightning-ft {function.__name__}")


COMMANDS: Mapping[str, Callable[[list[str]], None]] = MappingProxyType(
    {"export": partial(_typed, export), "benchmark": _benchmark, "soup": soup, "demo": demo}
)
"""By name; each takes the rest of the command line."""
