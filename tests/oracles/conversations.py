"""The tokenizer and the token masks: conversations as TRL's trainers tokenize them."""

import json
from typing import Any

import tiny
import tokenizers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

SYSTEM = {"role": "system", "content": "answer in one line"}
TURNS = [
    ("what is a stone?", "a small rock."),
    ("and a tree?", "a plant with a trunk.\nit grows."),
    ("why?", "no one knows, yet all ask."),
]
# Prompts with a better, a worse and an unrelated answer.
PREFERENCES = [
    (1, False, "a small rock.", "a stone is a stone is a stone"),
    (1, True, "one hard small thing", "no"),
    (2, False, "a plant that grows.", "it is a rock, or a plant, or no one knows."),
    (3, True, "all ask, no one knows.", "why not?"),
]
# For the unpaired objective: which of the two answers, and whether it is a good one.
FEEDBACK = [("chosen", True), ("rejected", False), ("chosen", True), ("rejected", True)]


def messages(turns: int, system: bool) -> list[dict[str, str]]:
    """A conversation of so many turns."""
    said = [SYSTEM] if system else []
    for question, answer in TURNS[:turns]:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return said


def train_tokenizer() -> None:
    """Writes a byte-level tokenizer with few merges, whose alphabet is that of the texts."""
    level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = level(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=tiny.VOCAB, special_tokens=list(tiny.SPECIAL), show_progress=False
    )
    texts = [SYSTEM["content"], *sum(TURNS, ()), *(t for p in PREFERENCES for t in p[2:])]
    made.train_from_iterator(texts, trainer)
    assert made.get_vocab_size() == tiny.VOCAB, made.get_vocab_size()
    tiny.TOKENIZER.mkdir(exist_ok=True)
    made.save(str(tiny.TOKENIZER / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (tiny.TOKENIZER / "tokenizer_config.json").write_text(text)


def tokenizer(template: str) -> Any:
    """The tokenizer with a chat template, for TRL."""
    made = AutoTokenizer.from_pretrained(tiny.TOKENIZER)
    made.chat_template = tiny.TEMPLATES[template]
    return made


def options(scratch: Any, **fields: Any) -> dict[str, Any]:
    """What every trainer is configured with: no truncation, no shuffling, no reports, float32."""
    return {
        "output_dir": str(scratch / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_length": None,
        "gradient_checkpointing": False,
        **fields,
    }


def model(folder: Any) -> Any:
    """The model of a folder, with plain attention."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def pairs() -> list[dict[str, Any]]:
    """Preference pairs in TRL's conversational shape."""
    rows = []
    for turns, system, chosen, rejected in PREFERENCES:
        rows.append(
            {
                "prompt": messages(turns, system)[:-1],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


def feedback() -> list[dict[str, Any]]:
    """Single answers with a label, in TRL's conversational shape."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": label}
        for pair, (name, label) in zip(pairs(), FEEDBACK, strict=True)
    ]


def sft_rows(template: str, folder: Any, scratch: Any, only: str) -> list[dict[str, Any]]:
    """Conversations as SFTTrainer prepares them, with the loss on every message of the assistant
    ("assistant") or on the last one ("completion")."""
    talks = [messages(turns, system) for turns in (1, 2, 3) for system in (False, True)]
    if only == "assistant":
        rows = [{"messages": talk} for talk in talks]
    else:
        rows = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks]
    trainer = SFTTrainer(
        model=model(folder),
        args=SFTConfig(**options(scratch, assistant_only_loss=only == "assistant")),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(template),
    )
    return [
        {"messages": talk, "ids": row["input_ids"], "labels": row["labels"]}
        for talk, row in zip(talks, trainer.train_dataset, strict=True)
    ]


def dpo_trainer(template: str, folder: Any, reference: Any, scratch: Any, **fields: Any) -> Any:
    """A DPOTrainer on `pairs`."""
    return DPOTrainer(
        model=model(folder),
        ref_model=model(reference),
        args=DPOConfig(**options(scratch, **fields)),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tokenizer(template),
    )


def kto_trainer(template: str, folder: Any, reference: Any, scratch: Any, **fields: Any) -> Any:
    """A KTOTrainer on `feedback`."""
    fields = {"per_device_train_batch_size": len(FEEDBACK), **fields}
    return KTOTrainer(
        model=model(folder),
        ref_model=model(reference),
        args=KTOConfig(**options(scratch, **fields)),
        train_dataset=Dataset.from_list(feedback()),
        processing_class=tokenizer(template),
    )


def record_masks(folder: Any, reference: Any, scratch: Any) -> dict[str, Any]:
    """For each template: conversations with ids and labels, and preference data with ids."""
    recorded = {}
    for template in tiny.TEMPLATES:
        dpo = dpo_trainer(template, folder, reference, scratch).train_dataset
        kto = kto_trainer(template, folder, reference, scratch).train_dataset
        recorded[template] = {
            "template": tiny.TEMPLATES[template],
            "assistant": sft_rows(template, folder, scratch, "assistant"),
            "completion": sft_rows(template, folder, scratch, "completion"),
            "pairs": [
                {**pair, **{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}}
                for pair, row in zip(pairs(), dpo, strict=True)
            ],
            "feedback": [
                {**each, **{k: row[k] for k in ("prompt_ids", "completion_ids")}}
                | {"kl_completion_ids": row["KL_completion_ids"]}
                for each, row in zip(feedback(), kto, strict=True)
            ],
        }
    return recorded
