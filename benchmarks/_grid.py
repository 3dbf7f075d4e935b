"""What benchmarks over tasks x methods x seeds share: arguments, MiniLM, tables of accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _timing import DATA, Row, arguments, markdown, needs, publish, start
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lightning_ft.core.files import atomic_file
from lightning_ft.demo import prepare_model


def begin(doc: str | None, tasks: Iterable[str], methods: Iterable[str], *, steps: int, seeds: int) -> Any:
    """The options of the command line, with the ``model`` prepared: with --quick a tiny one."""
    tasks, methods = list(tasks), list(methods)
    parser = arguments(doc)
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder with {'/, '.join(tasks)}/")
    parser.add_argument("--runs", type=Path, required=True, help="folder of finished runs; empty it for new code")
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--steps", type=int, default=steps, help="of a run, or of a long one where there are two")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--threads", type=int, default=None)
    options = start(parser)
    if options.threads:
        torch.set_num_threads(options.threads)
    for task in options.tasks:
        needs(options.data / task / "train.jsonl")
    options.model = options.runs / "model"
    if not (options.model / "config.json").is_file():
        prepare_model(options.model)
    if options.quick:
        source, options.model = options.model, options.runs / "tiny"
        _tiny(options.model, source)
    return options


def _tiny(folder: Path, source: Path) -> None:
    """MiniLM's architecture and words, so narrow that a trial takes no time."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModel.from_config(AutoConfig.from_pretrained(source, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def finish(
    name: str,
    options: Any,
    tables: dict[str, list[Row]],
    results: dict[str, dict[str, list[dict[str, Any]]]],
    *,
    setting: str,
) -> None:
    """Write the tables as Markdown and JSON, with what each run came to."""
    hours = sum(one["seconds"] for found in results.values() for runs in found.values() for one in runs) / 3600
    with atomic_file(options.results / f"{name}.md") as path:
        text = "\n".join(f"**{title}**\n\n{markdown(rows)}\n" for title, rows in tables.items())
        path.write_text(text, encoding="utf-8")
    publish(
        name,
        options.results,
        setting=f"{'A tiny model' if options.quick else 'all-MiniLM-L6-v2'}, {setting}, seeds 0 to "
        f"{options.seeds - 1}; {hours:.1f} hours of training.",
        tables=tables,
        runs=results,
    )
