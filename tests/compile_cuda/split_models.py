"""Models that take eight devices, cut to a few of their layers: shapes as their config.json has them."""

from __future__ import annotations

from support.large_models import LLAMA_33_70B

from .models import Model

_LLAMA_33_70B = {**LLAMA_33_70B, "num_hidden_layers": 2}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 2,  # of 48
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}

SPLIT_MODELS: dict[str, Model] = {
    "Llama-3.3-70B on 8": Model(
        config=_LLAMA_33_70B,
        max_model_len=131072,
        num_blocks=(60000,),
        devices=8,
    ),
    "Qwen3-30B-A3B on 8": Model(
        config=QWEN3_30B_A3B,
        max_model_len=40960,
        num_blocks=(80000,),
        devices=8,
        expert_parallel=True,
    ),
    "DeepSeek-V3 on 8": Model(
        config={
            "architectures": ["DeepseekV3ForCausalLM"],
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "first_k_dense_replace": 1,  # of 3
            "moe_layer_freq": 1,
            "num_hidden_layers": 2,  # of 61
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
            },
            "tie_word_embeddings": False,
        },
        max_model_len=163840,
        num_blocks=(120000,),
        devices=8,
        expert_parallel=True,
    ),
}
#: the same head whole on one device
HEADS: dict[str, Model] = {
    "Llama-3.3-70B's head": Model(
        config={**LLAMA_33_70B, "num_hidden_layers": 1},
        max_model_len=131072,
        num_blocks=(1000,),
    )
}
