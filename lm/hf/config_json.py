"""The fields of a Hugging Face config.json and the parts of a Config, in both directions.

Each family's function reads config.json through `Fields`, which refuses the fields that remain
unread unless they change nothing, and builds the Config from the functions here. `to_fields` writes
every field that any family reads.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.errors import UserError
from lm.model.attention import GQA
from lm.model.config import MAX_LAYERS, Block, Config
from lm.model.ffn import GeGLU, SwiGLU
from lm.model.moe import BiasBalance, MoE, SoftmaxRouter
from lm.model.norm import RMSNormConfig
from lm.model.rope import NTK, DynamicNTK, LinearScaling, Llama3Scaling, RoPE, YaRN

# Fields that describe the file, training or use of a model, not what it computes.
_NEUTRAL = """
    architectures model_type torch_dtype dtype transformers_version _name_or_path auto_map
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop router_jitter_noise
    router_aux_loss_coef aux_loss_alpha seq_aux output_router_logits pretraining_tp use_cache
    cache_implementation _attn_implementation attn_implementation max_position_embeddings
    output_attentions output_hidden_states return_dict use_return_dict torchscript
    id2label label2id task_specific_params problem_type finetuning_task tokenizer_class prefix
    temperature top_k top_p typical_p do_sample num_beams num_beam_groups num_return_sequences
    max_length min_length length_penalty repetition_penalty diversity_penalty early_stopping
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids begin_suppress_tokens
    suppress_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
    remove_invalid_values return_dict_in_generate output_scores is_decoder is_encoder_decoder
    add_cross_attention cross_attention_hidden_size tie_encoder_decoder pruned_heads
    chunk_size_feed_forward tf_legacy_loss use_bfloat16 unsloth_version unsloth_fixed
    sliding_window_pattern sliding_window_size is_llama_config transformers.js_config
    max_sequence_length model_max_length seq_length gradient_checkpointing neftune_noise_alpha
    keys_to_ignore_at_inference ep_size license language bos_token eos_token pad_token unk_token
    use_sdpa use_flash_attn use_flash_attention use_flash_attention_2 attn_impl
"""
NEUTRAL = frozenset(_NEUTRAL.split())
REQUIRED = object()


class Fields:
    """The fields of a config.json. `fields(name)` reads a required field, `fields(name, default)`
    an optional one; `check_unread` refuses the rest. Names that begin with an underscore belong to
    the program that wrote the file, unless they are read.

    Args:
      values: config.json, or an object in it.
      where: its name in error messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values, self.where = values, where
        self.read: set[str] = set()

    def __call__(self, name: str, default: Any = REQUIRED) -> Any:
        self.read.add(name)
        if name in self.values:
            return self.values[name]
        if default is REQUIRED:
            raise UserError(f"{self.where} has no {name}; download it again, or add the field.")
        return default

    def layers(self) -> int:
        """num_hidden_layers. Raises UserError unless it is a number of layers."""
        layers = self("num_hidden_layers")
        if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
            reason = f"it must be a whole number from 1 to {MAX_LAYERS:,}"
            raise self.error("num_hidden_layers", layers, reason)
        return layers

    def only(self, name: str, *allowed: Any) -> Any:
        """Reads a field that may have only these values; the first one is the default."""
        value = self(name, allowed[0])
        if value not in allowed:
            raise self.error(name, value, f"only {' or '.join(map(repr, allowed))} is supported")
        return value

    def error(self, name: str, value: Any, reason: str) -> UserError:
        """The error to raise for an unsupported value."""
        return UserError(f"{self.where}: {name}={value!r} is not supported; {reason}.")

    def check_unread(self) -> None:
        """Raises UserError for an unread field that may change what the model computes."""
        for name, value in self.values.items():
            is_neutral = name in self.read | NEUTRAL or name.startswith("_")
            if not is_neutral and value not in (None, False, 0, "", [], {}):
                raise self.error(name, value, "it may change what the model computes")


# From config.json to a Config


