"""Tests of `show`, which summarizes an experiment, and `lm bench step`, which times a step."""

import functools
import json
import math

import pytest
from tiny_experiments import config, experiment

from lm import model
from lm.commands import measure
from lm.errors import UserError
from lm.main import lm_main, main
from lm.parallel import hardware
from lm.parallel.mesh import Mesh, Place
from lm.planning import show

KEYS = {
    "seconds_per_step",
    "tokens_per_second",
    "start_to_first_step_seconds",
    "compile_seconds",
    "peak_memory_bytes",
    "matmul_flops_per_second",
    "model_flops_utilization",
}


@pytest.fixture(scope="module")
def facts():
    return show.facts(experiment())


def test_show_counts_parameters_flops_tokens_and_memory(facts):
    assert facts["parameter_count"] == model.parameter_count(config())._asdict()
    assert sum(row["count"] for row in facts["parameters"]) == facts["parameter_count"]["total"]
    assert all(math.prod(row["shape"]) == row["count"] for row in facts["parameters"])
    assert facts["steps"] == 8
    assert facts["tokens"] == 8 * 4 * 32
    assert facts["flops"] == facts["flops_per_token"] * facts["tokens"]
    total = facts["parameter_count"]["total"]
    memory = facts["memory_bytes_per_device"]
    assert memory["parameters"] == memory["gradients"] == 4 * total  # float32
    assert 8 * total <= memory["optimizer"] < 8 * total + 64  # two moments and a step count


def test_show_prints_declaration_table_and_totals(capsys):
    main(experiment, ["show"])
    out = capsys.readouterr().out
    for part in ("blocks/0/attention/q", "parameter", "sharding", "FLOPs", "Tokens", "Memory"):
        assert part in out, part
    assert "heads: 2" in out or "heads=2" in out
    assert "1,024 in 8 steps" in out


def test_show_prints_one_json_object(capsys, facts):
    main(experiment, ["show", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))


def test_show_needs_no_devices_for_a_mesh(capsys):
    main(experiment, ["show", "--json", "--mesh", "fsdp=2,tensor=2"])
    shown = json.loads(capsys.readouterr().out)
    (q,) = (row for row in shown["parameters"] if row["path"] == "blocks/0/attention/q")
    assert q["axes"] == ["layers", "embed", "heads", "head"]
    assert q["sharding"] == ["", "fsdp", "tensor", ""]
    assert shown["place"]["devices"] == 4
    memory = shown["memory_bytes_per_device"]
    assert memory["parameters"] < 4 * shown["parameter_count"]["total"] / 2


def test_show_accepts_place_larger_than_this_machine():
    places = {"v5p-64": Place(mesh=Mesh(fsdp=4))}
    shown = show.facts(experiment(places=places))
    assert shown["place"] == {"name": "v5p-64", "mesh": "fsdp=4", "devices": 4}


def test_show_applies_set_options(capsys):
    main(experiment, ["show", "--json", "--set", "model.layers=3", "--set", "schedule.steps=4"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == 4
    assert shown["experiment"]["name"] == "tiny+model.layers=3+schedule.steps=4"


def test_bench_prints_finite_measurements(tiny, capsys, monkeypatch):
    small = functools.partial(hardware.matmul_flops, size=256)
    monkeypatch.setattr(hardware, "matmul_flops", small)
    lm_main(["bench", "step", str(tiny.folder), "--steps", "4", "--json"])
    measured = json.loads(capsys.readouterr().out)
    assert measured.keys() >= KEYS
    assert all(measured[key] > 0 and math.isfinite(measured[key]) for key in KEYS)
    low, high = measured["seconds_per_step_range"]
    assert low <= measured["seconds_per_step"] <= high
    assert measured["tokens_per_second"] == pytest.approx(4 * 32 / measured["seconds_per_step"])
    assert measured["model_flops_utilization"] == pytest.approx(
        model.train_flops(config(), 32)
        * measured["tokens_per_second"]
        / measured["matmul_flops_per_second"]
    )
    assert measured["peak_memory_bytes"] > 1e7
    assert measured["start_to_first_step_seconds"] > measured["compile_seconds"]
    table = measure.step_text(measured)
    for part in ("seconds per step", "tokens per second", "compile time", "peak memory", "MFU"):
        assert part in table


def test_bench_accepts_modules_and_run_folders(tiny):
    assert measure.find(str(tiny.folder)) == tiny.declare()
    assert measure.find("tiny_experiments") == experiment()
    with pytest.raises(UserError, match="neither a run folder nor a module"):
        measure.find("experiments.bench_lama")
    with pytest.raises(UserError, match="declares no experiment"):
        measure.find("lm.errors")


def test_bench_llama_keeps_its_published_sizes():
    """The published throughput depends on these sizes."""
    declared = measure.find("experiments.bench_llama")
    c = declared.model
    assert (c.vocab, c.dim, c.layers, c.tied, c.ffn.hidden) == (4096, 384, 6, False, 1024)
    assert (c.attention.heads, c.attention.kv_heads, c.attention.head_dim) == (6, 2, 64)
    assert (declared.batch.sequences, declared.batch.length) == (16, 256)
    assert declared.precision.compute == "float32"
    assert type(declared.optimizer).__name__ == "AdamW" and declared.optimizer.clip_norm == 1.0


def test_bench_batches_have_no_padding(tiny):
    """Without padding, the counted FLOPs equal the executed FLOPs."""
    from lm.program import assemble

    declared = experiment()
    batch = measure._random_batch(assemble(declared))
    assert float(batch.weights.sum()) == batch.tokens.size
    assert int(batch.segments.min()) == 1
    assert int(batch.tokens.max()) < declared.model.vocab
