"""Real tokens per second of training: batches drawn at random, batches of like lengths, packed sequences. On the CPU.

The same Llama (hidden size 256, four blocks, random weights) under Lightning's Trainer with CausalLM, over the same
instructions, as InstructionData batches them: rows drawn at random and padded; rows of similar length, padded; several
rows packed into one sequence. Batch sizes are chosen so that a step has about as many real tokens everywhere. Each
segment trains on some batches of an epoch, taken evenly from it; its figure is the seconds per 1,000 tokens that are no
padding, prompts included.

Not timed: tokenising, packing and collating, which are done before; evaluation, saving, logging. The losses mean
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from _timing import DATA, SHARED, Row, arguments, compare, fit, interleave, loader, needs, publish, start
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from lightning_ft.data.instructions import InstructionData
from lightning_ft.modules import Architecture
from lightning_ft.modules.causal_lm import CausalLM

PACKED, BUCKETED, RANDOM = "packed", "similar lengths", "random"


class Size(NamedTuple):
    """How much is run: segments of ``steps`` batches, the first ``dropped`` left out."""

    rounds: int
    steps: int = 14
    dropped: int = 2
    rows: int = 8
    max_length: int = 1024
    hidden: int = 256
    layers: int = 4


class Set(NamedTuple):
    """The batches of a segment, and the real tokens of each."""

    batches: list[dict[str, Tensor]]
    tokens: list[int]
    padding: float


def batches(name: str, file: Path, tokenizer: str, size: Size) -> Set:
    """An even choice of the batches of the first epoch."""
    packing = name == PACKED
    data = InstructionData(
        tokenizer,
        str(file),
        packing=packing,
        bucket=name == BUCKETED,
        max_length=size.max_length,
        over_long="drop",
        batch_size=size.rows,
    )
    data.setup("fit")
    rows = data.need("train")
    if packing:  # as many real tokens in a step, about
        data.batch_size = max(1, round(size.rows * rows.lengths.double().mean().item() / size.max_length))
    every = list(data.train_dataloader())
    chosen = every[:: max(1, len(every) // size.steps)][: size.steps]
    length = dict(zip(rows.rows.tolist(), rows.lengths.tolist(), strict=True))
    tokens = [sum(length[row] for row in batch["row"].tolist()) for batch in chosen]
    padding = sum(batch["input_ids"].numel() for batch in chosen) / sum(tokens) - 1
    return Set(chosen, tokens, padding)


def module(tokenizer: str, size: Size) -> CausalLM:
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=size.max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CausalLM(Architecture(config, words))


def segment(model: CausalLM, chosen: Set, dropped: int) -> float:
    """Seconds per 1,000 real tokens."""
    ends = fit(model, loader(chosen.batches)).stamps[1:-1]
    return 1000 * (ends[-1] - ends[dropped - 1]) / sum(chosen.tokens[dropped:])


def speeds(sets: dict[str, Set], seconds: dict[str, list[float]]) -> list[Row]:
    return [
        {
            "batches": name,
            "real tokens/s": 1000 / median(seconds[name]),
            "padding over real tokens": chosen.padding,
            "real tokens of a step": median(chosen.tokens),
        }
        for name, chosen in sets.items()
    ]


def measure(sets: dict[str, Set], model: CausalLM, size: Size) -> dict[str, list[float]]:
    contestants: dict[str, Callable[[], float]] = {
        name: lambda chosen=chosen: segment(model, chosen, size.dropped) for name, chosen in sets.items()
    }
    return interleave(contestants, size.rounds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "self_instruct", help="folder with train.jsonl")
    parser.add_argument("--tokenizer", default=str(SHARED / "models" / "aidreams260k"), help="folder or hub name")
    options = start(parser)
    needs(file := options.data / "train.jsonl")
    size = Size(1, 4, 1, 4, 512, 16, 1) if options.quick else Size(options.rounds)
    sets = {name: batches(name, file, options.tokenizer, size) for name in (PACKED, BUCKETED, RANDOM)}
    torch.manual_seed(0)
    model = module(options.tokenizer, size)
    seconds = measure(sets, model, size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    publish(
        "packing",
        options.results,
        setting=f"{options.data.name}, rows of up to {size.max_length} tokens ({Path(options.tokenizer).name}), Llama "
        f"of {parameters / 1e6:.1f}M parameters, about {size.rows} rows a step. {2 * size.rounds} segments of "
        f"{size.steps} steps, the first {size.dropped} dropped, seed 0. Ratios of seconds per real token: median and "
        "quartiles; target: packed 1.5 times as fast as random.",
        tables={
            "Real tokens per second": speeds(sets, seconds),
            "Seconds per real token": compare(seconds, PACKED, {BUCKETED: None, RANDOM: 1 / 1.5}),
        },
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
