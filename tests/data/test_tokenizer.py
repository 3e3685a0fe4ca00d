"""Encoding is lossless, and training is deterministic."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_up_corpus import documents

from lm import data
from lm.data import tokenizer as tokenizer_module
from lm.data import tokenizer_training as training_module
from lm.errors import UserError

# All of Unicode except surrogates, which UTF-8 cannot encode; difficult characters are frequent.
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \n\t\r\u2581\u2585\0\u00a0<>|s/0123aé中😀"),
    ),
    max_size=60,
)
AWKWARD = "  a\u2581 b\r\n\n\t</s><0x41><unk> \u2585\0 ﬁ e\u0301 \u2028<|user|>"

# Parts of the corpus and of symbols, so that pieces of several characters meet at every boundary.
BITS = ["def ", "x", " ", "  ", "\n", "\n\n", "\u2581", "<|us", "er|>", "):", "\t", "天", "é"]


@pytest.fixture(scope="module", params=["bpe", "unigram", "char"])
def any_tokenizer(request):
    config = data.SentencePiece(vocab=384, kind=request.param, symbols=data.CHAT_SYMBOLS)
    return config.train(documents(30))


# The tokenizer is immutable, so all examples share one.
@settings(max_examples=150, deadline=None, suppress_health_check=[])
@given(text=TEXT)
@example(text="")
@example(text=AWKWARD)
@example(text="\u2581")
@example(text=" " * 20_000 + "\n" * 20_000)
def test_decoding_restores_the_encoded_text(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    stream = any_tokenizer.stream()
    assert "".join([stream.push([i]) for i in ids]) + stream.finish() == text


def test_encoding_a_batch_equals_encoding_each_text(any_tokenizer):
    texts = [*documents(4), "", "\u2581", AWKWARD]
    assert [ids.tolist() for ids in any_tokenizer.encode_batch(texts)] == [
        any_tokenizer.encode(text) for text in texts
    ]


def test_text_is_never_encoded_as_control_ids(any_tokenizer):
    for text in (AWKWARD, "<s>", "</s><pad>"):
        assert not {0, 1, 2, 3} & set(any_tokenizer.encode(text))


def test_symbols_are_encoded_as_single_tokens(any_tokenizer):
    for symbol in data.CHAT_SYMBOLS:
        (piece,) = any_tokenizer.encode(symbol)
        assert any_tokenizer.decode([piece]) == symbol
        assert piece in any_tokenizer.encode(f"x{symbol}y")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(st.sampled_from([*data.CHAT_SYMBOLS, *BITS]), max_size=40),
    size=st.integers(1, 9),
)
def test_ids_do_not_depend_on_where_long_text_is_cut(any_tokenizer, monkeypatch, parts, size):
    text = "".join(parts)
    monkeypatch.setattr(tokenizer_module, "_CUT", 1_000_000)
    whole = any_tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "_CUT", size)
    assert any_tokenizer.encode(text) == whole


@pytest.mark.parametrize("length", [15_990, 15_996, 31_999])
def test_a_symbol_in_a_long_text_without_spaces_is_one_token(any_tokenizer, length):
    assert any_tokenizer.encode("天" * length + "<|user|>")[-1:] == any_tokenizer.encode("<|user|>")


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_text_with_a_reserved_character_is_trained_on(kind):
    words = ("zebra zebra zebra \u2585 a\ud83db",) * 9
    plain = data.SentencePiece(vocab=300, kind=kind).train(("zebra zebra zebra", *words))
    assert len(plain.encode("zebra")) == len(
        data.SentencePiece(vocab=300, kind=kind).train(["zebra zebra zebra"] * 9).encode("zebra")
    )


@pytest.mark.parametrize("symbols", [("\n\n",), ("ab", "bc"), ("xx",)])
def test_symbols_that_may_overlap_in_a_text_are_refused(symbols):
    with pytest.raises(UserError, match="cannot overlap"):
        data.SentencePiece(vocab=384, symbols=symbols)


@pytest.mark.parametrize("fields", [{"coverage": 0.9}, {"vocab": 300.5}, {"vocab": 2**31}])
def test_settings_that_sentencepiece_does_not_take_are_refused_at_once(fields):
    with pytest.raises(UserError, match=rf"tokenizer\.{next(iter(fields))}="):
        data.SentencePiece(**{"vocab": 384, **fields})


@pytest.mark.parametrize("symbol", ["<end of turn>", "<s>", "<0x41>", "a\u2581", "\ud83d", " "])
def test_symbols_that_would_not_be_one_token_are_refused(symbol):
    with pytest.raises(UserError, match="tokenizer"):
        data.SentencePiece(vocab=384, symbols=(symbol,)).train(documents(30))


def test_half_surrogate_pairs_are_encoded_as_replacement_characters(any_tokenizer):
    assert any_tokenizer.encode("caf\udce9") == any_tokenizer.encode("caf\ufffd")
    assert any_tokenizer.encode("\ud83d\ude42") == any_tokenizer.encode("\U0001f642")


def test_special_ids_and_ids_beyond_the_vocabulary(tokenizer):
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert tokenizer.decode([0, 1, *tokenizer.encode("a"), 2]) == "a"
    # A model's vocabulary may be padded beyond that of the tokenizer.
    assert tokenizer.decode([tokenizer.vocab + 5]) == ""


def test_streaming_yields_only_complete_characters(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("\U0010ffff")
    assert len(ids) == 4
    assert [stream.push([piece]) for piece in ids] == ["", "", "", "\U0010ffff"]
    stream.push(ids[:2])
    assert stream.finish() == "\ufffd"
    assert tokenizer.decode(ids[:2]) == "\ufffd"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(kind):
    config = data.SentencePiece(vocab=350, kind=kind)
    assert config.train(documents(20)).model == config.train(documents(20)).model


def test_numbers_are_split_into_digits():
    tokenizer = data.SentencePiece(vocab=320).train(["2024 2024 2024 " * 50])
    assert [tokenizer.decode([piece]) for piece in tokenizer.encode("2024")] == list("2024")


def test_training_reads_a_bounded_sample():
    sample = training_module.Sample(budget=20_000, seed=0)
    texts = documents(200)
    for owner, text in enumerate(texts):
        sample.add(text, owner)
    kept = list(sample.texts())
    assert 5_000 < sum(len(part.encode()) for part in kept) <= 20_000
    assert all(any(part in text for text in texts) for part in kept)
    again = training_module.Sample(budget=20_000, seed=0)
    for text in reversed(texts):
        again.add(text)
    assert sorted(again.texts()) == sorted(kept)  # independent of the order


def test_save_and_load(tokenizer, tmp_path):
    for folder in (str(tmp_path), "memory://run"):
        tokenizer.save(folder)
        assert data.load_tokenizer(f"{folder}/tokenizer.model").model == tokenizer.model
        assert data.load_tokenizer(folder).model == tokenizer.model
        loaded = data.TokenizerFile(path=folder).load()
        assert loaded.encode("def x") == tokenizer.encode("def x")


def test_a_model_that_adds_a_leading_space(tmp_path):
    # Like the tokenizer of Llama; trained here with the defaults of SentencePiece.
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(20)),
        model_writer=model,
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    tokenizer = data.Tokenizer(model.getvalue())
    for text in ("self value", " self", "x" * 40_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.pad == tokenizer.eos  # the model has no padding id


def test_invalid_settings_and_files_are_errors(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'unigram'"):
        data.SentencePiece(vocab=500, kind="unigrm")
    with pytest.raises(UserError, match=r"tokenizer\.vocab=200 must be above 260"):
        data.SentencePiece(vocab=200)
    with pytest.raises(UserError, match=r"tokenizer\.vocab=262 is too small"):
        data.SentencePiece(vocab=262).train(documents(5))
    with pytest.raises(UserError, match="no text to train"):
        data.SentencePiece(vocab=300).train([])
    with pytest.raises(UserError, match="no file"):
        data.load_tokenizer(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model"):
        data.load_tokenizer(tmp_path / "bad.model")


def test_a_text_too_small_for_the_vocabulary_prints_a_note(capsys, caplog):
    tokenizer = data.SentencePiece(vocab=5_000, kind="unigram").train(["a small text"])
    assert tokenizer.vocab < 5_000
    note = f"The text yields only {tokenizer.vocab} of tokenizer.vocab=5000 pieces"
    assert capsys.readouterr().err.startswith(note)
    assert caplog.text == ""
