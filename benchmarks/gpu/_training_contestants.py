"""The contestants of training.py: our modules, plugins and callbacks under Lightning, and the Hugging Face Trainer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from _training_plan import RANK, Variant
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ft.modules import Architecture, CausalLM, SequenceClassification

CLIP, RATE, DECAY = 1.0, 2e-5, 0.01
STEPS = 1_000_000  # the clock ends a training
Batch = dict[str, Tensor]
Settings = dict[str, Any]


class Repeated(Dataset[Batch]):
    """A few batches, over and over."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Batch:
        return self._batches[index % len(self._batches)]


def build(variant: Variant, settings: Settings) -> SequenceClassification | CausalLM:
    """Our module in fp32 with random weights, which are drawn on the device."""
    from transformers import BertConfig, LlamaConfig

    given = {name: value for name, value in settings["config"].items() if name != "decoder"}
    attention = "sdpa" if variant.attention == "flash" else variant.attention
    rates: Any = {"learning_rate": RATE, "weight_decay": DECAY, "warmup": 0.0, "schedule": "constant"}
    with torch.device(settings["device"]):
        if settings["config"]["decoder"]:
            return CausalLM(Architecture(LlamaConfig(**given, attn_implementation=attention)), **rates)
        config = BertConfig(**given, attn_implementation=attention)
        return SequenceClassification(Architecture(config), num_labels=2, **rates)


def lora(settings: Settings) -> Any:
    """LoRA on all linear layers but the output's."""
    from peft import LoraConfig

    kind = "CAUSAL_LM" if settings["config"]["decoder"] else "SEQ_CLS"
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules="all-linear", task_type=kind)


# ---- ours


def train_ours(
    variant: Variant, settings: Settings, batches: Sequence[Batch], clock: Callable[[], bool]
) -> tuple[float, int]:
    """Until the clock says so; the last loss, and how many weights were trained."""
    module = build(variant, settings)
    if variant.compiled:
        module.model.compile()
    stop = _Stop(clock)
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if settings["device"] == "cuda" else "cpu",
        devices=1,
        precision=_precision(variant),
        plugins=_plugins(variant),
        callbacks=[*_callbacks(variant, settings), stop],
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, DataLoader(Repeated(batches), batch_size=None))
    return float(stop.loss), _trained(module)


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class _Stop(Callback):
    def __init__(self, clock: Callable[[], bool]) -> None:
        self.clock = clock
        self.loss: Any = math.nan

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = outputs["loss"]
        trainer.should_stop = self.clock()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # Lightning moves all to the host when it ends: tens of GB, seconds of each pass.
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
            optimizer.state.clear()


def _precision(variant: Variant) -> Any:
    if variant.precision == "fp16" or variant.base in ("int8", "int4"):
        return None  # the plugin's
    return "bf16-mixed" if variant.precision == "bf16" else "32-true"


def _plugins(variant: Variant) -> list[Any]:
    if variant.precision == "fp16":
        from lightning_ft.plugins import FP16

        return [FP16()]
    if variant.base == "int8":
        from lightning_ft.plugins import EightBit

        return [EightBit(compute="bf16-mixed")]
    if variant.base == "int4":
        from lightning_ft.plugins import FourBit

        return [FourBit(compute="bf16-mixed")]
    return []


def _callbacks(variant: Variant, settings: Settings) -> list[Callback]:
    if variant.optimizer == "adamw8bit":
        from lightning_ft.callbacks import EightBitOptimizer

        return [EightBitOptimizer("adamw")]
    if variant.base != "full":
        from lightning_ft.callbacks import PEFT

        return [PEFT(lora(settings))]
    return []


# ---- theirs


def train_theirs(
    variant: Variant, settings: Settings, batches: Sequence[Batch], clock: Callable[[], bool], folder: Path
) -> tuple[float, int]:
    """Until the clock says so; the mean loss, and how many weights were trained."""
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments
    from transformers import Trainer as HFTrainer

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = clock()

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=STEPS,
            per_device_train_batch_size=1,  # a batch is its row
            train_sampling_strategy="sequential",
            learning_rate=RATE,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            optim="adamw_bnb_8bit" if variant.optimizer == "adamw8bit" else "adamw_torch_fused",
            bf16=variant.precision == "bf16",
            fp16=variant.precision == "fp16",
            torch_compile=variant.compiled,
            use_cpu=settings["device"] == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        model = _their_model(variant, settings, folder)
        trainer = HFTrainer(
            model,
            arguments,
            train_dataset=Repeated(batches),
            data_collator=itemgetter(0),
            callbacks=[Stop()],
        )
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().training_loss), _trained(model)


def _their_model(variant: Variant, settings: Settings, folder: Path) -> nn.Module:
    if variant.base == "full":
        return build(variant, settings).model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if variant.base == "lora":
        return get_peft_model(build(variant, settings).model, lora(settings))
    model = _quantised(variant, settings, folder)
    return get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), lora(settings))


def _quantised(variant: Variant, settings: Settings, folder: Path) -> nn.Module:
    """As its documentation has it: weights in bf16 from a folder, quantised while they are loaded."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    decoder = settings["config"]["decoder"]
    if not (folder / "config.json").is_file():
        build(variant, settings).model.to(torch.bfloat16).save_pretrained(folder)
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    skipped = ["lm_head"] if decoder else ["classifier"]
    quantisation = BitsAndBytesConfig(
        load_in_8bit=variant.base == "int8",
        load_in_4bit=variant.base == "int4",
        llm_int8_skip_modules=skipped,
        **(four if variant.base == "int4" else {}),
    )
    kind: Any = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
    model: nn.Module = kind.from_pretrained(
        folder,
        quantization_config=quantisation,
        dtype=torch.bfloat16,
        device_map={"": 0 if settings["device"] == "cuda" else "cpu"},
    )
    return model
