"""The open families as Hugging Face writes them: for each a table of its weights and a function
from its config.json to a Config.

A row of a table says which weight of ours is which of theirs and how their dimensions lie, in the
letters of this repository: ours "dnh" and theirs "(nh)d" is a transposition and a split. Nothing
else is needed in either direction. The function runs one way only: to write a config.json every
field is filled in, and the family is taken whose function reads the same model from it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lm import declaration, trees
from lm.errors import UserError, nearest
from lm.hf import config_json as hf
from lm.hf.config_json import Fields
from lm.model.attention import QKNorm
from lm.model.config import Config
from lm.model.moe import Shared, SoftmaxRouter
from lm.model.transformer import shapes


class Row(NamedTuple):
    """One weight, or one for each layer or expert.

    ours    path; those of a layer without 'blocks/0/'
    axes    a letter for each dimension; 'e' is the expert where their name counts experts
    theirs  name; those of a layer without 'model.layers.0.'
    order   their dimensions; several letters in brackets are one dimension
    """

    ours: str
    axes: str
    theirs: str
    order: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of Hugging Face.

    architecture, model_type  as config.json names them
    rows                      of every weight that it may have
    config                    what a config.json means; asks `Fields` for all that matters
    """

    architecture: str
    model_type: str
    rows: tuple[Row, ...]
    config: Callable[[Fields], Config]


_WHOLE = (
    Row("embed/table", "vd", "model.embed_tokens.weight", "vd"),
    Row("final_norm/scale", "d", "model.norm.weight", "d"),
    Row("unembed/w", "dv", "lm_head.weight", "vd"),
)
_ATTENTION = (
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
_MLP = (
    Row("ffn/gate", "df", "mlp.gate_proj.weight", "fd"),
    Row("ffn/up", "df", "mlp.up_proj.weight", "fd"),
    Row("ffn/down", "fd", "mlp.down_proj.weight", "df"),
    Row("ffn/gate_bias", "f", "mlp.gate_proj.bias", "f"),
    Row("ffn/up_bias", "f", "mlp.up_proj.bias", "f"),
    Row("ffn/down_bias", "d", "mlp.down_proj.bias", "d"),
)
_EXPERTS = (
    Row("ffn/router", "de", "mlp.gate.weight", "ed"),
    Row("ffn/gate", "edf", "mlp.experts.{expert}.gate_proj.weight", "fd"),
    Row("ffn/up", "edf", "mlp.experts.{expert}.up_proj.weight", "fd"),
    Row("ffn/down", "efd", "mlp.experts.{expert}.down_proj.weight", "df"),
)
_NORMS_BEFORE = (
    Row("attention_norm/scale", "d", "input_layernorm.weight", "d"),
    Row("ffn_norm/scale", "d", "post_attention_layernorm.weight", "d"),
)
_NORMS_AROUND = (
    Row("attention_norm/scale", "d", "input_layernorm.weight", "d"),
    Row("attention_out_norm/scale", "d", "post_attention_layernorm.weight", "d"),
    Row("ffn_norm/scale", "d", "pre_feedforward_layernorm.weight", "d"),
    Row("ffn_out_norm/scale", "d", "post_feedforward_layernorm.weight", "d"),
)


# Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783)


def _llama(fields: Fields) -> Config:
    bias = fields("attention_bias", False)
    attention = hf.attention(fields, bias=bias, out_bias=bias)
    return hf.model(fields, attention, hf.gated(fields, bias=fields("mlp_bias", False)))


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    rows=_WHOLE + _ATTENTION + _MLP + _NORMS_BEFORE,
    config=_llama,
)


# Mistral (arXiv:2310.06825)


def _mistral(fields: Fields) -> Config:
    window = fields("sliding_window", 4096)
    if window is not None and not all(hf.kinds(fields, lambda layer: True)):
        # transformers gives every layer the window, others read the list.
        raise fields.refused("layer_types", fields("layer_types"), "a window is for all layers")
    fields("layer_types", None)
    return hf.model(fields, hf.attention(fields, window=window), hf.gated(fields))


MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    rows=LLAMA.rows,
    config=_mistral,
)


# Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115)


def _qwen2(fields: Fields) -> Config:
    return hf.model(fields, _qwen_attention(fields, bias=True), hf.gated(fields))


def _qwen_attention(fields: Fields, **special: Any) -> list[Any]:
    first = fields("max_window_layers", 28)
    windows = hf.kinds(fields, lambda layer: layer >= first)
    window = fields("sliding_window", 4096)
    if not fields("use_sliding_window", False):
        window = None
    return [hf.attention(fields, window=window if local else None, **special) for local in windows]


QWEN2 = Family(architecture="Qwen2ForCausalLM", model_type="qwen2", rows=LLAMA.rows, config=_qwen2)


# Qwen 3 (arXiv:2505.09388)


def _qwen3(fields: Fields) -> Config:
    bias = fields("attention_bias", False)
    qk_norm = QKNorm(norm=hf.norm(fields))
    attention = _qwen_attention(fields, qk_norm=qk_norm, bias=bias, out_bias=bias)
    return hf.model(fields, attention, hf.gated(fields))


QWEN3 = Family(architecture="Qwen3ForCausalLM", model_type="qwen3", rows=LLAMA.rows, config=_qwen3)


# Gemma 2 (arXiv:2408.00118)


def _gemma2(fields: Fields) -> Config:
    windows = hf.kinds(fields, lambda layer: layer % 2 == 0)
    window = fields("sliding_window", 4096)
    attention = [
        _gemma_attention(
            fields,
            window=window if local else None,
            position=hf.rope(fields),
            softcap=fields("attn_logit_softcapping", 50.0),
        )
        for local in windows
    ]
    return _gemma(fields, attention, logit_softcap=fields("final_logit_softcapping", 30.0))


def _gemma_attention(fields: Fields, **special: Any) -> Any:
    bias = fields("attention_bias", False)
    head_dim, scalar = fields("head_dim", 256), fields("query_pre_attn_scalar", 256)
    scale = None if scalar == head_dim else scalar**-0.5
    return hf.attention(fields, head_dim=head_dim, scale=scale, bias=bias, out_bias=bias, **special)


def _gemma(fields: Fields, attention: Any, **special: Any) -> Config:
    fields("hidden_act", None)  # an older name, which transformers does not read either
    fields.only("use_bidirectional_attention", False, None)
    return hf.model(
        fields,
        attention,
        hf.gated(fields, "hidden_activation", "gelu_pytorch_tanh"),
        norm=hf.norm(fields, offset=1.0),
        placement="sandwich",
        embed_scale=fields("hidden_size") ** 0.5,
        tied=fields("tie_word_embeddings", True),
        **special,
    )


GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    rows=_WHOLE + _ATTENTION + _MLP + _NORMS_AROUND,
    config=_gemma2,
)


# Gemma 3, text (arXiv:2503.19786)


def _gemma3(fields: Fields) -> Config:
    # What the small entries of published files leave out.
    given = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}
    fields = _with_defaults(fields, given | {"max_position_embeddings": 131_072})
    period = fields("sliding_window_pattern", None) or fields("_sliding_window_pattern", 6)
    windows = hf.kinds(fields, lambda layer: (layer + 1) % period != 0)
    window = fields("sliding_window", 4096)
    positions = {
        local: hf.rope(fields, kind, theta)
        for local, kind, theta in (
            (True, "sliding_attention", 10_000.0),
            (False, "full_attention", 1_000_000.0),
        )
    }
    attention = [
        _gemma_attention(
            fields,
            window=window if local else None,
            position=positions[local],
            softcap=fields("attn_logit_softcapping", None),
            qk_norm=QKNorm(norm=hf.norm(fields, offset=1.0)),
        )
        for local in windows
    ]
    return _gemma(fields, attention, logit_softcap=fields("final_logit_softcapping", None))


