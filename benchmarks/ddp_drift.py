"""Whether two processes stay equal under DDP while layers thaw. On the CPU; nothing here is timed.

A transformer of four blocks, two gloo processes, each with its own data (Lightning's DistributedSampler), unfreezing by
epoch: Lightning's BackboneFinetuning (which releases the backbone at once), finetuning-scheduler (from `make rivals`;
an explicit schedule, one block an epoch) and GradualUnfreezing; as a control, no callback. Each with and without
find_unused_parameters. The module has what their documentation asks for: its body is called ``backbone``, and its
optimiser holds what requires gradients when it is built. After every optimiser step all parameters of the two processes
are compared: the largest absolute difference. Replicas must not differ at all; if ours do, this script fails.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from argparse import SUPPRESS
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _rivals import FTS, answers, begin, find_rival, rival_option, tell
from _timing import Row, arguments, publish, start
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.callbacks import GradualUnfreezing

NOBODY, LIGHTNING, OURS = "none: all train", "BackboneFinetuning", "GradualUnfreezing"
RANKS, BLOCKS, WIDTH, VOCABULARY, LENGTH, BATCH, STEPS = 2, 4, 16, 50, 8, 4, 6
EPOCHS = BLOCKS + 2
"""One for the head, one for each block, one for the embeddings."""


class Backbone(nn.Module):
    """A transformer of four blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True) for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states."""
        hidden = self.tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


class Classifier(LightningModule):
    """The backbone and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(WIDTH, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        tokens, labels = batch
        return F.cross_entropy(self.head(self.backbone(tokens)[:, 0]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What trains now: callbacks that freeze before it add the rest later."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        """The same rows on both processes; Lightning shares them out."""
        tokens = torch.randint(VOCABULARY, (RANKS * BATCH * STEPS, LENGTH), generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(tokens, tokens[:, 0] % 2), BATCH, shuffle=True)


class Compare(Callback):
    """The largest difference between the ranks' parameters after each step, and how many tensors train in it."""

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.training: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Gather the other rank's parameters."""
        own = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        everyone = [torch.empty_like(own) for _ in range(RANKS)]
        torch.distributed.all_gather(everyone, own)
        self.differences.append((everyone[0] - everyone[1]).abs().max().item())
        self.training.append(sum(p.requires_grad for p in pl_module.parameters()))


def callbacks(name: str) -> list[Callback]:
    """The callback, and what it needs."""
    if name == NOBODY:
        return []
    if name == LIGHTNING:
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)]
    if name == OURS:
        return [GradualUnfreezing("1 epoch")]
    fts = import_module("finetuning_scheduler")
    parts = [r"head\..*", r"backbone\.norm\..*", *(rf"backbone\.layers\.{i}\..*" for i in reversed(range(BLOCKS)))]
    phases = [parts[:2], *([part] for part in parts[2:]), [r"backbone\.tokens\..*"]]
    schedule = {i: {"params": phase, "max_transition_epoch": i + 1} for i, phase in enumerate(phases)}
    scheduler = fts.FinetuningScheduler(
        schedule, base_max_lr=1e-3, restore_best=False, epoch_transitions_only=True, logging_level=40
    )
    return [scheduler, fts.FTSCheckpoint(save_top_k=0)]


def train(name: str, unused: bool, epochs: int) -> Row:
    """One run, on this rank."""
    seed_everything(0, verbose=False)
    compare = Compare()
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=RANKS,
            strategy=f"ddp_find_unused_parameters_{unused}".lower(),  # a name: the rival refuses an object
            callbacks=[*callbacks(name), compare],
            default_root_dir=root,
            logger=False,
            enable_checkpointing=name == FTS,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier())
    return {
        "callback": name,
        "unused": unused,
        "differences": compare.differences,
        "training tensors": compare.training,
    }


def table(runs: list[Row]) -> list[Row]:
    """When the ranks part, and how far."""
    rows = []
    for run in runs:
        differences = run["differences"]
        first = next((step for step, difference in enumerate(differences, 1) if difference > 0), None)
        trains = run["training tensors"]
        thaw = trains.count(trains[0]) + 1
        rows.append(
            {
                "callback": run["callback"],
                "find_unused_parameters": run["unused"],
                "steps": len(differences),
                "first thaw before step": thaw if thaw <= len(trains) else None,
                "ranks differ from step": "never" if first is None else first,
                "largest difference at the end": differences[-1],
            }
        )
    return rows


def both_ranks(python: Path | str, names: list[str], epochs: int) -> list[Row]:
    """Runs of these callbacks in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)}
    command = ["--quick", f"--epochs={epochs}", "--contestants", *names]
    numbers = [{"LOCAL_RANK": str(rank), "RANK": str(rank)} for rank in range(RANKS)]
    ranks = [begin(python, __file__, *command, env={**os.environ, **rendezvous, **number}) for number in numbers]
    with ThreadPoolExecutor(RANKS) as pool:
        told = [pool.submit(answers, rank) for rank in ranks]
        try:
            # Whichever fails first says why; the other one may wait for it for ever.
            for done in as_completed(told):
                done.result()
            return told[0].result()
        finally:
            for rank in ranks:
                rank.kill()


def main() -> None:
    parser = arguments(__doc__)
    rival_option(parser)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--contestants", nargs="+", help=SUPPRESS)
    options = start(parser)
    torch.set_num_threads(1)
    if options.contestants:
        contest(options)
        return
    epochs = 3 if options.quick else options.epochs
    version = find_rival(options.rival)
    runs = both_ranks(sys.executable, [NOBODY, LIGHTNING, OURS], epochs)
    if version is not None:
        runs[-2:-2] = both_ranks(options.rival, [FTS], epochs)
    publish(
        "ddp_drift",
        options.results,
        setting=f"{RANKS} gloo processes, {BLOCKS} blocks of width {WIDTH}, batch {BATCH} on each, AdamW at 1e-3, "
        f"{STEPS} steps an epoch, {epochs} epochs, seed 0. {FTS} {version or 'was left out'}.",
        tables={"Replicas under DDP": table(runs)},
        differences=runs,
    )
    if any(any(run["differences"]) for run in runs if run["callback"] == OURS):
        sys.exit(f"{OURS}: the ranks differ; see the table")


def contest(options: Any) -> None:
    """In a contestant's process: all its runs, told by the first rank."""
    for name in options.contestants:
        for unused in (False, True):
            run = train(name, unused, options.epochs)
            if os.environ["RANK"] == "0":
                tell(run)


if __name__ == "__main__":
    main()
