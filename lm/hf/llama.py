"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783)."""

from lm.hf import config_json
from lm.hf.config_json import Fields
from lm.hf.family import ATTENTION, DENSE_FFN, PRE_NORMS, WHOLE_MODEL, Family
from lm.model.config import Config


def _llama(fields: Fields) -> Config:
    bias = fields("attention_bias", False)
    fields.only("activation", None, "swiglu")  # of Falcon 3, which transformers does not read
    attention = config_json.attention(fields, bias=bias, out_bias=bias)
    ffn = config_json.dense_ffn(fields, bias=fields("mlp_bias", False))
    return config_json.model(fields, attention, ffn)


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    rows=WHOLE_MODEL + ATTENTION + DENSE_FFN + PRE_NORMS,
    config=_llama,
)
