"""The families of Hugging Face models, and a model's config.json: read, and written.

A family's function runs in one direction, from config.json to a Config. To write a config.json,
every field is filled in, and the first family is chosen whose function reads the same model back.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm import declaration
from lm.errors import UserError, nearest
from lm.hf import config_json
from lm.hf.config_json import Fields
from lm.hf.deepseek import DEEPSEEK
from lm.hf.family import Family
from lm.hf.gemma import GEMMA2, GEMMA3
from lm.hf.llama import LLAMA
from lm.hf.mistral import MISTRAL, MIXTRAL
from lm.hf.olmo import OLMO2
from lm.hf.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from lm.model.attention import GQA
from lm.model.config import Config
from lm.model.ffn import GeGLU, SwiGLU
from lm.model.moe import MoE

# Simplest first: a model that fits several families is written as the first of them.
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
LANGUAGE, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
EXPORTED = {"attention": (GQA,), "ffn": (SwiGLU, GeGLU, MoE)}  # not their subclasses


def read(config: Mapping[str, Any], where: str = "config.json") -> tuple[Family, Config]:
    """The family and the Config of a config.json.

    Raises UserError for an unknown architecture, and for a field that is not supported and may
    change what the model computes; the message names it.
    """
    config, head = _head(config, where)
    try:
        family = _named(config, where)
        fields = Fields(family.defaults | config, where)
        model = dataclasses.replace(family.config(fields), head=head)
        declaration.check_types(model, "model")
    except UserError as error:
        named = str(error).startswith(where)
        raise error if named else UserError(f"{where}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where} has a field of the wrong type ({error}); correct it.") from error
    fields.check_unread()
    return family, model


def _head(config: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str]:
    """(config.json of the language model, head of the model). A sequence classifier with one label
    is a model with a scalar head."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    if not isinstance(first, str) or not first.endswith(CLASSIFIER):
        return config, "vocab"
    names = config.get("id2label")
    labels = config.get("num_labels", len(names) if isinstance(names, dict) else 2)
    if labels != 1:
        raise UserError(
            f"{where}: {first} has {labels} labels; only one, the score of a reward model, is "
            "supported."
        )
    language = first.replace(CLASSIFIER, LANGUAGE)
    kept = {name: value for name, value in config.items() if name != "num_labels"}
    return {**kept, "architectures": [language]}, "scalar"


def _with_head(fields: dict[str, Any], head: str) -> dict[str, Any]:
    """Fields of a language model's config.json, for a model with this head."""
    if head == "vocab":
        return fields
    name = fields["architectures"][0].replace(LANGUAGE, CLASSIFIER)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**fields, **labels, "architectures": [name]}


def _named(config: Mapping[str, Any], where: str) -> Family:
    architectures = config.get("architectures")
    by_architecture = {family.architecture: family for family in FAMILIES}
    by_type = {family.model_type: family for family in FAMILIES}
    name, known = config.get("model_type"), by_type
    if architectures:
        name, known = architectures[0], by_architecture
    if name in known:
        if by_type.get(config.get("model_type"), known[name]) is not known[name]:
            raise UserError(
                f"{where}: architectures={architectures!r} and "
                f"model_type={config['model_type']!r} are of different families; correct one of "
                "them."
            )
        return known[name]
    field = "architectures" if architectures else "model_type"
    hint = nearest(str(name), known)
    listed = "" if "Known" in hint else f" Known: {', '.join(sorted(known))}."
    raise UserError(f"{where}: {field}={name!r} is not a supported family.{hint}{listed}")


def write(
    config: Config, length: int, origin: Mapping[str, Any] | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family of a model and the fields of its config.json; `read` gives the same model back.

    Args:
      length: max_position_embeddings.
      origin: the config.json that the model was imported with. Its family is tried first, and its
        fields stay as they are where they still describe the model.

    Raises UserError, naming the field, for a model that fits no family.
    """
    _check_layers(config)
    canonical, origin = config_json.canonical(config), _head(origin or {}, "config.json")[0]
    fields = config_json.to_fields(canonical, length)
    candidates = []
    for family in FAMILIES:
        different, used = _differences(family, canonical, fields)
        if family.architecture in (origin.get("architectures") or ()) and not different:
            # These depend on `length` and on the version of transformers.
            own = ("rope_theta", "rope_scaling", "rope_local_base_freq", "max_position_embeddings")
            same = {k: v for k, v in origin.items() if k in fields and k not in own}
            different, original = _differences(family, canonical, fields | same)
            return family, _with_head(used if different else original, config.head)
        candidates.append((sum(map(len, different)), family, different, used))
    for _, family, different, used in candidates:
        if not different:
            return family, _with_head(used, config.head)
    _, family, different, _ = min(candidates, key=lambda candidate: candidate[0])
    raise UserError(
        f"No Hugging Face family computes this model; the nearest is {family.architecture}, "
        f"which differs in {'; '.join(different)}."
    )


def _check_layers(config: Config) -> None:
    for number, block in enumerate(config.layout.blocks):
        for part, classes in EXPORTED.items():
            value = getattr(block, part)
            if type(value) not in classes:
                raise UserError(
                    f"No Hugging Face family computes model.{part}={declaration.text(value)} of "
                    f"layer {number}; supported are {', '.join(cls.__name__ for cls in classes)}."
                )


def _differences(
    family: Family, canonical: Config, config: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """The differences between `canonical` and the model that the family reads from these fields,
    and the fields that it reads."""
    fields = Fields(family.defaults | config)
    try:
        model = config_json.canonical(family.config(fields))
        different = declaration.differences(canonical, model, "model")
    except (UserError, TypeError, KeyError) as error:
        return [f"a part that it has no field for ({error})"] * 99, {}
    names = {"architectures": [family.architecture], "model_type": family.model_type}
    return different, names | {name: config[name] for name in config if name in fields.read}
