"""What every test may use: real weights and compiled programs, kept in the user's cache; and the order of files."""

from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.quick_compile import FOR_LONG_RUNS, QUICK, THOROUGH, flags

from jaxllm.config.cache_folder import cache_folder

# Tests compile the same small programs again and again. JAX reads these when it is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# XLA reads these when it compiles for the first time
os.environ["XLA_FLAGS"] = flags(QUICK, os.environ.get("XLA_FLAGS", ""))

# torch, the reference, computes in every worker: threads that wait for each other's cores cost it a factor of ten
os.environ.setdefault("OMP_NUM_THREADS", "1")

# the machines are shared and compiling takes its time: slowness is no failure
settings.register_profile("jaxllm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxllm")

# Shells start what runs in the background with interrupts ignored, and nohup ignores hangups; the tests send both, and
# the processes that they start inherit what this one does with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TESTS = Path(__file__).parent
#: The files that take longest, the longest first. `make test` gives whole files to its workers: one that began such a
#: file last would leave the other without work.
LONGEST = (
    "e2e/test_notebooks.py",
    "e2e/test_pairs.py",
    "e2e/test_invariance.py",
    "e2e/test_pipeline_parallel.py",
    "e2e/test_deterministic.py",
    "e2e/test_gpu_check.py",
    "parity/test_smollm2.py",
    "e2e/test_tensor_parallel.py",
    "e2e/test_expert_parallel.py",
    "e2e/test_peak_memory.py",
    "parity/test_pooling_parity.py",
    "e2e/test_latent_cache.py",
    "e2e/test_several_hosts.py",
    "unit/test_plan.py",
    "unit/test_donation.py",
    "e2e/test_data_parallel.py",
    "e2e/test_readme.py",
    "e2e/test_joint_replicas.py",
    "e2e/test_bench.py",
    "e2e/test_drafts.py",
    "e2e/test_compiles.py",
    "e2e/test_sinks.py",
    "property/test_micro_batches.py",
    "kernels/test_kv_write.py",
    "e2e/test_exit.py",
    "e2e/test_save_load.py",
    "unit/test_parallel.py",
    "unit/test_stacked_matrix.py",
    "unit/test_loader_destination.py",
    "unit/test_sampling_draws.py",
    "parity/test_families.py",
    "kernels/test_mosaic_prefill.py",
    "parity/test_moe_families.py",
    "parity/test_deepseek.py",
    "e2e/test_run_batch.py",
    "e2e/test_flax.py",
    "e2e/test_batch_kills.py",
    "e2e/test_failed_start.py",
)


#: Files whose fixture `found` asks many engines, most of them over several devices: the tests that use it are
#: `thorough`. `e2e/test_data_parallel.py` is what `make test` runs of such engines.
MANY_ENGINES = (
    "e2e/test_pairs.py",
    "e2e/test_tensor_parallel.py",
    "e2e/test_pipeline_parallel.py",
    "e2e/test_expert_parallel.py",
    "e2e/test_joint_replicas.py",
    "e2e/test_latent_cache.py",
    "e2e/test_sinks.py",
    "e2e/test_several_hosts.py",
    "e2e/test_one_byte_caches.py",
    "e2e/test_kernels_of_experts.py",
    "e2e/test_lora_pairs.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-thorough` reads only files that have such tests; the others take half a minute of every worker."""
    alone = re.fullmatch(r"thorough( and not \([\w ]+\))?", config.option.markexpr)
    if not alone or not collection_path.match("test_*.py"):
        return None
    if collection_path.is_relative_to(TESTS) and collection_path.relative_to(TESTS).as_posix() in MANY_ENGINES:
        return None
    return None if "mark.thorough" in collection_path.read_text() else True


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long, and order the tests' files: `LONGEST` first, the others as they were found."""
    many = {TESTS / name for name in MANY_ENGINES}
    for item in items:
        if item.path in many and "found" in getattr(item, "fixturenames", ()):
            item.add_marker("thorough")
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What was imported stays: were it looked through, each of the many collections, of which every start of an engine
    asks for one, would take half a second.
    """
    gc.freeze()


#: files whose engines are not compiled quickly
COMPILED_OTHERWISE = {
    "e2e/test_deterministic.py": THOROUGH,
    "e2e/test_bad_input.py": FOR_LONG_RUNS,
    "parity/test_smollm2.py": FOR_LONG_RUNS,
    "parity/test_real_weights.py": FOR_LONG_RUNS,
}


@pytest.fixture(scope="module", autouse=True)
def engines_are_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the options of `COMPILED_OTHERWISE`."""
    options = COMPILED_OTHERWISE.get(request.path.relative_to(TESTS).as_posix())
    if options is None:
        yield
        return
    from jaxllm.runner.compile.compiler_options import CPU_OPTIONS

    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setitem(CPU_OPTIONS, name, value)
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, the embedded default model."""
    from jaxllm.weights import fetch

    return fetch.fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a folder."""
    from jaxllm.weights import fetch

    return fetch.fetch("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def qwen25_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct."""
    from jaxllm.weights import fetch

    return fetch.fetch("qwen2.5-coder-0.5b-instruct")
