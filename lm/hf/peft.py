"""Adapters in the folder format of PEFT: adapter_config.json and adapter_model.safetensors.

LoRA is read and written for every family. Prefix tuning is read and written without its encoder,
which PEFT does not save either.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from lm import trees
from lm.data.json_files import json_object
from lm.errors import UserError
from lm.hf.family import Family
from lm.hf.safetensors import Files, write
from lm.hf.tensors import TensorSlice, layer_paths, tensor_slices
from lm.hf.weights import Pretrained
from lm.model import GQA, Config, LoRA, Prefix, RoPE, shapes
from lm.model.adapters.adapter import ROOT
from lm.model.adapters.prefix import KEY
from lm.model.rope import rotate

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODEL = "base_model.model."  # before every tensor's name
_PROMPT = "prompt_embeddings"
_EMBEDDING, _HEAD = "embed/table", "unembed/w"
_TIED = ("lm_head.", "embed_tokens.")
# Fields of a LoRA that change what it computes, with the value that this reader knows.
_NEUTRAL = {
    "use_dora": False,
    "bias": "none",
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
}


Weights = dict[str, np.ndarray]  # by path


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter, and no model."""
    path = epath.Path(folder)
    return (path / CONFIG).exists() and not (path / "config.json").exists()


def base_of(folder: str | os.PathLike[str]) -> epath.Path:
    """The folder of the model that an adapter is for. Raises UserError if it is not here."""
    path = epath.Path(folder)
    named = _fields(path).get("base_model_name_or_path")
    for base in (epath.Path(str(named)), path / str(named)):
        if named and (base / "config.json").exists():
            return base
    raise UserError(
        f"{path / CONFIG}: base_model_name_or_path={named!r} is no Hugging Face folder here; "
        "set it to the path of the model's folder."
    )


class AdaptedPretrained(Pretrained):
    """A model with the adapter of a PEFT folder. Opening it reads adapter_config.json and the
    adapter's weights, and raises UserError for what is not supported."""

    def __init__(self, folder: str | os.PathLike[str]):
        super().__init__(base_of(folder))
        self.base_config = self.config
        path = epath.Path(folder)
        fields, files = _fields(path), Files(path, WEIGHTS)
        kind = fields.get("peft_type")
        if kind == "LORA":
            read = _read_lora(path, fields, files, self.family, self.config)
        elif kind == "PREFIX_TUNING":
            read = _read_prefix(path, files, self.config)
        else:
            raise UserError(
                f"{path / CONFIG}: peft_type={kind!r} is not supported; use LORA or PREFIX_TUNING."
            )
        self.config, self.adapter_weights = read

    def params(
        self,
        shardings: Sharding | trees.Tree | None = None,
        dtype: str | None = None,
        config: Config | None = None,
    ) -> dict[str, Any]:
        """See `Pretrained.params`; `config` must be None."""
        first = shardings or SingleDeviceSharding(jax.local_devices()[0])
        paths = trees.flatten(shapes(self.config))
        where = trees.flatten(first) if isinstance(first, Mapping) else dict.fromkeys(paths, first)
        plain = {path: where[path] for path in trees.flatten(shapes(self.base_config))}
        flat = trees.flatten(super().params(trees.unflatten(plain), dtype, self.base_config))
        for path, x in self.adapter_weights.items():
            x = x if dtype is None else x.astype(dtype)
            flat[path] = jax.make_array_from_callback(x.shape, where[path], x.__getitem__)
        if _HEAD in paths and _HEAD not in flat:  # no longer tied
            flat[_HEAD] = jax.jit(jnp.transpose, out_shardings=where[_HEAD])(flat[_EMBEDDING])
        return trees.unflatten({path: flat[path] for path in paths})

    def stored_dtypes(self) -> set[str]:
        """See `Pretrained.stored_dtypes`."""
        return {tensor.dtype.name for tensor in self.files.tensors.values()}


