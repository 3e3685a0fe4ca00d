"""Plans of the generation engine: their memory adds up, time follows the number of requests and the
length, and errors come before compilation."""

import dataclasses
import json
from functools import partial

import jax
import pytest

from experiments import llama3_8b, stdlib
from lm import planning
from lm.errors import UserError
from lm.experiment import override
from lm.generate import programs
from lm.main import main
from lm.model import GQA
from lm.parallel.mesh import Mesh
from lm.planning import compiled, slices
from lm.planning.engine import Engine
from lm.planning.serving import RESERVE, text

LLAMA = llama3_8b.experiment()
TOKEN = 2 * 8 * 128 * 2 * 32  # bytes of keys and values of a token: bfloat16, 32 layers
WEIGHTS = 8_030_261_248  # in 2 bytes each
needs_libtpu = pytest.mark.skipif(not compiled.available(), reason="libtpu is not installed")


def estimate(on="v5p-8", experiment=LLAMA, **options):
    return planning.serving(experiment, on, compile=False, **options)


@pytest.mark.parametrize(("on", "ways"), [("v5p-8", 4), ("v6e-8", 8)])
def test_memory_adds_up(on, ways):
    plan = estimate(on)
    assert plan["weight_bytes_per_device"] == pytest.approx(2 * WEIGHTS / ways, rel=1e-3)
    assert plan["cache_bytes_per_token_and_device"] == TOKEN / ways
    used = plan["weight_bytes_per_device"] + plan["temp_bytes_per_device"]
    used += plan["cache_tokens"] * TOKEN / ways
    assert 0.98 < used / plan["capacity_bytes_per_device"] <= 1 - RESERVE
    assert json.loads(json.dumps(plan)) == plan


def test_more_devices_than_heads_store_each_head_several_times():
    plan = estimate("v5e-16")
    assert plan["cache_bytes_per_token_and_device"] == TOKEN / 8


def test_int8_halves_the_cache_and_adds_its_scales():
    plan = estimate(cache_dtype="int8")
    assert plan["cache_bytes_per_token_and_device"] == TOKEN / 4 * (128 + 4) / (2 * 128)


def test_time_follows_requests_and_length():
    few, some, many = estimate(rows=[64, 8, 256])["decode"]
    assert [few["rows"], some["rows"], many["rows"]] == [8, 64, 256]
    assert few["bound"] == "reading weights" and many["bound"] == "reading the cache"
    # All weights except for the embedding, which is looked up, at 85 % of 2.765 TB/s.
    weights = 2 * (WEIGHTS - 128_256 * 4096) / 4
    assert few["weight_seconds"] == pytest.approx(weights / (0.85 * 2765e9), rel=0.02)
    assert many["cache_seconds"] == pytest.approx(32 * few["cache_seconds"])
    assert many["cache_bytes_per_device"] == pytest.approx(256 * 4096 * TOKEN / 4, rel=0.01)
    assert few["tokens_per_second_and_request"] > some["tokens_per_second_and_request"]
    assert few["tokens_per_second"] < some["tokens_per_second"] < many["tokens_per_second"]
    short = estimate(context=1024)["decode"][-1]
    assert short["cache_seconds"] == pytest.approx(many["cache_seconds"] / 4, rel=0.03)


def test_windows_limit_the_cache():
    windowed = dataclasses.replace(
        LLAMA.model, attention=dataclasses.replace(LLAMA.model.attention, window=512)
    )
    plan = estimate(experiment=dataclasses.replace(LLAMA, model=windowed), context=8192)
    assert isinstance(windowed.attention, GQA)
    assert plan["cache_tokens"] > 4 * estimate(context=8192)["cache_tokens"]
    step = plan["decode"][0]
    assert step["cache_bytes_per_device"] == pytest.approx(8 * 512 * TOKEN / 4, rel=0.1)


def test_the_cache_may_hold_fewer_requests():
    plan = estimate("v5e-16", context=65_536)
    assert [step["fits"] for step in plan["decode"]] == [True, False, False]
    assert "the cache holds fewer" in text(plan)


