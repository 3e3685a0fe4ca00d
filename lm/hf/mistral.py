"""Mistral (arXiv:2310.06825) and Mixtral (arXiv:2401.04088)."""

from lm.hf import config_json
from lm.hf.config_json import Fields
from lm.hf.family import ATTENTION, DENSE_FFN, PRE_NORMS, WHOLE_MODEL, Family, Row
from lm.model.config import Config
from lm.model.moe import SoftmaxRouter


def _mistral(fields: Fields) -> Config:
    window = fields("sliding_window", 4096)
    if window is not None and not all(config_json.is_sliding(fields, lambda layer: True)):
        # transformers gives every layer the window; other libraries read the list.
        reason = "the sliding window must be for all layers"
        raise fields.error("layer_types", fields("layer_types"), reason)
    fields("layer_types", None)
    attention = config_json.attention(fields, window=window)
    return config_json.model(fields, attention, config_json.dense_ffn(fields))


MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    rows=WHOLE_MODEL + ATTENTION + DENSE_FFN + PRE_NORMS,
    config=_mistral,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072},
)


def _mixtral(fields: Fields) -> Config:
    attention = config_json.attention(fields, window=fields("sliding_window", None))
    ffn = config_json.sparse_ffn(
        fields,
        experts=fields("num_local_experts", 8),
        hidden=fields("intermediate_size"),
        router=SoftmaxRouter(renormalize=True),
    )
    return config_json.model(fields, attention, ffn)


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    rows=(
        *WHOLE_MODEL,
        *ATTENTION,
        *PRE_NORMS,
        Row("ffn/router", "de", "block_sparse_moe.gate.weight", "ed"),
        Row("ffn/gate", "edf", "block_sparse_moe.experts.{expert}.w1.weight", "fd"),
        Row("ffn/up", "edf", "block_sparse_moe.experts.{expert}.w3.weight", "fd"),
        Row("ffn/down", "efd", "block_sparse_moe.experts.{expert}.w2.weight", "df"),
    ),
    config=_mixtral,
    defaults={
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
)
