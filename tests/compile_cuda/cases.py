"""Everything that is compiled: every kernel's configurations, and the programs of engines with real models."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import pallas_kernels
from jaxllm.api.pooler import Pooler
from jaxllm.config.cache import kv_cache_groups
from jaxllm.config.devices import GPU
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.models.registry import model_config, pooling_model_config
from jaxllm.parallel.rules import shapes
from jaxllm.runner.build import make_programs
from jaxllm.runner.compile.programs import Key
from jaxllm.runner.compile.target import target_described
from jaxllm.runner.heads.sampling_programs import SCORER, WRITER, SamplingPrograms
from jaxllm.runner.runner_config import RunnerConfig
from pallas_kernels.backend import device_backend
from pallas_kernels.batch import Layout
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.configurations import Heads, Step
from pallas_kernels.paged_latent_attention.api import paged_latent_attention
from pallas_kernels.paged_latent_attention.configurations import DEEPSEEK_V3_OF_8, LatentStep

from .models import MODELS, Model

#: bytes of temporaries that no program of an engine may exceed; with the weights, they are what the KV cache is not
MOST_TEMPORARY_BYTES = 3 * 2**30
#: KV heads, head_dim, dtype and positions of the pages that two layers alone are compiled for
POOLS = (
    (1, 256, "bfloat16", 16),
    (1, 64, "float32", 64),
    (1, 96, "bfloat16", 64),
    (2, 128, "bfloat16", 64),
    (3, 64, "bfloat16", 16),
    (4, 80, "float32", 16),
    (8, 128, "bfloat16", 16),
)
#: blocks of such a pool
POOL_BLOCKS = (1_000, 10_000)
#: what kinds of programs write of their state
_WRITTEN = {
    "forward": ("cache", "tokens"),
    "sample": ("tokens",),
    "write tokens": ("tokens",),
    "pool": ("cache", "pooled"),
}
#: configurations of an operation in a quick run, about
_QUICK = 8
#: which programs of a model are compiled: [in a quick run][where `Model.all_programs`]
_KINDS = (("most", "all"), ("few", "most"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to compile."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    #: bytes of arguments that the results must take over
    in_place_bytes: int
    #: bytes of the KV cache; 0: the program has none
    cache_bytes: int
    most_temporary_bytes: int | None
    #: that it goes through; None: it is no model's step
    layers: int | None = None
    #: of a layer's weights
    layer_bytes: int = 0
    #: whether it is one of an engine's programs, not a kernel by itself
    is_step: bool = False


def kernel_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Every configuration that `pallas_kernels.<operation>.api.configurations` tells; quick: some of each operation.

    Args:
        part: as in `step_cases`, of these.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    for configurations in _operations():
        takes_device = "device_kind" in inspect.signature(configurations).parameters
        every = configurations(device_kind=device.device_kind) if takes_device else configurations()
        some = every[:: max(len(every) // _QUICK, 1)] if quick else every
        for case in some[part :: 1 if part is None else 2]:
            if not case.runs_on(gpu.compute_capability):
                continue
            arguments = case.shapes_on(sharding)
            donated = sum(_bytes(arguments[i]) for i in case.donated)
            yield Case(
                name=f"{case.operation}: {case.label}",
                lower=lambda case=case, arguments=arguments: jax.jit(case.function, donate_argnums=case.donated).lower(
                    *arguments
                ),
                in_place_bytes=donated,
                cache_bytes=0,
                most_temporary_bytes=case.max_temporary_bytes,
            )


def _operations() -> list[Callable[..., Any]]:
    found = []
    for operation in pkgutil.iter_modules(pallas_kernels.__path__, "pallas_kernels."):
        if operation.ispkg:
            api = importlib.import_module(f"{operation.name}.api")
            if hasattr(api, "configurations"):
                found.append(api.configurations)
    return found


def pool_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Two layers, which write keys and values and attend to them: pages of several shapes, in pools of two sizes.

    Args:
        part: as in `step_cases`, of the shapes.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    backend = device_backend(device)

    def step(cache: Any, query: Any, new: Any, batch: Any) -> Any:
        def layer(carry: tuple[Any, Any], place: Layout) -> tuple[tuple[Any, Any], None]:
            cache, query = carry
            cache, _ = write_kv(cache, new, new, place, batch)
            return (cache, paged_attention(query, cache, place, batch, scale=1.0)), None

        places: Any = np.array([[0, 0], [0, cache.shape[0] // 2], [1000, 1000]], np.int32)
        return jax.lax.scan(layer, (cache, query), Layout(*places))[0]

    for kv_heads, head_dim, dtype, block_size in (POOLS[:2] if quick else POOLS)[part :: 1 if part is None else 2]:
        heads = Heads(model="layers", heads=2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim)
        for num_blocks in POOL_BLOCKS:
            page = 2 * kv_heads * block_size * head_dim * jax.numpy.dtype(dtype).itemsize
            about = Step(
                heads=heads,
                tokens=8,
                seqs=8,
                query=dtype,
                stored=dtype,
                block_size=block_size,
                context=1024,
                cache_bytes=2 * num_blocks * page,
                decode_only=True,
            )
            query, new = (
                jax.ShapeDtypeStruct((8, number, head_dim), jax.numpy.dtype(dtype))
                for number in (2 * kv_heads, kv_heads)
            )
            arguments = jax.tree.map(
                lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
                (about.cache()[0], query, new, about.batch(backend)),
            )
            size = "" if num_blocks == POOL_BLOCKS[0] else f", {num_blocks} blocks"
            yield Case(
                name=f"pool of pages: {kv_heads} KV heads of {head_dim}, blocks of {block_size} in {dtype}{size}",
                lower=lambda arguments=arguments: jax.jit(step, donate_argnums=0).lower(*arguments),
                in_place_bytes=_bytes(arguments[0]),
                cache_bytes=_bytes(arguments[0]),
                most_temporary_bytes=None,
            )


def latent_pool_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Two layers, which write latents and attend to them, in pools of two sizes.

    Args:
        part: of the single shape that there is, 1 has none.
    """
    if part == 1:
        return
    sharding = jax.sharding.SingleDeviceSharding(device)
    heads, backend, value_width = DEEPSEEK_V3_OF_8, device_backend(device), 512

    def step(cache: Any, query: Any, batch: Any) -> Any:
        def layer(carry: tuple[Any, Any], place: Layout) -> tuple[tuple[Any, Any], None]:
            cache, query = carry
            cache, _ = write_kv(cache, query[:, :1], None, place, batch)
            seen = paged_latent_attention(query, cache, place, batch, scale=1.0, value_width=value_width)
            return (cache, query.at[..., :value_width].set(seen)), None

        places: Any = np.array([[0, 0], [0, cache.shape[0] // 2], [1000, 1000]], np.int32)
        return jax.lax.scan(layer, (cache, query), Layout(*places))[0]

    for num_blocks in POOL_BLOCKS:
        about = LatentStep(
            heads=heads,
            tokens=8,
            seqs=8,
            context=1024,
            cache_bytes=2 * num_blocks * 64 * heads.head_dim * 2,
            decode_only=True,
            value_width=value_width,
        )
        query = jax.ShapeDtypeStruct((8, heads.heads, heads.head_dim), jax.numpy.bfloat16)
        arguments = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
            (about.cache()[0], query, about.batch(backend)),
        )
        size = "" if num_blocks == POOL_BLOCKS[0] else f", {num_blocks} blocks"
        yield Case(
            name=f"pool of latents: {heads.head_dim} numbers, blocks of 64 in bfloat16{size}",
            lower=lambda arguments=arguments: jax.jit(step, donate_argnums=0).lower(*arguments),
            in_place_bytes=_bytes(arguments[0]),
            cache_bytes=_bytes(arguments[0]),
            most_temporary_bytes=None,
        )


def step_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Programs of each of `MODELS`; quick: its largest steps, and one sampler.

    Args:
        part: 0 or 1: of every second model alone, from the first or the second one on.
    """
    for name, model in list(MODELS.items())[part :: 1 if part is None else 2]:
        for i, num_blocks in enumerate(model.num_blocks[:1] if quick else model.num_blocks):
            which = _KINDS[i > 0 or quick][model.all_programs and not i]
            config = _runner_config(model, device, gpu)
            params = shapes(config.specs(), jax.numpy.dtype(config.dtype), config.sharding)
            programs: Any = make_programs(config, params, num_blocks)
            state = config.state(num_blocks)
            body: Any = getattr(params, "body", params)
            for label, key in _keys(programs, which):
                written = [getattr(state, part, None) for part in _WRITTEN.get(key[0], ())]
                yield Case(
                    name=f"{name}: {label}" + (f", {num_blocks} blocks" if i else ""),
                    lower=lambda programs=programs, key=key: programs._lower(key),
                    in_place_bytes=_bytes(written),
                    cache_bytes=_bytes(state.cache),
                    most_temporary_bytes=MOST_TEMPORARY_BYTES,
                    layers=model.config["num_hidden_layers"] if key[0] in ("forward", "pool") else None,
                    layer_bytes=_bytes(body.layers[0]),
                    is_step=True,
                )


def _keys(programs: Any, which: str) -> Iterator[tuple[str, Key]]:
    """Names and keys of "all" kinds of a model's programs, of "most", or of a "few"."""
    buckets = tuple(programs.packings)
    decodes = [bucket for bucket in buckets if bucket.decode_only]
    mixed = [bucket for bucket in buckets if not bucket.decode_only]
    chosen = [*decodes[-1:], mixed[-1]]
    if which == "all":
        chosen = [*decodes[:1], *decodes[len(decodes) // 2 : -1 : 2], *decodes[-1:], mixed[len(mixed) // 2], mixed[-1]]
    if not isinstance(programs, SamplingPrograms):
        for bucket in chosen:
            yield f"pool {bucket}", ("pool", bucket)
        if which != "few":
            yield f"pool each token, {chosen[-1]}", ("tokens", chosen[-1])
        return
    for bucket in chosen:
        yield f"decode {bucket.seqs} seqs" if bucket.decode_only else f"mixed {bucket}", ("forward", bucket)
    if which != "few":
        yield f"sample {programs._sample_rows[-1]} rows", ("sample", programs._sample_rows[-1], True)
    if which == "all":
        for rows in programs._sample_rows[:-1]:
            yield f"sample {rows} rows", ("sample", rows, True)
        for rows in programs._sample_rows:
            yield f"sample {rows} rows, greedy", ("sample", rows, False)
        yield "score", SCORER
        yield "write tokens", WRITER


def _runner_config(model: Model, device: Any, gpu: GPU) -> RunnerConfig:
    pools = model.pooling_type is not None
    read = (pooling_model_config if pools else model_config)(model.config)
    return RunnerConfig(
        model=read,
        pooler=Pooler(seq_pooling_type=model.pooling_type) if model.pooling_type else None,
        groups=kv_cache_groups(read.kv_specs),
        scheduler=SchedulerConfig(
            max_num_seqs=model.max_num_seqs,
            max_num_batched_tokens=model.max_num_batched_tokens,
            max_model_len=model.max_model_len,
            max_scored_tokens=1024,
        ),
        dtype="bfloat16",
        target=target_described(gpu, (device,)),
        block_size=16,
        gpu_memory_utilization=0.9,
        kv_cache_memory_bytes=None,
        num_gpu_blocks_override=None,
        enable_prefix_caching=True,
        enforce_eager=False,
        fit_max_model_len=False,
        num_logprobs=20,
        logprobs_mode="raw_logprobs",
        processors=(),
        seed=0,
        compile_cache=None,
        progress=None,
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
