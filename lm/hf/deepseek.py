"""DeepSeekMoE (arXiv:2401.06066): many narrow experts, some of them shared."""

from lm.hf import config_json
from lm.hf.config_json import Fields
from lm.hf.family import ATTENTION, DENSE_FFN, EXPERTS, PRE_NORMS, WHOLE_MODEL, Family, Row
from lm.model.config import Config
from lm.model.moe import Shared, SoftmaxRouter


def _deepseek(fields: Fields) -> Config:
    fields.only("scoring_func", "softmax")
    bias = fields("attention_bias", False)
    hidden, first = fields("moe_intermediate_size"), fields("first_k_dense_replace", 0)
    shared = fields("n_shared_experts", None)
    sparse = config_json.sparse_ffn(
        fields,
        experts=fields("n_routed_experts"),
        hidden=hidden,
        router=SoftmaxRouter(renormalize=fields("norm_topk_prob", False)),
        shared=Shared(hidden=shared * hidden) if shared else None,
    )
    dense, step = config_json.dense_ffn(fields), fields("moe_layer_freq", 1)
    ffns = [dense if layer < first or layer % step else sparse for layer in range(fields.layers())]
    attention = config_json.attention(fields, bias=bias, out_bias=bias)
    return config_json.model(fields, attention, ffns)


DEEPSEEK = Family(
    architecture="DeepseekForCausalLM",
    model_type="deepseek",
    rows=(
        *WHOLE_MODEL,
        *ATTENTION,
        *PRE_NORMS,
        *DENSE_FFN,
        *EXPERTS,
        Row("ffn/shared/ffn/gate", "df", "mlp.shared_experts.gate_proj.weight", "fd"),
        Row("ffn/shared/ffn/up", "df", "mlp.shared_experts.up_proj.weight", "fd"),
        Row("ffn/shared/ffn/down", "fd", "mlp.shared_experts.down_proj.weight", "df"),
    ),
    config=_deepseek,
)
