"""How long steps take: learnt from steps that were measured, or by the rates of a GPU that is not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from support.large_models import LLAMA_3_8B
from support.linear_steps import LinearSteps

from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import GPUS
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.engine.observe.step_shape import StepShape
from jaxllm.engine.step import SchedulerOutput
from jaxllm.tuning.simulation.absent import absent_engine
from jaxllm.tuning.simulation.fitted_steps import FittedSteps
from jaxllm.tuning.simulation.forecasts import on_absent
from jaxllm.tuning.simulation.roofline_steps import BEST, LIKELY
from jaxllm.tuning.simulation.settings import changed
from jaxllm.tuning.simulation.simulate import simulate
from jaxllm.tuning.simulation.workload import Workload, WorkloadRequest

SETTINGS = EngineSettings(
    platform="cpu", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, block_size=8, num_blocks=65
)


def requests(*lengths: tuple[float, int, int]) -> Workload:
    fields = ("arrival", "num_prompt_tokens", "num_output_tokens")
    return Workload(requests=tuple(WorkloadRequest(**dict(zip(fields, each, strict=True))) for each in lengths))  # pyright: ignore[reportArgumentType]


def test_what_a_step_attends_to_is_counted():
    step = SchedulerOutput.empty(0)
    step.rows, step.starts, step.counts, step.wanted = [0, 1, 2], [10, 4, 0], [1, 3, 2], [1, 1, 0]
    # position 10 sees 11 tokens; 4, 5 and 6 see 5, 6 and 7; 0 and 1 see 1 and 2
    assert StepShape.of(step, 8) == StepShape(8, 3, 2, 11, 5 + 6 + 7 + 1 + 2)
    step.rows, step.starts, step.counts, step.wanted, step.num_steps = [0, 1], [10, 4], [3, 2], [3, 2], 3
    assert StepShape.of(step, 8) == StepShape(8, 2, 5, 11 + 12 + 13 + 5 + 6, 0, 3)


def measured(seconds, count: int = 400) -> dict[str, np.ndarray]:
    """Steps of random shapes that take as long as `seconds` of them has it, and up to 5% more or less."""
    draw = np.random.default_rng(0)
    sizes = draw.choice([1, 8, 16, 32, 64], count)
    rows = np.minimum(sizes, draw.integers(1, 17, count))
    decode = draw.random(count) < 0.6
    columns = {
        "bucket_tokens": sizes,
        "num_prefill_tokens": np.where(decode, 0, sizes),
        "num_decode_tokens": np.where(decode, rows, 0),
        "num_seqs": rows,
        "num_logits": np.where(decode, rows, 1),
        "decode_context": np.where(decode, rows * draw.integers(1, 500, count), 0),
        "chunk_pairs": np.where(decode, 0, sizes * draw.integers(1, 500, count)),
        "num_steps": np.ones(count, int),
        "num_drafted_tokens": np.zeros(count, int),
        **{f"{part}_time": np.full(count, 1e-4) for part in ("schedule", "launch", "update", "output")},
    }
    times = np.array([seconds(*row[:5]) for row in _shapes(columns)])
    return {**columns, "device_time": times * draw.uniform(0.95, 1.05, count)}


def _shapes(steps: dict[str, np.ndarray]) -> list[StepShape]:
    names = ("bucket_tokens", "num_seqs", "num_logits", "decode_context", "chunk_pairs")
    return [StepShape(*map(int, row)) for row in zip(*(steps[name] for name in names), strict=True)]


def test_programs_of_a_size_may_take_a_time_of_their_own():
    """A line through all sizes is wrong by half where few tokens have other programs than many."""

    def seconds(tokens: int, rows: int, logits: int, context: int, pairs: int) -> float:
        base = {1: 5e-3, 8: 9e-3, 16: 21e-3, 32: 24e-3, 64: 30e-3}[tokens]
        return base + 1e-4 * logits + 2e-6 * context + 1e-7 * pairs

    steps = measured(seconds)
    half = FittedSteps.of_halves(steps)[0]
    for shape in _shapes(steps):
        assert half.device_seconds(shape) == pytest.approx(seconds(*shape[:5]), rel=0.1)
    model = FittedSteps.of(steps)
    assert model.host_seconds(4) == pytest.approx(3e-4, rel=0.01) and "fitted to 400 steps" in str(model)
    # of sizes that nobody has seen it goes on as a line
    more = model.device_seconds(StepShape(128, 1, 1, 0, 0))
    assert more >= model.device_seconds(StepShape(64, 1, 1, 0, 0))


def test_too_little_to_learn_from_is_refused():
    few = measured(lambda *_: 1e-3, 5)
    with pytest.raises(ValidationError, match="5 steps to learn from; 8 are needed"):
        FittedSteps.of(few)
    old = measured(lambda *_: 1e-3)
    with pytest.raises(ValidationError, match="does not say what its steps attended to"):
        FittedSteps.of({**old, "num_logits": np.zeros(400, int)})


def test_requests_of_the_simplest_engine_by_hand():
    """One after the other, since there is one row: chunks of 32 tokens and of 8, then two more steps of one token."""
    steps = LinearSteps(fixed=1e-3, token=1e-4)
    alone = changed(SETTINGS, {"max_num_seqs": 1, "async_scheduling": False})
    run = simulate(requests((0.0, 40, 3), (0.001, 8, 1)), alone, steps)
    chunks = 1e-3 + 32e-4, 1e-3 + 8e-4
    decode = 1e-3 + 1e-4
    assert run.ttft == pytest.approx([sum(chunks), sum(chunks) + 2 * decode + chunks[1] - 0.001])
    assert run.itl == pytest.approx([decode, decode]) and run.tpot == pytest.approx([decode])
    assert run.seconds == pytest.approx(sum(chunks) + 2 * decode + chunks[1])
    assert run.throughput == pytest.approx(4 / run.seconds) and list(run.num_waiting) == [0, 1, 1, 1, 0]
    assert run.goodput(ttft=sum(chunks) + 1e-6) == pytest.approx(1 / run.seconds)
    assert run.percentile("e2e", 100) == pytest.approx(run.seconds - 0.001)


def test_requests_wait_for_their_turn_where_few_may_run_at_a_time():
    steps = LinearSteps(fixed=1e-3, token=0.0)
    both = requests((0.0, 8, 2), (0.0, 8, 2))
    one = Workload(requests=both.requests, max_concurrency=1)
    quick, slow = (simulate(each, SETTINGS, steps) for each in (both, one))
    assert quick.ttft == pytest.approx([1e-3, 1e-3]) and slow.ttft == pytest.approx([1e-3, 1e-3])
    assert slow.arrivals[1] == pytest.approx(quick.seconds) and slow.seconds == pytest.approx(2 * quick.seconds)


def test_other_settings_of_memory():
    own = EngineSettings(
        block_size=16,
        num_blocks=101,
        block_bytes=1000,
        int8_block_bytes=600,
        total_bytes=1_000_000,
        weight_bytes=500_000,
        other_bytes=299_000,
        gpu_memory_utilization=0.9,
    )
    blocks = lambda **changes: changed(own, changes).num_blocks  # noqa: E731
    assert blocks(gpu_memory_utilization=0.9) == blocks() == 101
    assert blocks(gpu_memory_utilization=0.95) == 151 and blocks(kv_cache_dtype="int8") == 168
    assert blocks(block_size=32) == 50 and blocks(kv_cache_memory_bytes=7000) == 7
    assert blocks(num_gpu_blocks_override=5) == 5
    with pytest.raises(ValidationError, match="hold no block of 1,000 bytes: raise gpu_memory_utilization"):
        blocks(gpu_memory_utilization=0.8)
    for changes, message in (
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is not simulated"),
        ({"max_model_len": "auto"}, "max_model_len must be a whole number to be simulated, got 'auto'"),
    ):
        with pytest.raises(ValidationError, match=message):
            blocks(**changes)
    own = changed(own, {"num_gpu_blocks_override": 50})
    # as many as it says, however large they are
    assert blocks(kv_cache_dtype="int8") == blocks(block_size=32) == 50 and blocks(kv_cache_memory_bytes=7000) == 7
    with pytest.raises(ValidationError, match="whose cache num_gpu_blocks_override decides"):
        blocks(gpu_memory_utilization=0.5)
    for changes, message in (
        ({"kv_offloading_size": 1.0}, "kv_offloading_size is not simulated"),
        ({"max_model_len": 10}, "max_model_len=10 cuts off the longest request, which has 11 tokens"),
    ):
        with pytest.raises(ValidationError, match=message):
            simulate(
                requests((0.0, 8, 3)), dataclasses.replace(SETTINGS, **changes), LinearSteps(fixed=1e-3, token=0.0)
            )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    return path


def test_a_step_on_a_gpu_takes_what_its_bytes_and_operations_need(llama: Path):
    settings, steps = absent_engine(llama, device="h100")
    gpu, best = GPUS["h100"], steps.with_efficiency(BEST)
    assert settings.platform == "gpu" and settings.num_blocks is not None and settings.num_blocks > 20_000
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    read = 2 * (32 * layer + 4096 * 128256)
    kv = 2 * 32 * 8 * 128 * 2
    shape = StepShape(1, 1, 1, 1000, 0)
    assert best.device_seconds(shape) == pytest.approx((read + 1000 * kv) / gpu.memory_bandwidth, rel=0.001)
    assert steps.device_seconds(shape) == pytest.approx(best.device_seconds(shape) / LIKELY)
    pairs = 8192 * 8193 // 2
    flops = 2 * (8192 * 32 * layer + 4096 * 128256) + 4 * 4096 * 32 * pairs
    assert best.device_seconds(StepShape(8192, 1, 1, 0, pairs)) == pytest.approx(flops / gpu.bf16_flops, rel=0.001)
    halves = absent_engine(llama, device="h100", tensor_parallel_size=2)[1].with_efficiency(BEST)
    assert 0.5 < halves.device_seconds(shape) / best.device_seconds(shape) < 0.7


def test_a_forecast_for_a_gpu_says_how_sure_it_is(llama: Path):
    found = on_absent(llama, requests(*[(0.01 * i, 500, 50) for i in range(20)]), "h100", {"max_num_seqs": 8})
    best, likely = found.runs.values()
    assert best.throughput > likely.throughput > 0 and not found.errors
    assert "error: unknown" in str(found) and "at 60% of its rates" in str(found)
    assert "<img" in found._repr_html_() and "H100" in found._repr_html_()
    with pytest.raises(ValidationError, match="one replica without a pipeline"):
        absent_engine(llama, device="h100", pipeline_parallel_size=2)
    with pytest.raises(ValidationError, match="needs 1.00 GiB of KV cache"):
        absent_engine(llama, device="l4", gpu_memory_utilization=0.5)
