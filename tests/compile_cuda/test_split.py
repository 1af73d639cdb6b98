"""Models of eight devices: what a device has of them, and what the devices exchange in a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .compiling import QUICK, Results
from .split_models import SPLIT_MODELS
from .steps import SPLIT_ARCHITECTURE

MIB = 2**20
DECODE, MIXED = "decode 256 seqs", "mixed 8192 tokens x 256 seqs"
#: bytes of weights that a device has of each kind of layer, in bfloat16 by the shapes of the model's tensors: an eighth
#: of everything but norms, routers, DeepSeek's projections to latents, and of the KV heads one each
LAYER_BYTES = {
    # 8192 x (8192 + 2 x 1024 + 8192 + 3 x 28672) / 8 + 2 x 8192
    "Llama-3.3-70B on 8": {213_942_272},
    # 2048 x (4096 + 4096) / 8 + 2 x 128 x 2048 + 2 x 2048 + 2 x 128 + 128 x 2048 + 128 x 3 x 768 x 2048 / 8
    "Qwen3-30B-A3B on 8": {156_770_816},
    # (1536 + 576) x 7168 + (192 x 1536 + 256 x 512 + 128 x 7168) x 128 / 8 + 2 x 7168 + 1536 + 512, then
    # 3 x 18432 x 7168 / 8, or (256 / 8 + 1 / 8) x 3 x 2048 x 7168 + 256 x 7168 and 256 in float32
    "DeepSeek-V3 on 8": {172_392_448, 2_906_555_392},
}
#: bytes of the hidden states of a step's tokens, which every layer sums up twice over the devices
HIDDEN_BYTES = {
    "Llama-3.3-70B on 8": {DECODE: 4 * MIB, MIXED: 128 * MIB},
    "Qwen3-30B-A3B on 8": {DECODE: 1 * MIB, MIXED: 32 * MIB},
    "DeepSeek-V3 on 8": {DECODE: 3.5 * MIB, MIXED: 112 * MIB},
}
#: how often: behind attention, and behind the MLP or the experts, of both layers
SUMS = {
    "Llama-3.3-70B on 8": {"heads": 2, "mlp": 2},
    "Qwen3-30B-A3B on 8": {"heads": 2, "experts": 2},
    "DeepSeek-V3 on 8": {"heads": 2, "mlp": 1, "experts": 1},
}
#: of a row's scores, in float32
ROW_BYTES = {"Llama-3.3-70B on 8": 128256 * 4, "Qwen3-30B-A3B on 8": 151936 * 4, "DeepSeek-V3 on 8": 129280 * 4}
#: of what a step is told, in one buffer of integers
MOST_TOLD_BYTES = 16 * MIB


def split(compiled: dict[tuple[str, str], Results]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(JAX, model, program, result) of every program of several devices."""
    for (jax, _), found in compiled.items():
        for name, result in found.items():
            model, _, program = name.partition(": ")
            if model in SPLIT_MODELS and "error" not in result:
                yield jax, model, program, result


@pytest.fixture(scope="module")
def found(compiled: dict[tuple[str, str], Results]) -> list[tuple[str, str, str, dict[str, Any]]]:
    assert any(target == SPLIT_ARCHITECTURE for _, target in compiled)
    found = list(split(compiled))
    models = {"Qwen3-30B-A3B on 8"} if QUICK else set(SPLIT_MODELS)
    for program in (DECODE, MIXED):
        assert {model for _, model, has, _ in found if has == program} == models
    return found


def test_a_device_has_its_part_of_the_weights(found):
    for jax, model, program, result in found:
        if result["layers"]:
            assert set(result["layer_bytes"]) == LAYER_BYTES[model], (jax, model)
            told = result["arguments"] - result["weight_bytes"] - result["in_place"]
            assert 0 <= told < MOST_TOLD_BYTES, (jax, model, program, told)


def test_devices_exchange_hidden_states_and_nothing_else(found):
    """No weight, no cache, and of experts no more than what they add."""
    for jax, model, program, result in found:
        if result["layers"]:
            size = HIDDEN_BYTES[model][program]
            sums = {("all-reduce", over, 8, size): times for over, times in SUMS[model].items()}
            given = exchanged(result)
            # once a step, of the embedding, which XLA of JAX 0.11 may widen to float32 for the norm behind it
            embedded = {key: times for key, times in given.items() if key[1] == "vocab"}
            assert embedded in [{("all-reduce", "vocab", 8, size * wider): 1} for wider in (1, 2)], (
                jax,
                model,
                program,
            )
            assert given == sums | embedded, (jax, model, program)


def test_a_sampler_gathers_scores(found):
    for jax, model, program, result in found:
        if program.startswith("sample"):
            rows = int(program.split()[1])
            gathered = {("all-gather", "vocab", 8, rows * ROW_BYTES[model]): 1}
            assert exchanged(result) == gathered, (jax, model, program)


def exchanged(result: dict[str, Any]) -> dict[tuple[str, str, int, int], int]:
    return {(kind, over, devices, size): times for kind, over, devices, size, times in result["collectives"]}