def _with_defaults(fields: Fields, defaults: Mapping[str, Any]) -> Fields:
    fields.given = {**defaults, **fields.given}
    return fields


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM", model_type="gemma3_text", rows=GEMMA2.rows, config=_gemma3
)


# OLMo 2 (arXiv:2501.00656)


def _olmo2(fields: Fields) -> Config:
    fields.only("attention_bias", False)
    qk_norm = QKNorm(norm=hf.norm(fields), over="projection")
    attention = hf.attention(fields, qk_norm=qk_norm)
    return hf.model(fields, attention, hf.gated(fields), placement="output")


OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    rows=(
        *_WHOLE,
        *_ATTENTION,
        *_MLP,
        Row("attention_out_norm/scale", "d", "post_attention_layernorm.weight", "d"),
        Row("ffn_out_norm/scale", "d", "post_feedforward_layernorm.weight", "d"),
    ),
    config=_olmo2,
)


# Mixtral (arXiv:2401.04088)


def _mixtral(fields: Fields) -> Config:
    attention = hf.attention(fields, window=fields("sliding_window", None))
    ffn = hf.experts(
        fields,
        experts=fields("num_local_experts", 8),
        hidden=fields("intermediate_size"),
        router=SoftmaxRouter(renormalize=True),
    )
    return hf.model(fields, attention, ffn)


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    rows=(
        *_WHOLE,
        *_ATTENTION,
        *_NORMS_BEFORE,
        Row("ffn/router", "de", "block_sparse_moe.gate.weight", "ed"),
        Row("ffn/gate", "edf", "block_sparse_moe.experts.{expert}.w1.weight", "fd"),
        Row("ffn/up", "edf", "block_sparse_moe.experts.{expert}.w3.weight", "fd"),
        Row("ffn/down", "efd", "block_sparse_moe.experts.{expert}.w2.weight", "df"),
    ),
    config=_mixtral,
)


# Qwen 3 MoE (arXiv:2505.09388)


def _qwen3_moe(fields: Fields) -> Config:
    window = fields("sliding_window", 4096) if fields("use_sliding_window", False) else None
    bias = fields("attention_bias", False)
    qk_norm = QKNorm(norm=hf.norm(fields))
    attention = hf.attention(fields, window=window, qk_norm=qk_norm, bias=bias, out_bias=bias)
    return hf.model(fields, attention, _qwen_ffns(fields))


def _qwen_ffns(fields: Fields, **special: Any) -> list[Any]:
    """Sparse layers among dense ones."""
    fields("max_window_layers", None)  # in the files, and read by nobody
    experts = fields("num_experts", None) or fields("num_local_experts")
    sparse = hf.experts(
        fields,
        experts=experts,
        hidden=fields("moe_intermediate_size"),
        router=SoftmaxRouter(renormalize=fields("norm_topk_prob", False)),
        **special,
    )
    fields("num_local_experts", None)
    dense, step = hf.gated(fields), fields("decoder_sparse_step", 1)
    alone = fields("mlp_only_layers", None) or []
    return [
        dense if layer in alone or (layer + 1) % step else sparse
        for layer in range(fields("num_hidden_layers"))
    ]


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rows=_WHOLE + _ATTENTION + _NORMS_BEFORE + _MLP + _EXPERTS,
    config=_qwen3_moe,
)


# Qwen 2 MoE (arXiv:2407.10671)


def _qwen2_moe(fields: Fields) -> Config:
    fields.only("use_sliding_window", False)
    fields("sliding_window", None), fields("layer_types", None)
    attention = hf.attention(fields, bias=fields("qkv_bias", True))
    shared = Shared(hidden=fields("shared_expert_intermediate_size"), gated=True)
    return hf.model(fields, attention, _qwen_ffns(fields, shared=shared))


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
)


# DeepSeekMoE (arXiv:2401.06066): many narrow experts, some of them shared


