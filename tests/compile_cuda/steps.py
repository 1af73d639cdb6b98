"""The programs of engines with real models, on one device and on several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxllm.api.pooler import Pooler
from jaxllm.config.cache import kv_cache_groups
from jaxllm.config.devices import GPU
from jaxllm.config.lora import LoRAConfig
from jaxllm.config.parallel import Grid
from jaxllm.config.resolve import GPU_DRAFT_SEQS
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.models.eagle import eagle_head
from jaxllm.models.matrices import matrices
from jaxllm.models.registry import model_config, pooling_model_config
from jaxllm.parallel.rules import check_split, shapes, spread_experts
from jaxllm.runner.build import make_programs
from jaxllm.runner.compile.deviceless import devices as described
from jaxllm.runner.compile.encoder import ENCODE
from jaxllm.runner.compile.programs import Key
from jaxllm.runner.compile.target import target_described
from jaxllm.runner.device_state import device_state
from jaxllm.runner.heads.sampling_programs import SCORER, WRITER, SamplingPrograms
from jaxllm.runner.runner_config import RunnerConfig, model_specs
from jaxllm.speculative.draft_model import ModelDrafter, draft_groups
from jaxllm.speculative.drafter import Drafter
from jaxllm.speculative.head_drafter import HeadDrafter
from jaxllm.speculative.ngram import NgramDrafter
from jaxllm.weights.quantization.detect import Quantization, quantization_method
from jaxllm.weights.quantization.method import Found

from .cases import Case, device_bytes
from .models import MODELS, Model
from .quantized_models import QUANTIZED_MODELS
from .split_models import HEADS, SPLIT_MODELS

#: bytes of temporaries that no program of an engine may exceed; with the weights, they are what the KV cache is not
MOST_TEMPORARY_BYTES = 3 * 2**30
#: what kinds of programs write of their state
_WRITTEN = {
    "forward": ("cache", "tokens"),
    "sample": ("tokens",),
    "write tokens": ("tokens",),
    ENCODE: ("encoded",),
    "pool": ("cache", "pooled"),
    "draft steps": ("cache", "tokens", "drafting", "draft_cache"),
    "catch up": ("cache", "tokens", "drafting", "draft_cache"),
}
#: which programs of a model are compiled: [in a quick run][where `Model.all_programs`]
_KINDS = (("most", "all"), ("few", "most"))
#: what a quick run leaves out: the steps of the first are Llama 3.1's with heads whose kernels are compiled by
#: themselves, those of the second are a smaller Gemma's with Llama's heads, those of the third are its embedder's, and
#: each of the others takes as long as all of another model's
_NOT_QUICK = (
    "SmolLM2-135M",
    "Gemma-3-27B",
    "Qwen2.5-7B",
    "Llama-3.1-8B, drafts",
    "Llama-3.1-8B, drafts of Llama-3.2-1B",
    "Llama-3.1-8B, drafts of EAGLE-3",
    "Llama-3.1-8B, half on the host",
    "Llama-3.1-8B, adapters",
    "Gemma-3-4B, images",
    "Qwen2.5-VL-7B, images",
)
#: the architecture of the GPUs that the models of several devices run on, and those with adapters
SPLIT_ARCHITECTURE = "sm_90"


def step_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Programs of each of `MODELS`; quick: the largest steps of most of them, and one sampler.

    Args:
        part: 0 or 1: of every second model alone, from the first or the second one on.
    """
    models = [item for item in MODELS.items() if not (quick and item[0] in _NOT_QUICK)]
    # kernels of adapters are compiled for each architecture, whole steps with them take long
    models = [(name, model) for name, model in models if not model.adapters or gpu.architecture == SPLIT_ARCHITECTURE]
    for name, model in models[part :: 1 if part is None else 2]:
        for i, num_blocks in enumerate(model.num_blocks[:1] if quick else model.num_blocks):
            which = _KINDS[i > 0 or quick or model.offloaded > 0][model.all_programs and not i]
            size = f", {num_blocks} blocks" if i else ""
            yield from _cases(name, model, gpu, (device,), num_blocks, size, lambda p, which=which: _keys(p, which))


