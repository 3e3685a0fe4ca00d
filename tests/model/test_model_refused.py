"""Invalid configs raise a one-sentence error that names the field, its value and the fix."""

import dataclasses

import pytest

from lm import model
from lm.errors import UserError

GQA = {"heads": 4, "kv_heads": 2, "head_dim": 8}
NORM = model.RMSNormConfig()
BAD = {
    "heads": (lambda: model.GQA(**GQA | {"heads": 0}), "attention.heads=0", "above zero"),
    "kv_heads": (lambda: model.GQA(**GQA | {"kv_heads": 3}), "attention.kv_heads=3", "1, 2, 4"),
    "window": (
        lambda: model.GQA(**GQA, window=4, causal=False),
        "attention.window=4",
        "causal=True",
    ),
    "no window": (lambda: model.GQA(**GQA, window=0), "attention.window=0", "above zero"),
    "first tokens": (
        lambda: model.GQA(**GQA, sinks=model.FirstTokens(count=2)),
        "attention.sinks=FirstTokens(count=2)",
        "set a window",
    ),
    "softcap": (lambda: model.GQA(**GQA, softcap=-1.0), "softcap=-1.0", "above zero"),
    "odd head": (lambda: model.GQA(**GQA | {"head_dim": 7}), "head_dim=7", "even number"),
    "fraction": (lambda: model.RoPE(fraction=0.0), "fraction=0.0", "NoPosition"),
    "odd fraction": (
        lambda: model.GQA(**GQA, position=model.RoPE(fraction=0.4)),
        "fraction=0.4",
        "even number",
    ),
    "theta": (lambda: model.RoPE(theta=1.0), "theta=1.0", "10_000"),
    "factor": (lambda: model.LinearScaling(factor=0.5), "factor=0.5", "at least 1"),
    "yarn": (
        lambda: model.YaRN(factor=2, original=64, beta_fast=1, beta_slow=2),
        "beta_fast=1",
        "above beta_slow=2",
    ),
    "llama3": (
        lambda: model.Llama3Scaling(factor=2, original=64, low=4, high=1),
        "high=1",
        "above low=4",
    ),
    "over": (
        lambda: model.QKNorm(norm=NORM, over="heads"),
        "qk_norm.over='heads'",
        "'head'",
    ),
    "hidden": (lambda: model.SwiGLU(hidden=0), "ffn.hidden=0", "above zero"),
    "activation": (
        lambda: model.MLP(hidden=8, activation="gelu_tan"),
        "ffn.activation='gelu_tan'",
        "'gelu_tanh'",
    ),
    "eps": (lambda: model.RMSNormConfig(eps=0.0), "norm.eps=0.0", "above zero"),
    "std": (lambda: model.Normal(std=0), "init.std=0", "above zero"),
}
CONFIG = {
    "vocab": ({"vocab": 0}, "model.vocab=0", "above zero"),
    "layers": ({"layers": -1}, "model.layers=-1", "above zero"),
    "placement": ({"placement": "prenorm"}, "model.placement='prenorm'", "'pre'"),
    "dropout": ({"dropout": 1.0}, "model.dropout=1.0", "below 1"),
    "softcap": ({"logit_softcap": 0.0}, "model.logit_softcap=0.0", "above zero"),
    "prefix": ({"prefix": (model.Block(),) * 3}, "model.layers=2", "more layers"),
    "no attention": ({"attention": None}, "model.attention=None", "every block"),
    "no ffn": (
        {"ffn": None, "pattern": (model.Block(ffn=model.ReLU2(hidden=8)), model.Block())},
        "model.ffn=None",
        "every block",
    ),
    "unused ffn": (
        {"pattern": (model.Block(ffn=model.ReLU2(hidden=8)),)},
        "model.ffn=SwiGLU(hidden=24",
        "model.ffn=None",
    ),
}


def check(make, field: str, fix: str) -> None:
    with pytest.raises(UserError) as refused:
        make()
    message = str(refused.value)
    assert field in message and fix in message, message
    assert "\n" not in message and message.endswith((".", "?"))


@pytest.mark.parametrize("name", BAD)
def test_invalid_component_configs_raise_errors(name):
    check(*BAD[name])


@pytest.mark.parametrize("name", CONFIG)
def test_invalid_model_configs_raise_errors(name, base):
    changes, field, fix = CONFIG[name]
    check(lambda: dataclasses.replace(base, **changes), field, fix)


def test_invalid_remat_and_cache_options_raise_errors(base, attend, draw, tokens):
    check(
        lambda: model.Model(base, draw(base), options=model.ForwardOptions(remat="blocks"))(tokens),
        "remat='blocks'",
        "'block'",
    )
    config = attend(causal=False)
    check(lambda: model.init_cache(config, 1, 8), "attention.causal=False", "causal=True")
