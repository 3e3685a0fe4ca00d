"""Writes family_defaults.json: for each folder and each field of its config.json, the value that
transformers gives the field when it is absent.

    pip install transformers && python tests/hf/family_defaults.py

Adds the installed version to the file. torch is not needed.
"""

import json
from pathlib import Path

import transformers

HERE = Path(__file__).parent
FAMILIES = (
    "llama2",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "olmo2",
)
# Fields that decide what a model computes.
FIELDS = [
    "attention_bias",
    "attn_logit_softcapping",
    "decoder_sparse_step",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_key_value_heads",
    "num_local_experts",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
]
ALIASES = {
    "rope_theta": ["rope_parameters"],
    "num_experts": ["num_local_experts"],
    "num_local_experts": ["num_experts"],
}


def without(config, field):
    """The value of `field` in transformers' own object when config.json lacks it."""
    rest = {k: v for k, v in config.items() if k not in (field, "model_type")}
    for alias in ALIASES.get(field, ()):
        rest.pop(alias, None)
    values = transformers.AutoConfig.for_model(config["model_type"], **rest).to_dict()
    if field == "rope_theta" and "rope_parameters" in values:  # transformers 5
        parameters = values["rope_parameters"] or {}
        return parameters.get("full_attention", parameters).get("rope_theta")
    if field == "rope_local_base_freq" and "rope_parameters" in values:
        return values["rope_parameters"].get("sliding_attention", {}).get("rope_theta")
    return values.get(field)


def defaults(family):
    config = json.loads((HERE / "folders" / family / "config.json").read_text())
    return {field: without(config, field) for field in FIELDS}


if __name__ == "__main__":
    path = HERE / "family_defaults.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[transformers.__version__] = {family: defaults(family) for family in FAMILIES}
    path.write_text(json.dumps(kept, indent=1) + "\n")