def attention(fields: Fields, **options: Any) -> GQA:
    """Attention with the heads, head width and positions that all families declare alike; `options`
    override and add fields of GQA."""
    heads = fields("num_attention_heads")
    kv_heads, head_dim = fields("num_key_value_heads", None), fields("head_dim", None)
    common = {
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": fields("hidden_size") // heads if head_dim is None else head_dim,
    }
    if "position" not in options:
        common["position"] = rope(fields)
    return GQA(**common | options)


def rope(fields: Fields, layer_type: str | None = None, theta: float = 10_000.0) -> RoPE:
    """Rotary positions from `rope_theta` and `rope_scaling` or, since transformers 5, from
    `rope_parameters`, which may hold one entry for each layer type. `theta` is the default."""
    fields.only("partial_rotary_factor", 1.0, None)
    given = fields("rope_theta", None)
    theta = theta if given is None else given
    old, new = fields("rope_scaling", None), fields("rope_parameters", None)
    if old and new and old != new:
        reason = "rope_parameters is there too, and they differ; keep one of them"
        raise fields.error("rope_scaling", old, reason)
    if new and layer_type is not None and layer_type not in new:
        raise fields.error("rope_parameters", new, f"it has no entry for {layer_type}")
    new = new[layer_type] if new and layer_type is not None else new
    where = "rope_parameters" if new else "rope_scaling"
    values = dict(new or old or {})
    if layer_type == "sliding_attention" and not new:  # Gemma 3 scales its global layers only
        return RoPE(theta=fields("rope_local_base_freq", 10_000.0))
    return RoPE(
        theta=values.pop("rope_theta", None) or theta,
        scaling=_scaling(Fields(values, f"{fields.where}: {where}"), _length(fields)),
    )


def _length(fields: Fields) -> int:
    return fields("max_position_embeddings", 2048)


def _scaling(
    values: Fields, length: int
) -> LinearScaling | DynamicNTK | YaRN | Llama3Scaling | None:
    older, newer = values("type", None), values("rope_type", None)
    kind = newer or older or "default"
    values.only("partial_rotary_factor", 1.0, None)
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(factor=values("factor"))
    elif kind == "dynamic":
        values("original_max_position_embeddings", None)  # transformers uses the length instead
        scaling = DynamicNTK(factor=values("factor"), original=length)
    elif kind == "yarn":
        scaling = _yarn(values, length)
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=values("factor"),
            original=values("original_max_position_embeddings"),
            low=values("low_freq_factor"),
            high=values("high_freq_factor"),
        )
    else:
        supported = "supported are default, linear, dynamic, yarn and llama3"
        raise values.error("rope_type" if newer else "type", kind, supported)
    values.check_unread()
    return scaling


def _yarn(values: Fields, length: int) -> YaRN:
    original = values("original_max_position_embeddings", None)
    original = length if original is None else original
    factor = values("factor", None)
    factor = length / original if factor is None else factor
    amplitude = values("attention_factor", None)
    mscale, mscale_all_dim = values("mscale", None), values("mscale_all_dim", None)
    if amplitude is None and mscale and mscale_all_dim:
        amplitude = (0.1 * mscale * math.log(factor) + 1) / (
            0.1 * mscale_all_dim * math.log(factor) + 1
        )
    return YaRN(
        factor=factor,
        original=original,
        beta_fast=values("beta_fast", None) or 32.0,
        beta_slow=values("beta_slow", None) or 1.0,
        attention_factor=amplitude,
        truncate=values("truncate", True),
    )


_GATED = {"silu": SwiGLU, "swish": SwiGLU, "gelu_pytorch_tanh": GeGLU}


def dense_ffn(
    fields: Fields, activation: str = "hidden_act", default: str = "silu", bias: bool = False
) -> SwiGLU | GeGLU:
    """A gated feed-forward; `activation` is the field that names its activation function."""
    name = fields(activation, None) or default
    if name not in _GATED:
        raise fields.error(activation, name, f"supported are {', '.join(_GATED)}")
    return _GATED[name](hidden=fields("intermediate_size"), bias=bias)


def sparse_ffn(fields: Fields, **options: Any) -> MoE:
    """A mixture of experts; `options` are fields of MoE."""
    fields.only("hidden_act", "silu")
    return MoE(experts_per_token=fields("num_experts_per_tok"), balance=None, **options)


