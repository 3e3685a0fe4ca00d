"""Records TRL's losses and gradients on a real model, in float64, to compare ours in float32 with.

    python tests/oracles/smollm2.py FOLDER OUT
    PYTHONPATH=tests:tests/objectives python tests/oracles/check_smollm2.py OUT

FOLDER is the Hugging Face folder of SmolLM2-135M-Instruct. The conversations are those of the other
oracles, in the model's own chat template. OUT gets the recorded arrays, the reference model and the
teacher: the same with 1 % and 10 % of noise on their weights. float64, because float32 itself is
off by up to 1e-4 on this model.
"""

import argparse
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())

import conversations
import losses
import numpy as np
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# SmolLM2's template with TRL's marks around what the assistant writes.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    """Records everything in OUT."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    policy, reference, teacher, reward = write_models(options.folder, options.out)

    conversations.model = model
    conversations.tokenizer = lambda template: tokenizer(options.folder)
    losses.AutoModelForSequenceClassification = Scalar
    losses.AGREE = 1e-3  # one of the two computes in float32
    losses.DPO = {name: losses.DPO[name] for name in ("sigmoid", "smoothed", "ipo")}
    tiny.write_model = lambda to, **fields: reward if fields.get("reward") else policy

    gradients = losses.gradients
    losses.gradients = lambda loss, model, name, whole=None: gradients(loss, model, name)
    parts = {
        "preference": lambda: losses.preference(policy, reference, scratch),
        "unpaired": lambda: losses.unpaired(policy, reference, scratch),
        "simpo": lambda: losses.simpo(policy, scratch),
        "reward": lambda: losses.reward(scratch),
        "distill": lambda: losses.distill(policy, teacher),
        "sft": lambda: losses.sft(policy, scratch),
    }
    for name, record in parts.items():
        to = options.out / f"{name}.npz"
        if not to.exists():
            np.savez(to, **record())
            print(name, "recorded", flush=True)


def write_models(folder: Path, out: Path) -> list[Path]:
    """The policy, the reference model, the teacher and a reward model with a random head."""
    weights = {name: x.float() for name, x in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    for name in ("_model_name_or_path", "torch_dtype"):
        config.pop(name, None)
    random = torch.Generator().manual_seed(0)

    def noisy(share: float) -> dict[str, torch.Tensor]:
        return {
            name: x * (1 + share * torch.randn(x.shape, generator=random))
            for name, x in weights.items()
        }

    head = torch.randn((1, config["hidden_size"]), generator=random) / 8
    models = {
        "policy": (weights, {}),
        "reference": (noisy(0.01), {}),
        "teacher": (noisy(0.1), {}),
        "reward": (
            {**weights, "score.weight": head},
            {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
        ),
    }
    for name, (arrays, fields) in models.items():
        to = out / name
        to.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**config, "dtype": "float32", "pad_token_id": 2, **fields})
        (to / "config.json").write_text(text)
        save_file(arrays, to / "model.safetensors", metadata={"format": "pt"})
        for each in folder.glob("*token*"):
            shutil.copy(each, to / each.name)
    return [out / name for name in models]


def model(folder: Path) -> Any:
    """The model of a folder in float64."""
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return doubled(made)


def doubled(made: Any) -> Any:
    """The same model in float64: transformers computes norms and RoPE in float32 whatever the type
    of the weights. The embedding gives the pad token, which ends turns, a gradient too."""
    made.model.embed_tokens.padding_idx = None
    made.double()
    for module in made.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = functools.partial(norm, module)
    made.model.rotary_emb.forward = functools.partial(rope, made.config)
    return made


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the type of its input."""
    variance = x.pow(2).mean(-1, keepdim=True)
    return module.weight * (x * torch.rsqrt(variance + module.variance_epsilon))


def rope(config: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cosines and sines in the type of `x`."""
    width = config.hidden_size // config.num_attention_heads
    powers = torch.arange(0, width, 2, dtype=x.dtype) / width
    angles = position_ids[..., None].to(x.dtype) * config.rope_parameters["rope_theta"] ** -powers
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


class Scalar:
    """The reward model of a folder in float64."""

    @staticmethod
    def from_pretrained(folder: Path, **fields: Any) -> Any:
        made = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **fields)
        return doubled(made)


def tokenizer(folder: Path) -> Any:
    """SmolLM2's tokenizer, with its template for TRL."""
    made = transformers.AutoTokenizer.from_pretrained(folder)
    made.chat_template = TEMPLATE
    return made


if __name__ == "__main__":
    main()
