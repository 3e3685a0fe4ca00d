"""A server of a tiny model, and the official client."""

import openai
import pytest
from served_models import serving, tokenizer, write_run

from lm import model
from lm.serve.router import Source


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{name: run folder}: two models, and an adapter of the first."""
    home, words = tmp_path_factory.mktemp("served"), tokenizer()
    return {
        "one": write_run(home / "one", words, seed=1),
        "two": write_run(home / "two", words, seed=2),
        "tuned": write_run(home / "tuned", words, seed=1, adapter=model.LoRA(rank=2)),
    }


@pytest.fixture(scope="session")
def server(folders):
    """Serves "one" with its adapter "tuned"."""
    with serving(
        Source("one", str(folders["one"])), adapters=(Source("tuned", str(folders["tuned"])),)
    ) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    """Of `server`. It does not repeat requests that fail."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
