"""``jaxllm bench images`` times pictures, texts, and both in one batch; and pictures that are encoded together."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.bench import report
from jaxllm.bench.datasets import bench_ids
from jaxllm.bench.latency import make_batch
from jaxllm.bench.measurements import turns
from jaxllm.command_options import build_llm
from jaxllm.multimodal.items import IMAGE

Samples = dict[str, list[float]]


def run(arguments: argparse.Namespace) -> int:
    """Time each in turns; print medians."""
    batch = make_batch(arguments, bench_ids(arguments), arguments.batch_size, arguments.input_len)
    texts: list[Any] = [{"prompt_token_ids": ids} for ids, _ in batch]
    params = SamplingParams(max_tokens=arguments.output_len, temperature=0, ignore_eos=True, detokenize=False)
    found: Samples = {}
    with build_llm(arguments, enable_prefix_caching=False) as llm:
        media = llm.engine.inputs.reader.media
        if media is None:
            raise ValidationError(f"{llm.engine.args.model} sees no images: give a --model that does.")
        mark = media.placeholder_ids(IMAGE)

        def images(turn: int, kind: int) -> list[Any]:
            """Others every time: what was encoded or prepared once comes from a cache."""
            seeds = ((turn + arguments.num_iters_warmup, kind, number) for number in range(arguments.num_images))
            return [
                {"prompt_token_ids": [*mark, *ids], "multi_modal_data": {IMAGE: _noise(arguments.image_size, seed)}}
                for seed, (ids, _) in zip(seeds, itertools.cycle(batch))
            ]

        one = SamplingParams(max_tokens=1, detokenize=False)
        for turn in turns(arguments):
            for name, asked, own in (
                ("texts", texts, params),
                ("images", images(turn, 0), one),
                ("both", [*texts, *images(turn, 1)], [params] * len(texts) + [one] * arguments.num_images),
            ):
                began = time.perf_counter()
                outputs = llm.generate(asked, own, use_tqdm=False)
                if turn < 0:
                    continue
                found.setdefault(name, []).append(time.perf_counter() - began)
                if name != "images":
                    found.setdefault(f"a token of {name}", []).append(_token_seconds(outputs[: len(texts)]))
        launches = _launches(llm, arguments)
    medians = {name: statistics.median(seconds) for name, seconds in {**found, **launches}.items()}
    rate = arguments.num_images / medians["images"]
    print(f"Images: {rate:.2f} images/s of {arguments.image_size} x {arguments.image_size} pixels, one token each")
    tokens = len(texts) * arguments.output_len
    print(
        f"Texts: {tokens / medians['texts']:.1f} output tokens/s alone; both take {medians['both']:.3f} s, alone they"
    )
    print(f"take {medians['texts']:.3f} s and {medians['images']:.3f} s")
    print(f"A text's token: {1e3 * medians['a token of texts']:.2f} ms alone, "
          f"{1e3 * medians['a token of both']:.2f} ms beside images")  # fmt: skip
    for name, seconds in launches.items():
        print(f"Encoding {arguments.num_images} squares, {name}: {statistics.median(seconds):.3f} s")
    report.write(arguments.output_json, arguments, {"rounds": found, "launches": launches, "medians": medians})
    return 0


def _noise(size: int, seed: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def _token_seconds(outputs: Sequence[RequestOutput]) -> float:
    """The median text's, behind its first token."""
    return statistics.median(
        (metrics.last_token_ts - metrics.first_token_ts) / max(metrics.num_generation_tokens - 1, 1)
        for metrics in (output.metrics for output in outputs)
        if metrics is not None
    )


def _launches(llm: LLM, arguments: argparse.Namespace) -> Samples:
    """Seconds that the tower takes for so many squares, one a launch and all in one; {} where it sees no squares."""
    from jaxllm.layers.context import Context
    from jaxllm.layers.vision import Patches
    from jaxllm.models.clip_vision import ClipConfig
    from jaxllm.models.vision import encode

    setup: Any = llm.engine.model_files.config
    config, params = setup.model.vision, llm.engine.runners[0].params.vision  # pyright: ignore
    if not isinstance(config, ClipConfig):
        return {}
    count, size = arguments.num_images, config.fixed_patches

    def encoded(squares: int) -> Any:
        places = np.stack(np.divmod(np.arange(size, dtype=np.int32), config.side), axis=1)
        each = Patches(
            positions=np.tile(places, (squares, 1)),  # pyright: ignore[reportArgumentType]
            frames=np.zeros(squares * size, np.int32),  # pyright: ignore[reportArgumentType]
            windows=np.zeros(squares * size, np.int32),  # pyright: ignore[reportArgumentType]
        )
        return functools.partial(jax.jit(functools.partial(encode, Context(), config)), params, patches=each)

    one, several, found = encoded(1), encoded(count), {}
    pixels = np.random.default_rng(0).standard_normal((count, size, config.patch_numbers), np.float32)
    given = pixels.astype(params.patch_embedding.dtype)
    for turn in turns(arguments):
        for name, launch in (
            ("one a launch", lambda: [one(pixels=own) for own in given]),
            ("all in one launch", lambda: several(pixels=given.reshape(count * size, -1))),
        ):
            began = time.perf_counter()
            jax.block_until_ready(launch())
            if turn >= 0:
                found.setdefault(name, []).append(time.perf_counter() - began)
    return found
