"""The tiny Llama that both sides of a comparison read, and the recorded numbers.

Nothing here imports torch or jax. Weights are drawn again wherever they are needed, so they are
not stored.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
TOKENIZER = HERE / "tokenizer"  # tokenizer.json and tokenizer_config.json
VOCAB = 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": "float32",
}
SPECIAL = ("<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# Two chat templates with TRL's marks around what the assistant writes; without the marks they are
# the templates that models come with.
TEMPLATES = {
    "plain": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "lines": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ '\\n' }}"
        "{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ m.content }}<|end|>{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
    ),
}


def unmarked(template: str) -> str:
    """The template without TRL's marks."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def weights(seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """float32 weights by their Hugging Face names, with those of a reward model's head. Large
    enough that attention, probabilities and gradients are far from uniform."""
    width, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 16
    shapes = {"model.embed_tokens.weight": (VOCAB, width), "model.norm.weight": (width,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        parts = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        shapes |= {f"model.layers.{layer}.{k}.weight": shape for k, shape in parts.items()}
    shapes["score.weight"] = (1, width)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, width)
    return {name: _draw(name, shape, seed) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
    x = random.standard_normal(shape)
    return np.float32(1 + 0.1 * x if "norm" in name else 0.2 * x)


def write_model(to: Path, seed: int = 0, tied: bool = False, reward: bool = False) -> Path:
    """Writes a Hugging Face folder with its tokenizer: the policy (seed 0), or the reference model
    and teacher (seed 1). With `reward`, a scalar head instead of the vocabulary's."""
    to.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **IDS, "tie_word_embeddings": tied}
    arrays = weights(seed, tied)
    arrays.pop("lm_head.weight" if reward else "score.weight", None)
    if reward:
        config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(arrays, to / "model.safetensors", metadata={"format": "pt"})
    for each in sorted(TOKENIZER.glob("*.json")):
        shutil.copy(each, to / each.name)
    return to


def matrix() -> np.ndarray:
    """The matrix that NF4 quantizes: 320 blocks of 64, one with an outlier and one of zeros."""
    x = np.float32(0.05 * np.random.Generator(np.random.PCG64(0)).standard_normal((64, 320)))
    x[3, 5], x[1, :64] = 1.5, 0
    return x


def read(name: str) -> dict[str, np.ndarray]:
    """Recorded arrays of recorded/NAME.npz."""
    with np.load(RECORDED / f"{name}.npz") as arrays:
        return dict(arrays)


def read_adapter(name: str) -> dict[str, np.ndarray]:
    """Arrays of the PEFT folder recorded/NAME."""
    return load_file(RECORDED / name / "adapter_model.safetensors")
