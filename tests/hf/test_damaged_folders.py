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


# Found by trying to break the import


def test_a_folder_beside_the_target_is_kept(folder, tmp_path):
    for name in ("foo.partial", "bar.partial"):
        source = shutil.copytree(folder, tmp_path / name)
        target = name.removesuffix(".partial")
        make = exchange.import_run if target == "foo" else exchange.export_run
        make(source, tmp_path / target)
        assert (source / "config.json").exists() and (tmp_path / target).is_dir()


def test_targets_that_cannot_be_made_are_refused_before_weights_are_read(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(hf.Pretrained, "params", None)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for target in ("file", "file/below", ".", ""):
        for make in (exchange.import_run, exchange.export_run):
            with pytest.raises(UserError, match=r"is a file|exists|current folder|names no"):
                make(folder, target)
    for name in ("my model", ".m", "m" * 300):
        with pytest.raises(UserError, match=r"cannot be a run's folder|names no folder"):
            exchange.import_run(folder, tmp_path / name)


def test_a_link_to_an_empty_folder_is_filled(folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    exchange.export_run(folder, tmp_path / "link")
    assert (tmp_path / "real" / "config.json").exists()


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {
                "rope_parameters": {"rope_theta": 500.0},
                "rope_scaling": {"type": "linear", "factor": 2},
            },
            "keep one",
        ),
        ({"model_type": "mistral"}, "different families"),
        ({"num_key_value_heads": 0}, "kv_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"rms_norm_eps": 1e60}, "eps=1e\\+60"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_fields_that_contradict_or_cannot_be_meant(folder, fields, words):
    change(folder, **fields)
    with pytest.raises(UserError, match=words):
        hf.Pretrained(folder)


def test_rope_parameters_of_gemma_need_an_entry_for_each_kind_of_layer(tmp_path):
    folder = write_folder("gemma3", tmp_path)
    change(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_scaling=None)
    with pytest.raises(UserError, match="no entry for sliding_attention"):
        hf.Pretrained(folder)


def test_a_step_of_a_hugging_face_folder_is_refused(folder):
    with pytest.raises(UserError, match="step=7: .* without steps"):
        lm.load(folder, step=7)


def test_tokens_that_the_model_does_not_have_are_refused(folder):
    weights = read_weights(folder)
    small = {n: x[:200] if x.shape[0] == 384 else x for n, x in weights.items()}
    write_weights(folder, small)
    change(folder, vocab_size=200)
    run = lm.load(folder)
    with pytest.raises(UserError, match=r"gives token 2\d\d, and model.vocab=200 ends before it"):
        run.evaluate(data.Documents(("a stone in its river by night",)))
    for tokens in ([[1, 250]], [[1, -5]], [1, 5], [[]], [[1.5, 2.0]]):
        with pytest.raises(UserError, match="ids from 0 to 199"):
            run.logits(tokens)


def test_special_tokens_beyond_the_tokenizer_are_refused(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5000]}')
    with pytest.raises(UserError, match="special token 5000 lies outside the 280 ids"):
        lm.load(folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [1, {2**31}]}}')
    with pytest.raises(UserError, match="is no list of token ids"):
        lm.load(folder)


def test_layers_of_different_dtypes_are_read_as_float32(folder):
    weights, name = read_weights(folder), "model.layers.1.mlp.up_proj.weight"
    half = {**weights, name: weights[name].astype("bfloat16")}
    write_weights(folder, half)
    params = lm.load(folder).params["blocks"]["0"]["ffn"]["up"]
    assert params.dtype == np.float32
    np.testing.assert_array_equal(params[1].T, half[name].astype(np.float32))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"]
)
def test_a_folder_in_place_of_a_file_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        lm.load(folder)


def test_an_export_of_weights_that_are_not_finite_says_so(folder, tmp_path):
    weights = read_weights(folder)
    weights["lm_head.weight"] = np.full_like(weights["lm_head.weight"], np.nan)
    write_weights(folder, weights)
    with pytest.raises(UserError, match="logits are not finite"):
        exchange.export_run(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
