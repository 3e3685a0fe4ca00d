"""Fine-tuning from the weights of a folder, and exporting the result."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_experiments

import lm
from lm import data, exchange, optim, runs
from lm.errors import UserError
from lm.parallel.mesh import Mesh

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """A Hugging Face folder with a tokenizer: the tiny run, exported."""
    return exchange.export_run(tiny.folder, tmp_path_factory.mktemp("start") / "out")


def tuned(start, **fields):
    """Returns an experiment of two steps that starts from this folder."""
    base = runs.load_declaration(start)
    return dataclasses.replace(
        base,
        name="tuned",
        data=data.Documents(texts=tiny_experiments.texts(seed=1), held_out=0.1),
        batch=data.BatchShape(sequences=4, length=tiny_experiments.LENGTH),
        schedule=optim.Constant(peak=1e-4, steps=2),
        **fields,
    )


def test_training_starts_from_the_weights_of_the_folder(start, tmp_path):
    """With a learning rate near zero, the weights stay equal to those of the folder."""
    still = optim.Constant(peak=1e-12, steps=1)
    e = dataclasses.replace(tuned(start), schedule=still)
    after = lm.train(e, workdir=tmp_path)
    before = lm.load(start)
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_a_fine_tuned_run_is_exported(start, tmp_path):
    after = lm.train(tuned(start), workdir=tmp_path)
    moved = [
        np.abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(jax.tree.leaves(lm.load(start).params), jax.tree.leaves(after.params))
    ]
    assert all(0 < change < 1e-2 for change in moved)
    out = exchange.export_run(tmp_path / "tuned", tmp_path / "out", dtype="bfloat16")
    again = lm.load(out)
    assert {x.dtype.name for x in jax.tree.leaves(again.params)} == {"bfloat16"}
    text = "the tree of light"
    assert again.tokenizer.encode(text) == after.tokenizer.encode(text)
    assert "Started from the weights of out." in (out / "README.md").read_text()
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    assert all((out / name).read_bytes() == (start / name).read_bytes() for name in names)


def test_training_starts_from_a_run_folder(tiny, tmp_path):
    """`start` may be a run folder; the new run records the config.json of imported weights."""
    tokenizer = data.TokenizerFile(path=str(tiny.folder))
    e = dataclasses.replace(tuned(tiny.folder, tokenizer=tokenizer), start=str(tiny.folder))
    lm.train(e, workdir=tmp_path)
    assert runs.load_declaration(tmp_path / "tuned").start == str(tiny.folder)
    imported = tmp_path / "imported"
    out = exchange.export_run(tiny.folder, tmp_path / "out")
    exchange.import_run(out, imported)
    lm.train(dataclasses.replace(e, name="again", start=str(imported)), workdir=tmp_path)
    facts = json.loads((tmp_path / "again" / "experiment.json").read_text())
    assert facts["origin"]["config"] == json.loads((out / "config.json").read_text())


def test_a_model_with_other_shapes_is_refused(start, tmp_path):
    e = tuned(start)
    wider = dataclasses.replace(e.model, ffn=dataclasses.replace(e.model.ffn, hidden=48))
    with pytest.raises(UserError, match=r"ffn/down is \[2, 32, 16\] there and \[2, 48, 16\] here"):
        lm.train(dataclasses.replace(e, model=wider), workdir=tmp_path)
    with pytest.raises(UserError, match="neither a run folder"):
        lm.train(dataclasses.replace(e, start=str(tmp_path / "nothing")), workdir=tmp_path)
    assert not (tmp_path / "tuned").exists()


def test_evaluation_without_text_is_refused(start):
    with pytest.raises(UserError, match="came without text"):
        lm.load(start).evaluate()


def test_an_exported_folder_generates_and_evaluates_like_its_run(tiny, start):
    run, exported = lm.load(tiny.folder), lm.load(start, mesh=Mesh())
    texts = [each.generate("the tree", temperature=0, max_tokens=8) for each in (run, exported)]
    assert texts[0] == texts[1]
    text = data.Documents(texts=tiny_experiments.texts(4, seed=2))
    results = exported.evaluate(text, context=tiny_experiments.LENGTH)
    for a, b in zip(run.evaluate(text), results):
        assert a.value == pytest.approx(b.value, rel=1e-4)
