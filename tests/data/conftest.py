import pytest
from made_up_corpus import documents

from lm import data

VOCAB = 384


@pytest.fixture(scope="session")
def tokenizer_config():
    return data.SentencePiece(vocab=VOCAB)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_config):
    return tokenizer_config.train(documents(40))


@pytest.fixture(scope="session")
def own():
    """A tokenizer for conversations, trained here."""
    return data.SentencePiece(vocab=400, symbols=data.CHAT_SYMBOLS).train(documents(30))


@pytest.fixture(scope="session")
def own_config(own, tmp_path_factory):
    """Loads `own`."""
    folder = tmp_path_factory.mktemp("own")
    own.save(folder)
    return data.TokenizerFile(path=str(folder))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tokenizer_config):
    """Two prepared sources of unequal size, with 10% of each held out."""
    mixture = data.Mixture(
        sources={
            "a": data.Documents(documents(60, seed=1), held_out=0.1),
            "b": data.Documents(documents(30, seed=2), held_out=0.1),
        },
        weights={"a": 0.75, "b": 0.25},
    )
    return data.prepare(mixture, tokenizer_config, tmp_path_factory.mktemp("prepared"))
