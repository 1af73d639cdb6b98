"""The KV cache is never copied: every step writes into the buffer that it was given. By the compiler's own account."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxllm import LLM, SamplingParams
from jaxllm.config.cache import kv_cache_groups
from jaxllm.layers.attention import Cache, ScaledPages, attention, write_kv
from jaxllm.layers.context import Context, StepBatch
from jaxllm.layers.mla import LatentConfig
from jaxllm.models.eagle import eagle_head
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.rules import shapes
from jaxllm.runner.buckets import Bucket, decode_step_buckets, draft_buckets
from jaxllm.runner.compile.block_copies import LOT_SIZES, gather_blocks, scatter_blocks
from jaxllm.runner.compile.compiler_options import CPU_OPTIONS
from jaxllm.runner.compile.programs import Key
from jaxllm.runner.heads.sampling_programs import SamplingPrograms
from jaxllm.runner.heads.sampling_step import DRAFTING_COLUMNS, State, StepConfig
from jaxllm.runner.runner import Runner
from jaxllm.speculative.draft_model import ModelDrafter, draft_groups
from jaxllm.speculative.drafter import Drafter, ReadingDrafter
from jaxllm.speculative.head_drafter import HeadDrafter
from jaxllm.speculative.ngram import NgramDrafter
from pallas_kernels.backend import Backend
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention.cpu_ffi import form_of, latent_form_of, load
from pallas_kernels.storage import STORAGE, is_scaled

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
#: with experts in place of its MLPs
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
#: with latents in place of keys and values
DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "architectures": ["DeepseekV2ForCausalLM"],
    "q_lora_rank": None,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 3,
}
MAX_NUM_SEQS, MAX_MODEL_LEN = 6, 128
TWO_GROUPS, ONE_GROUP = (32, None, 32), (None, None, None)
#: blocks of a cache for which programs are compiled and not run; their temporaries are smaller than a byte or two for
#: each, so that nothing in them has as many entries as there are blocks
MANY = 1_000_000
ONE, SEVERAL = Bucket(1, 1), Bucket(8, 2)
#: of programs that are not run: how good their machine code is does not matter
OPTIONS: Any = {**CPU_OPTIONS, "xla_backend_optimization_level": 0}


def make_programs(
    dtype: str,
    num_blocks: int,
    *,
    buckets: tuple[Bucket, ...] = (Bucket(1, 1), Bucket(8, MAX_NUM_SEQS)),
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    windows: tuple[int | None, ...] = TWO_GROUPS,
    config: dict[str, Any] | None = None,
    kv_dtype: str | None = None,
    drafter: Drafter | None = None,
) -> tuple[SamplingPrograms, State]:
    """Programs of a small model, not compiled yet; or of the one that `config` describes.

    Args:
        kv_dtype: of the pages; None: `dtype`.
    """
    shape = {"num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    model = model_config(config) if config else model_config({**LLAMA, **shape})
    model = dataclasses.replace(model, layer_window=windows)
    groups = kv_cache_groups(model.kv_specs)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    pages = num_blocks * max(len(group.layers) for group in groups)
    page = model.kv_specs[0].page_shape(block_size)
    stored = STORAGE.get(jnp.dtype(kv_dtype or dtype), jnp.dtype(kv_dtype or dtype))
    cache: Any = jax.ShapeDtypeStruct((pages, *page), stored, sharding=sharding)
    if is_scaled(stored):
        cache = ScaledPages(cache, jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32, sharding=sharding))  # pyright: ignore

    def rows(width: int) -> Any:
        return jax.ShapeDtypeStruct((MAX_NUM_SEQS + 1, width), jnp.int32, sharding=sharding)

    drafting = rows(DRAFTING_COLUMNS) if drafter else None
    state = State(cache=cache, tokens=rows(MAX_MODEL_LEN), drafting=drafting)
    params = shapes(decoder_specs(model), jnp.dtype(dtype), sharding)
    if isinstance(drafter, ReadingDrafter):
        page = drafter.model.kv_specs[0].page_shape(block_size)
        draft_cache: Any = jax.ShapeDtypeStruct(
            (num_blocks * drafter.model.num_layers, *page), stored, sharding=sharding
        )
        kept = STORAGE.get(jnp.dtype(dtype), jnp.dtype(dtype))
        kept = jax.ShapeDtypeStruct((num_blocks, drafter.kept_numbers), kept, sharding=sharding)
        state = dataclasses.replace(state, draft_cache=drafter.cache(draft_cache, kept))
        params = dataclasses.replace(params, draft=shapes(drafter.specs(), jnp.dtype(dtype), sharding))
    programs = SamplingPrograms(
        StepConfig(
            context=with_kernel(page, jnp.dtype(kv_dtype or dtype), heads=model.num_heads, latents=model.latents),
            model=model,
            groups=groups,
            num_logprobs=5,
            logprobs_mode="raw_logprobs",
            max_scored_tokens=16,
            drafter=drafter,
        ),
        buckets,
        MAX_MODEL_LEN // block_size,
        params,
        state,
        platform="cpu",
        eager=True,
        cache_dir=None,
        num_decode_steps=4,
        decode_buckets=decode_step_buckets(buckets, MAX_NUM_SEQS),
        copied_layers=len(groups[0].layers),
        draft_buckets=draft_buckets(2) if drafter else (),
    )
    return programs, state


def with_kernel(page: Sequence[int], numbers: jnp.dtype, *, heads: int, latents: LatentConfig | None = None) -> Context:
    """As an engine on this machine has it: with a kernel of attention, of pages of this shape."""
    pages: dict[str, Any] = dict(block_size=page[-2], stored=numbers.name)
    if latents is not None:
        form = latent_form_of(heads=heads, width=latents.width, value_width=latents.rank, **pages)
    else:
        form = form_of(
            heads=heads,
            kv_heads=page[0] // 2,
            head_dim=page[2],
            transposed=Backend().transposes_keys(page[1]),
            has_softcap=False,
            dtype=numbers.name,
            **pages,
        )
    return Context() if form is None else Context(backend=Backend(cpu_attention=(load(form, None),)))


def size(shapes: Any) -> int:
    """Of a tree of arrays, in bytes."""
    return sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in jax.tree.leaves(shapes))


def test_every_program_writes_in_place():
    programs, state = make_programs("bfloat16", 40)
    programs.compile_all()
    kinds = set()
    for (kind, *_), program in programs._compiled.items():
        whole = size(state.cache) + size(state.tokens)
        expected = {
            "forward": whole,
            "decode steps": whole,
            "score": 0,
            "gather blocks": 0,
            "scatter blocks": size(state.cache),
        }.get(kind, size(state.tokens))
        memory = program.memory_analysis()
        assert memory is not None and memory.alias_size_in_bytes == expected
        kinds.add(kind)
    copies = {"gather blocks", "scatter blocks"}
    assert kinds == {"forward", "decode steps", "sample", "score", "write tokens", *copies}


@pytest.mark.parametrize(("layers", "stored"), [(1, jnp.float32), (3, jnp.uint16), (2, jnp.int8)])
def test_copies_of_blocks_move_them_and_nothing_else(layers: int, stored: Any):
    """Of a cache of pages and of their scales, in memory that does not grow with it; the oracle is numpy's indexing."""
    random = np.random.default_rng(0)

    def arrays(num_blocks: int) -> list[np.ndarray]:
        numbers = random.integers(0, 127, (layers * num_blocks, 4, 8, 16)).astype(stored)
        return [numbers, random.random((layers * num_blocks, 4, 8), np.float32)]

    def compiled(num_blocks: int, function: Any, *more: Any, donate: tuple[int, ...] = ()) -> Any:
        cache = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays(num_blocks)]
        lowered = jax.jit(functools.partial(function, layers), donate_argnums=donate).lower(cache, *more)
        return lowered.compile(OPTIONS)

    for lot in LOT_SIZES:
        ids = np.array([0, *random.permutation(np.arange(1, 20))][-lot:], np.int32)
        new = arrays(lot)
        blocks = [array.reshape(layers, lot, *array.shape[1:]).swapaxes(0, 1).copy() for array in new]
        gather, scatter = (compiled(20, gather_blocks, ids), compiled(20, scatter_blocks, ids, blocks, donate=(0,)))
        larger = (compiled(2000, gather_blocks, ids), compiled(2000, scatter_blocks, ids, blocks, donate=(0,)))
        for few, many in zip((gather, scatter), larger, strict=True):
            assert few.memory_analysis().temp_size_in_bytes == many.memory_analysis().temp_size_in_bytes
        before = arrays(20)
        cache = [jnp.array(array) for array in before]
        for found, array in zip(gather(cache, ids), before, strict=True):
            np.testing.assert_array_equal(found, array.reshape(layers, 20, *array.shape[1:])[:, ids].swapaxes(0, 1))
        after, _ = scatter(cache, ids, blocks)
        for found, array, block in zip(after, before, blocks, strict=True):
            expected = array.reshape(layers, 20, *array.shape[1:]).copy()
            expected[:, ids] = block.swapaxes(0, 1)
            np.testing.assert_array_equal(found, expected.reshape(array.shape))


