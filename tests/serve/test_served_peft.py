"""PEFT folders (tests/oracles), served over one Hugging Face folder, write what each writes when it
is opened by itself."""

import json
import shutil

import jax
import openai
import pytest
from oracles import tiny
from served_models import serving

import lm
from lm.generate import Engine, Request, Sampling
from lm.serve.router import Source

# Adapted layers; modules trained whole; keys and values of a prefix; an embedding; a head.
KINDS = {
    False: ("rslora", "lora_saved", "prefix"),
    True: ("tied_embedding", "tied_head"),
}


@pytest.mark.parametrize("tied", KINDS)
def test_peft_adapters(tmp_path, tied):
    base = tmp_path / "base"
    tiny.write_model(base, tied=tied)
    for file in tiny.TOKENIZER.iterdir():
        shutil.copy(file, base)
    for kind in KINDS[tied]:
        shutil.copytree(tiny.RECORDED / kind, tmp_path / kind)
        fields = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        fields["base_model_name_or_path"] = str(base)
        (tmp_path / kind / "adapter_config.json").write_text(json.dumps(fields))
    adapters = tuple(Source(kind, str(tmp_path / kind)) for kind in KINDS[tied])
    with (
        serving(Source("base", str(base)), adapters=adapters) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        texts, pointers = {}, {}
        for kind in ("base", *KINDS[tied]):
            run = lm.load(tmp_path / kind)
            request = Request(
                prompt=[0, 20, 30, 40], max_tokens=30, sampling=Sampling(temperature=0)
            )
            (want,) = Engine(run.apply.cast(), context=256).generate([request])
            made = client.completions.create(
                model=kind,
                prompt=[0, 20, 30, 40],
                max_tokens=30,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            texts[kind] = made.choices[0].text
            assert texts[kind] == run.tokenizer.decode(want.tokens)
            params = server.worker.variants[kind].engine.model.params
            arrays = jax.tree.leaves({k: x for k, x in params.items() if k != "adapter"})
            pointers[kind] = {x.unsafe_buffer_pointer() for x in arrays}
    assert len(set(texts.values())) > 1
    assert pointers.get("rslora", pointers["base"]) == pointers["base"]