def quantized_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """Steps of single tokens of each of `QUANTIZED_MODELS`, of one row and of most; quick: of most.

    Args:
        part: 0 or 1: of every second model alone, from the first or the second one on.
    """
    for name, model in list(QUANTIZED_MODELS.items())[part :: 1 if part is None else 2]:

        def keys(programs: Any) -> Iterator[tuple[str, Key]]:
            decodes = [bucket for bucket in programs.packings if bucket.decode_only]
            for bucket in decodes[-1:] if quick else (decodes[0], decodes[-1]):
                yield f"decode {bucket.seqs} seqs", ("forward", bucket)

        yield from _cases(name, model, gpu, (device,), model.num_blocks[0], "", keys)


def split_cases(device: Any, gpu: GPU, quick: bool, part: int | None = None) -> Iterator[Case]:
    """The largest decode and mixed step of each of `SPLIT_MODELS`, and its samplers of one row and of most; samplers of
    one row of `HEADS`. Quick: the steps of one, and the samplers of `HEADS`.

    Args:
        part: 0 or 1: in a quick run the steps alone, or the samplers.
    """
    if gpu.architecture != SPLIT_ARCHITECTURE:
        return
    if not quick or part != 1:
        for name in ("Qwen3-30B-A3B on 8",) if quick else SPLIT_MODELS:
            model = SPLIT_MODELS[name]
            several = tuple(described(gpu, model.devices))
            keys = (lambda p: _keys(p, "few")) if quick else (lambda p: (*_keys(p, "most"), *_single_rows(p)))
            yield from _cases(name, model, gpu, several, model.num_blocks[0], "", keys)
    if not quick or part != 0:
        for name, model in HEADS.items():
            yield from _cases(name, model, gpu, (device,), model.num_blocks[0], "", _single_rows)


def _cases(
    name: str,
    model: Model,
    gpu: GPU,
    devices: tuple[Any, ...],
    num_blocks: int,
    size: str,
    keys: Callable[[Any], Any],
) -> Iterator[Case]:
    config = _runner_config(model, devices, gpu)
    params = shapes(config.specs(), jax.numpy.dtype(config.dtype), config.sharding)
    programs: Any = make_programs(config, params, num_blocks)
    state = device_state(config, num_blocks)
    body: Any = getattr(params, "body", params)
    for label, key in keys(programs):
        written = [getattr(state, part, None) for part in _WRITTEN.get(key[0], ())]
        has_layers = key[0] in ("forward", "pool")
        yield Case(
            name=f"{name}: {label}{size}",
            lower=lambda key=key: programs._lower(key),
            in_place_bytes=device_bytes(written),
            cache_bytes=device_bytes(state.cache),
            most_temporary_bytes=MOST_TEMPORARY_BYTES,
            layers=config.model.num_layers if has_layers else None,
            layer_bytes=tuple(map(device_bytes, body.layers)) if has_layers else (),
            weight_bytes=device_bytes(_taken(key, programs, params)) if written else 0,
            fetched_bytes=config.fetched_bytes if has_layers else 0,
            is_step=True,
            devices=devices,
        )


def _taken(key: Key, programs: Any, params: Any) -> Any:
    """What a program takes of the weights."""
    if key[0] == ENCODE:
        return params.vision
    return params if key[0] in ("forward", "pool") else programs.head_params(params)


