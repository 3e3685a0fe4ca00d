"""Real text is read, tokenized and prepared without loss. Absent corpora are skipped."""

from pathlib import Path

import pytest

from lm import data

REAL = Path(__file__).parents[3] / "shared" / "data"

CORPORA = {
    "pretrain-tinyshakespeare": data.Text(str(REAL / "pretrain-tinyshakespeare/input.txt")),
    "pretrain-udhr": data.Jsonl(str(REAL / "pretrain-udhr/udhr.jsonl.gz")),
    "pretrain-c4-sample": data.Jsonl(str(REAL / "pretrain-c4-sample/*.jsonl.gz")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPORA)
def test_no_text_is_lost(name, tmp_path):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not present")
    source = CORPORA[name]
    prepared = data.prepare(source, data.SentencePiece(vocab=4096), tmp_path)
    texts = set(source.documents())
    if len(texts) == 1:
        (head,), (tail,) = (prepared.texts(source.label, s) for s in ("train", "held_out"))
        assert {head + tail} == texts
        return
    train, held_out = (set(prepared.texts(source.label, s)) for s in ("train", "held_out"))
    assert train | held_out == texts and not train & held_out
    # 0.05 of hundreds of documents, plus or minus three standard deviations.
    assert 0.02 < len(held_out) / len(texts) < 0.09


def test_preparing_the_standard_library(tmp_path):
    prepared = data.prepare(data.StandardLibrary(), data.SentencePiece(vocab=2048), tmp_path)
    loader = prepared.loader(data.BatchShape(sequences=4, length=128), seed=0)
    assert loader.batch(0).weights.mean() > 0.95  # little padding
    assert 2 < loader.bytes_per_token < 5
    assert all(prepared.texts("stdlib"))