@pytest.mark.parametrize(
    ("dtype", "shape", "buckets", "several"),
    [
        ("bfloat16", dict(kv_heads=1, head_dim=256, block_size=64, windows=TWO_GROUPS), (ONE, SEVERAL), True),
        ("float32", dict(head_dim=64, windows=ONE_GROUP, kv_dtype="float8_e4m3fn"), (SEVERAL,), False),
        ("bfloat16", dict(config=DEEPSEEK, block_size=64, windows=ONE_GROUP), (ONE, SEVERAL), False),
        ("bfloat16", dict(config=MIXTRAL, windows=ONE_GROUP), (SEVERAL,), True),
    ],
)
def test_no_program_needs_more_memory_for_a_larger_cache(
    dtype: str, shape: dict[str, Any], buckets: tuple[Bucket, ...], several: bool
):
    """Steps of one token and of several, and several steps in one launch with all that sampling can be asked for."""

    programs, state = make_programs(dtype, MANY, buckets=buckets, **shape)
    assert programs.config.context.backend.cpu_attention
    keys: list[Key] = [("forward", bucket) for bucket in programs.packings]
    if several:
        keys.append(("decode steps", next(iter(programs.decode_packings)), True))
    programs._options = OPTIONS
    programs._compile(keys)
    assert len(programs._compiled) == len(buckets) + several
    for program in programs._compiled.values():
        memory = program.memory_analysis()
        assert memory is not None and memory.alias_size_in_bytes == size(state.cache) + size(state.tokens)
        assert memory.temp_size_in_bytes < MANY


