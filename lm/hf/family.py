"""What a family of Hugging Face models is: a table of its weights and a function from its
config.json to a Config.

A row of a table maps a parameter to a tensor of the folder; letters name the dimensions on both
sides, so that ours "dnh" and theirs "(nh)d" is a transposition and a split. The rows that several
families share are here; each family's own file adds the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lm.hf.config_json import Fields
from lm.model.config import Config


class Row(NamedTuple):
    """One weight, or one for each layer or expert.

    ours    path of the parameter; in a layer, without 'blocks/0/'
    axes    a letter for each of its dimensions; 'e' is the expert where tensor names count experts
    theirs  name of the tensor; in a layer, without 'model.layers.0.'
    order   the tensor's dimensions; several letters in brackets are one dimension
    """

    ours: str
    axes: str
    theirs: str
    order: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of Hugging Face.

    Args:
      architecture, model_type: as in config.json.
      rows: one for every weight that a model of this family may have.
      config: the Config of a config.json. It reads every field that matters through `Fields`, which
        refuses the fields that remain.
      defaults: values of absent fields in transformers, where the functions of config_json have
        others (tests/hf/test_family_defaults.py compares them).
    """

    architecture: str
    model_type: str
    rows: tuple[Row, ...]
    config: Callable[[Fields], Config]
    defaults: Mapping[str, Any] = field(default_factory=dict)


WHOLE_MODEL = (
    Row("embed/table", "vd", "model.embed_tokens.weight", "vd"),
    Row("final_norm/scale", "d", "model.norm.weight", "d"),
    Row("unembed/w", "dv", "lm_head.weight", "vd"),
    Row("score/w", "ds", "score.weight", "sd"),
)
ATTENTION = (
    Row("attention/q", "dnh", "self_attn.q_proj.weight", "(nh)d"),
    Row("attention/k", "dkh", "self_attn.k_proj.weight", "(kh)d"),
    Row("attention/v", "dkh", "self_attn.v_proj.weight", "(kh)d"),
    Row("attention/o", "nhd", "self_attn.o_proj.weight", "d(nh)"),
    Row("attention/q_bias", "nh", "self_attn.q_proj.bias", "(nh)"),
    Row("attention/k_bias", "kh", "self_attn.k_proj.bias", "(kh)"),
    Row("attention/v_bias", "kh", "self_attn.v_proj.bias", "(kh)"),
    Row("attention/o_bias", "d", "self_attn.o_proj.bias", "d"),
    Row("attention/q_norm/scale", "h", "self_attn.q_norm.weight", "h"),
    Row("attention/k_norm/scale", "h", "self_attn.k_norm.weight", "h"),
)
DENSE_FFN = (
    Row("ffn/gate", "df", "mlp.gate_proj.weight", "fd"),
    Row("ffn/up", "df", "mlp.up_proj.weight", "fd"),
    Row("ffn/down", "fd", "mlp.down_proj.weight", "df"),
    Row("ffn/gate_bias", "f", "mlp.gate_proj.bias", "f"),
    Row("ffn/up_bias", "f", "mlp.up_proj.bias", "f"),
    Row("ffn/down_bias", "d", "mlp.down_proj.bias", "d"),
)
EXPERTS = (
    Row("ffn/router", "de", "mlp.gate.weight", "ed"),
    Row("ffn/gate", "edf", "mlp.experts.{expert}.gate_proj.weight", "fd"),
    Row("ffn/up", "edf", "mlp.experts.{expert}.up_proj.weight", "fd"),
    Row("ffn/down", "efd", "mlp.experts.{expert}.down_proj.weight", "df"),
)
PRE_NORMS = (
    Row("attention_norm/scale", "d", "input_layernorm.weight", "d"),
    Row("ffn_norm/scale", "d", "post_attention_layernorm.weight", "d"),
)
SANDWICH_NORMS = (
    Row("attention_norm/scale", "d", "input_layernorm.weight", "d"),
    Row("attention_out_norm/scale", "d", "post_attention_layernorm.weight", "d"),
    Row("ffn_norm/scale", "d", "pre_feedforward_layernorm.weight", "d"),
    Row("ffn_out_norm/scale", "d", "post_feedforward_layernorm.weight", "d"),
)
OUTPUT_NORMS = (
    Row("attention_out_norm/scale", "d", "post_attention_layernorm.weight", "d"),
    Row("ffn_out_norm/scale", "d", "post_feedforward_layernorm.weight", "d"),
)
