"""Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786)."""

from collections.abc import Mapping
from typing import Any

from lm.hf import config_json
from lm.hf.config_json import Fields
from lm.hf.family import ATTENTION, DENSE_FFN, SANDWICH_NORMS, WHOLE_MODEL, Family
from lm.model.attention import QKNorm
from lm.model.config import Config


def _gemma2(fields: Fields) -> Config:
    sliding = config_json.is_sliding(fields, lambda layer: layer % 2 == 0)
    window = fields("sliding_window", 4096)
    attention = [
        _attention(
            fields,
            window=window if is_sliding else None,
            position=config_json.rope(fields),
            softcap=fields("attn_logit_softcapping", 50.0),
        )
        for is_sliding in sliding
    ]
    return _model(fields, attention, logit_softcap=fields("final_logit_softcapping", 30.0))


def _attention(fields: Fields, **options: Any) -> Any:
    bias = fields("attention_bias", False)
    head_dim, scalar = fields("head_dim", 256), fields("query_pre_attn_scalar", 256)
    scale = None if scalar == head_dim else scalar**-0.5
    return config_json.attention(
        fields, head_dim=head_dim, scale=scale, bias=bias, out_bias=bias, **options
    )


def _model(fields: Fields, attention: Any, **options: Any) -> Config:
    fields("hidden_act", None)  # an older name, which transformers does not read either
    fields.only("use_bidirectional_attention", False, None)
    return config_json.model(
        fields,
        attention,
        config_json.dense_ffn(fields, "hidden_activation", "gelu_pytorch_tanh"),
        norm=config_json.norm(fields, offset=1.0),
        placement="sandwich",
        embed_scale=fields("hidden_size") ** 0.5,
        tied=fields("tie_word_embeddings", True),
        **options,
    )


GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    rows=WHOLE_MODEL + ATTENTION + DENSE_FFN + SANDWICH_NORMS,
    config=_gemma2,
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 8192},
)


def _gemma3(fields: Fields) -> Config:
    period = fields("sliding_window_pattern", None) or fields("_sliding_window_pattern", 6)
    sliding = config_json.is_sliding(fields, lambda layer: (layer + 1) % period != 0)
    window = fields("sliding_window", 4096)
    positions = {
        is_sliding: config_json.rope(fields, layer_type, theta)
        for is_sliding, layer_type, theta in (
            (True, "sliding_attention", 10_000.0),
            (False, "full_attention", 1_000_000.0),
        )
    }
    attention = [
        _attention(
            fields,
            window=window if is_sliding else None,
            position=positions[is_sliding],
            softcap=fields("attn_logit_softcapping", None),
            qk_norm=QKNorm(norm=config_json.norm(fields, offset=1.0)),
        )
        for is_sliding in sliding
    ]
    return _model(fields, attention, logit_softcap=fields("final_logit_softcapping", None))


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    rows=GEMMA2.rows,
    config=_gemma3,
    # The config.json of published small models leaves these out.
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    },
)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's fields of a config.json: for a Gemma 3 with vision those of `text_config`,
    otherwise all."""
    if config.get("architectures") != ["Gemma3ForConditionalGeneration"]:
        return config
    ids = {f"{role}_token_id": config.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}
    ids = {name: value for name, value in ids.items() if value is not None}
    family = {"architectures": [GEMMA3.architecture], "model_type": GEMMA3.model_type}
    text = config.get("text_config")
    return (text if isinstance(text, dict) else {}) | ids | family
