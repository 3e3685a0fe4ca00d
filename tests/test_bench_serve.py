"""Tests of `lm bench serve`, which measures the generation engine."""

import json
import math

import numpy as np
import pytest
from tiny_experiments import experiment

import lm
from lm.commands import measure_serving
from lm.commands.measure_serving import Arrival, Served
from lm.errors import UserError
from lm.generate import Engine, Request, Sampling
from lm.main import lm_main

POSITIVE = {
    "start_to_first_token_seconds",
    "engine_start_seconds",
    "tokens_per_second",
    "seconds",
    "peak_memory_bytes",
    "prompt_tokens",
    "generated_tokens",
}


def test_bench_serve_prints_finite_measurements(tiny, capsys):
    lm_main(["bench", "serve", str(tiny.folder), "--requests", "5", "--rate", "1000", "--json"])
    measured = json.loads(capsys.readouterr().out)
    assert measured.keys() >= POSITIVE
    assert all(measured[key] > 0 and math.isfinite(measured[key]) for key in POSITIVE)
    assert (measured["requests"], measured["requests_per_second"]) == (5, 1000)
    assert measured["tokens_per_second"] == pytest.approx(
        measured["generated_tokens"] / measured["seconds"]
    )
    for name in ("seconds_to_first_token", "seconds_per_token"):
        assert 0 < measured[name]["p50"] <= measured[name]["p99"] < measured["seconds"], name
    assert measured["start_to_first_token_seconds"] > measured["engine_start_seconds"]
    assert measured["at_once_tokens_per_second"].keys() == {"1", "7", "64"}
    assert all(rate > 0 for rate in measured["at_once_tokens_per_second"].values())
    assert measured["same_tokens"] or not measured["exact"]
    alone = measured["alone"]
    assert alone["engine_over_plain"] == pytest.approx(
        alone["engine_tokens_per_second"] / alone["plain_tokens_per_second"]
    )
    table = measure_serving.serving_text(measured)
    for part in ("start to first token", "tokens per second, 64 at once", "engine over plain"):
        assert part in table


def test_bench_serve_finds_modules_and_refuses_changes_of_a_folder(tiny):
    name, apply, length = measure_serving._model(experiment(), None)
    assert (name, apply.config, length) == ("tiny", experiment().model, 32)
    with pytest.raises(SystemExit, match="2"):
        lm_main(["bench", "serve", str(tiny.folder), "--set", "model.layers=3"])
    with pytest.raises(SystemExit, match="2"):
        lm_main(["bench", "serve", "experiments.bench_lama"])


def test_answers_are_those_of_the_engine_and_come_after_their_arrival(tiny):
    apply = lm.load(tiny.folder).apply.cast()
    engine = Engine(apply, context=32)
    arrivals = measure_serving.workload(
        apply.config.vocab, requests=6, rate=500, seed=1, context=32
    )
    answers = measure_serving.serve(engine, arrivals)
    want = engine.generate(
        Request(prompt=each.prompt, max_tokens=each.max_tokens, sampling=Sampling(temperature=0))
        for each in arrivals
    )
    for arrival, answer, output in zip(arrivals, answers, want, strict=True):
        assert answer.tokens == output.tokens
        assert len(answer.tokens) == len(answer.seconds) == arrival.max_tokens
        assert answer.seconds == sorted(answer.seconds)
        assert answer.seconds[0] > 0
    assert engine.idle


def test_logits_that_are_not_finite_are_refused():
    _, apply, _ = measure_serving._model(experiment(), None)
    table = np.full(apply.params["embed"]["table"].shape, np.nan, np.float32)
    broken = apply.replace(params={**apply.params, "embed": {"table": table}})
    with pytest.raises(UserError, match="not finite"):
        measure_serving.serve(Engine(broken, context=32), [Arrival(0.0, [1, 2], 3)])


def test_workload_is_poisson_with_mixed_lengths_and_depends_on_the_seed_alone():
    options = {"requests": 2000, "rate": 50.0, "context": 64}
    arrivals = measure_serving.workload(100, seed=3, **options)
    assert arrivals == measure_serving.workload(100, seed=3, **options)
    assert arrivals != measure_serving.workload(100, seed=4, **options)
    seconds = np.array([each.seconds for each in arrivals])
    gaps = np.diff(seconds)
    assert seconds[0] == 0
    # Exponential gaps have equal mean and deviation; 2000 of them are within 10 % of both.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.15)
    for lengths in (
        [len(each.prompt) for each in arrivals],
        [each.max_tokens for each in arrivals],
    ):
        assert (min(lengths), max(lengths)) == (8, 32)
        assert np.median(lengths) == pytest.approx(16, abs=1)  # the geometric mean of 8 and 32
    assert all(0 <= token < 100 for each in arrivals for token in each.prompt)


def test_latencies_of_a_hand_made_case():
    arrivals = [Arrival(0.0, [1], 3), Arrival(2.0, [1], 1)]
    answers = [Served([5, 6, 7], [1.0, 2.0, 4.0]), Served([8], [3.0])]
    measured = measure_serving.latencies(arrivals, answers)
    assert measured["seconds"] == 5.0  # the second request ends three seconds after its arrival
    assert measured["tokens_per_second"] == pytest.approx(4 / 5)
    assert measured["seconds_to_first_token"] == pytest.approx({"p50": 2.0, "p99": 2.98})
    assert measured["seconds_per_token"] == pytest.approx({"p50": 1.5, "p99": 1.5})