def is_sliding(fields: Fields, default: Callable[[int], bool]) -> list[bool]:
    """For each layer, whether its attention has a sliding window: from `layer_types`, or by
    `default` of the layer's number."""
    layers = fields.layers()
    layer_types = fields("layer_types", None)
    if layer_types is None:
        return [default(layer) for layer in range(layers)]
    unknown = set(layer_types) - {"sliding_attention", "full_attention"}
    if unknown or len(layer_types) != layers:
        reason = f"it must be {layers} times 'sliding_attention' or 'full_attention'"
        raise fields.error("layer_types", layer_types, reason)
    return [layer_type == "sliding_attention" for layer_type in layer_types]


def model(
    fields: Fields, attention: Sequence[GQA] | GQA, ffn: Sequence[Any] | Any, **options: Any
) -> Config:
    """The Config. `attention` and `ffn` are one for all layers, or one for each; `options` override
    and add fields of Config."""
    layers = fields.layers()
    attentions = [attention] * layers if isinstance(attention, GQA) else attention
    ffns = ffn if isinstance(ffn, list) else [ffn] * layers
    common = {
        "vocab": fields("vocab_size"),
        "dim": fields("hidden_size"),
        "norm": norm(fields),
        "tied": fields("tie_word_embeddings", False),
    }
    blocks = [Block(attention=a, ffn=f) for a, f in zip(attentions, ffns, strict=True)]
    return of_blocks(blocks, **common | options)


def norm(fields: Fields, offset: float = 0.0) -> RMSNormConfig:
    """The norm of the residual stream; `offset` is added to its scale."""
    return RMSNormConfig(eps=fields("rms_norm_eps", 1e-6), offset=offset)


def of_blocks(blocks: Sequence[Block], **fields: Any) -> Config:
    """The Config with these layers, as the shortest prefix and repeated pattern."""
    count = len(blocks)
    sizes = (
        (total - period, period) for total in range(1, count + 1) for period in range(total, 0, -1)
    )
    first, period = next(
        (first, period)
        for first, period in sizes
        if all(blocks[i] == blocks[i - period] for i in range(first + period, count))
    )
    prefix, pattern = blocks[:first], blocks[first : first + period]
    shared = {}
    for part in ("attention", "ffn"):
        if all(getattr(block, part) == getattr(pattern[0], part) for block in pattern):
            shared[part] = getattr(pattern[0], part)

    def without_shared(block: Block) -> Block:
        same = {part: None for part, value in shared.items() if getattr(block, part) == value}
        return dataclasses.replace(block, **same)

    pattern = () if len(shared) == 2 else tuple(map(without_shared, pattern))
    return Config(
        layers=count, prefix=tuple(map(without_shared, prefix)), pattern=pattern, **shared, **fields
    )


# From a Config to config.json


def canonical(config: Config) -> Config:
    """The canonical form of a model: equal for all Configs that compute the same, without fields
    that only training reads."""
    blocks = [
        Block(attention=_canonical_attention(block.attention), ffn=_canonical_ffn(block.ffn))
        for block in config.layout.blocks
    ]
    names = ("vocab", "dim", "norm", "placement", "tied", "embed_scale", "logit_softcap")
    return of_blocks(blocks, **{name: getattr(config, name) for name in names})


def _canonical_attention(attention: GQA) -> GQA:
    scale = attention.scale
    if scale is not None and math.isclose(scale, attention.head_dim**-0.5, rel_tol=1e-12):
        scale = None
    position = attention.position
    if isinstance(position, RoPE) and isinstance(position.scaling, NTK):
        theta = position.scaling.base(position.theta, position.rotated(attention.head_dim))
        position = dataclasses.replace(position, theta=theta, scaling=None)
    elif isinstance(position, RoPE) and isinstance(position.scaling, YaRN):
        yarn = position.scaling
        explicit = dataclasses.replace(yarn, attention_factor=yarn.amplitude)
        position = dataclasses.replace(position, scaling=explicit)
    return dataclasses.replace(attention, scale=scale, position=position)


