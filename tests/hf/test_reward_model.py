"""Reward models as sequence classifiers of Hugging Face, with one label."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import lm
from lm import exchange, model, trees
from lm.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import tiny

TOKENS = np.arange(12)[None]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder of transformers' LlamaForSequenceClassification, as a run."""
    folder = Path(tiny.write_model(tmp_path_factory.mktemp("rm") / "base"))
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields["architectures"] = ["LlamaForSequenceClassification"]
    fields["id2label"] = {"0": "LABEL_0"}
    path.write_text(json.dumps(fields))
    tensors = tiny.load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    score = np.random.default_rng(0).standard_normal((1, fields["hidden_size"]))
    tiny.save_file(
        {**tensors, "score.weight": score.astype(np.float32)}, folder / "model.safetensors"
    )
    return lm.load(folder)


def test_values_are_the_score_of_the_hidden_states(scored):
    hidden = np.float64(scored.apply(TOKENS).hidden_btd)
    wanted = hidden @ np.float64(scored.params["score"]["w"])[:, 0]
    np.testing.assert_allclose(scored.values(TOKENS), wanted, rtol=1e-5, atol=1e-5)


def test_an_export_gives_the_same_values(scored, tmp_path):
    exchange.export_run(scored.folder, tmp_path / "out")
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert fields["id2label"] == {"0": "LABEL_0"}
    again = lm.load(tmp_path / "out")
    np.testing.assert_array_equal(again.values(TOKENS), scored.values(TOKENS))
    assert "unembed/w" not in trees.flatten(model.shapes(again.experiment.model))


def test_logits_and_values_are_refused_where_there_are_none(scored, tmp_path):
    with pytest.raises(UserError, match=r"head='scalar' gives values"):
        scored.logits(TOKENS)
    language = lm.load(tiny.write_model(tmp_path / "language"))
    with pytest.raises(UserError, match=r"head='vocab' gives logits"):
        language.values(TOKENS)


def test_several_labels_are_refused(scored, tmp_path):
    fields = json.loads((Path(scored.folder) / "config.json").read_text())
    fields["id2label"] = {"0": "A", "1": "B"}
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"LlamaForSequenceClassification has 2 labels"):
        lm.load(folder)