def _fields(path: epath.Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        return json_object(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); fetch it again.") from None


# ---- LoRA


def _read_lora(
    path: epath.Path, fields: Mapping[str, Any], files: Files, family: Family, config: Config
) -> tuple[Config, Weights]:
    _check_lora(path, fields)
    if config.tied and any(key in name for name in files.tensors for key in _TIED):
        # PEFT changes the embedding or the head, also of a model that ties them.
        config = dataclasses.replace(config, tied=False)
    found: dict[str, list[tuple[TensorSlice, list[np.ndarray]]]] = {}
    wholes: dict[str, list[tuple[TensorSlice, np.ndarray]]] = {}  # trained without an adapter
    known: set[str] = set()
    for part in tensor_slices(family, config):
        names = _tensor_names(part)
        present = [name for name in names if name in files.tensors]
        if len(present) == 1:
            raise UserError(f"{path / WEIGHTS} has {present[0]} alone; download it again.")
        if present:
            arrays = [files.read(files.tensors[name]).astype(np.float32) for name in names]
            found.setdefault(part.path, []).append((part, arrays))
            known |= set(names)
        if (whole := _MODEL + part.name) in files.tensors:
            wholes.setdefault(part.path, []).append((part, files.read(files.tensors[whole])))
            known.add(whole)
    for name in files.tensors.keys() - known:
        raise UserError(f"{path / WEIGHTS} holds {name}, which no matrix of the model takes.")
    if not found:
        raise UserError(f"{path / WEIGHTS} holds no weights of a LoRA.")
    adapter = LoRA(
        rank=max(fields["r"], *(len(a) for parts in found.values() for _, (a, _) in parts)),
        alpha=float(fields["lora_alpha"]),
        rslora=bool(fields.get("use_rslora")),
        targets=tuple(sorted({_pattern(path) for path in found})),
        dropout=float(fields.get("lora_dropout") or 0),
    )
    config = dataclasses.replace(config, adapter=adapter)
    # A layer that the file leaves out has a change of zero.
    weights = _zeros(config)
    for part, (a, b) in (item for parts in found.values() for item in parts):
        at_a, at_b = (weights[f"{ROOT}/{part.path}/{name}"][part.index] for name in "ab")
        rank, inputs, outputs = len(a), at_a.size // adapter.rank, at_b.size // adapter.rank
        if (a.shape, b.shape) != ((rank, inputs), (outputs, rank)):
            raise UserError(
                f"{path / WEIGHTS}: the adapter of {part.name} has the shapes {list(a.shape)} and "
                f"{list(b.shape)}, which do not fit the model; they are not of one model."
            )
        # In all families a matrix has the axes of its input, and of its output, in the order of
        # the tensor.
        at_a.reshape(inputs, -1)[:, :rank] = a.T
        b = b * (_scale(fields, part, rank) / adapter.scale)
        at_b.reshape(-1, outputs)[:rank] = b.T
    return config, weights | _saved(path, config, wholes)


def _zeros(config: Config) -> Weights:
    """The weights of the adapter, all zero."""
    return {
        name: np.zeros(x.shape, np.float32)
        for name, x in trees.flatten(shapes(config)).items()
        if name.startswith(f"{ROOT}/")
    }


def _saved(
    path: epath.Path, config: Config, wholes: Mapping[str, list[tuple[TensorSlice, np.ndarray]]]
) -> Weights:
    """Weights that were trained whole, in our axes."""
    weights, declared = {}, trees.flatten(shapes(config))
    for name, parts in wholes.items():
        weights[name] = np.full(declared[name].shape, np.nan, np.float32)
        for part, tensor in parts:
            weights[name][part.index] = tensor.reshape(part.split).transpose(part.order)
        if np.isnan(weights[name]).any():
            raise UserError(
                f"{path / WEIGHTS} holds {parts[0][0].name}, but not that of every layer; merge "
                "the adapter with PEFT's merge_and_unload() and import the model."
            )
    return weights


def _scale(fields: Mapping[str, Any], part: TensorSlice, rank: int) -> float:
    """The factor on B A of one matrix."""
    module = part.name.removesuffix(".weight")
    alphas = fields.get("alpha_pattern") or {}
    alpha = next(
        (value for pattern, value in alphas.items() if re.match(rf"(.*\.)?({pattern})$", module)),
        fields["lora_alpha"],
    )
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def _check_lora(path: epath.Path, fields: Mapping[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        if fields.get(name) not in (neutral, None, {}, []):
            raise UserError(
                f"{path / CONFIG}: {name}={fields[name]!r} is not supported; merge the adapter "
                "with PEFT's merge_and_unload() and import the model."
            )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path / CONFIG}: r={rank!r} and lora_alpha={alpha!r} must be numbers.")


def _tensor_names(part: TensorSlice) -> tuple[str, str]:
    """Names of the two tensors that change a matrix."""
    module = _MODEL + part.name.removesuffix(".weight")
    if part.path == _EMBEDDING:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _pattern(path: str) -> str:
    """The target of a path: that matrix in every layer."""
    part, _, *rest = path.split("/")
    return "/".join(["**", *rest]) if part in ("prefix", "blocks", "suffix") else path


def write_adapter(
    folder: Path, family: Family, config: Config, weights: Mapping[str, Any], base: str
) -> None:
    """Writes an adapter into a local folder. `weights` are those of the adapter, by path, on the
    host; `base` is the folder or name of the model that it is for. Raises UserError for an adapter
    that PEFT does not have."""
    adapter = config.adapter
    if isinstance(adapter, LoRA):
        fields, tensors = _lora_fields(adapter, family, config, weights)
    elif isinstance(adapter, Prefix):
        fields, tensors = _prefix_fields(adapter, config, weights)
    else:
        raise UserError(
            f"model.adapter={type(adapter).__name__}(...) has no form in PEFT, and cannot be "
            "merged either; evaluate and serve the run folder."
        )
    common = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps({**common, **fields}, indent=2) + "\n")
    described = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    write(folder, described, iter(tensors.values()), shard_bytes=1 << 62, single=WEIGHTS)


def _lora_fields(
    adapter: LoRA, family: Family, config: Config, weights: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tensors, modules = {}, set()
    for part in tensor_slices(family, config):
        a, b = (weights.get(f"{ROOT}/{part.path}/{name}") for name in "ab")
        if a is None:
            continue
        a, b = np.asarray(a)[part.index], np.asarray(b)[part.index]
        pair = a.reshape(-1, adapter.rank).T, b.reshape(adapter.rank, -1).T
        tensors |= _named(_tensor_names(part), pair)
        modules.add(part.name.removesuffix(".weight").split(".")[-1])
        if part.path == _EMBEDDING and config.tied:
            # The transposed change for the head, which PEFT adapts apart.
            head = (f"{_MODEL}lm_head.lora_{name}.weight" for name in "AB")
            tensors |= _named(head, (pair[1].T, pair[0].T))
            modules.add("lm_head")
    fields = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return fields, tensors


def _named(names: Iterable[str], arrays: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    return {n: np.ascontiguousarray(x, np.float32) for n, x in zip(names, arrays, strict=True)}


# ---- Prefix tuning


def _read_prefix(path: epath.Path, files: Files, config: Config) -> tuple[Config, Weights]:
    if _PROMPT not in files.tensors:
        raise UserError(f"{path / WEIGHTS} has no {_PROMPT}.")
    prompt_mx = files.read(files.tensors[_PROMPT]).astype(np.float32)
    adapter = Prefix(tokens=len(prompt_mx))
    adapted = dataclasses.replace(config, adapter=adapter)
    layers = list(_kv_layers(adapted))
    sizes = [2 * gqa.kv_heads * gqa.head_dim for _, _, gqa in layers]
    if prompt_mx.ndim != 2 or prompt_mx.shape[1] != sum(sizes):
        raise UserError(
            f"{path / WEIGHTS}: {_PROMPT} has shape {list(prompt_mx.shape)}; this model needs "
            f"{sum(sizes)} numbers per token."
        )
    weights = _zeros(adapted)
    starts = np.cumsum([0, *sizes])
    for (stem, index, gqa), start, size in zip(layers, starts, sizes):
        pair = prompt_mx[:, start : start + size].reshape(-1, 2, gqa.kv_heads, gqa.head_dim)
        weights[f"{stem}/k"][index] = _rotated(pair[:, 0], gqa, -adapter.tokens)
        weights[f"{stem}/v"][index] = pair[:, 1]
    return adapted, weights


def _prefix_fields(
    adapter: Prefix, config: Config, weights: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    layers, parts = list(_kv_layers(config)), []
    for stem, index, gqa in layers:
        k, v = (np.asarray(weights[f"{stem}/{name}"])[index] for name in "kv")
        parts += [_rotated(k, gqa, adapter.tokens), v]
    prompt_mx = np.concatenate([x.reshape(adapter.tokens, -1) for x in parts], axis=1)
    gqa = layers[0][2]
    fields = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": adapter.tokens,
        "num_layers": len(layers),
        "num_attention_heads": gqa.kv_heads,
        "token_dim": gqa.kv_heads * gqa.head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": gqa.kv_heads * gqa.head_dim,
    }
    return fields, {_PROMPT: np.ascontiguousarray(prompt_mx, np.float32)}


def _kv_layers(config: Config) -> Iterator[tuple[str, tuple[int, ...], GQA]]:
    """Of each layer: the path of its trained keys and values, its index in their stack, and its
    attention."""
    layout = config.layout
    for prefix, index in layer_paths(config):
        part, i, _ = prefix.split("/")
        yield f"{ROOT}/{prefix}attention/{KEY}", index, layout.parts[part][int(i)].attention


def _rotated(k_mkh: np.ndarray, gqa: GQA, by: int) -> np.ndarray:
    """Keys rotated by a number of positions. PEFT's keys stand before the text, which begins at
    position M; ours have no position, and the text begins at 0."""
    if not isinstance(gqa.position, RoPE):
        return k_mkh
    table = gqa.position.table(jnp.full((1, len(k_mkh)), by, jnp.int32), gqa.head_dim)
    return np.asarray(rotate(jnp.asarray(k_mkh)[None], table)[0])