def model_drafter() -> ModelDrafter:
    """For `make_programs`' model."""
    small = model_config({**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    groups = kv_cache_groups(dataclasses.replace(model_config(LLAMA), layer_window=TWO_GROUPS).kv_specs)
    model, groups = draft_groups(groups, small)
    return ModelDrafter(num_drafts=3, model=model, groups=groups, max_length=MAX_MODEL_LEN)


def head_drafter() -> HeadDrafter:
    """EAGLE-3's for `make_programs`' model."""
    target = dataclasses.replace(model_config(LLAMA), layer_window=TWO_GROUPS)
    own = {**LLAMA, "num_hidden_layers": 1, "draft_vocab_size": 64, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    head, layers = eagle_head("eagle3", own, target, lambda name: True, None)
    model, groups = draft_groups(kv_cache_groups(target.kv_specs), layers)
    return HeadDrafter(num_drafts=3, model=model, groups=groups, max_length=MAX_MODEL_LEN, head=head)


@pytest.mark.parametrize(
    "drafter", [NgramDrafter(3, 1, 2), model_drafter(), head_drafter()], ids=["n-grams", "a model", "a head"]
)
def test_checking_drafts_needs_no_more_memory_for_a_larger_cache(drafter: Drafter):
    programs, state = make_programs("bfloat16", MANY, buckets=(SEVERAL,), drafter=drafter)
    # all that sampling can be asked for with one of them: it reads nothing of what drafts are made of
    everything = not isinstance(drafter, ReadingDrafter)
    keys: list[Key] = [("draft steps", next(reversed(programs.draft_packings)), everything)]
    keys += [("forward", SEVERAL)] if isinstance(drafter, ReadingDrafter) else []
    keys += [("catch up", bucket) for bucket in list(programs.catch_up_packings)[-1:]]
    assert len(keys) == 1 + isinstance(drafter, ReadingDrafter) + isinstance(drafter, ModelDrafter)
    programs._options = OPTIONS
    programs._compile(keys)
    for program in programs._compiled.values():
        memory = program.memory_analysis()
        assert memory is not None and memory.alias_size_in_bytes == size(state)
        assert memory.temp_size_in_bytes < MANY


#: KV heads, head_dim, what numbers are stored as, positions of a block, groups of layers
EVERY = list(
    itertools.product((1, 2, 3, 4, 8), (64, 80, 96, 128, 256), (jnp.float32, jnp.uint16), (16, 64), (1, 2)),
)
#: with scales
SCALED = [(1, 64, jnp.int8, 64, 1), (1, 128, jnp.uint8, 16, 2), (3, 80, jnp.int8, 16, 2)]
#: of each number of KV heads and each head_dim one of the eight that there are: any two values of two columns meet
SOME = [EVERY[8 * (5 * i + j) + (3 * i + 5 * j) % 8] for i in range(5) for j in range(5)]


@pytest.mark.parametrize("kernels", [False, True], ids=["XLA", "kernels"])
def test_pages_are_not_copied(kernels: bool):
    # compiling a kernel takes half a second
    check_pages([*(SOME[::5] if kernels else SOME), *SCALED], kernels)


@pytest.mark.large
@pytest.mark.parametrize("part", range(8))
def test_pages_of_no_shape_are_copied(part: int):
    check_pages(EVERY[part::8], kernels=False)


def check_pages(shapes: Sequence[tuple[int, int, Any, int, int]], kernels: bool) -> None:
    """By loops over two layers, which write a token's keys and values and attend to what is there: one for each shape,
    in one program, since many programs take longer to compile.
    """

    def words(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    news, caches, contexts = [], [], []
    for kv_heads, head_dim, stored, block_size, groups in shapes:
        numbers = jnp.float32 if stored == jnp.float32 else jnp.bfloat16
        news.append(jax.ShapeDtypeStruct((1, kv_heads, head_dim), numbers))
        pages = 2 // groups * MANY
        cache: Any = jax.ShapeDtypeStruct((pages, 2 * kv_heads, block_size, head_dim), stored)
        if is_scaled(stored):
            cache = ScaledPages(cache, jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32))  # pyright: ignore
        caches.append(cache)
        numbers = next((number for number, bits in STORAGE.items() if bits == stored), jnp.dtype(stored))
        contexts.append(with_kernel(cache.shape[1:], numbers, heads=kv_heads) if kernels else Context())
    batch: Any = AttentionBatch(
        token_seq=words(1),  # pyright: ignore[reportArgumentType]
        positions=words(1),  # pyright: ignore[reportArgumentType]
        token_valid=jax.ShapeDtypeStruct((1,), jnp.bool),  # pyright: ignore[reportArgumentType]
        query_start=words(2),  # pyright: ignore[reportArgumentType]
        kv_lens=words(1),  # pyright: ignore[reportArgumentType]
        block_tables=words(2, 1, 4),  # pyright: ignore[reportArgumentType]
        num_decodes=words(),  # pyright: ignore[reportArgumentType]
        num_seqs=words(),  # pyright: ignore[reportArgumentType]
        decode_only=True,
    )

    def layers(context: Context, cache: Cache, new: jax.Array, groups: int, batch: AttentionBatch) -> Any:
        batch = dataclasses.replace(batch, block_tables=batch.block_tables[:groups])
        step: Any = StepBatch(tokens=batch.token_seq, attention=batch)
        layer: Any = np.arange(2, dtype=np.int32)
        window: Any = np.full(2, 30, np.int32)
        places = Layout(group=layer % groups, page_offset=layer // groups * np.int32(MANY), window=window)

        def one(carry: tuple[Cache, jax.Array], place: Layout) -> tuple[tuple[Cache, jax.Array], None]:
            cache, query = carry
            cache = write_kv(context, cache, new, new, place, step)
            return (cache, attention(context, query, cache, place, step, scale=1.0)), None

        return lax.scan(one, (cache, new), places)[0]

    def step(caches: list[Cache], news: list[jax.Array], batch: AttentionBatch) -> Any:
        return [
            layers(context, cache, new, groups, batch)
            for context, cache, new, (*_, groups) in zip(contexts, caches, news, shapes, strict=True)
        ]

    program = jax.jit(step, donate_argnums=0).lower(caches, news, batch)
    assert ("jaxllm_attention" in program.as_text()) == kernels
    memory = program.compile(OPTIONS).memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == size(caches)
    assert memory.temp_size_in_bytes < 2 * MANY


def test_the_buffer_stays_where_it_is(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with LLM(
        tmp_path,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_batched_tokens=8,
        num_gpu_blocks_override=64,
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
    ) as llm:
        places, count = set(), 0
        core, runner = llm.engine.core, llm.engine.runner
        assert isinstance(runner, Runner)
        params = SamplingParams(temperature=0.7, seed=3, presence_penalty=0.5, max_tokens=9, logprobs=2)
        for i, length in enumerate((1, 70, 12, 100, 33)):
            core.add_request(*llm.engine.inputs.request(str(i), list(range(length)), params))
        while core.has_unfinished:
            core.step()
            count += 1
            state = runner._live()
            assert isinstance(state, State)
            places.add(tuple(array.unsafe_buffer_pointer() for array in jax.tree.leaves(state)))
        assert count > 10
        assert len(places) == 1
