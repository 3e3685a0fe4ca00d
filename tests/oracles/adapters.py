"""PEFT folders of adapters, with the logits of the adapted model and gradients in it.

Keys of the recorded arrays: tokens and positions; NAME/logits at these positions, NAME/merged after
merge_and_unload, NAME/loss (mean cross-entropy of every next token) and NAME/grad/WEIGHT, by the
names in adapter_model.safetensors or, of prefixes, those of PEFT's modules.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import conversations
import numpy as np
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def lora(*targets: str, **fields: Any) -> LoraConfig:
    """LoRA of rank 4 on these modules."""
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **fields
    )


def prefix(**fields: Any) -> PrefixTuningConfig:
    """Prefix tuning with five keys and values in each layer."""
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **fields)


ADAPTERS = {
    "lora": lora(*LINEAR),
    "rslora": lora("q_proj", "v_proj", use_rslora=True),
    # Of other ranks and alphas in some weights, and none in the first layer.
    "lora_patterns": lora(
        "q_proj",
        "down_proj",
        layers_to_transform=[1],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 3},
    ),
    "lora_head": lora("q_proj", "embed_tokens", "lm_head"),
    "lora_saved": lora("q_proj", modules_to_save=["norm", "lm_head"]),
    "prefix": prefix(),
    "prefix_projected": prefix(prefix_projection=True, encoder_hidden_size=24),
}
# On the model whose embedding is also its head.
TIED = {
    "tied": lora(*ATTENTION),
    "tied_embedding": lora("q_proj", "embed_tokens"),
    "tied_head": lora("q_proj", "lm_head"),
    "tied_both": lora("q_proj", "embed_tokens", ensure_weight_tying=True),
}
# PEFT 0.21 adds to the shared matrix what belongs to one of its two uses, or adds it twice.
MERGED_WRONG = ("tied_embedding", "tied_head", "tied_both")
WITH_GRADIENTS = ("lora", "rslora", "prefix", "prefix_projected")
POSITIONS = slice(3, None, 7)  # whose logits are recorded


def record(to: Path, scratch: Path) -> dict[str, np.ndarray]:
    """Writes the folders to `to`/NAME and returns the arrays."""
    rows = conversations.sft_rows("plain", tiny.write_model(scratch / "base"), scratch, "assistant")
    ids = torch.tensor([row["ids"][:24] for row in rows[2:4]])
    arrays = {"tokens": np.int16(ids), "positions": np.arange(24)[POSITIONS]}
    for tied, configs in ((False, ADAPTERS), (True, TIED)):
        folder = tiny.write_model(scratch / f"base_{tied}", tied=tied)
        for name, config in configs.items():
            model = get_peft_model(conversations.model(folder), config)
            fill(model)
            arrays |= evaluated(model, ids, name)
            save(model, to / name)
            if isinstance(config, LoraConfig):
                arrays |= merged(model, ids, name, arrays[f"{name}/logits"])
    return arrays


def fill(model: Any) -> None:
    """Sets what trains to random numbers: LoRA starts from zeros."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
            drawn = torch.from_numpy(random.standard_normal(param.shape))
            param.data.copy_(1 + 0.1 * drawn if "norm" in name else 0.3 * drawn)


def evaluated(model: Any, ids: torch.Tensor, name: str) -> dict[str, np.ndarray]:
    """Logits, and loss and gradients of the tokens, each from those before it."""
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    output.loss.backward()
    logits = output.logits.detach().numpy()[:, POSITIONS]
    arrays = {f"{name}/logits": logits, f"{name}/loss": np.float32(output.loss.item())}
    if name in WITH_GRADIENTS:
        for weight, param in model.named_parameters():
            if param.grad is not None:
                arrays[f"{name}/grad/{weight.replace('.default', '')}"] = param.grad.numpy()
    return arrays


def merged(model: Any, ids: torch.Tensor, name: str, logits: Any) -> dict[str, np.ndarray]:
    """Logits after merging, where PEFT does that right."""
    after = model.merge_and_unload()(input_ids=ids).logits.detach().numpy()[:, POSITIONS]
    is_wrong = not np.allclose(after, logits, atol=1e-4)
    assert is_wrong == (name in MERGED_WRONG), name
    return {} if is_wrong else {f"{name}/merged": after}


def save(model: Any, to: Path) -> None:
    """Writes a PEFT folder, without the name of this machine's folder."""
    model.save_pretrained(to, save_embedding_layers=False)
    (to / "README.md").unlink(missing_ok=True)
    path = to / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "base"}
    # PEFT writes sets, in any order.
    config = {k: sorted(x) if isinstance(x, list) else x for k, x in config.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
