"""Times LoRA fine-tuning with PEFT, as a yardstick: prints one JSON line.

    python tests/oracles/bench_lora.py FOLDER DATA [--loop plain|trl] [--batch 4] ...

FOLDER is a Hugging Face folder, and DATA a .jsonl or .jsonl.gz file of {"question": ..., "answer":
...} lines, as GSM8K has.
They become full rows of `length` tokens with the loss on every token: no padding, and no mask but
the causal one, so attention takes its fastest path. Everything is float32 on the CPU. Measure on an
idle machine: torch's threads wait for each other, and other work slows them many times over.

`plain` is a loop around PEFT's model and a fused AdamW; `trl` is TRL's SFTTrainer, whose fused head
never holds all logits.
"""

import argparse
import gzip
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 2e-4


def main() -> None:
    """Trains a few steps and prints steps per second, memory and the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--loop", choices=("plain", "trl"), default="plain")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    options = parser.parse_args()

    rows = packed(options)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    before = resident()
    ends, losses = (plain if options.loop == "plain" else trl)(model, config, rows, options)
    seconds = [b - a for a, b in itertools.pairwise(ends)][options.warmup :]
    result = {key: x for key, x in vars(options).items() if key not in ("folder", "data")}
    result |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(statistics.median(seconds), 4),
        "steps_per_second": round(1 / statistics.median(seconds), 4),
        "tokens_per_second": round(options.batch * options.length / statistics.median(seconds), 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "mb_before_training": before,
        "losses": [round(loss, 4) for loss in losses],
    }
    print(json.dumps(result))


def resident() -> int:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def packed(options: argparse.Namespace) -> torch.Tensor:
    """Rows of tokens, end to end from the conversations, enough for all steps."""
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    count = (options.steps + options.warmup) * options.batch
    ids: list[int] = []
    open_ = gzip.open if options.data.suffix == ".gz" else open
    for line in open_(options.data, "rt"):
        record = json.loads(line)
        talk = [
            {"role": "user", "content": record["question"]},
            {"role": "assistant", "content": record["answer"]},
        ]
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= count * options.length:
            return torch.tensor(ids[: count * options.length]).reshape(count, options.length)
    raise SystemExit(f"{options.data} has too little text; use fewer --steps.")


def plain(
    model: Any, config: LoraConfig, rows: torch.Tensor, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """(times between steps, losses) of a loop without a trainer."""
    model = get_peft_model(model, config).train()
    if options.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if options.compile else model
    ends, losses = [time.perf_counter()], []
    for batch in rows.split(options.batch):
        loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.perf_counter())
    return ends, losses


class Clock(TrainerCallback):
    """Records when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def trl(
    model: Any, config: LoraConfig, rows: torch.Tensor, options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """(times between steps, losses) of TRL's trainer."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                max_steps=options.steps + options.warmup,
                per_device_train_batch_size=options.batch,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                max_length=options.length,
                gradient_checkpointing=options.checkpointing,
                torch_compile=options.compile,
                shuffle_dataset=False,
                train_sampling_strategy="sequential",
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}),
            processing_class=AutoTokenizer.from_pretrained(options.folder),
            peft_config=config,
            callbacks=[clock],
        )
        trainer.train()
    return clock.ends, [each["loss"] for each in trainer.state.log_history if "loss" in each]


if __name__ == "__main__":
    main()