def _deepseek(fields: Fields) -> Config:
    fields.only("scoring_func", "softmax")
    bias = fields("attention_bias", False)
    hidden, first = fields("moe_intermediate_size"), fields("first_k_dense_replace", 0)
    shared = fields("n_shared_experts", None)
    sparse = hf.experts(
        fields,
        experts=fields("n_routed_experts"),
        hidden=hidden,
        router=SoftmaxRouter(renormalize=fields("norm_topk_prob", False)),
        shared=Shared(hidden=shared * hidden) if shared else None,
    )
    dense, step = hf.gated(fields), fields("moe_layer_freq", 1)
    ffns = [
        dense if layer < first or layer % step else sparse
        for layer in range(fields("num_hidden_layers"))
    ]
    return hf.model(fields, hf.attention(fields, bias=bias, out_bias=bias), ffns)


DEEPSEEK = Family(
    architecture="DeepseekForCausalLM",
    model_type="deepseek",
    rows=(
        *QWEN3_MOE.rows,
        Row("ffn/shared/ffn/gate", "df", "mlp.shared_experts.gate_proj.weight", "fd"),
        Row("ffn/shared/ffn/up", "df", "mlp.shared_experts.up_proj.weight", "fd"),
        Row("ffn/shared/ffn/down", "fd", "mlp.shared_experts.down_proj.weight", "df"),
    ),
    config=_deepseek,
)


# The plainest first: a model that several can be is written as the first of them.
FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    GEMMA2,
    GEMMA3,
    MIXTRAL,
    QWEN3_MOE,
    QWEN2_MOE,
    DEEPSEEK,
)


