"""Whether a document is held out depends only on its text."""

import pytest
from made_up_corpus import documents

from lm import data
from lm.data.progress import silent
from lm.data.split import scan
from lm.data.tokenizer_training import Sample
from lm.errors import UserError


def split(texts, held_out=0.1):
    source = data.Documents(tuple(texts), held_out=held_out)
    found, _ = scan("x", source, None, silent)
    return [found.split(text) for text in texts]


def sides(texts, held_out=0.1):
    return {text: ("held out" if held else "train") for text, (_, held) in zip(texts, split(texts))}


def test_about_the_declared_fraction_is_held_out():
    held = [tail for _, tail in split(documents(600, longest=3)) if tail]
    assert 30 < len(held) < 100  # 60 plus or minus four standard deviations


def test_the_split_does_not_depend_on_order_or_other_documents():
    texts = documents(100, longest=3)
    before = sides(texts)
    after = sides((*reversed(texts), *documents(50, seed=9)))
    assert all(after[text] == side for text, side in before.items())


def test_identical_documents_are_in_the_same_split():
    texts = documents(40, longest=3) * 3
    train = {head for head, _ in split(texts) if head}
    held = {tail for _, tail in split(texts) if tail}
    assert train and held and not train & held


@pytest.mark.parametrize("seed", range(12))
def test_at_least_one_document_is_held_out(seed):
    # A fraction of 0.05 selects none of 20 documents with a probability of 0.36.
    parts = split(documents(20, seed=seed, longest=2), held_out=0.05)
    assert any(tail for _, tail in parts) and any(head for head, _ in parts)


def test_with_few_documents_the_end_of_each_is_held_out():
    texts = documents(3)
    for text, (head, tail) in zip(texts, split(texts)):
        assert head + tail == text
        assert len(tail) == round(len(text) / 10)


def test_zero_holds_out_nothing():
    assert all(tail == "" for _, tail in split(documents(30), held_out=0))


def test_the_tokenizer_is_not_trained_on_held_out_text():
    for count in (3, 20, 100):
        texts = documents(count, seed=5)
        sample = Sample(1 << 20, 0)
        found, sampled = scan("x", data.Documents(texts, held_out=0.05), sample, silent)
        train = [head for head, _ in map(found.split, texts) if head]
        assert "".join(sampled) == "".join(train)


def test_too_little_text_is_an_error():
    with pytest.raises(UserError, match="'x' has no text"):
        split([])
    with pytest.raises(UserError, match="no two different documents"):
        split(["the same"] * 30)
