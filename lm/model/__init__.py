"""The transformer.

    transformer, block, layers   the model, one layer, and how layers run (scan, pipeline)
    attention, ffn, moe, norm, rope, cache, paged   building blocks
    attention_kernels            on one device or a mesh
    config                       the declaration
    adapters                     LoRA, prefix tuning, bottleneck adapters
    model                        config, weights, mesh and precision as one value
    param, initializers          declares weights and multiplies by them; draws them
    experts, expert_parallel     dispatch of tokens to experts, on one device and on several
    remat                        activation checkpointing and offload
    dropout                      of activations, and inside products with adapters
    counts                       parameters and FLOPs

In a notebook:

    model = Transformer(config, rngs=nnx.Rngs(0))
    logits_btv = model.logits(model(tokens_bt).hidden_btd)
"""

from lm.model.adapters import Adapter, Bottleneck, LoRA, LoRAWeight, Prefix
from lm.model.attention import (
    GQA,
    MHA,
    MQA,
    AttentionConfig,
    FirstTokens,
    GroupedQueryAttention,
    LearnedSinks,
    Positions,
    QKNorm,
)
from lm.model.block import TransformerBlock
from lm.model.cache import Cache, Contiguous, Window
from lm.model.config import Block, Config, Layout
from lm.model.counts import Counts, flops, parameter_count, train_flops
from lm.model.ffn import MLP, FeedForward, FeedForwardConfig, GatedMLP, GeGLU, ReLU2, SwiGLU
from lm.model.initializers import He, Normal, ScaledNormal, TruncatedNormal, Xavier
from lm.model.layers import ForwardOptions
from lm.model.model import Model, unstacked
from lm.model.moe import (
    BiasBalance,
    Capacity,
    Dropless,
    LoadBalance,
    MixtureOfExperts,
    MoE,
    Shared,
    SigmoidRouter,
    SoftmaxRouter,
)
from lm.model.norm import LayerNorm, LayerNormConfig, RMSNorm, RMSNormConfig
from lm.model.paged import Paged
from lm.model.param import einsum, param
from lm.model.rope import (
    NTK,
    ALiBi,
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    NoPosition,
    RoPE,
    RotaryEmbedding,
    YaRN,
)
from lm.model.transformer import (
    Embedding,
    Output,
    Transformer,
    adapter_weights,
    auxiliary,
    axes,
    complete,
    init,
    init_cache,
    init_pages,
    merge,
    reaches,
    shapes,
    update_balance,
)

__all__ = [  # noqa: RUF022
    # Models
    "Model",
    "Output",
    "Transformer",
    "adapter_weights",
    "auxiliary",
    "axes",
    "complete",
    "init",
    "init_cache",
    "init_pages",
    "merge",
    "reaches",
    "shapes",
    "unstacked",
    # Building blocks
    "Cache",
    "Contiguous",
    "Embedding",
    "FeedForward",
    "GatedMLP",
    "GroupedQueryAttention",
    "LayerNorm",
    "MixtureOfExperts",
    "Paged",
    "Positions",
    "RMSNorm",
    "RotaryEmbedding",
    "TransformerBlock",
    "Window",
    "einsum",
    "param",
    "update_balance",
    # Configs
    "GQA",
    "MHA",
    "MLP",
    "MQA",
    "NTK",
    "ALiBi",
    "Adapter",
    "AttentionConfig",
    "BiasBalance",
    "Block",
    "Bottleneck",
    "Capacity",
    "Config",
    "Counts",
    "Dropless",
    "DynamicNTK",
    "FeedForwardConfig",
    "FirstTokens",
    "ForwardOptions",
    "GeGLU",
    "He",
    "LayerNormConfig",
    "Layout",
    "LearnedSinks",
    "LinearScaling",
    "Llama3Scaling",
    "LoRA",
    "LoRAWeight",
    "LoadBalance",
    "MoE",
    "NoPosition",
    "Normal",
    "Prefix",
    "QKNorm",
    "RMSNormConfig",
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
    "flops",
    "parameter_count",
    "train_flops",
]
