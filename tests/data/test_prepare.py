"""Prepared data is identical after any interruption, and errors name damaged files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from made_up_corpus import documents

from lm import data
from lm.data import folder as folders
from lm.data import shards
from lm.errors import UserError

HERE = Path(__file__).parent
CORPUS = data.Mixture(
    sources={
        "a": data.Documents(documents(30, seed=1), held_out=0.1),
        "b": data.Documents(documents(5, seed=2), held_out=0.1),
    }
)
TOKENIZER = data.SentencePiece(vocab=384)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 4_000)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 4_000)
        prepared = data.prepare(CORPUS, TOKENIZER, folder)
    return folder, prepared


def content(folder):
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_documents_are_read_back_unchanged(complete):
    _, prepared = complete
    texts = [*prepared.texts("a", "train"), *prepared.texts("a", "held_out")]
    assert sorted(texts) == sorted(CORPUS.sources["a"].texts)
    heads, tails = (list(prepared.texts("b", split)) for split in ("train", "held_out"))
    assert tuple(a + b for a, b in zip(heads, tails)) == CORPUS.sources["b"].texts


def test_each_document_has_bos_and_eos_tokens(complete):
    _, prepared = complete
    stream = prepared.stream("a", "train")
    tokens = stream.read(0, stream.tokens)
    assert (tokens[stream.starts[:-1]] == prepared.tokenizer.bos).all()
    assert (tokens[stream.starts[1:] - 1] == prepared.tokenizer.eos).all()
    assert (tokens == prepared.tokenizer.bos).sum() == stream.documents


def test_the_manifest_has_counts_and_checksums(complete):
    folder, prepared = complete
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["shards"]["a"]) > 3
    for (name, split), counts in prepared.counts.items():
        texts = list(prepared.texts(name, split))
        assert counts.documents == len(texts)
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        ids = prepared.tokenizer.encode_batch(texts)
        assert counts.tokens == sum(len(each) + 1 for each in ids)
    files = {n: f for e in manifest["shards"]["a"] for n, f in shards._files(e).items()}
    for name, file in files.items():
        assert folders.digest((folder / name).read_bytes()) == file["sha256"]


class Interrupted(BaseException):
    pass


def test_interrupting_any_write_does_not_change_the_result(complete, tmp_path, monkeypatch):
    expected = content(complete[0])
    write, state = folders._write_atomically, {"writes": 0, "partial": False}

    def failing(path, content):
        if state["writes"] == 0:
            if state["partial"]:
                path.parent.mkdir(exist_ok=True)
                path.with_name(path.name + ".tmp").write_bytes(bytes(content)[:7])
            raise Interrupted
        state["writes"] -= 1
        write(path, content)

    monkeypatch.setattr(folders, "_write_atomically", failing)
    interruptions = 0
    # A shard takes three to five writes. Interrupt at each, with and without a partial file.
    while True:
        state["writes"], state["partial"] = interruptions % 7, interruptions % 2 == 0
        try:
            data.prepare(CORPUS, TOKENIZER, tmp_path)
            break
        except Interrupted:
            interruptions += 1
            assert interruptions < 300, "no progress is made"
    assert interruptions > 10
    assert content(tmp_path) == expected


KILLED = """
import os, signal, sys
from made_up_corpus import documents
from lm import data
from lm.data import folder, shards
from test_prepare import CORPUS, TOKENIZER
shards.SHARD = 4_000
write, writes = folder._write_atomically, [int(sys.argv[2])]
def dying(path, content):
    if not writes[0]:
        path.parent.mkdir(exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            file.write(bytes(content)[:9]); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    writes[0] -= 1
    write(path, content)
folder._write_atomically = dying
data.prepare(CORPUS, TOKENIZER, sys.argv[1])
"""


@pytest.mark.slow
def test_killing_the_process_does_not_change_the_result(complete, tmp_path):
    paths = [str(HERE), str(HERE.parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for writes in (0, 2, 4, 9, 100):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(writes)]
        ended = subprocess.run(command, env=environment, cwd=HERE.parent.parent, check=False)
        assert ended.returncode == (0 if writes == 100 else -signal.SIGKILL)
    assert content(tmp_path) == content(complete[0])


def test_finished_shards_are_not_rebuilt(complete, tmp_path, monkeypatch):
    data.prepare(CORPUS, TOKENIZER, tmp_path)
    (tmp_path / "a" / "train-00002.tokens").unlink()
    built = []
    build = shards._build
    monkeypatch.setattr(shards, "_build", lambda *a: built.append(a[1:3]) or build(*a))
    data.prepare(CORPUS, TOKENIZER, tmp_path)
    assert built == [("a", 2)]
    assert content(tmp_path) == content(complete[0])


def test_a_complete_folder_is_only_read(complete, monkeypatch):
    folder, prepared = complete

    def forbidden(*_):
        raise AssertionError("wrote a file or trained the tokenizer again")

    monkeypatch.setattr(folders, "_write_atomically", forbidden)
    monkeypatch.setattr(data.SentencePiece, "train_on", forbidden)
    again = data.prepare(CORPUS, TOKENIZER, folder)
    assert again.fingerprint == prepared.fingerprint and again.counts == prepared.counts


def test_the_number_of_threads_does_not_change_the_result(complete, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    data.prepare(CORPUS, TOKENIZER, tmp_path)
    assert content(tmp_path) == content(complete[0])


def error(corpus, tokenizer, folder):
    with pytest.raises(UserError) as caught:
        data.prepare(corpus, tokenizer, folder)
    return str(caught.value)


def test_a_different_recipe_is_an_error(complete):
    folder, _ = complete
    before = content(folder)
    message = error(CORPUS, data.SentencePiece(vocab=400), folder)
    assert "tokenizer.vocab=384" in message and "400" in message and str(folder) in message
    other = data.Mixture(sources={**CORPUS.sources, "b": data.Documents(("x",), held_out=0.1)})
    assert "other files (sources.b.fingerprint differs)" in error(other, TOKENIZER, folder)
    fewer = data.Mixture(sources={"a": CORPUS.sources["a"]})
    assert "sources.b" in error(fewer, TOKENIZER, folder)
    assert content(folder) == before


def test_weights_are_not_part_of_the_recipe(complete):
    folder, prepared = complete
    other = data.Mixture(sources=CORPUS.sources, weights={"a": 0.1, "b": 0.9})
    assert data.prepare(other, TOKENIZER, folder).fingerprint == prepared.fingerprint


@pytest.mark.parametrize(
    "name, damage",
    [
        ("a/train-00001.tokens", lambda content: content[:-2]),
        ("a/train-00001.tokens", lambda content: b"\x05\x05" + content[2:]),
        ("a/held_out-00000.documents.npy", lambda content: content[:-1] + b"\x7f"),
        ("tokenizer.model", lambda content: content[:-1]),
        ("manifest.json", lambda content: content[:-9]),
    ],
)
def test_the_error_names_a_damaged_file(name, damage, complete, tmp_path):
    data.prepare(CORPUS, TOKENIZER, tmp_path)
    name = name if (tmp_path / name).exists() else name.replace("00000", "00001")
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    message = error(CORPUS, TOKENIZER, tmp_path)
    assert f"{path} is damaged" in message and "elete" in message
    if name != "manifest.json":  # the suggested fix works
        path.unlink()
        data.prepare(CORPUS, TOKENIZER, tmp_path)
        assert content(tmp_path) == content(complete[0])


def test_a_prepared_folder_can_be_used_as_a_source(complete):
    folder, prepared = complete
    again = data.prepare(data.Shards(str(folder)), None, "unused")
    assert again.counts == prepared.counts
    assert data.prepare(data.Shards(str(folder)), TOKENIZER, "unused").names == ("a", "b")
    shape = data.BatchShape(sequences=2, length=16)
    only_b = data.prepare(data.Shards(str(folder), weights={"b": 1.0}), None, "unused")
    rate = prepared.counts["b", "train"]
    assert only_b.loader(shape, 0).bytes_per_token == pytest.approx(rate.bytes / rate.tokens)
    with pytest.raises(UserError, match=r"tokenizer\.vocab"):
        data.prepare(data.Shards(str(folder)), data.SentencePiece(vocab=400), "unused")
    with pytest.raises(UserError, match="is not a folder of token shards"):
        data.prepare(data.Shards(str(HERE)), None, "unused")


def test_preparing_into_a_folder_at_a_url(complete, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepared = data.prepare(CORPUS, TOKENIZER, "memory://prepared")
    assert prepared.fingerprint == complete[1].fingerprint
    shape = data.BatchShape(sequences=4, length=32)
    a, b = (p.loader(shape, 0).batch(3) for p in (prepared, complete[1]))
    assert all(np.array_equal(x, y) for x, y in zip(a, b))
    damaged = "memory://prepared/a/train-00000.tokens"
    whole = fsspec.filesystem("memory").cat_file(damaged)
    fsspec.filesystem("memory").pipe_file(damaged, whole[:-2] + b"\0\0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(UserError, match=r"train-00000\.tokens is damaged"):
        stream = data.prepare(CORPUS, TOKENIZER, "memory://prepared").stream("a", "train")
        stream.read(0, 5)


def test_preparing_with_an_existing_tokenizer(complete, tmp_path):
    existing = data.TokenizerFile(path=str(complete[0] / "tokenizer.model"))
    prepared = data.prepare(CORPUS, existing, tmp_path)
    assert prepared.tokenizer.model == complete[1].tokenizer.model
    assert prepared.counts == complete[1].counts
    assert "tokenizer.tokenizer=" in error(CORPUS, TOKENIZER, tmp_path)


def test_vocabularies_above_65536_take_four_bytes_per_token():
    assert shards.token_dtype(65_536).itemsize == 2
    assert shards.token_dtype(65_537).itemsize == 4


def test_progress_bars_reach_their_totals(tmp_path):
    seen = {}

    class Bar:
        def __init__(self, description, total, unit=""):
            self.description, self.total = description, total
            seen[description] = [total, 0, unit]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, n):
            seen[self.description][1] += n

    data.prepare(CORPUS, TOKENIZER, tmp_path, progress=Bar)
    assert list(seen) == [
        "reading a",
        "reading b",
        "training the tokenizer",
        "tokenizing a",
        "tokenizing b",
    ]
    assert all(total == done for total, done, _ in seen.values())
    assert [unit for *_, unit in seen.values()] == ["B", "B", "", "B", "B"]


def test_too_little_text_is_an_error(tmp_path):
    for texts, words in (
        ((), "has no text"),
        (("",), "has no text"),
        (("abc",), "too small to give a held_out part"),
    ):
        corpus, tokenizer = data.Documents(texts, held_out=0.05), data.SentencePiece(vocab=300)
        message = error(corpus, tokenizer, tmp_path / str(len(texts) + len("".join(texts))))
        assert words in message
    with pytest.raises(UserError, match=r"works only with data\.Shards"):
        data.prepare(CORPUS, None, tmp_path)


def test_a_full_disk_is_an_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    folder = folders.Folder(tmp_path)
    os.symlink("/dev/full", tmp_path / "x.tokens.tmp")
    with pytest.raises(UserError, match=r"disk of .* is full: x\.tokens needs 100,000 bytes"):
        folder.write("x.tokens", b"0" * 100_000)
    assert folder.size("x.tokens") is None
