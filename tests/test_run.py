"""Tests of lm.train and lm.load: run folder contents, loading, resuming, and rejected changes."""

import importlib.util
import inspect
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_experiments import LENGTH, STEPS, config, experiment, texts

import lm
from lm import data, evals, folders, model, optim, runs, summary, trees
from lm.errors import UserError
from lm.main import lm_main
from lm.parallel.mesh import Mesh
from lm.prepared import prepare


@pytest.fixture(scope="module")
def loaded(tiny):
    return lm.load(tiny.folder)


def test_run_folder_contains_documented_files(tiny):
    written = json.loads((tiny.folder / "experiment.json").read_text())
    assert written.keys() >= {"experiment", "data", "place", "devices", "python", "versions", "git"}
    assert set(written["versions"]) == set(folders.PACKAGES)
    for name in ("tokenizer.model", "metrics.jsonl", "eval.jsonl", "plots/loss.png"):
        assert (tiny.folder / name).stat().st_size > 0, name
    assert (tiny.folder / "plots/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tiny.folder / "checkpoints").iterdir()) == ["4", "8"]


def test_metrics_contain_one_line_per_step(tiny):
    lines = [json.loads(x) for x in (tiny.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    wanted = "loss grad_norm learning_rate tokens seconds tokens_per_second bits_per_byte"
    for line in lines:
        assert line.keys() >= {*wanted.split(), "model_flops_utilization", "weight", "skipped"}
        assert all(math.isfinite(x) for x in line.values())
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["tokens"] == STEPS * 4 * LENGTH


def test_evaluations_include_standard_error_and_count(tiny):
    lines = [json.loads(x) for x in (tiny.folder / "eval.jsonl").read_text().splitlines()]
    measures = ("loss", "perplexity", "bits_per_byte")
    assert [(line["step"], line["name"]) for line in lines] == [
        (step, f"text/{measure}") for step in (4, 8) for measure in measures
    ]
    assert all(line["stderr"] > 0 and line["count"] > 0 for line in lines)
    by_name = {line["name"]: line["value"] for line in lines[-3:]}
    assert by_name["text/perplexity"] == pytest.approx(math.exp(by_name["text/loss"]))


def test_loaded_run_has_declared_experiment_and_parameter_shapes(tiny, loaded):
    assert loaded.experiment == tiny.declare()
    assert loaded.step == STEPS
    assert loaded.stopped is None
    shapes = {k: v.shape for k, v in trees.flatten(model.shapes(config())).items()}
    assert {k: v.shape for k, v in trees.flatten(loaded.params).items()} == shapes
    assert isinstance(loaded.params["blocks"]["0"]["attention"]["q"], jax.Array)


def test_logits_cover_each_position_and_are_causal(loaded):
    tokens_bt = np.arange(2 * 6).reshape(2, 6) + 10
    logits_btv = loaded.logits(tokens_bt)
    assert logits_btv.shape == (2, 6, 320)
    assert logits_btv.dtype == np.float32
    changed = tokens_bt.copy()
    changed[:, -1] = 3
    again_btv = loaded.logits(changed)
    np.testing.assert_array_equal(logits_btv[:, :-1], again_btv[:, :-1])
    assert not np.array_equal(logits_btv[:, -1], again_btv[:, -1])


def test_generate_returns_string_for_string_and_list_for_list(loaded):
    one = loaded.generate("the tree", max_tokens=8, temperature=0)
    assert isinstance(one, str)
    assert loaded.generate("the tree", max_tokens=8, temperature=0) == one
    both = loaded.generate(["the tree", "a"], max_tokens=8, temperature=0)
    assert both[0] == one  # independent of the other prompts in the batch
    assert len(both) == 2


def test_prompt_longer_than_context_raises_user_error(loaded):
    with pytest.raises(UserError, match="32"):
        loaded.generate("the tree " * 40, max_tokens=4)


def test_evaluate_reproduces_results_of_training(tiny, loaded):
    lines = [json.loads(x) for x in (tiny.folder / "eval.jsonl").read_text().splitlines()]
    results = loaded.evaluate()
    for result, line in zip(results, lines[-3:], strict=True):
        assert result.name == line["name"]
        assert result.value == pytest.approx(line["value"], rel=1e-6)  # the same float32 sums


def test_earlier_step_can_be_loaded(tiny, loaded):
    earlier = lm.load(tiny.folder, step=4)
    assert earlier.step == 4
    before, after = (trees.flatten(r.params)["final_norm/scale"] for r in (earlier, loaded))
    assert not np.array_equal(before, after)
    with pytest.raises(UserError, match="no checkpoint of step 5 in .*, only of 4, 8"):
        lm.load(tiny.folder, step=5)


def test_run_can_be_loaded_onto_a_mesh(tiny, loaded):
    on_mesh = lm.load(tiny.folder, mesh=Mesh())
    jax.tree.map(np.testing.assert_array_equal, on_mesh.params, loaded.params)
    with pytest.raises(UserError, match="needs 64 devices"):
        lm.load(tiny.folder, mesh=Mesh(data=64))


def test_copied_run_folder_works_without_the_original_files(tiny, loaded, tmp_path):
    folder = tiny.copy(tmp_path) / "tiny"
    hidden = tiny.home.rename(tiny.home.with_name("hidden"))
    try:
        copied = lm.load(folder)
        jax.tree.map(np.testing.assert_array_equal, copied.params, loaded.params)
        text = copied.generate("the tree", max_tokens=8, temperature=0)
        other = tmp_path / "other.txt"
        other.write_text("a stone in the river\n" * 5)
        results = copied.evaluate(other)
    finally:
        hidden.rename(tiny.home)
    assert text == loaded.generate("the tree", max_tokens=8, temperature=0)
    assert [r.name for r in results] == ["text/loss", "text/perplexity", "text/bits_per_byte"]


def test_finished_run_is_not_trained_again(tiny, capsys):
    again = lm.train(tiny.declare(), workdir=tiny.home / "runs")
    said = capsys.readouterr().out
    assert again.step == STEPS
    assert "is complete at step 8 of 8" in said
    assert "python -m lm generate" in said and "delete" in said


def test_suggested_command_repeats_arguments_with_twice_the_steps(tiny, capsys, monkeypatch):
    spec = importlib.util.spec_from_loader("experiments.mine", loader=None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    typed = ["--set", "data.path=my books/*.txt", "--set=schedule.steps=8", "--set", "name=one"]
    monkeypatch.setattr(sys, "argv", ["mine.py", *typed, "--mesh", "data=2"])
    lm.train(tiny.declare(), workdir=tiny.home / "runs")
    command = "python -m experiments.mine --set 'data.path=my books/*.txt' --mesh data=2"
    longer = f"{command} --set schedule.steps={2 * STEPS}  # a new, longer run\n"
    assert longer in capsys.readouterr().out


def test_missing_plot_is_drawn_by_next_train_call(tiny, tmp_path):
    """Simulates a run killed, or out of disk, between its last checkpoint and its plot."""
    runs = tiny.copy(tmp_path)
    plot = runs / "tiny/plots/loss.png"
    plot.unlink()
    lm.train(tiny.declare(), workdir=runs)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_different_experiment_in_same_folder_raises_user_error(tiny):
    other = replace(tiny.declare(), seed=1)
    with pytest.raises(
        UserError, match=r"another declaration \(seed: 0 -> 1\)\. .*--set name=NAME"
    ):
        lm.train(other, workdir=tiny.home / "runs")


def test_settings_that_may_change_do_not_prevent_resuming(tiny):
    other = replace(tiny.declare(), log=replace(tiny.declare().log, every=1), sample="the")
    assert lm.train(other, workdir=tiny.home / "runs").step == STEPS


@pytest.fixture
def changed_text(tiny):
    """Modifies one of the training texts for the duration of a test."""
    path = next((tiny.home / "texts").iterdir())
    text, times = path.read_text(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_text(text + "night")
    yield
    path.write_text(text)
    os.utime(path, ns=times)


def test_changed_text_raises_user_error(tiny, changed_text, tmp_path):
    runs = tiny.copy(tmp_path)
    shutil.rmtree(runs / "tiny/checkpoints/8")  # stopped at step 4
    with pytest.raises(UserError, match=r"text has changed since .*tiny was begun"):
        lm.train(tiny.declare(), workdir=runs)
    with pytest.raises(UserError, match=r"text has changed since .*tiny was begun"):
        lm.load(runs / "tiny").evaluate()


def test_new_timestamps_do_not_count_as_changed_text(tiny, tmp_path):
    """Copying or checking out files changes their timestamps but not their contents."""
    texts = shutil.copytree(tiny.home / "texts", tmp_path / "texts", copy_function=shutil.copyfile)
    declared = replace(tiny.declare(), data=data.Text(path=f"{texts}/*.txt", held_out=0.1))
    one, two = (prepare(e, tmp_path / "runs") for e in (tiny.declare(), declared))
    assert one.fingerprint == two.fingerprint


def test_different_schedule_in_same_folder_raises_user_error(tiny):
    longer = replace(tiny.declare(), schedule=optim.Constant(peak=1e-3, steps=9))
    with pytest.raises(UserError, match="schedule"):
        lm.train(longer, workdir=tiny.home / "runs")


def test_too_little_text_raises_user_error_before_compilation(tmp_path):
    declared = experiment(data=data.Documents(texts=("a",), held_out=0.1))
    with pytest.raises(UserError, match="too small to give a held_out part"):
        lm.train(declared, workdir=tmp_path)


def test_prompt_of_sample_longer_than_context_raises_user_error_before_training(tmp_path):
    declared = experiment(name="sample", sample=("a", "the tree " * 40))
    with pytest.raises(UserError, match=r"sample: prompt 1 has 82 tokens.*context=32"):
        lm.train(declared, workdir=tmp_path)
    assert not (tmp_path / "sample" / "metrics.jsonl").exists()


def test_evaluation_without_held_out_text_raises_user_error_before_training(tmp_path):
    declared = experiment(
        name="nothing",
        data=data.Documents(texts=texts(), held_out=0),
        evals=(evals.Perplexity(source="documents"),),
    )
    with pytest.raises(UserError, match="data holds out none: set data.held_out=0.05"):
        lm.train(declared, workdir=tmp_path)
    assert not (tmp_path / "nothing" / "metrics.jsonl").exists()


def damaged(loaded, change):
    """The run with its output matrix changed."""
    params = {**loaded.params, "unembed": {"w": change(loaded.params["unembed"]["w"])}}
    return replace(loaded, params=params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_generating_from_weights_that_are_not_finite_raises_user_error(loaded, value, temperature):
    broken = damaged(loaded, lambda w: w.at[0, 0].set(value))
    with pytest.raises(UserError, match="logits are not finite"):
        broken.generate("the", max_tokens=3, temperature=temperature)


def test_perplexity_beyond_float64_is_infinite_and_null_in_json(loaded, monkeypatch, capsys):
    broken = damaged(loaded, lambda w: 1e5 * w)
    results = broken.evaluate(data.Documents(("the tree",)))
    assert results[0].value > 709.8 and results[1].value == np.inf
    monkeypatch.setattr(runs.Run, "evaluate", lambda *_, **__: results)
    lm_main(["eval", str(loaded.folder), "--json"])

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [each["value"] for each in printed["results"]][1] is None


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_seeds_that_jax_would_not_tell_apart_raise_user_error(loaded, seed):
    with pytest.raises(UserError, match="seed="):
        loaded.generate("the", seed=seed)
    with pytest.raises(UserError, match="seed="):
        experiment(seed=seed)


def test_context_of_zero_raises_user_error(loaded):
    with pytest.raises(UserError, match="context=0 must be above zero"):
        loaded.evaluate(data.Documents(("the tree",)), context=0)
    with pytest.raises(UserError, match="context=0 must be above zero"):
        loaded.generate("the", context=0)


def test_public_api_consists_of_functions_that_check_their_argument():
    assert all(inspect.isfunction(function) for function in (lm.train, lm.load, lm.plan))
    with pytest.raises(UserError, match=r"call it, as in train\(experiment\(\)\)"):
        lm.train(experiment)
    with pytest.raises(UserError, match="needs an Experiment, not str"):
        lm.train("stdlib")


def test_run_model_is_flax_module_with_same_logits(loaded):
    tokens_bt = np.arange(6)[None] + 10
    module = loaded.model
    assert isinstance(module, model.Transformer)
    logits_btv = module.logits(module(tokens_bt).hidden_btd)
    # Only one of them is compiled, so float32 sums are evaluated in another order.
    np.testing.assert_allclose(logits_btv, loaded.logits(tokens_bt), atol=1e-4)


def test_run_folder_of_older_format_raises_user_error(tiny, tmp_path):
    folder = tiny.copy(tmp_path) / "tiny"
    facts = json.loads((folder / "experiment.json").read_text())
    del facts["format"]
    (folder / "experiment.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"written by another version of lm \(format 1"):
        lm.load(folder)
    with pytest.raises(UserError, match=r"written by another version of lm \(format 1"):
        lm.train(tiny.declare(), workdir=tmp_path / "runs")


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("", ""),
        ("--set schedule.steps=5", ""),
        ("--workdir w --set model.layers=2 --set=name=mine", " --workdir w --set model.layers=2"),
    ],
)
def test_suggested_command_keeps_typed_arguments(typed, kept, monkeypatch):
    started = SimpleNamespace(__spec__=SimpleNamespace(name="experiments.stdlib"))
    monkeypatch.setitem(sys.modules, "__main__", started)
    monkeypatch.setattr(sys, "argv", ["stdlib.py", *typed.split()])
    assert summary._this_command() == f"python -m experiments.stdlib{kept}"
