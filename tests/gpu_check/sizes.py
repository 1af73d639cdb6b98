"""How large everything is: on a GPU, and in a rehearsal on a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from support.large_models import LLAMA_31_8B, LLAMA_32_1B

from gpu_check.records import is_rehearsal

#: what the rehearsal takes in the place of Llama 3.1
TINY_LLAMA: dict[str, Any] = {
    **LLAMA_31_8B,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """One of `FULL` and `REHEARSAL`."""

    #: of one array of the copy; read and written once a launch
    copy_bytes: int
    #: rows, columns and depth of the matrix product
    matmul_size: int
    #: times that something is measured
    repeats: int

    #: the operations' benchmarks: heads, KV heads, head_dim
    heads: tuple[int, int, int]
    block_size: int
    #: (sequences, tokens of context of each)
    decode_contexts: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    kv_writes: tuple[int, ...]
    #: that one timed program goes through, of prompts and of writes
    prefill_layers: int
    write_layers: int
    #: bytes of keys and values that one timed program reads, in as many layers as it takes
    cache_bytes: int
    #: rows of the products of quantized weights and of experts
    matmul_tokens: tuple[int, ...]
    #: as which weights are stored there: "bfloat16", and names of `pallas_kernels.quant_matmul.configurations.FORMS`
    quantized_forms: tuple[str, ...]
    expert_forms: tuple[str, ...]

    #: the model of the whole steps and of the throughput
    model: dict[str, Any]
    engine: dict[str, Any]
    decode_steps: tuple[tuple[int, int], ...]
    #: (sequences that decode, tokens of context of each, tokens of the chunk, where in its prompt the chunk begins)
    mixed_steps: tuple[tuple[int, int, int, int], ...]
    steps: int

    num_requests: int
    input_len: int
    output_len: int

    #: the model that drafts, the sequences of its launches, and tokens of each
    draft_model: dict[str, Any]
    draft_sequences: tuple[int, ...]
    draft_output_len: int

    #: the small model of the parity check, and what it is asked
    parity_model: dict[str, Any]
    parity_prompts: tuple[int, ...]
    parity_shared_prefix: int
    parity_output_len: int
    #: most tokens of a step of the engine that chunks
    parity_chunk: int
    parity_max_model_len: int


FULL = Sizes(
    copy_bytes=4 * 2**30,
    matmul_size=8192,
    repeats=5,
    heads=(32, 8, 128),
    block_size=16,
    decode_contexts=((64, 4096), (1, 131072), (256, 1024), (16, 4096)),
    prompts=(2048, 8192),
    kv_writes=(64, 2048),
    prefill_layers=4,
    write_layers=8,
    cache_bytes=4 * 2**30,
    matmul_tokens=(1, 16, 64, 512),
    quantized_forms=(
        "bfloat16",
        "int4 in groups of 128",
        "int8",
        "fp8 by fp8",
        "fp8 in blocks of 128 by fp8",
        "int8 by int8",
        "mxfp4",
    ),
    expert_forms=("bfloat16", "int4 in groups of 128", "fp8 in blocks of 128 by fp8", "mxfp4"),
    model=LLAMA_31_8B,
    engine={"max_model_len": 8192, "max_num_seqs": 256, "max_num_batched_tokens": 2048},
    decode_steps=((64, 4096), (1, 4096), (16, 4096), (256, 1024)),
    mixed_steps=((0, 0, 2048, 0), (63, 4096, 1985, 0), (63, 4096, 1985, 4096)),
    steps=12,
    num_requests=128,
    input_len=512,
    output_len=256,
    draft_model=LLAMA_32_1B,
    draft_sequences=(1, 16, 64),
    draft_output_len=256,
    parity_model={
        **LLAMA_31_8B,
        "vocab_size": 8192,
        "max_position_embeddings": 2048,
        "rope_scaling": None,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    parity_prompts=(5, 64, 300, 300, 417, 650),
    parity_shared_prefix=256,
    parity_output_len=48,
    parity_chunk=128,
    parity_max_model_len=1024,
)
REHEARSAL = Sizes(
    copy_bytes=2**20,
    matmul_size=128,
    repeats=1,
    heads=(4, 2, 64),
    block_size=16,
    decode_contexts=((3, 64),),
    prompts=(32,),
    kv_writes=(3,),
    prefill_layers=1,
    write_layers=1,
    cache_bytes=2**16,
    matmul_tokens=(4,),
    quantized_forms=("bfloat16", "int8"),
    expert_forms=("int4 in groups of 128",),
    model=TINY_LLAMA,
    engine={"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 32, "enforce_eager": True},
    decode_steps=((4, 64),),
    mixed_steps=((3, 64, 13, 16),),
    steps=2,
    num_requests=4,
    input_len=16,
    output_len=8,
    draft_model={**TINY_LLAMA, "num_hidden_layers": 1},
    draft_sequences=(1, 2),
    draft_output_len=12,
    parity_model=TINY_LLAMA,
    parity_prompts=(5, 60, 60, 90),
    parity_shared_prefix=48,
    parity_output_len=8,
    parity_chunk=32,
    parity_max_model_len=128,
)


def sizes() -> Sizes:
    """Those of the check that this process belongs to."""
    return REHEARSAL if is_rehearsal() else FULL
