"""config.json of published models, as their folders hold them: each is read, and gives the number
of parameters that the model has."""

import pytest

from lm import model
from lm.hf import families
from lm.hf.gemma import text_part

# Fields of nearly every file, with the values of Llama 2 7B.
COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2 = {
    "max_window_layers": 28,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}


def config(architecture, model_type, **fields):
    return COMMON | {"architectures": [architecture], "model_type": model_type} | fields


def llama(**fields):
    return config("LlamaForCausalLM", "llama", pretraining_tp=1, rope_scaling=None, **fields)


PUBLISHED = {
    "Llama-2-7b-hf": (6_738_415_616, llama(_name_or_path="meta-llama/Llama-2-7b-hf")),
    "Llama-3.1-8B": (
        8_030_261_248,
        llama(
            attention_bias=False,
            eos_token_id=[128001, 128008, 128009],
            intermediate_size=14336,
            mlp_bias=False,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=131072,
            rope_theta=500000.0,
        )
        | {
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            }
        },
    ),
    "SmolLM2-135M-Instruct": (
        134_515_008,
        llama(
            _model_name_or_path="HuggingFaceTB/SmolLM2-135M",
            head_dim=64,
            hidden_size=576,
            initializer_range=0.041666666666666664,
            intermediate_size=1536,
            is_llama_config=True,
            max_position_embeddings=8192,
            mlp_bias=False,
            num_attention_heads=9,
            num_hidden_layers=30,
            num_key_value_heads=3,
            pad_token_id=2,
            rope_interleaved=False,
            rope_theta=100000,
            tie_word_embeddings=True,
            vocab_size=49152,
            **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        ),
    ),
    "Falcon3-1B": (
        1_669_408_768,
        llama(
            activation="swiglu",
            head_dim=256,
            hidden_size=2048,
            intermediate_size=8192,
            max_position_embeddings=4096,
            mlp_bias=False,
            num_attention_heads=8,
            num_hidden_layers=18,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            rope_theta=1000042,
            vocab_size=131072,
        ),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        config(
            "MistralForCausalLM",
            "mistral",
            intermediate_size=14336,
            max_position_embeddings=32768,
            num_key_value_heads=8,
            sliding_window=4096,
        ),
    ),
    "Mistral-Small-24B of Unsloth, transformers 5": (
        23_572_403_200,
        config(
            "MistralForCausalLM",
            "mistral",
            dtype="bfloat16",
            head_dim=128,
            hidden_size=5120,
            intermediate_size=32768,
            max_position_embeddings=32768,
            num_hidden_layers=40,
            num_key_value_heads=8,
            pad_token_id=11,
            rope_parameters={"rope_theta": 100000000.0, "rope_type": "default"},
            sliding_window=None,
            unsloth_fixed=True,
            unsloth_version="2025.12.5",
            use_cache=False,
            vocab_size=131072,
        ),
    ),
    "Mixtral-8x7B-v0.1": (
        46_702_792_704,
        config(
            "MixtralForCausalLM",
            "mixtral",
            intermediate_size=14336,
            max_position_embeddings=32768,
            num_experts_per_tok=2,
            num_key_value_heads=8,
            num_local_experts=8,
            output_router_logits=False,
            rope_theta=1e6,
            router_aux_loss_coef=0.02,
            sliding_window=None,
        ),
    ),
    "Qwen1.5-0.5B with a classifier's labels": (
        463_987_712,
        config(
            "Qwen2ForCausalLM",
            "qwen2",
            **QWEN2
            | {
                "hidden_size": 1024,
                "id2label": {"0": "human", "1": "chatgpt"},
                "intermediate_size": 2816,
                "label2id": {"chatgpt": 1, "human": 0},
                "max_position_embeddings": 32768,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "num_key_value_heads": 16,
                "sliding_window": 32768,
                "tie_word_embeddings": True,
                "vocab_size": 151936,
            },
        ),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        config(
            "Qwen2ForCausalLM",
            "qwen2",
            **QWEN2
            | {
                "hidden_size": 896,
                "intermediate_size": 4864,
                "max_position_embeddings": 32768,
                "num_attention_heads": 14,
                "num_hidden_layers": 24,
                "num_key_value_heads": 2,
                "sliding_window": 32768,
                "tie_word_embeddings": True,
                "use_mrope": False,
                "vocab_size": 151936,
            },
        ),
    ),
    "Qwen2.5-Coder-32B-Instruct with YaRN": (
        32_763_876_352,
        config(
            "Qwen2ForCausalLM",
            "qwen2",
            **QWEN2
            | {
                "hidden_size": 5120,
                "intermediate_size": 27648,
                "max_position_embeddings": 32768,
                "max_window_layers": 70,
                "num_attention_heads": 40,
                "num_hidden_layers": 64,
                "num_key_value_heads": 8,
                "rope_scaling": {
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                    "type": "yarn",
                },
                "sliding_window": 131072,
                "vocab_size": 152064,
            },
        ),
    ),
    "Qwen3-Coder-30B-A3B-Instruct": (
        30_532_122_624,
        config(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            attention_bias=False,
            decoder_sparse_step=1,
            head_dim=128,
            hidden_size=2048,
            intermediate_size=5472,
            max_position_embeddings=262144,
            max_window_layers=28,
            mlp_only_layers=[],
            moe_intermediate_size=768,
            norm_topk_prob=True,
            num_experts=128,
            num_experts_per_tok=8,
            num_hidden_layers=48,
            num_key_value_heads=4,
            output_router_logits=False,
            qkv_bias=False,
            rms_norm_eps=1e-6,
            rope_scaling=None,
            rope_theta=10000000,
            router_aux_loss_coef=0.0,
            shared_expert_intermediate_size=0,
            sliding_window=None,
            use_qk_norm=True,
            use_sliding_window=False,
            vocab_size=151936,
        ),
    ),
    "gemma-2-9b": (
        9_241_705_984,
        config(
            "Gemma2ForCausalLM",
            "gemma2",
            attention_bias=False,
            attn_logit_softcapping=50.0,
            cache_implementation="hybrid",
            final_logit_softcapping=30.0,
            head_dim=256,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            hidden_size=3584,
            intermediate_size=14336,
            max_position_embeddings=8192,
            num_attention_heads=16,
            num_hidden_layers=42,
            num_key_value_heads=8,
            pad_token_id=0,
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-6,
            sliding_window=4096,
            sliding_window_size=4096,
            tie_word_embeddings=True,
            vocab_size=256000,
        ),
    ),
    "gemma-3-4b-it, its text model": (
        3_880_263_168,
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
    ),
    "OLMo-2-1124-7B": (
        7_298_617_344,
        config(
            "Olmo2ForCausalLM",
            "olmo2",
            attention_bias=False,
            pad_token_id=100277,
            rms_norm_eps=1e-6,
            rope_scaling=None,
            rope_theta=500000,
            vocab_size=100352,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name):
    parameters, fields = PUBLISHED[name]
    _, config = families.read(text_part(fields))
    assert model.parameter_count(config).total == parameters


def test_fields_that_change_the_model_are_still_refused():
    for field, value in (
        ("quantization_config", {"bits": 4}),
        ("activation", "relu"),
        ("rope_interleaved", True),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("no_such_option", 2),
    ):
        with pytest.raises(ValueError, match=field):
            families.read(llama(**{field: value}))
