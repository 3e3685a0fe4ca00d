"""The fields of a Hugging Face config.json and the parts of a Config, both ways.

`Fields` is read by the function of each family (families.py): it knows what was asked for, so that
a field nobody asked for is refused unless it changes nothing. `written` gives every field that any
family asks for.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.errors import UserError
from lm.model.attention import GQA
from lm.model.config import Block, Config
from lm.model.ffn import GeGLU, SwiGLU
from lm.model.moe import BiasBalance, MoE, SoftmaxRouter
from lm.model.norm import RMSNorm
from lm.model.rope import NTK, DynamicNTK, LinearScaling, Llama3Scaling, RoPE, YaRN

# What describes the file, its training or its use, and not what the model computes.
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
    sliding_window_pattern _sliding_window_pattern
"""
NEUTRAL = frozenset(_NEUTRAL.split())
REQUIRED = object()


class Fields:
    """A config.json. `fields(name, default)` reads a field that may be absent; `finish` refuses
    what nobody has asked for."""

    def __init__(self, given: Mapping[str, Any], where: str = "config.json"):
        self.given, self.where = given, where
        self.asked: set[str] = set()

    def __call__(self, name: str, default: Any = REQUIRED) -> Any:
        self.asked.add(name)
        if name in self.given:
            return self.given[name]
        if default is REQUIRED:
            raise UserError(f"{self.where} has no {name}; fetch it again, or add the field.")
        return default

    def only(self, name: str, *allowed: Any) -> Any:
        """The value of a field that may have these values; the first one is that of its absence."""
        value = self(name, allowed[0])
        if value not in allowed:
            raise self.refused(name, value, f"only {' or '.join(map(repr, allowed))} is supported")
        return value

    def refused(self, name: str, value: Any, why: str) -> UserError:
        """To be raised."""
        return UserError(f"{self.where}: {name}={value!r} is not supported here; {why}.")

    def finish(self) -> None:
        """Raises UserError for a field that nobody has asked for and that may change the result."""
        for name, value in self.given.items():
            if name not in self.asked | NEUTRAL and value not in (None, False, 0, "", [], {}):
                raise self.refused(name, value, "it may change what the model computes")


# From fields to parts


def attention(fields: Fields, **special: Any) -> GQA:
    """Heads, their width and their positions as every family declares them."""
    heads = fields("num_attention_heads")
    given = {
        "heads": heads,
        "kv_heads": fields("num_key_value_heads", None) or heads,
        "head_dim": fields("head_dim", None) or fields("hidden_size") // heads,
    }
    if "position" not in special:
        given["position"] = rope(fields)
    return GQA(**given | special)


def rope(fields: Fields, kind: str | None = None, theta: float = 10_000.0) -> RoPE:
    """Rotary positions: `rope_theta` and `rope_scaling`, or, as of transformers 5,
    `rope_parameters`, which may hold one entry for each `kind` of layer."""
    fields.only("partial_rotary_factor", 1.0, None)
    theta = fields("rope_theta", None) or theta
    old, new = fields("rope_scaling", None), fields("rope_parameters", None)
    new = new[kind] if new and kind in new else new
    where = "rope_parameters" if new else "rope_scaling"
    given = dict(new or old or {})
    if kind == "sliding_attention" and not new:  # Gemma 3 scales its global layers only
        return RoPE(theta=fields("rope_local_base_freq", 10_000.0))
    return RoPE(
        theta=given.pop("rope_theta", None) or theta,
        scaling=_scaling(Fields(given, f"{fields.where}: {where}"), _length(fields)),
    )


def _length(fields: Fields) -> int:
    return fields("max_position_embeddings", 2048)


def _scaling(
    given: Fields, length: int
) -> LinearScaling | DynamicNTK | YaRN | Llama3Scaling | None:
    older, newer = given("type", None), given("rope_type", None)
    kind = newer or older or "default"
    given.only("partial_rotary_factor", 1.0, None)
    if kind == "default":
        found = None
    elif kind == "linear":
        found = LinearScaling(factor=given("factor"))
    elif kind == "dynamic":
        given("original_max_position_embeddings", None)  # the length is what counts
        found = DynamicNTK(factor=given("factor"), original=length)
    elif kind == "yarn":
        found = _yarn(given, length)
    elif kind == "llama3":
        found = Llama3Scaling(
            factor=given("factor"),
            original=given("original_max_position_embeddings"),
            low=given("low_freq_factor"),
            high=given("high_freq_factor"),
        )
    else:
        known = "default, linear, dynamic, yarn and llama3 are known"
        raise given.refused("rope_type" if newer else "type", kind, known)
    given.finish()
    return found


def _yarn(given: Fields, length: int) -> YaRN:
    original = given("original_max_position_embeddings", None) or length
    factor = given("factor", None) or length / original
    amplitude = given("attention_factor", None)
    mscale, everywhere = given("mscale", None), given("mscale_all_dim", None)
    if amplitude is None and mscale and everywhere:
        amplitude = (0.1 * mscale * math.log(factor) + 1) / (
            0.1 * everywhere * math.log(factor) + 1
        )
    return YaRN(
        factor=factor,
        original=original,
        beta_fast=given("beta_fast", None) or 32.0,
        beta_slow=given("beta_slow", None) or 1.0,
        attention_factor=amplitude,
        truncate=given("truncate", True),
    )


_GATED = {"silu": SwiGLU, "swish": SwiGLU, "gelu_pytorch_tanh": GeGLU}


def gated(
    fields: Fields, activation: str = "hidden_act", default: str = "silu", bias: bool = False
) -> SwiGLU | GeGLU:
    """The feed-forward of a dense layer."""
    name = fields(activation, None) or default
    if name not in _GATED:
        raise fields.refused(activation, name, f"{', '.join(_GATED)} are known")
    return _GATED[name](hidden=fields("intermediate_size"), bias=bias)


