"""Exporting SentencePiece models as tokenizer.json with the same ids; loading tokenizer.json."""

import json
import random

import pytest

from lm import data, hf
from lm.errors import UserError
from lm.generate import text as speech
from lm.hf.tokenizer import SAMPLES

tokenizers = pytest.importorskip("tokenizers")

# Synthetic text in many scripts; each word has random letters of one script.
SCRIPTS = (
    "abcdeéñß<>/knpsux",
    "абвгдеж",
    "αβγδεζη",
    "天地玄黄宇宙洪荒",
    "あいうえおカキク",
    "가나다라마",
    "אבגדה",
    "ابتثج",
    "कखगघ",
    "ກຂຄ",
)


def random_text(seed, documents=60):
    draw = random.Random(seed)

    def word():
        letters = draw.choice(SCRIPTS)
        return "".join(draw.choices(letters, k=draw.randint(1, 8)))

    def gap():
        return draw.choice([" "] * 12 + ["\n", "  ", ", ", ". ", " 12.", "\n    ", "-", "😀"])

    return ["".join(word() + gap() for _ in range(200)) for _ in range(documents)]


def read(files):
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    config = json.loads(files["tokenizer_config.json"])
    tokenizer.encode_special_tokens = config["split_special_tokens"]
    return tokenizer


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
@pytest.mark.parametrize("fallback", [True, False])
def test_tokenizer_json_gives_the_same_ids(kind, fallback):
    trained = data.SentencePiece(
        vocab=900, kind=kind, byte_fallback=fallback, symbols=data.CHAT_SYMBOLS
    ).train(random_text(0))
    exported = read(hf.export_files(trained, 512))
    spelled = ["<s> </s> <pad>", "<|user|>abc<|end|>", " <|user|> "]
    for text in [*random_text(1), *SAMPLES, *spelled]:
        ids = trained.encode(text)
        assert exported.encode(text, add_special_tokens=False).ids == ids
        if fallback:
            assert exported.decode(ids, skip_special_tokens=False) == text
    assert exported.encode("abc").ids == [trained.bos, *trained.encode("abc")]


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_models_with_a_normalizer_and_a_dummy_prefix_give_the_same_ids(rule, kind):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in random_text(2) for line in text.splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule == "nmt_nfkc",
        minloglevel=3,
    )
    trained = data.Tokenizer(model.getvalue())
    exported = read(hf.export_files(trained, 512))
    for text in SAMPLES:
        assert exported.encode(text, add_special_tokens=False).ids == trained.encode(text)


def byte_level(folder):
    """Saves a byte-level BPE tokenizer with added special tokens, as in Llama 3 and Qwen."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|start_of_text|>", "<|end_of_text|>", "<|turn|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(random_text(3), trainer)
    made.add_tokens(["[mark]"])
    made.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<|start_of_text|>"},
        "eos_token": "<|end_of_text|>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return made


def test_a_byte_level_tokenizer_is_loaded_and_saved(tmp_path):
    made = byte_level(tmp_path)
    loaded = data.load_tokenizer(tmp_path)
    assert (loaded.bos, loaded.eos, loaded.stops, loaded.prefix) == (0, 1, (1, 2), (0,))
    assert loaded.vocab == made.get_vocab_size()
    assert loaded.chat_template == "{{ messages }}"
    for text in [*random_text(4, 10), *SAMPLES, "a [mark] b"]:
        ids = loaded.encode(text)
        assert ids == made.encode(text, add_special_tokens=False).ids
        assert loaded.decode(ids) == text
        stream = loaded.stream()
        pieces = [stream.push([i]) for i in ids] + [stream.finish()]
        assert "".join(pieces) == text  # complete characters, even where tokens split them
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    assert loaded.decode(loaded.encode("a<|turn|>b")) == "ab"
    loaded.save(tmp_path / "copy")
    copy = data.load_tokenizer(tmp_path / "copy")
    assert (copy.checksum, copy.files) == (loaded.checksum, loaded.files)


def test_a_prompt_gets_at_most_one_bos_token(tmp_path):
    byte_level(tmp_path)
    loaded = data.load_tokenizer(tmp_path)
    assert speech.begin(loaded, "ab").ids[0] == loaded.bos
    assert speech.begin(loaded, "<|start_of_text|>ab") == speech.begin(loaded, "ab")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|end_of_text|>", "bos_token": None}))
    qwen = data.load_tokenizer(tmp_path)
    assert speech.begin(qwen, "ab").ids == qwen.encode("ab")
    assert speech.begin(qwen, "").ids == [qwen.eos]


def test_unsupported_tokenizers_are_refused(tmp_path):
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="name no end token"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a supported tokenizer\.json"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        (tmp_path / "empty").mkdir()
        data.load_tokenizer(tmp_path / "empty")
    trained = data.SentencePiece(vocab=700).train(random_text(0))
    trained.save(tmp_path / "sp")
    (tmp_path / "sp" / "added_tokens.json").write_text('{"<|im_end|>": 700}')
    with pytest.raises(UserError, match="adds tokens to its tokenizer"):
        data.load_tokenizer(tmp_path / "sp")


def test_training_text_is_prepared_with_an_imported_tokenizer(tmp_path):
    byte_level(tmp_path)
    tokenizer = data.TokenizerFile(path=str(tmp_path))
    texts = tuple(random_text(5, 10))
    source = data.Documents(texts=texts, held_out=0.0)
    prepared = data.prepare(source, tokenizer, tmp_path / "shards")
    opened = data.prepare(data.Shards(str(tmp_path / "shards")), tokenizer, "unused")
    assert opened.fingerprint == prepared.fingerprint
    assert set(opened.texts(opened.names[0], "train")) == set(texts)
