"""Tables and functions of the families, without any weights: a Config goes out as config.json and
comes back the same, and every weight has one place."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_experiments

from lm import model, trees
from lm.hf import families
from lm.hf.config_json import meaning

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
    "qk_norm": ("Qwen3ForCausalLM", {"attention": gqa(qk_norm=model.QKNorm(norm=model.RMSNorm()))}),
    "deepseek": (
        "DeepseekForCausalLM",
        {"ffn": NARROW, "prefix": (model.Block(ffn=SWIGLU),), "layers": 4},
    ),
    "no_shared": ("DeepseekForCausalLM", {"ffn": dataclasses.replace(NARROW, shared=None)}),
    "gated": ("Qwen2MoeForCausalLM", {"ffn": GATED, "attention": gqa(bias=True)}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_out_and_in_again(name):
    architecture, fields = CONFIGS[name]
    config = tiny_experiments.config(**{"attention": gqa(), **fields})
    family, written = families.write(config, 256)
    assert family.architecture == architecture
    again, found = families.read(json.loads(json.dumps(written)))
    assert again is family
    assert meaning(found) == meaning(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_has_one_place(name):
    """The tensors of a folder fill each array of ours exactly once."""
    _, fields = CONFIGS[name]
    config = tiny_experiments.config(**{"attention": gqa(), **fields})
    family, _ = families.write(config, 256)
    filled = {
        path: np.zeros(x.shape, int) for path, x in trees.flatten(model.shapes(config)).items()
    }
    names = set()
    for spot in families.spots(family, config):
        filled[spot.path][spot.before] += 1
        split = np.empty(spot.split).transpose(spot.order)
        assert split.shape == filled[spot.path][spot.before].shape
        assert np.prod(spot.shape) == split.size
        assert spot.name not in names
        names.add(spot.name)
    assert all((count == 1).all() for count in filled.values())
