"""Evaluation covers every token of every document once and gives the index of its document."""

import numpy as np
import pytest
from made_up_corpus import documents

from lm import data
from lm.errors import UserError


@pytest.mark.parametrize("length, sequences", [(16, 4), (64, 3), (1024, 2)])
def test_every_target_is_evaluated_exactly_once(tokenizer, length, sequences):
    texts = documents(12)
    evaluation = data.evaluation(data.Documents(texts), tokenizer, length, sequences)
    assert evaluation.bytes_d.tolist() == [len(text.encode()) for text in texts]
    ids = [tokenizer.encode(text) for text in texts]
    assert evaluation.tokens_d.tolist() == [len(each) + 1 for each in ids]
    targets = [[] for _ in texts]
    for batch, documents_bt in evaluation:
        assert batch.tokens.shape == documents_bt.shape == (sequences, length)
        assert ((documents_bt >= 0) == (batch.weights > 0)).all()
        for document in range(len(texts)):
            targets[document] += batch.targets[documents_bt == document].tolist()
    for document, each in enumerate(ids):
        assert sorted(targets[document]) == sorted([*each, tokenizer.eos])
    assert len(list(evaluation)) == len(evaluation)


def test_selected_rows_equal_those_of_the_whole_batch(tokenizer):
    evaluation = data.evaluation(data.Documents(documents(12)), tokenizer, 64, 4)
    batch, documents_bt = evaluation.batch(1)
    rows, row_documents_bt = evaluation.batch(1, slice(1, 3))
    assert all(np.array_equal(x[1:3], y) for x, y in zip(batch, rows))
    assert np.array_equal(documents_bt[1:3], row_documents_bt)


def test_evaluation_covers_the_held_out_documents(prepared):
    assert prepared.held_out == ("a", "b")
    for name in prepared.held_out:
        evaluation = prepared.evaluation(name, 64, 4)
        counts = prepared.counts[name, "held_out"]
        assert evaluation.name == name
        assert len(evaluation.bytes_d) == counts.documents
        assert evaluation.bytes_d.sum() == counts.bytes
        assert sum(batch.weights.sum() for batch, _ in evaluation) == counts.tokens
        assert sum(len(text.encode()) for text in prepared.texts(name)) == counts.bytes
    with pytest.raises(UserError, match="source='c' is not known"):
        prepared.evaluation("c", 64, 4)


def test_no_text_to_evaluate_is_an_error(tokenizer, tokenizer_config, tmp_path):
    with pytest.raises(UserError, match="no text to evaluate"):
        data.evaluation(data.Documents(()), tokenizer, 64, 4)
    prepared = data.prepare(data.Documents(documents(30), held_out=0.0), tokenizer_config, tmp_path)
    assert prepared.held_out == ()
    with pytest.raises(UserError, match="nothing held out"):
        prepared.evaluation("documents", 64, 4)
