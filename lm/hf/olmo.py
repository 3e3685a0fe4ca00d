"""OLMo 2 (arXiv:2501.00656)."""

from lm.hf import config_json
from lm.hf.config_json import Fields
from lm.hf.family import ATTENTION, DENSE_FFN, OUTPUT_NORMS, WHOLE_MODEL, Family
from lm.model.attention import QKNorm
from lm.model.config import Config


def _olmo2(fields: Fields) -> Config:
    fields.only("attention_bias", False)
    qk_norm = QKNorm(norm=config_json.norm(fields), over="projection")
    attention = config_json.attention(fields, qk_norm=qk_norm)
    return config_json.model(fields, attention, config_json.dense_ffn(fields), placement="output")


OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    rows=WHOLE_MODEL + ATTENTION + DENSE_FFN + OUTPUT_NORMS,
    config=_olmo2,
    defaults={"rms_norm_eps": 1e-5},
)
