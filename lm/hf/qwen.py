"""Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115) and Qwen 3 (arXiv:2505.09388), dense and
mixtures of experts."""

from typing import Any

from lm.hf import config_json
from lm.hf.config_json import Fields
from lm.hf.family import ATTENTION, DENSE_FFN, EXPERTS, PRE_NORMS, WHOLE_MODEL, Family, Row
from lm.model.attention import QKNorm
from lm.model.config import Config
from lm.model.moe import Shared, SoftmaxRouter


def _qwen2(fields: Fields) -> Config:
    return config_json.model(fields, _attention(fields, bias=True), config_json.dense_ffn(fields))


def _attention(fields: Fields, **options: Any) -> list[Any]:
    """One for each layer: those from `max_window_layers` on have a sliding window."""
    first = fields("max_window_layers", 28)
    sliding = config_json.is_sliding(fields, lambda layer: layer >= first)
    window = fields("sliding_window", 4096)
    if not fields("use_sliding_window", False):
        window = None
    return [
        config_json.attention(fields, window=window if is_sliding else None, **options)
        for is_sliding in sliding
    ]


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    rows=WHOLE_MODEL + ATTENTION + DENSE_FFN + PRE_NORMS,
    config=_qwen2,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
)


def _qwen3(fields: Fields) -> Config:
    bias = fields("attention_bias", False)
    fields.only("use_qk_norm", True, None)
    qk_norm = QKNorm(norm=config_json.norm(fields))
    attention = _attention(fields, qk_norm=qk_norm, bias=bias, out_bias=bias)
    return config_json.model(fields, attention, config_json.dense_ffn(fields))


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    rows=QWEN2.rows,
    config=_qwen3,
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
)


def _qwen3_moe(fields: Fields) -> Config:
    window = fields("sliding_window", 4096) if fields("use_sliding_window", False) else None
    bias = fields("attention_bias", False)
    fields.only("use_qk_norm", True, None)
    qk_norm = QKNorm(norm=config_json.norm(fields))
    attention = config_json.attention(
        fields, window=window, qk_norm=qk_norm, bias=bias, out_bias=bias
    )
    return config_json.model(fields, attention, _ffns(fields))


def _ffns(fields: Fields, **options: Any) -> list[Any]:
    """One for each layer, sparse or dense."""
    fields("max_window_layers", None)  # in the files, but without effect in transformers
    experts = fields("num_experts", None) or fields("num_local_experts")
    sparse = config_json.sparse_ffn(
        fields,
        experts=experts,
        hidden=fields("moe_intermediate_size"),
        router=SoftmaxRouter(renormalize=fields("norm_topk_prob", False)),
        **options,
    )
    fields("num_local_experts", None)
    dense, step = config_json.dense_ffn(fields), fields("decoder_sparse_step", 1)
    dense_layers = fields("mlp_only_layers", None) or []
    return [
        dense if layer in dense_layers or (layer + 1) % step else sparse
        for layer in range(fields.layers())
    ]


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rows=WHOLE_MODEL + ATTENTION + PRE_NORMS + DENSE_FFN + EXPERTS,
    config=_qwen3_moe,
    defaults={
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 32_768,
    },
)


def _qwen2_moe(fields: Fields) -> Config:
    fields.only("use_sliding_window", False)
    fields("sliding_window", None), fields("layer_types", None)
    attention = config_json.attention(fields, bias=fields("qkv_bias", True))
    shared = Shared(hidden=fields("shared_expert_intermediate_size"), gated=True)
    return config_json.model(fields, attention, _ffns(fields, shared=shared))


QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    rows=(
        *QWEN3_MOE.rows,
        Row("ffn/shared/ffn/gate", "df", "mlp.shared_expert.gate_proj.weight", "fd"),
        Row("ffn/shared/ffn/up", "df", "mlp.shared_expert.up_proj.weight", "fd"),
        Row("ffn/shared/ffn/down", "fd", "mlp.shared_expert.down_proj.weight", "df"),
        Row("ffn/shared/gate", "do", "mlp.shared_expert_gate.weight", "od"),
    ),
    config=_qwen2_moe,
    defaults={
        "num_key_value_heads": 16,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 32_768,
    },
)