def text_part(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text model in a config.json: all, but of a Gemma 3 with vision."""
    if "Gemma3ForConditionalGeneration" not in (given.get("architectures") or ()):
        return given
    ids = {f"{role}_token_id": given.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}
    ids = {name: value for name, value in ids.items() if value is not None}
    family = {"architectures": [GEMMA3.architecture], "model_type": GEMMA3.model_type}
    return (given.get("text_config") or {}) | ids | family


def read(given: Mapping[str, Any], where: str = "config.json") -> tuple[Family, Config]:
    """The family and the Config of a config.json.

    Raises UserError for an architecture that is not known, and for a field that is not honoured and
    may change what the model computes; both are named.
    """
    family = _named(given, where)
    fields = Fields(given, where)
    try:
        config = family.config(fields)
    except UserError as refusal:
        named = str(refusal).startswith(where)
        raise refusal if named else UserError(f"{where}: {refusal}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where} has a field of the wrong kind ({error}); mend it.") from error
    fields.finish()
    return family, config


def _named(given: Mapping[str, Any], where: str) -> Family:
    architectures = given.get("architectures")
    if architectures:
        name, known = architectures[0], {family.architecture: family for family in FAMILIES}
    else:
        name, known = given.get("model_type"), {family.model_type: family for family in FAMILIES}
    if name in known:
        return known[name]
    what = "architectures" if architectures else "model_type"
    hint = nearest(str(name), known)
    listed = "" if "Known" in hint else f" Known: {', '.join(sorted(known))}."
    raise UserError(f"{where}: {what}={name!r} is not a family that is known here.{hint}{listed}")


def write(
    config: Config, length: int, origin: Mapping[str, Any] | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family that can be this model, and the fields of its config.json; `read` gives the same
    model back.

    Args:
        length: max_position_embeddings.
        origin: the config.json that the model came with: its family is tried first, and where its
            fields still say the same, they stay as they are.

    Raises UserError, naming the field, for a model that no family can be.
    """
    wanted, origin = hf.meaning(config), origin or {}
    fields = hf.written(wanted, length)
    tried = []
    for family in FAMILIES:
        different, kept = _differences(family, wanted, fields)
        if family.architecture in (origin.get("architectures") or ()) and not different:
            left = ("rope_theta", "rope_scaling", "rope_local_base_freq", "max_position_embeddings")
            same = {k: v for k, v in origin.items() if k in fields and k not in left}
            different, own = _differences(family, wanted, fields | same)
            return family, kept if different else own
        tried.append((sum(map(len, different)), family, different, kept))
    for _, family, different, kept in tried:
        if not different:
            return family, kept
    _, family, different, _ = min(tried, key=lambda each: each[0])
    raise UserError(
        f"No family of Hugging Face computes this model; the nearest is {family.architecture}, "
        f"which differs in {'; '.join(different)}."
    )


def _differences(
    family: Family, wanted: Config, given: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """What a family makes otherwise of these fields, and those of them that it asks for."""
    fields = Fields(given)
    try:
        different = declaration.differences(wanted, hf.meaning(family.config(fields)), "model")
    except (UserError, TypeError, KeyError) as error:
        return [f"what it has no field for ({error})"] * 99, {}
    names = {"architectures": [family.architecture], "model_type": family.model_type}
    return different, names | {name: given[name] for name in given if name in fields.asked}


class Spot(NamedTuple):
    """Where one tensor of theirs lies in ours.

    name    theirs
    path    ours, whole: 'blocks/0/attention/q'
    before  indices that come first in ours: the repeat within a stack, the expert
    shape   of theirs
    split   of theirs, with bracketed dimensions apart
    order   the axis of `split` that each further dimension of ours is
    """

    name: str
    path: str
    before: tuple[int, ...]
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]


def spots(family: Family, config: Config) -> Iterator[Spot]:
    """Every tensor of a model in its folder, layer by layer."""
    flat = {path: x.shape for path, x in trees.flatten(shapes(config)).items()}
    whole = {row.ours for row in _WHOLE}
    first, last = ("embed/table",), ("final_norm/scale", "unembed/w")
    yield from _rows(family, flat, "", (), "", lambda row: row.ours in first)
    for number, (prefix, before) in enumerate(_layers(config)):
        theirs = f"model.layers.{number}."
        yield from _rows(family, flat, prefix, before, theirs, lambda row: row.ours not in whole)
    yield from _rows(family, flat, "", (), "", lambda row: row.ours in last)


def _layers(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Where the weights of each layer lie, and its spot in a stack."""
    layout = config.layout
    for i in range(len(layout.prefix)):
        yield f"prefix/{i}/", ()
    for repeat in range(layout.repeats):
        for i in range(len(layout.pattern)):
            yield f"blocks/{i}/", (repeat,)
    for i in range(len(layout.suffix)):
        yield f"suffix/{i}/", ()


def _rows(
    family: Family,
    flat: Mapping[str, tuple[int, ...]],
    prefix: str,
    before: tuple[int, ...],
    theirs: str,
    wanted: Callable[[Row], bool],
) -> Iterator[Spot]:
    for row in filter(wanted, family.rows):
        path = prefix + row.ours
        shape = flat.get(path, ())[len(before) :]
        if path not in flat or len(shape) != len(row.axes):
            continue  # a bias that this model has not, or the dense one of two kinds of layer
        experts = [()]
        axes, sizes = row.axes, dict(zip(row.axes, shape, strict=True))
        if "{expert}" in row.theirs:
            experts, axes = [(e,) for e in range(sizes["e"])], axes.replace("e", "")
        letters = row.order.replace("(", "").replace(")", "")
        for expert in experts:
            yield Spot(
                name=theirs + row.theirs.format(expert=expert[0] if expert else None),
                path=path,
                before=before + expert,
                shape=tuple(math.prod(sizes[x] for x in group) for group in _groups(row.order)),
                split=tuple(sizes[letter] for letter in letters),
                order=tuple(letters.index(letter) for letter in axes),
            )


def _groups(order: str) -> list[str]:
    """'(nh)d' -> ['nh', 'd']."""
    groups, inside = [], False
    for letter in order:
        if letter in "()":
            inside = letter == "("
            groups += [""] if inside else []
        elif inside:
            groups[-1] += letter
        else:
            groups.append(letter)
    return groups
