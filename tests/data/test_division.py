"""What is held out depends on each document's text alone."""

import pytest
from made_up_corpus import documents

from lm import data
from lm.data.division import survey
from lm.data.progress import silent
from lm.data.tokenizer import Sample
from lm.errors import UserError


def divide(texts, held_out=0.1):
    source = data.Documents(tuple(texts), held_out=held_out)
    division, _ = survey("x", source, None, silent)
    return [division.divide(text) for text in texts]


def sides(texts, held_out=0.1):
    return {
        text: ("held out" if held else "train") for text, (_, held) in zip(texts, divide(texts))
    }


def test_about_the_share_is_held_out():
    held = [tail for _, tail in divide(documents(600, longest=3)) if tail]
    assert 30 < len(held) < 100  # 60, give or take four standard deviations


def test_order_and_company_do_not_matter():
    texts = documents(100, longest=3)
    before = sides(texts)
    after = sides((*reversed(texts), *documents(50, seed=9)))
    assert all(after[text] == side for text, side in before.items())


def test_copies_fall_on_one_side():
    texts = documents(40, longest=3) * 3
    train = {head for head, _ in divide(texts) if head}
    held = {tail for _, tail in divide(texts) if tail}
    assert train and held and not train & held


@pytest.mark.parametrize("seed", range(12))
def test_one_document_at_least_is_held_out(seed):
    # Of 20 documents a twentieth is none in one case of three.
    parts = divide(documents(20, seed=seed, longest=2), held_out=0.05)
    assert any(tail for _, tail in parts) and any(head for head, _ in parts)


def test_few_documents_give_their_ends():
    texts = documents(3)
    for text, (head, tail) in zip(texts, divide(texts)):
        assert head + tail == text
        assert len(tail) == round(len(text) / 10)


def test_nothing_may_be_held_out():
    assert all(tail == "" for _, tail in divide(documents(30), held_out=0))


def test_the_tokenizer_never_sees_what_is_held_out():
    for count in (3, 20, 100):
        texts = documents(count, seed=5)
        sample = Sample(1 << 20, 0)
        division, drawn = survey("x", data.Documents(texts, held_out=0.05), sample, silent)
        train = [head for head, _ in map(division.divide, texts) if head]
        assert "".join(drawn) == "".join(train)


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="'x' holds no text"):
        divide([])
    with pytest.raises(UserError, match="no two different documents"):
        divide(["the same"] * 30)
