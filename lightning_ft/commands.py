"""The commands of ``lightning-ft`` that are none of the trainer's: export, verify, serve, benchmark, soup, demo."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, auto_cli
from typing_extensions import override

from lightning_ft.cli import FineTuningCLI, run

if TYPE_CHECKING:
    from lightning_ft.core.report import Report
    from lightning_ft.export import Gate


class _Built(FineTuningCLI):
    """A command line that makes trainer, model and data, and runs nothing."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


def export(
    source: str,
    out: str,
    *,
    to: Literal["onnx", "tensorrt", "triton", "genai", "hf"] = "onnx",
    precision: Literal["fp32", "fp16", "int8", "int8-static", "int8-weights", "int4"] = "fp32",
    data: str | None = None,
    max_drop: float = 0.005,
    metric: str | None = None,
    members: str | None = None,
    opset: int = 20,
    max_length: int = 128,
    tolerance: float = 1e-5,
    name: str = "model",
    device: Literal["cpu", "gpu"] = "cpu",
    deploy: bool = False,
) -> None:
    """Write a folder for serving, proved equal to the source before anything is left in OUT.

    Args:
        source: A checkpoint of a lightning_ft module (``runs/run_0/checkpoints/last.ckpt``) or a Hugging Face folder;
            for TensorRT and Triton also a folder that was exported to ONNX.
        out: The folder to create. An earlier export there is replaced when the new one is whole, and kept beside it.
        to: ONNX; engines of TensorRT; a model repository of Triton; onnxruntime-genai; or a Hugging Face folder.
        precision: Of the graph. Below fp32 the validation data of ``--data`` judge it.
        data: Configuration of the run: its data judge and calibrate, give TensorRT the lengths to expect, and the
            folder the windows in which long texts are read.
        max_drop: How much of the task's metric a graph in fewer bits may lose; 0.005 is half a point.
        metric: The metric that counts, such as ``val_f1``; by default the usual one of the task.
        members: A folder of snapshots, whose mean answer becomes the graph.
        opset: ONNX operator set.
        max_length: Longest input, in tokens, for which equality is proved.
        tolerance: Largest error of the graph in fp32, relative to the largest logit.
        name: Of the model in a Triton repository.
        device: What Triton runs the graph on.
        deploy: Also write Dockerfiles, an AWS Lambda function and a Hugging Face endpoint handler into OUT.
    """
    from lightning_ft.export import export_genai, export_hf, export_onnx

    if deploy and to != "onnx":
        raise ValueError(f"--deploy writes what runs an ONNX folder, and --to is {to}: leave one of them out")
    if to == "hf":
        print(export_hf(source, out))
        return
    built = None if data is None else _built(data, source)
    gate = _gate(precision, built, max_drop, metric)
    if to == "genai":
        if precision not in ("fp32", "int8", "int4"):
            raise ValueError(f"--precision {precision}: onnxruntime-genai has fp32, int8 and int4")
        print(export_genai(source, out, precision=precision, gate=gate, max_length=max_length, progress=_say))
        return

    def graph(place: str) -> Report:
        return export_onnx(
            source,
            place,
            precision=precision,
            gate=gate,
            settings=_reading(built),
            members=members or (),
            opset=opset,
            max_length=max_length,
            tolerance=tolerance,
            progress=_say,
        )

    if to == "onnx":
        print(graph(out))
        if deploy:
            _deploy(Path(out))
        return
    with _exported(source, out, graph) as folder:
        print(_engines(folder, out, built, max_length) if to == "tensorrt" else _repository(folder, out, name, device))


def _built(data: str, source: str) -> FineTuningCLI:
    """The data of a run, with the labels of a checkpoint, so that no training file is needed."""
    path = ["--ckpt_path", source] if Path(source).is_file() else []
    return run(["validate", "--config", str(data), *path], cli_class=_Built)


