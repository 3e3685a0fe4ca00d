"""Against transformers itself, where it is installed (the extra 'transformers'): it loads what is
exported, and what it saves is imported; both compute the same logits and the same ids."""

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


def theirs(folder, tokens) -> np.ndarray:
    """The logits that transformers computes of a folder, in float32."""
    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return net(torch.tensor(np.asarray(tokens))).logits.numpy()


def save(config, to, seed=0):
    """A model of transformers with random weights, saved by itself."""
    torch.manual_seed(seed)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # norms and biases begin at one and zero, which hides mistakes
        for weight in net.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    net.save_pretrained(to)
    return net


def check_both_ways(folder, tmp_path):
    """Imported, the logits are transformers'; exported, they still are."""
    ours = np.asarray(lm.load(folder).logits(TOKENS))
    assert np.abs(ours - theirs(folder, TOKENS)).max() < TOLERANCE
    out = exchange.export_run(folder, tmp_path / "out")
    assert np.abs(ours - theirs(out, TOKENS)).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_family_is_loaded(family, folder, tmp_path):
    wanted = reference(family)
    out = exchange.export_run(folder(family), tmp_path / "out", shard_bytes=200_000)
    logits_btv = theirs(out, wanted["tokens"])[:, wanted["positions"]]
    assert np.abs(logits_btv - wanted["logits"]).max() < TOLERANCE


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_given": {
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
def test_scaled_positions(scaling, tmp_path):
    config = transformers.LlamaConfig(**SIZES, rope_scaling=dict(SCALINGS[scaling]))
    save(config, tmp_path / "in")
    check_both_ways(tmp_path / "in", tmp_path)


OTHERS = {
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


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_of_the_families(name, tmp_path):
    kind, changes = OTHERS[name]
    save(getattr(transformers, kind)(**SIZES | changes), tmp_path / "in")
    check_both_ways(tmp_path / "in", tmp_path)


def test_positions_beyond_a_dynamic_length(tmp_path):
    """Greedy text that grows past the length, token by token with the cache."""
    sizes = SIZES | {"max_position_embeddings": 32}
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    net = save(transformers.LlamaConfig(**sizes, rope_scaling=scaling), tmp_path / "in")
    prompt = torch.tensor(TOKENS[:1, :20])
    wanted = net.generate(
        prompt, do_sample=False, max_new_tokens=60, eos_token_id=None, pad_token_id=0
    )
    run = lm.load(tmp_path / "in")
    (found,) = generate.generate(
        run.experiment.model,
        run.params,
        [TOKENS[0, :20].tolist()],
        context=128,
        max_tokens=60,
        sampling=generate.Sampling(temperature=0),
    )
    assert found.tokens == wanted[0, 20:].tolist()


def test_the_text_of_a_gemma_3_that_sees(tmp_path):
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
        wanted = net(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(np.asarray(lm.load(tmp_path / "in").logits(TOKENS)) - wanted).max() < TOLERANCE
    out = exchange.export_run(tmp_path / "in", tmp_path / "out")
    assert np.abs(theirs(out, TOKENS) - wanted).max() < TOLERANCE


def test_a_byte_level_tokenizer_comes_back(tmp_path, folder):
    """Its ids, through an import and an export, and those of a conversation by its template."""
    from test_tokenizer_files import byte_level, made_up

    here = tmp_path / "in"
    shutil.copytree(folder("llama2"), here)
    byte_level(here)
    template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    (here / "chat_template.jinja").write_text(template)
    run = exchange.import_run(here, tmp_path / "run")
    out = exchange.export_run(tmp_path / "run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in [*made_up(4, 5), *SAMPLES]:
        assert tokenizer.encode(text, add_special_tokens=False) == run.tokenizer.encode(text)
    chat = [{"role": "user", "content": "abc"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|turn|>abc"
    assert tokenizer.encode(text, add_special_tokens=False) == run.tokenizer.encode(text)


def test_deepseek_experts(tmp_path):
    """transformers has this architecture only in its second form; its layer of experts is the same
    there, and attention is Llama's."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

    if not hasattr(deepseek, "DeepseekV2Moe"):
        pytest.skip("before transformers 5 its weights have other names")
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
        wanted = net(torch.tensor(TOKENS)).logits.numpy()
    ours = np.asarray(lm.load(folder).logits(TOKENS))
    assert np.abs(ours - wanted).max() < TOLERANCE
    out = exchange.export_run(folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["n_shared_experts"] == 2
    assert np.abs(np.asarray(lm.load(out).logits(TOKENS)) - wanted).max() < TOLERANCE


def test_a_run_trained_here_is_loaded_with_its_tokenizer(tmp_path):
    run = trained(tmp_path)
    out = exchange.export_run(run.folder, tmp_path / "out")
    ours = lm.load(run.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in [*SAMPLES, "the tree of light"]:
        ids = ours.tokenizer.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [ours.tokenizer.bos, *ids]
        assert tokenizer.decode(ids) == text
    logits = np.asarray(ours.logits(TOKENS))
    assert np.abs(logits - theirs(out, TOKENS)).max() < TOLERANCE