def _canonical_ffn(ffn: Any) -> Any:
    if not isinstance(ffn, MoE):
        return ffn
    balance = ffn.balance if isinstance(ffn.balance, BiasBalance) else None
    return dataclasses.replace(ffn, balance=balance, z_loss=0.0)


def to_fields(config: Config, length: int) -> dict[str, Any]:
    """Every field that any family reads, from a `canonical` Config; `length` is
    max_position_embeddings. Reading them back shows whether a family fits."""
    blocks = config.layout.blocks
    attentions, ffns = [b.attention for b in blocks], [b.ffn for b in blocks]
    first = attentions[-1]
    dense = next((ffn for ffn in ffns if not isinstance(ffn, MoE)), None)
    sparse = next((ffn for ffn in ffns if isinstance(ffn, MoE)), None)
    windows = [a.window for a in attentions]
    activation = "silu"
    if isinstance(dense, GeGLU) or (sparse and sparse.activation == "gelu_tanh"):
        activation = "gelu_pytorch_tanh"
    fields = {
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "intermediate_size": getattr(dense or sparse, "hidden", None),
        "hidden_act": activation,
        "hidden_activation": activation,
        "rms_norm_eps": config.norm.eps,
        "attention_bias": first.out_bias,
        "qkv_bias": first.bias,
        "mlp_bias": getattr(dense, "bias", False),
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": length,
        "sliding_window": next(filter(None, windows), None),
        "use_sliding_window": any(windows),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        "max_window_layers": next((i for i, w in enumerate(windows) if w), config.layers),
        "attn_logit_softcapping": first.softcap,
        "final_logit_softcapping": config.logit_softcap,
        "query_pre_attn_scalar": _rounded((first.scale or first.head_dim**-0.5) ** -2),
    }
    return fields | _rope_fields(attentions) | _expert_fields(ffns, sparse)


def _rope_fields(attentions: Sequence[GQA]) -> dict[str, Any]:
    """In the form that transformers 4 and 5 and vLLM read."""
    full = next((a for a in reversed(attentions) if not a.window), attentions[-1]).position
    local = next((a for a in attentions if a.window), attentions[-1]).position
    if not isinstance(full, RoPE) or not isinstance(local, RoPE):
        return {}
    scaling, scaling_fields = full.scaling, {}
    match scaling:
        case LinearScaling():
            scaling_fields = {"rope_type": "linear", "factor": scaling.factor}
        case DynamicNTK():
            scaling_fields = {"rope_type": "dynamic", "factor": scaling.factor}
        case YaRN():
            scaling_fields = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.amplitude,
            }
            scaling_fields |= {} if scaling.truncate else {"truncate": False}
        case Llama3Scaling():
            scaling_fields = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
            }
    fields = {
        "rope_theta": full.theta,
        "rope_scaling": scaling_fields or None,
        "rope_local_base_freq": local.theta,
    }
    if isinstance(scaling, DynamicNTK):  # transformers derives it from the length
        fields["max_position_embeddings"] = scaling.original
    return fields


def _expert_fields(ffns: Sequence[Any], sparse: MoE | None) -> dict[str, Any]:
    if sparse is None:
        return {}
    dense = [i for i, ffn in enumerate(ffns) if not isinstance(ffn, MoE)]
    shared = sparse.shared.hidden if sparse.shared else 0
    leading = dense == list(range(len(dense)))
    return {
        "num_local_experts": sparse.experts,
        "num_experts": sparse.experts,
        "n_routed_experts": sparse.experts,
        "num_experts_per_tok": sparse.experts_per_token,
        "moe_intermediate_size": sparse.hidden,
        "norm_topk_prob": getattr(sparse.router, "renormalize", False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "shared_expert_intermediate_size": shared,
        "n_shared_experts": shared // sparse.hidden or None,
        "first_k_dense_replace": len(dense) if leading else 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax" if isinstance(sparse.router, SoftmaxRouter) else "sigmoid",
    }


def _rounded(value: float) -> int | float:
    """An int where the value is one but for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value
