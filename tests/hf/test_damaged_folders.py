"""A Hugging Face folder whose JSON parses but has a field of another type, or misses one, is read
or refused with one sentence."""

import contextlib
import io
import json
import math
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hf_folders import read_weights, write_folder, write_weights

import lm
from lm import data, exchange, hf
from lm.errors import UserError

ODD = (None, True, -1, 0, 1.5, math.nan, 10**30, "x", "", [], ["x"], [[1]], {}, {"x": 1}, [1, 2])
DROP = object()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a byte-level tokenizer: 0 begin, 1 end, 2 end of turn."""
    folder = write_folder("llama2", tmp_path_factory.mktemp("whole"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = level(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<b>", "<e>", "<t>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a stone in its river by night"] * 9, trainer)
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<b>", "eos_token": "<e>", "added_tokens_decoder": {"0": {}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text('{"unk_token": "<t>"}')
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def sentencepiece_folder(folder):
    """The same with a tokenizer.model and added_tokens.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a stone in its river"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "added_tokens.json").write_text('{"<b>": 1}')
    return folder


def opened(folder):
    """Reads everything that a run needs before its weights."""
    pretrained = hf.Pretrained(folder)
    pretrained.length, pretrained.stored_dtypes()
    tokenizer = data.load_tokenizer(folder)
    tokenizer.encode("a stone"), tokenizer.chat_template, tokenizer.stops
    return pretrained, tokenizer


def changes(content):
    """Copies of a JSON object with one field, also of a nested object, changed or dropped."""
    for key, value in content.items():
        yield {k: v for k, v in content.items() if k != key}
        for odd in ODD:
            yield {**content, key: odd}
        if isinstance(value, dict):
            for nested in changes(value):
                yield {**content, key: nested}


def check_every_change(folder, name, read=opened):
    path = folder / name
    content = json.loads(path.read_text())
    for changed in [*changes(content), *ODD]:
        path.write_text(json.dumps(changed))
        with contextlib.suppress(UserError):
            read(folder)
    for text in ("", '{"a": 2', "\x00", '{"\\ud83d": 1}', "[" * 200_000):
        path.write_text(text)
        with contextlib.suppress(UserError):
            read(folder)
    path.write_bytes(b"\xff\xfe")
    with contextlib.suppress(UserError):
        read(folder)


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe", "gemma3"])
def test_config_json(family, tmp_path):
    folder = write_folder(family, tmp_path)
    check_every_change(folder, "config.json", lambda folder: hf.Pretrained(folder).length)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_files_beside_the_tokenizer(folder, name):
    check_every_change(folder, name)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_files_beside_a_sentencepiece_model(sentencepiece_folder, name):
    check_every_change(sentencepiece_folder, name)


@pytest.mark.parametrize(
    "content", ['{"<x>": 2', '["<x>"]', '{"<x>": "300"}', '{"<x>": -1}', '{"<x>": [3]}']
)
def test_damaged_added_tokens_are_named(sentencepiece_folder, content):
    (sentencepiece_folder / "added_tokens.json").write_text(content)
    with pytest.raises(UserError, match=r"added_tokens\.json is damaged: .*; fetch it again"):
        lm.load(sentencepiece_folder)


def test_index_of_the_weights(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(read_weights(folder), "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict(list(names.items())[:2])}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_every_change(folder, "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model-00001"]}')
    with pytest.raises(UserError, match=r"index\.json is damaged: it has no weight_map"):
        lm.load(folder)


def rewrite_header(folder, edit):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(edit(json.loads(raw[8 : 8 + size]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


def test_headers_of_safetensors(folder):
    original = (folder / "model.safetensors").read_bytes()
    entry = {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}
    for changed in [*changes(entry), *ODD]:
        rewrite_header(folder, lambda header, changed=changed: {**header, "x": changed})
        with pytest.raises(UserError):
            opened(folder)
        (folder / "model.safetensors").write_bytes(original)
    for size in (0, 2**40, 2**63 - 1):
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + original[8:])
        with pytest.raises(UserError, match=r"model\.safetensors"):
            opened(folder)


def test_overlapping_and_missing_bytes_are_refused(folder):
    original = (folder / "model.safetensors").read_bytes()

    def overlap(header):
        first, second = [n for n, e in header.items() if e["shape"] == [64]][:2]
        return {**header, second: header[first]}

    rewrite_header(folder, overlap)
    with pytest.raises(UserError, match="do not follow those before"):
        opened(folder)
    (folder / "model.safetensors").write_bytes(original + b"\0" * 4)
    with pytest.raises(UserError, match="4 bytes follow the last tensor"):
        opened(folder)


# Facts that several files tell


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits(folder):
    return np.asarray(lm.load(folder).logits([[1, 5, 9]]))


@pytest.mark.parametrize("generation", [None, {}, {"temperature": 0.6}, {"eos_token_id": None}])
def test_end_tokens_of_config_json_count_where_generation_config_has_none(folder, generation):
    change(folder, eos_token_id=[1, 2])
    path = folder / "generation_config.json"
    path.unlink() if generation is None else path.write_text(json.dumps(generation))
    assert opened(folder)[1].stops == (1, 2)
    imported = exchange.import_run(folder, folder.parent / "run")
    assert imported.tokenizer.stops == lm.load(imported.folder).tokenizer.stops == (1, 2)


def test_an_output_matrix_that_differs_from_the_tied_embedding_is_kept(folder):
    untied = logits(folder)
    change(folder, tie_word_embeddings=True)
    np.testing.assert_array_equal(logits(folder), untied)
    weights = read_weights(folder)
    write_weights(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert hf.Pretrained(folder).config.tied


def test_the_single_file_is_read_where_there_are_two_versions_of_the_weights(folder):
    exchange.export_run(folder, folder.parent / "shards", shard_bytes=200_000)
    for path in (folder.parent / "shards").glob("model*"):
        shutil.copy(path, folder)
    weights = {name: 2 * x for name, x in read_weights(folder.parent / "shards").items()}
    write_weights(folder, weights)
    (folder.parent / "single").mkdir()
    single = shutil.copytree(folder, folder.parent / "single" / "model")
    for path in single.glob("model-*"):
        path.unlink()
    (single / "model.safetensors.index.json").unlink()
    np.testing.assert_array_equal(logits(folder), logits(single))


def test_a_tensor_in_two_shards_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    index = {
        "weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"twice, also in b\.safetensors"):
        lm.load(folder)


def test_an_adapter_beside_the_model_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config\.json\)"):
        lm.load(folder)