def _gate(precision: str, built: FineTuningCLI | None, max_drop: float, metric: str | None) -> Gate | None:
    from lightning_ft.export import Gate

    if precision == "fp32":
        return None
    if built is None:
        raise ValueError(
            f"--precision {precision} is judged on validation data: name the run's configuration with --data, such as "
            "runs/run_0/config.yaml"
        )
    return Gate(built.datamodule, max_drop, metric)


def _reading(built: FineTuningCLI | None) -> dict[str, Any] | None:
    """How the run's data make tokens of a row; None for the defaults, and for several tasks."""
    from lightning_ft.data import MultiTaskData
    from lightning_ft.export import reading_settings

    if built is None or isinstance(built.datamodule, MultiTaskData):
        return None
    return reading_settings(built.datamodule)


@contextmanager
def _exported(source: str, out: str, graph: Callable[[str], Report]) -> Iterator[Path]:
    """An ONNX folder: the source itself, or one that is made of it and goes again."""
    place = Path(source)
    if (place / "head.json").is_file() or any(place.glob("*/head.json")):
        yield place
        return
    parent = Path(out).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".onnx-") as made:
        folder = Path(made) / "onnx"
        print(graph(str(folder)), end="\n\n")
        yield folder


def _engines(folder: Path, out: str, built: FineTuningCLI | None, max_length: int) -> Report:
    from lightning_ft.export import Profile, build_tensorrt, token_lengths

    profile = None
    if built is not None and (folder / "model.onnx").is_file() and not _writes(folder):
        lengths = token_lengths(built.datamodule)
        profile = Profile.of(lengths, longest=max(max_length, *lengths))
    return build_tensorrt(folder, out, profile=profile, progress=_say)


def _writes(folder: Path) -> bool:
    """Whether the graph has a cache, for which lengths of texts are not all that counts."""
    return "graphs" in json.loads((folder / "head.json").read_text(encoding="utf-8"))["settings"]


def _repository(folder: Path, out: str, name: str, device: Literal["cpu", "gpu"]) -> Report:
    from lightning_ft.export import write_triton_repository

    engine = any(folder.glob("**/engine.json"))
    return write_triton_repository(
        folder,
        out,
        name=name,
        backend="tensorrt" if engine else "onnxruntime",
        device="gpu" if engine else device,
        progress=_say,
    )


def _deploy(out: Path) -> None:
    from lightning_ft.export import write_deployment

    for folder in [out] if (out / "head.json").is_file() else sorted(file.parent for file in out.glob("*/head.json")):
        print(f"\n{write_deployment(folder)}")


def verify(folder: str, *, source: str | None = None, members: str | None = None) -> None:
    """Check that an exported folder still is what was written, and what it was written from.

    Args:
        folder: What ``lightning-ft export`` wrote.
        source: What it was made of: its weights must be those that were exported, and outputs are compared again.
        members: As for the export.
    """
    from lightning_ft.export import verify as check

    print(check(folder, source=source, members=members or (), progress=_say))


def serve(arguments: list[str]) -> None:
    """``lightning-ft serve``: an exported folder behind HTTP, until it is stopped."""
    from lightning_ft.export import launch

    sys.exit(launch(arguments))


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
        labelled = next((member for member in options.members if Path(member).is_file()), options.members[0])
        built = _built(options.config, labelled)
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


def intrinsic_dimension(arguments: list[str]) -> None:
    """``lightning-ft intrinsic_dimension search``: the smallest subspace in which training does nearly as well."""
    from lightning_ft.intrinsic import command

    command(arguments)


def seeds(arguments: list[str]) -> None:
    """``lightning-ft seeds``: many runs that differ in their seeds, ranked early; the best are finished."""
    from lightning_ft.seeds.command import command

    command(arguments)


COMMANDS: Mapping[str, Callable[[list[str]], None]] = MappingProxyType(
    {
        "export": partial(_typed, export),
        "verify": partial(_typed, verify),
        "serve": serve,
        "benchmark": _benchmark,
        "soup": soup,
        "intrinsic_dimension": intrinsic_dimension,
        "seeds": seeds,
        "demo": demo,
    }
)
"""By name; each takes the rest of the command line."""
