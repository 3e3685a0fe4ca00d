"""Errors on reading or writing a folder are one sentence that names the file or the field."""

import dataclasses
import json
import shutil

import pytest
import tiny_experiments
from hf_folders import read_weights, write_weights

import lm
from lm import exchange, hf, model
from lm.errors import UserError
from lm.hf import families
from lm.hf.llama import LLAMA


@pytest.fixture
def copy(folder, tmp_path):
    """copy(family) returns a copy of the folder that the test may modify."""

    def make(family):
        return shutil.copytree(folder(family), tmp_path / family)

    return make


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def check_refused(folder, *parts):
    with pytest.raises(UserError) as refusal:
        lm.load(folder)
    for part in parts:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused(copy):
    path = copy("llama2") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    check_refused(path.parent, "model.safetensors is truncated: it has 765,", "download it again")
    path.write_bytes(b"")
    check_refused(path.parent, "is truncated or not safetensors")


def test_missing_weight_files_are_refused(copy, folder, tmp_path):
    exchange.export_run(folder("llama2"), tmp_path / "out", shard_bytes=200_000)
    shard = sorted((tmp_path / "out").glob("model-00002-of-*.safetensors"))[0]
    shard.unlink()
    check_refused(tmp_path / "out", f"index.json names {shard.name}, which is missing")
    (copy("llama2") / "model.safetensors").unlink()
    (tmp_path / "llama2" / "pytorch_model.bin").touch()
    check_refused(tmp_path / "llama2", "neither model.safetensors", "pytorch_model.bin")


def test_a_wrong_shape_is_refused(copy):
    folder = copy("llama2")
    change(folder, intermediate_size=128)
    check_refused(folder, "mlp.gate_proj.weight has shape [160, 64]", "config.json it is [128, 64]")


def test_missing_and_unexpected_tensors_are_refused(copy):
    folder = copy("llama2")
    weights = read_weights(folder)
    lost = {name: x for name, x in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
    write_weights(folder, lost)
    check_refused(folder, "no tensor model.layers.1.mlp.up_proj.weight, which LlamaForCausalLM")
    more = weights | {"model.layers.0.self_attn.q_proj.bias": weights["model.norm.weight"]}
    write_weights(folder, more)
    check_refused(folder, "holds model.layers.0.self_attn.q_proj.bias", "would lose it")


@pytest.mark.parametrize(
    ("family", "fields", "parts"),
    [
        ("llama2", {"architectures": ["LlamaForCausaLM"]}, ("Did you mean 'LlamaForCausalLM'?",)),
        ("llama2", {"architectures": ["GPT2LMHeadModel"]}, ("'GPT2LMHeadModel' is not a supp",)),
        ("llama2", {"quantization_config": {"bits": 4}}, ("quantization_config", "not supported")),
        ("llama2", {"hidden_act": "relu"}, ("hidden_act='relu'",)),
        ("llama2", {"logit_scale": 0.5}, ("logit_scale=0.5", "may change what the model computes")),
        ("llama2", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, ("type='su'",)),
        (
            "llama2",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2, "base": 3}},
            ("rope_scaling: base=3",),
        ),
        ("llama2", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5",)),
        ("llama2", {"hidden_size": "64"}, ("dim='64' must be a whole number",)),
        ("llama2", {"num_key_value_heads": 3}, ("config.json", "kv_heads=3 does not divide")),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            ("layer_types", "must be for all layers"),
        ),
        ("gemma3", {"use_bidirectional_attention": True}, ("use_bidirectional_attention=True",)),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, ("layer_types",)),
    ],
)
def test_unsupported_config_fields_are_refused(family, fields, parts, copy):
    folder = copy(family)
    change(folder, **fields)
    check_refused(folder, "config.json", *parts)


def test_config_fields_without_effect_are_accepted(copy):
    folder = copy("llama2")
    change(folder, some_switch=False, another=None, unsloth_version="2026.1", attention_dropout=0.1)
    lm.load(folder)


def test_a_damaged_or_missing_config_is_refused(copy, tmp_path):
    folder = copy("llama2")
    (folder / "config.json").write_text("{")
    check_refused(folder, "config.json is damaged")
    (folder / "config.json").unlink()
    check_refused(
        folder, "neither a run folder (it has no experiment.json) nor a Hugging Face folder"
    )
    check_refused(tmp_path / "nothing", "neither a run folder")


def test_quantized_weights_are_refused(copy):
    path = copy("llama2") / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    check_refused(path.parent, "is stored as I32", "without quantization")


def test_a_model_that_matches_no_family_is_not_exported(tmp_path):
    config = tiny_experiments.config(placement="post")
    with pytest.raises(UserError, match=r"model\.placement: 'post' -> 'pre'"):
        families.write(config, 64)
    moe = model.MoE(experts=4, experts_per_token=2, hidden=32, dispatch=model.Capacity(factor=1.0))
    with pytest.raises(UserError, match=r"model\.ffn\.dispatch"):
        families.write(tiny_experiments.config(ffn=moe), 64)
    biased = dataclasses.replace(moe, dispatch=model.Dropless(), balance=model.BiasBalance())
    with pytest.raises(UserError, match=r"model\.ffn\.balance"):
        families.write(tiny_experiments.config(ffn=biased), 64)
    family, _ = families.write(tiny_experiments.config(dropout=0.1, embed_std=0.1), 64)
    assert family is LLAMA  # fields that only training uses do not matter


def test_custom_layers_are_not_exported():
    """Not even if they are subclasses of layers that can be exported."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(model.SwiGLU):
        pass

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Local(model.GQA):
        pass

    with pytest.raises(UserError, match=r"model\.ffn=Mine\(hidden=32\) of layer 0; supported"):
        families.write(tiny_experiments.config(ffn=Mine(hidden=32)), 64)
    local = Local(heads=2, kv_heads=1, head_dim=8)
    with pytest.raises(UserError, match=r"model\.attention=Local\(.*\) of layer 0; supported"):
        families.write(tiny_experiments.config(attention=local), 64)


def test_a_damaged_folder_is_not_imported(copy, tmp_path):
    path = copy("llama2") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is truncated"):
        exchange.import_run(path.parent, tmp_path / "run")
    with pytest.raises(UserError, match="is truncated"):
        exchange.export_run(path.parent, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path.parent]


def test_a_failed_export_leaves_no_files(folder, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exchange, "_check", fail)
    with pytest.raises(OSError):
        exchange.export_run(folder("llama2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    exchange.export_run(folder("llama2"), tmp_path / "out")
    with pytest.raises(UserError, match="out exists"):
        exchange.export_run(folder("llama2"), tmp_path / "out")
    with pytest.raises(UserError, match="out exists"):
        exchange.import_run(folder("llama2"), tmp_path / "out")


def test_an_export_that_reads_back_differently_is_refused(folder, tmp_path, monkeypatch):
    write = hf.write_pretrained

    def flip(where, *arguments, **options):
        write(where, *arguments, **options)
        path = where / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(hf, "write_pretrained", flip)
    with pytest.raises(UserError, match=r"export failed: unembed/w differs"):
        exchange.export_run(folder("llama2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
