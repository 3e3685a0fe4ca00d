"""`lm serve --ngrams` and `--draft`: the answers are those without."""

import openai
import pytest
from served_models import serving

from lm.serve.router import Source
from lm.serve.variants import Reading


def texts(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    return [
        client.completions.create(
            model="one", prompt=["the cat sat", "猫は"], max_tokens=40, temperature=t, seed=3
        ).choices
        for t in (0, 0.8)
    ]


@pytest.mark.parametrize("option", ["ngrams", "draft"])
def test_answers_are_the_same(folders, option):
    source = Source("one", str(folders["one"]))
    reading = Reading(**{option: 3 if option == "ngrams" else str(folders["two"])})
    with serving(source) as plain, serving(source, reading=reading) as drafting:
        assert texts(plain) == texts(drafting)
        assert drafting.worker.variants["one"].engine.drafted > 0
