"""Batch in, hidden states and logits out. Configs are declarations; a model is a nested dict of
arrays.

params = model.init(config, key)
out = model.forward(config, params, tokens_bt)
logits_btv = model.logits(config, params, out.hidden_btd)

Tokens reach experts on other devices through exchange_rows.py. The open families, as Hugging Face
writes them, are tables in families.py, and fields.py is their config.json.
"""

from lm.model.attention import GQA, MHA, MQA, FirstTokens, LearnedSinks, QKNorm
from lm.model.config import Block, Config, Layout
from lm.model.counts import Counts, flops, parameter_count, train_flops
from lm.model.ffn import MLP, GeGLU, ReLU2, SwiGLU
from lm.model.moe import (
    BiasBalance,
    Capacity,
    Dropless,
    LoadBalance,
    MoE,
    Shared,
    SigmoidRouter,
    SoftmaxRouter,
)
from lm.model.norm import LayerNorm, RMSNorm
from lm.model.param import He, Normal, ScaledNormal, TruncatedNormal, Xavier
from lm.model.rope import (
    NTK,
    ALiBi,
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    NoPosition,
    RoPE,
    YaRN,
)
from lm.model.transformer import (
    Output,
    axes,
    forward,
    init,
    init_cache,
    logits,
    shapes,
    unembedding,
    update_balance,
)

__all__ = [
    "GQA",
    "MHA",
    "MLP",
    "MQA",
    "NTK",
    "ALiBi",
    "BiasBalance",
    "Block",
    "Capacity",
    "Config",
    "Counts",
    "Dropless",
    "DynamicNTK",
    "FirstTokens",
    "GeGLU",
    "He",
    "LayerNorm",
    "Layout",
    "LearnedSinks",
    "LinearScaling",
    "Llama3Scaling",
    "LoadBalance",
    "MoE",
    "NoPosition",
    "Normal",
    "Output",
    "QKNorm",
    "RMSNorm",
    "ReLU2",
    "RoPE",
    "ScaledNormal",
    "Shared",
    "SigmoidRouter",
    "SoftmaxRouter",
    "SwiGLU",
    "TruncatedNormal",
    "Xavier",
    "YaRN",
    "axes",
    "flops",
    "forward",
    "init",
    "init_cache",
    "logits",
    "parameter_count",
    "shapes",
    "train_flops",
    "unembedding",
    "update_balance",
]
