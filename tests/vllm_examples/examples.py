"""Which of vLLM's examples are run: every one that is offline, about text, and one process."""

from __future__ import annotations

from typing import NamedTuple


class Example(NamedTuple):
    """A script below ``examples`` of vLLM's source distribution."""

    path: str
    #: of its command line, where it does not run without
    arguments: tuple[str, ...] = ()


EXAMPLES = (
    Example("basic/offline_inference/basic.py"),
    Example("basic/offline_inference/chat.py"),
    Example("basic/offline_inference/classify.py"),
    Example("basic/offline_inference/embed.py"),
    Example("basic/offline_inference/generate.py"),
    Example("basic/offline_inference/score.py"),
    Example("deployment/async_llm_streaming.py"),
    Example("deployment/llm_engine_example.py"),
    Example("features/automatic_prefix_caching/automatic_prefix_caching_offline.py"),
    Example("features/automatic_prefix_caching/prefix_caching_offline.py"),
    Example("features/context_extension/context_extension_offline.py"),
    Example("features/logits_processor/custom.py"),
    Example("features/logits_processor/custom_req.py"),
    Example("features/logits_processor/custom_req_init.py"),
    Example("features/logits_processor/dry.py"),
    Example("features/lora/lora_with_quantization_offline.py"),
    Example("features/lora/multilora_offline.py"),
    Example("features/profiling/run_one_batch_offline.py"),
    Example("features/profiling/simple_profiling_offline.py"),
    Example("features/prompt_embed/prompt_embed_offline.py"),
    Example("features/reset_kv/reset_kv_offline.py"),
    Example("features/sharded_state/load_sharded_state_offline.py"),
    Example("features/sharded_state/save_sharded_state_offline.py", ("--output", "saved")),
    Example("features/speculative_decoding/extract_hidden_states_offline.py"),
    Example("features/speculative_decoding/mlpspeculator_offline.py"),
    Example("features/speculative_decoding/spec_decode_offline.py"),
    Example("features/structured_outputs/structured_outputs_offline.py"),
    Example("generate/qwen_1m_offline.py"),
    Example("generate/trace_replay_offline.py"),
    Example("observability/metrics/offline.py"),
    Example("pooling/classify/classification_with_lora_offline.py"),
    Example("pooling/embed/embed_jina_embeddings_v3_offline.py"),
    Example("pooling/embed/embed_matryoshka_fy_offline.py"),
    Example("pooling/reward/sequence_reward_offline.py"),
    Example("pooling/reward/token_reward_offline.py"),
    Example("pooling/score/qwen3_reranker_offline.py"),
    Example("pooling/score/using_template_offline.py"),
    Example("pooling/token_classify/ner_offline.py"),
    Example("pooling/token_embed/jina_reranker_v3_offline.py"),
    Example("pooling/token_embed/late_chunking_offline.py"),
    Example("pooling/token_embed/multi_vector_retrieval_offline.py"),
    Example("rl/batch_invariance/reproducibility_offline.py"),
    Example("rl/pause_resume/pause_resume_offline.py"),
    Example("rl/skip_loading_weights_in_engine_init.py"),
    Example("tool_calling/chat_with_tools_offline.py"),
)
