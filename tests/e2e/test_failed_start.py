"""Engines that do not start: the error says why, comes early, and leaves nothing behind."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import jax
import pytest
from support.live_buffers import live
from support.tiny_model import SMALL

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.runner import build
from jaxllm.runner.compile.programs import Programs
from jaxllm.runner.runner import Runner
from jaxllm.weights.checkpoint import Checkpoint
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.tensor_files import TensorFiles

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)


class Failure(Exception):
    """Raised on purpose."""


# A constructor that fails, while the caller (a notebook, a debugger) keeps the exception and with it its frames.


def failing(model: Path, **arguments: Any) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        LLM(model, **{**SMALL, **arguments})
    return caught.value


def test_too_small_a_pool(tiny_model: Path):
    before = live()
    error = failing(tiny_model, num_gpu_blocks_override=8, block_size=16)
    assert live() <= before
    assert isinstance(error, ValidationError)
    assert "estimated maximum model length is 112" in str(error)
    assert "num_gpu_blocks_override to 17" in str(error)
    failing(tiny_model, num_gpu_blocks_override=8, block_size=16, max_model_len=113)
    with LLM(tiny_model, **{**SMALL, "num_gpu_blocks_override": 8, "block_size": 16, "max_model_len": 112}) as llm:
        (output,) = llm.generate([[1] * 100], LONG, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 12


def test_a_weight_that_cannot_be_read(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    before = live()
    read, count = TensorFiles.read, iter(range(10**6))

    def broken(self: TensorFiles, name: str, *where: Any) -> Any:
        if next(count) == 12:
            raise WeightsError(f"tensor {name!r} cannot be read")
        return read(self, name, *where)

    monkeypatch.setattr(TensorFiles, "read", broken)
    error = failing(tiny_model)
    assert live() <= before
    assert "cannot be read" in str(error)


@pytest.mark.parametrize("kind", [Failure, KeyboardInterrupt])
def test_a_start_that_breaks_off_at_its_very_end(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
):
    before = live()

    def broken(self: Runner) -> None:
        raise kind

    monkeypatch.setattr(Runner, "warm_up", broken)
    error = failing(tiny_model)
    assert live() <= before
    assert isinstance(error, kind)


def test_without_a_writable_cache_folder_the_engine_still_starts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("JAXLLM_CACHE", str(file / "cache"))
    configured = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        # one that compiles little
        with LLM(tiny_model, runner="pooling", convert="embed", **SMALL) as llm:
            assert llm.embed([[1, 2, 3]], use_tqdm=False)
    finally:
        jax.config.update("jax_compilation_cache_dir", configured)
    assert "No compile cache: cannot write to" in caplog.text


def test_weights_are_read_no_further_when_a_start_fails(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    begun, ended = threading.Event(), threading.Event()

    def load(self: Checkpoint, *args: Any, stop: threading.Event, **options: Any) -> None:
        begun.set()
        if stop.wait(60):
            ended.set()
        raise CancelledError

    def compile_first(self: Programs) -> None:
        assert begun.wait(60)
        raise Failure

    monkeypatch.setattr(Checkpoint, "load", load)
    monkeypatch.setattr(Programs, "compile_first", compile_first)
    # as at a start that compiles nothing
    monkeypatch.setattr(Programs, "were_found", property(lambda self: True, lambda self, found: None), raising=False)
    with pytest.raises(Failure):
        LLM(str(tiny_model), **SMALL)
    assert ended.is_set()


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_compiled(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def compiled_plan(config: Any, **_: Any) -> None:
        raise Failure

    monkeypatch.setattr(build, "compiled_plan", compiled_plan)
    with pytest.raises(Failure):
        LLM(str(tiny_model), **SMALL)
    monkeypatch.setattr(TensorFiles, "shape", lambda self, name: (1, 2, 3))
    with pytest.raises(WeightsError, match=r"has shape \(1, 2, 3\), the model's config asks for"):
        LLM(str(tiny_model), **SMALL)
