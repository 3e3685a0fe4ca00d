"""Comparison with transformers, if it is installed (the extra 'transformers'): it loads exported
folders, and folders that it saved are imported, with the same logits and ids."""

import json
import shutil

import numpy as np
import pytest
from hf_folders import FAMILIES, reference, write_weights
from tiny_experiments import trained

import lm
from lm import exchange, generate
from lm.hf.tokenizer import SAMPLES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4  # see test_round_trip
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 80))
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}


def transformers_logits(folder, tokens) -> np.ndarray:
    """Returns the logits that transformers computes from a folder, in float32."""
    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return net(torch.tensor(np.asarray(tokens))).logits.numpy()


def save(config, to, seed=0):
    """Saves a transformers model with random weights."""
    torch.manual_seed(seed)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # norms and biases start at one and zero, which would hide errors
        for weight in net.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    net.save_pretrained(to)
    return net


def check_both_ways(folder, tmp_path):
    """Checks the logits of a folder against transformers, before and after an export."""
    logits = np.asarray(lm.load(folder).logits(TOKENS))
    assert np.abs(logits - transformers_logits(folder, TOKENS)).max() < TOLERANCE
    out = exchange.export_run(folder, tmp_path / "out")
    assert np.abs(logits - transformers_logits(out, TOKENS)).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_an_exported_folder(family, folder, tmp_path):
    expected = reference(family)
    out = exchange.export_run(folder(family), tmp_path / "out", shard_bytes=200_000)
    logits_btv = transformers_logits(out, expected["tokens"])[:, expected["positions"]]
    assert np.abs(logits_btv - expected["logits"]).max() < TOLERANCE


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_explicit": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scaling_equals_that_of_transformers(scaling, tmp_path):
    config = transformers.LlamaConfig(**SIZES, rope_scaling=dict(SCALINGS[scaling]))
    save(config, tmp_path / "in")
    check_both_ways(tmp_path / "in", tmp_path)


VARIANTS = {
    "llama_biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_heads": ("LlamaConfig", {"head_dim": 24}),
    "qwen2_windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "qwen3_biases": ("Qwen3Config", {"attention_bias": True}),
    "gemma2_scalar": ("Gemma2Config", {"query_pre_attn_scalar": 20, "sliding_window": 16}),
    "gemma3_global": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 20}
        | {"layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]},
    ),
    "mixtral_window": ("MixtralConfig", {"sliding_window": 16, "num_local_experts": 4}),
    "qwen3_moe_mixed": (
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
        | {"mlp_only_layers": [1], "head_dim": 24, "norm_topk_prob": False},
    ),
    "qwen2_moe_shared": (
        "Qwen2MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 48},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_families_equal_those_of_transformers(name, tmp_path):
    kind, changes = VARIANTS[name]
    save(getattr(transformers, kind)(**SIZES | changes), tmp_path / "in")
    check_both_ways(tmp_path / "in", tmp_path)


def test_dynamic_rope_scaling_beyond_the_original_length(tmp_path):
    """Greedy decoding beyond the original length, with the KV cache."""
    sizes = SIZES | {"max_position_embeddings": 32}
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    net = save(transformers.LlamaConfig(**sizes, rope_scaling=scaling), tmp_path / "in")
    prompt = torch.tensor(TOKENS[:1, :20])
    expected = net.generate(
        prompt, do_sample=False, max_new_tokens=60, eos_token_id=None, pad_token_id=0
    )
    run = lm.load(tmp_path / "in")
    (generated,) = generate.generate(
        run.apply.cast(),
        [TOKENS[0, :20].tolist()],
        context=128,
        max_tokens=60,
        sampling=generate.Sampling(temperature=0),
    )
    assert generated.tokens == expected[0, 20:].tolist()


def test_the_text_model_of_a_multimodal_gemma_3_is_imported(tmp_path):
    text = SIZES | {"head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 2}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319
    )
    torch.manual_seed(0)
    net = transformers.Gemma3ForConditionalGeneration(config).eval()
    net.save_pretrained(tmp_path / "in")
    with torch.no_grad():
        expected = net(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(np.asarray(lm.load(tmp_path / "in").logits(TOKENS)) - expected).max() < TOLERANCE
    out = exchange.export_run(tmp_path / "in", tmp_path / "out")
    assert np.abs(transformers_logits(out, TOKENS) - expected).max() < TOLERANCE


def test_a_byte_level_tokenizer_is_imported_and_exported(tmp_path, folder):
    """The ids of texts and of a conversation in its chat template stay the same."""
    from test_tokenizer_files import byte_level, random_text

    source = tmp_path / "in"
    shutil.copytree(folder("llama2"), source)
    byte_level(source)
    template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    run = exchange.import_run(source, tmp_path / "run")
    out = exchange.export_run(tmp_path / "run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in [*random_text(4, 5), *SAMPLES]:
        assert tokenizer.encode(text, add_special_tokens=False) == run.tokenizer.encode(text)
    chat = [{"role": "user", "content": "abc"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|turn|>abc"
    assert tokenizer.encode(text, add_special_tokens=False) == run.tokenizer.encode(text)


def test_deepseek_experts_equal_those_of_transformers(tmp_path):
    """transformers has only DeepSeek V2, whose experts are those of DeepSeekMoE. The attention here
    is that of Llama."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

    if not hasattr(deepseek, "DeepseekV2Moe"):
        pytest.skip("weights have other names before transformers 5")
    fields = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    net = save(transformers.LlamaConfig(**SIZES), tmp_path / "llama")
    experts = DeepseekV2Config(
        **SIZES, **fields, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0
    )
    experts._experts_implementation = "eager"
    weights = {}
    for number, layer in enumerate(net.model.layers):
        if number >= 1:
            layer.mlp = deepseek.DeepseekV2Moe(experts).eval()
            for weight in layer.mlp.parameters():
                torch.nn.init.normal_(weight, std=0.1)
    for name, weight in net.state_dict().items():
        weight = weight.detach().numpy()
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(weight):
                gate, up = np.split(both, 2)
                base = name.replace("gate_up_proj", f"{e}.")
                weights[f"{base}gate_proj.weight"] = np.ascontiguousarray(gate)
                weights[f"{base}up_proj.weight"] = np.ascontiguousarray(up)
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(weight):
                weights[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            weights[name] = weight
    folder = tmp_path / "in"
    folder.mkdir()
    config = {**SIZES, **fields, "architectures": ["DeepseekForCausalLM"], "norm_topk_prob": False}
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, weights)
    with torch.no_grad():
        expected = net(torch.tensor(TOKENS)).logits.numpy()
    logits = np.asarray(lm.load(folder).logits(TOKENS))
    assert np.abs(logits - expected).max() < TOLERANCE
    out = exchange.export_run(folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["n_shared_experts"] == 2
    assert np.abs(np.asarray(lm.load(out).logits(TOKENS)) - expected).max() < TOLERANCE


def test_transformers_loads_an_exported_run_with_its_tokenizer(tmp_path):
    folder = trained(tmp_path).folder
    out = exchange.export_run(folder, tmp_path / "out")
    run = lm.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in [*SAMPLES, "the tree of light"]:
        ids = run.tokenizer.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [run.tokenizer.bos, *ids]
        assert tokenizer.decode(ids) == text
    logits = np.asarray(run.logits(TOKENS))
    assert np.abs(logits - transformers_logits(out, TOKENS)).max() < TOLERANCE