def test_weights_that_do_not_fit():
    large = override(LLAMA, ["model.layers=400"])
    plan = estimate("v5e-8", experiment=large)
    assert not plan["fits"] and plan["decode"] == [] and plan["prefill"] is None
    assert "does not fit one sequence of 4,096" in text(plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": "v5p-9"}, "there is no such slice"),
        ({"mesh": Mesh(tensor=8)}, "has 8 devices and v5p-8"),
        ({"on": "v5p-128"}, "does not divide over mesh tensor=64"),
        ({"rows": [0]}, "rows[0]"),
        ({"cache_dtype": "int4"}, "cache_dtype"),
    ],
    ids=str,
)
def test_errors_come_before_compilation(options, message, monkeypatch):
    monkeypatch.setattr(compiled, "build", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError) as error:
        planning.serving(LLAMA, options.pop("on", "v5p-8"), **options)
    assert message in str(error.value)


def test_an_experiment_without_tpus_needs_a_slice():
    with pytest.raises(UserError, match="has no place on TPUs"):
        planning.serving(stdlib.experiment(), compile=False)


def test_the_command(capsys):
    """At a slice that is no place of the experiment."""
    words = [
        "plan",
        "--serve",
        "--on",
        "v6e-8",
        "--estimate",
        "--context",
        "2048",
        "--rows",
        "4,32",
    ]
    main(llama3_8b.experiment, words)
    printed = capsys.readouterr().out
    assert "requests of 2,048" in printed and "mesh tensor=8" in printed
    main(llama3_8b.experiment, [*words, "--json"])
    assert [step["rows"] for step in json.loads(capsys.readouterr().out)["decode"]] == [4, 32]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--serve", "--search"], "--search is not an option of --serve"),
        (["--rows", "8"], "--rows is an option of --serve"),
        (["--context", "8"], "--context is an option of --serve"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(llama3_8b.experiment, ["plan", "--on", "v5p-8", "--estimate", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@needs_libtpu
def test_abstract_caches_are_those_of_the_engine():
    """Shapes and shardings."""
    small = override(
        LLAMA,
        ["model.layers=2", "model.dim=64", "model.vocab=512", "tokenizer.vocab=512",
         "model.attention.heads=4", "model.attention.kv_heads=2", "model.ffn.hidden=128"],
    )  # fmt: skip
    mesh = Mesh(tensor=4).build(compiled.describe(slices.find("v5e-4")))
    engine = Engine.of(small.model, "float32", mesh, 256, "int8")
    counts = engine.counts(1024, 8)
    ours = engine.caches(counts)
    empty = programs.empty.lower(engine.model, counts, engine.page, "int8")
    with compiled._without_cache():  # which cannot read programs for a TPU that is not there
        theirs, placed = empty.out_info, empty.compile().output_shardings
    for one, other, where in zip(*map(jax.tree.leaves, (ours, theirs, placed)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(where, one.ndim)


@pytest.mark.slow
@needs_libtpu
def test_the_compiled_plan_agrees_with_the_estimate():
    """With two layers, and for the program with the largest temporaries in all of its memory."""
    e = override(LLAMA, ["model.layers=2"])
    plan, by_estimate = (planning.serving(e, "v6e-8", rows=[64], compile=c) for c in (True, False))
    for name in ("weight_seconds", "cache_seconds", "link_seconds"):
        ours, theirs = plan["decode"][0][name], by_estimate["decode"][0][name]
        assert ours == pytest.approx(theirs, rel=0.3), name
    kinds = {row["kind"] for row in plan["decode"][0]["collectives"]}
    assert kinds == {"all-reduce", "all-gather"}
    tpu_slice = slices.find("v6e-8")
    mesh = Mesh(tensor=8).build(compiled.describe(tpu_slice))
    engine = Engine.of(e.model, "bfloat16", mesh, 4096)
    arguments = engine.arguments(64, engine.caches(engine.counts(plan["cache_tokens"], 64)))
    lower = partial(programs.forward.lower, *arguments)
    assert compiled.build(lower, arguments, mesh, "v6e-8").fits