def experts(fields: Fields, **special: Any) -> MoE:
    """The feed-forward of a sparse layer."""
    fields.only("hidden_act", "silu")
    return MoE(experts_per_token=fields("num_experts_per_tok"), balance=None, **special)


def kinds(fields: Fields, default: Callable[[int], bool]) -> list[bool]:
    """Of each layer whether it sees a sliding window only; `default` tells where no list does."""
    layers = fields("num_hidden_layers")
    written = fields("layer_types", None)
    if written is None:
        return [default(layer) for layer in range(layers)]
    unknown = set(written) - {"sliding_attention", "full_attention"}
    if unknown or len(written) != layers:
        why = f"{layers} times 'sliding_attention' or 'full_attention' is expected"
        raise fields.refused("layer_types", written, why)
    return [kind == "sliding_attention" for kind in written]


def model(
    fields: Fields, attention: Sequence[GQA] | GQA, ffn: Sequence[Any] | Any, **special: Any
) -> Config:
    """The Config of all this; `attention` and `ffn` are one for all layers or one for each."""
    layers = fields("num_hidden_layers")
    attentions = [attention] * layers if isinstance(attention, GQA) else attention
    ffns = ffn if isinstance(ffn, list) else [ffn] * layers
    given = {
        "vocab": fields("vocab_size"),
        "dim": fields("hidden_size"),
        "norm": norm(fields),
        "tied": fields("tie_word_embeddings", False),
    }
    blocks = [Block(attention=a, ffn=f) for a, f in zip(attentions, ffns, strict=True)]
    return of_blocks(blocks, **given | special)


def norm(fields: Fields, offset: float = 0.0) -> RMSNorm:
    """The norm of the residual stream."""
    return RMSNorm(eps=fields("rms_norm_eps", 1e-6), offset=offset)


def of_blocks(blocks: Sequence[Block], **fields: Any) -> Config:
    """The Config with these layers: the shortest prefix and pattern that give them."""
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

    def own(block: Block) -> Block:
        same = {part: None for part, value in shared.items() if getattr(block, part) == value}
        return dataclasses.replace(block, **same)

    pattern = () if len(shared) == 2 else tuple(map(own, pattern))
    return Config(layers=count, prefix=tuple(map(own, prefix)), pattern=pattern, **shared, **fields)


# From a Config to fields


def meaning(config: Config) -> Config:
    """The same model in one form for all that compute the same: what only training reads is left
    out."""
    blocks = [
        Block(attention=_plain_attention(block.attention), ffn=_plain_ffn(block.ffn))
        for block in config.layout.blocks
    ]
    kept = ("vocab", "dim", "norm", "placement", "tied", "embed_scale", "logit_softcap")
    return of_blocks(blocks, **{name: getattr(config, name) for name in kept})


def _plain_attention(attention: GQA) -> GQA:
    scale = attention.scale
    if scale is not None and math.isclose(scale, attention.head_dim**-0.5, rel_tol=1e-12):
        scale = None
    position = attention.position
    if isinstance(position, RoPE) and isinstance(position.scaling, NTK):
        theta = position.scaling.base(position.theta, position.rotated(attention.head_dim))
        position = dataclasses.replace(position, theta=theta, scaling=None)
    elif isinstance(position, RoPE) and isinstance(position.scaling, YaRN):
        given = position.scaling
        same = dataclasses.replace(given, attention_factor=given.amplitude)
        position = dataclasses.replace(position, scaling=same)
    return dataclasses.replace(attention, scale=scale, position=position)


def _plain_ffn(ffn: Any) -> Any:
    if not isinstance(ffn, MoE):
        return ffn
    balance = ffn.balance if isinstance(ffn.balance, BiasBalance) else None
    return dataclasses.replace(ffn, balance=balance, z_loss=0.0)


def written(config: Config, length: int) -> dict[str, Any]:
    """Every field that a family may ask for, of a `meaning`; `length` is max_position_embeddings.
    Whether a family can be this model is for its own function to say."""
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
        "query_pre_attn_scalar": _whole((first.scale or first.head_dim**-0.5) ** -2),
    }
    return fields | _written_rope(attentions) | _written_experts(ffns, sparse)


def _written_rope(attentions: Sequence[GQA]) -> dict[str, Any]:
    """In the form that transformers 4 and 5 and vLLM read."""
    everywhere = next((a for a in reversed(attentions) if not a.window), attentions[-1]).position
    local = next((a for a in attentions if a.window), attentions[-1]).position
    if not isinstance(everywhere, RoPE) or not isinstance(local, RoPE):
        return {}
    scaling, fields = everywhere.scaling, {}
    match scaling:
        case LinearScaling():
            fields = {"rope_type": "linear", "factor": scaling.factor}
        case DynamicNTK():
            fields = {"rope_type": "dynamic", "factor": scaling.factor}
        case YaRN():
            fields = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.amplitude,
            }
            fields |= {} if scaling.truncate else {"truncate": False}
        case Llama3Scaling():
            fields = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
            }
    found = {
        "rope_theta": everywhere.theta,
        "rope_scaling": fields or None,
        "rope_local_base_freq": local.theta,
    }
    # What the length means to these, in all versions of transformers.
    if isinstance(scaling, DynamicNTK):
        found["max_position_embeddings"] = scaling.original
    if isinstance(scaling, YaRN):
        found["max_position_embeddings"] = round(scaling.factor * scaling.original)
    return found


def _written_experts(ffns: Sequence[Any], sparse: MoE | None) -> dict[str, Any]:
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


def _whole(value: float) -> int | float:
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value
