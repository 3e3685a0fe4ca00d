"""Model families, without weights: a Config is unchanged after writing and reading config.json, and
the tensors of a folder fill every parameter exactly once."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_experiments

from lm import model, trees
from lm.hf import families
from lm.hf.config_json import canonical
from lm.hf.tensors import tensor_slices

SWIGLU = model.SwiGLU(hidden=32)
NARROW = model.MoE(
    experts=8,
    experts_per_token=3,
    hidden=12,
    router=model.SoftmaxRouter(renormalize=False),
    shared=model.Shared(hidden=24),
    z_loss=1e-3,
)
GATED = dataclasses.replace(NARROW, shared=model.Shared(hidden=20, gated=True))


def gqa(**fields):
    return model.GQA(heads=4, kv_heads=2, head_dim=8, **fields)


def rope(scaling, **fields):
    return gqa(position=model.RoPE(theta=500_000.0, scaling=scaling), **fields)


CONFIGS = {
    "plain": ("LlamaForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tied": True, "attention": gqa(bias=True, out_bias=True)}),
    "linear": ("LlamaForCausalLM", {"attention": rope(model.LinearScaling(factor=2.0))}),
    "ntk": ("LlamaForCausalLM", {"attention": rope(model.NTK(factor=2.0))}),
    "dynamic": ("LlamaForCausalLM", {"attention": rope(model.DynamicNTK(factor=2.0, original=64))}),
    "yarn": ("LlamaForCausalLM", {"attention": rope(model.YaRN(factor=4.0, original=64))}),
    "yarn_ramp": (
        "LlamaForCausalLM",
        {"attention": rope(model.YaRN(factor=4.0, original=64, beta_fast=8.0, truncate=False))},
    ),
    "llama3": ("LlamaForCausalLM", {"attention": rope(model.Llama3Scaling(factor=8, original=64))}),
    "window": ("MistralForCausalLM", {"attention": gqa(window=16)}),
    "biases": ("Qwen2ForCausalLM", {"attention": gqa(bias=True)}),
    "prefix": (
        "Qwen2ForCausalLM",
        {
            "attention": gqa(bias=True, window=16),
            "prefix": (model.Block(attention=gqa(bias=True)),) * 2,
            "layers": 5,
        },
    ),
    "qk_norm": (
        "Qwen3ForCausalLM",
        {"attention": gqa(qk_norm=model.QKNorm(norm=model.RMSNormConfig()))},
    ),
    "deepseek": (
        "DeepseekForCausalLM",
        {"ffn": NARROW, "prefix": (model.Block(ffn=SWIGLU),), "layers": 4},
    ),
    "no_shared": ("DeepseekForCausalLM", {"ffn": dataclasses.replace(NARROW, shared=None)}),
    "gated": ("Qwen2MoeForCausalLM", {"ffn": GATED, "attention": gqa(bias=True)}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_written_and_read_back(name):
    architecture, fields = CONFIGS[name]
    config = tiny_experiments.config(**{"attention": gqa(), **fields})
    family, config_json = families.write(config, 256)
    assert family.architecture == architecture
    read_family, read_config = families.read(json.loads(json.dumps(config_json)))
    assert read_family is family
    assert canonical(read_config) == canonical(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_filled_exactly_once(name):
    """The tensors of a folder fill each parameter exactly once."""
    _, fields = CONFIGS[name]
    config = tiny_experiments.config(**{"attention": gqa(), **fields})
    family, _ = families.write(config, 256)
    filled = {
        path: np.zeros(x.shape, int) for path, x in trees.flatten(model.shapes(config)).items()
    }
    names = set()
    for part in tensor_slices(family, config):
        filled[part.path][part.index] += 1
        split = np.empty(part.split).transpose(part.order)
        assert split.shape == filled[part.path][part.index].shape
        assert np.prod(part.shape) == split.size
        assert part.name not in names
        names.add(part.name)
    assert all((count == 1).all() for count in filled.values())