def _keys(programs: Any, which: str) -> Iterator[tuple[str, Key]]:
    """Names and keys of "all" kinds of a model's programs, of "most", or of a "few"; where it pools, of one."""
    buckets = tuple(programs.packings)
    decodes = [bucket for bucket in buckets if bucket.decode_only]
    mixed = [bucket for bucket in buckets if not bucket.decode_only]
    chosen = [*decodes[-1:], mixed[-1]]
    if which == "all":
        chosen = [*decodes[:1], *decodes[len(decodes) // 2 : -1 : 2], *decodes[-1:], mixed[len(mixed) // 2], mixed[-1]]
    if not isinstance(programs, SamplingPrograms):
        for bucket in chosen[-1:] if which == "few" else chosen:
            yield f"pool {bucket}", ("pool", bucket)
        if which != "few":
            yield f"pool each token, {chosen[-1]}", ("tokens", chosen[-1])
        return
    if programs.draft_packings:
        buckets = tuple(programs.draft_packings)
        for bucket in (buckets[0], buckets[-1]):
            yield f"drafts of {bucket.seqs} seqs", ("draft steps", bucket, bucket is buckets[0])
        for bucket in list(programs.catch_up_packings)[-1:]:
            yield f"what was passed over of {bucket.seqs} seqs", ("catch up", bucket)
        return
    if programs.encoder is not None:
        for key in (*programs.encoder.keys[:1], *programs.encoder.keys[1:][-1:]):
            yield f"encode {key[1]} patches", key
        chosen = chosen[-1:]
    for bucket in chosen:
        yield f"decode {bucket.seqs} seqs" if bucket.decode_only else f"mixed {bucket}", ("forward", bucket)
    if which != "few" and programs.encoder is None and programs.adapters is None:
        yield f"sample {programs._sample_rows[-1]} rows", ("sample", programs._sample_rows[-1], True)
    if which == "all":
        for rows in programs._sample_rows[:-1]:
            yield f"sample {rows} rows", ("sample", rows, True)
        for rows in programs._sample_rows:
            yield f"sample {rows} rows, greedy", ("sample", rows, False)
        yield "score", SCORER
        yield "write tokens", WRITER


def _single_rows(programs: Any) -> Iterator[tuple[str, Key]]:
    for full in (True, False):
        yield "sample 1 rows" + ("" if full else ", greedy"), ("sample", 1, full)


def _runner_config(model: Model, devices: tuple[Any, ...], gpu: GPU) -> RunnerConfig:
    pools = model.pooling_type is not None
    read = (pooling_model_config if pools else model_config)(model.config)
    if model.expert_parallel:
        read = spread_experts(read)
    check_split(read, model.devices)
    config = RunnerConfig(
        model=read,
        quantization=_quantization(model, read),
        pooler=Pooler(seq_pooling_type=model.pooling_type) if model.pooling_type else None,
        groups=kv_cache_groups(read.kv_specs),
        scheduler=SchedulerConfig(
            max_num_seqs=model.max_num_seqs,
            max_num_batched_tokens=model.max_num_batched_tokens,
            max_model_len=model.max_model_len,
            max_scored_tokens=1024,
            num_drafts=model.drafts,
            max_draft_seqs=GPU_DRAFT_SEQS if model.drafts else 0,
            encoder_cache_tokens=model.max_num_batched_tokens if model.encoder_patches else 0,
        ),
        dtype="bfloat16",
        kv_dtype="bfloat16",
        target=target_described(gpu, devices, grid=Grid(tensor=model.devices)),
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
        encoder_patches=model.encoder_patches,
        pixel_normal=((0.5,) * 3, (0.5,) * 3) if model.encoder_patches else ((), ()),
        drafter=_drafter(model, read),
        seed=0,
        compile_cache=None,
        progress=None,
        lora=_lora(model),
    )
    layers = sum(config.layer_bytes)
    return dataclasses.replace(config, cpu_offload_bytes=int(model.offloaded * layers))


def _lora(model: Model) -> LoRAConfig | None:
    if model.adapters is None:
        return None
    count, rank = model.adapters
    return LoRAConfig(max_loras=count, max_lora_rank=rank, max_cpu_loras=count, dtype="bfloat16")


def _drafter(model: Model, read: Any) -> Drafter | None:
    if model.eagle3 is not None:
        # its embedding is the model's
        head, layers = eagle_head("eagle3", model.eagle3, read, lambda name: not name.startswith("embed"), None)
        layers, groups = draft_groups(kv_cache_groups(read.kv_specs), layers)
        own: dict[str, Any] = dict(num_drafts=model.drafts, max_length=model.max_model_len)
        return HeadDrafter(model=layers, groups=groups, head=head, **own)
    if model.draft is None:
        return NgramDrafter(model.drafts, 2, 5) if model.drafts else None
    drafting, groups = draft_groups(kv_cache_groups(read.kv_specs), model_config(model.draft))
    return ModelDrafter(num_drafts=model.drafts, model=drafting, groups=groups, max_length=model.max_model_len)


def _quantization(model: Model, read: Any) -> Quantization | None:
    """As its config.json alone says it."""
    method = quantization_method(None, model.config.get("quantization_config"))
    if method is None:
        return None
    layouts = ((name, shape, method.planned(name, shape)) for name, shape, _ in matrices(model_specs(read, None)))
    return Quantization(method, {name: Found(layout, shape) for name, shape, layout in layouts if layout is not None})
