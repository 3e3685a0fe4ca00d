"""Numbers are checked in the precision in which they are used: a value that float32 or an array
cannot hold is refused, naming the field."""

import re

import pytest
from tiny_experiments import config

from lm import data, evals, model, optim
from lm.errors import UserError
from lm.parallel.mesh import Mesh


def refused(make, field):
    with pytest.raises(UserError, match=re.escape(field)):
        make()


@pytest.mark.parametrize("value", [1e60, 1e-60, float("inf"), float("nan"), 0.0, -1.0])
@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("optimizer.eps", lambda x: optim.AdamW(eps=x)),
        ("optimizer.clip_norm", lambda x: optim.AdamW(clip_norm=x)),
        ("schedule.peak", lambda x: optim.Constant(peak=x, steps=9)),
        ("model.logit_softcap", lambda x: config(logit_softcap=x)),
        ("model.embed_scale", lambda x: config(embed_scale=x)),
        ("model.embed_std", lambda x: config(embed_std=x)),
        ("model.norm.eps", lambda x: model.RMSNormConfig(eps=x)),
        (
            "position.scaling.attention_factor",
            lambda x: model.YaRN(factor=2.0, original=64, attention_factor=x),
        ),
        ("model.ffn.balance.weight", lambda x: model.LoadBalance(weight=x)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_positive_numbers_are_positive_and_finite_in_float32(field, make, value):
    refused(lambda: make(value), field)


@pytest.mark.parametrize("value", [1e60, float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("optimizer.weight_decay", lambda x: optim.AdamW(weight_decay=x)),
        ("model.norm.offset", lambda x: model.RMSNormConfig(offset=x)),
        (
            "model.ffn.z_loss",
            lambda x: model.MoE(experts=4, experts_per_token=2, hidden=8, z_loss=x),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_from_zero_are_finite_in_float32(field, make, value):
    refused(lambda: make(value), field)


@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("value", [1 - 1e-12, 1.0, -0.1, float("nan")])
def test_decays_are_below_one_in_float32(name, value):
    refused(lambda: optim.AdamW(**{name: value}), f"optimizer.{name}=")


@pytest.mark.parametrize("value", [0, -1, 2**31, 10**30, 2.5, "64"])
@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("model.vocab", lambda x: config(vocab=x)),
        ("model.dim", lambda x: config(dim=x)),
        ("model.layers", lambda x: config(layers=x)),
        ("model.attention.window", lambda x: model.GQA(heads=2, kv_heads=1, head_dim=8, window=x)),
        ("model.ffn.hidden", lambda x: model.SwiGLU(hidden=x)),
        ("batch.length", lambda x: data.BatchShape(sequences=4, length=x)),
        ("batch.sequences", lambda x: data.BatchShape(sequences=x, length=4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_are_whole_numbers_below_two_to_the_31(field, make, value):
    refused(lambda: make(value), f"{field}=")


def test_digits_that_are_not_decimal_and_counts_beyond_all_batches():
    refused(lambda: Mesh.parse("data=\u00b2"), "needs a whole number")
    assert evals.Perplexity(batches=10**30).batches == 10**30
