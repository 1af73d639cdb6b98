"""The progress bar's words and numbers, with a clock that stands still until it is told, and how seldom it draws."""

from __future__ import annotations

import functools
import io
import logging
import subprocess
import sys
from typing import Any

import pytest
from tqdm import tqdm

from jaxllm.api.outputs import CompletionOutput, RequestOutput
from jaxllm.config.log import LogHandler
from jaxllm.engine.observe.metrics import EngineStats
from jaxllm.engine.observe.progress import Progress
from jaxllm.engine.scheduling.stats import SchedulerStats


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bar:
    """What tqdm would be told."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.postfixes: list[str] = []
        self.updates: list[int] = []
        self.refreshes = 0
        self.closed = False

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        assert not refresh
        self.postfixes.append(text)

    def update(self, count: int) -> bool:
        self.updates.append(count)
        return False

    def refresh(self) -> None:
        self.refreshes += 1

    def close(self) -> None:
        self.closed = True


def output(num_prompt_tokens: int, *lengths: int) -> RequestOutput:
    completions = [CompletionOutput(index=i, text="", token_ids=[1] * n) for i, n in enumerate(lengths)]
    return RequestOutput(
        request_id="a", prompt=None, prompt_token_ids=[1] * num_prompt_tokens, outputs=completions, finished=True
    )


def stats(
    prompt: int, generated: int, *, queries: int = 0, hits: int = 0, preemptions: int = 0, usage: float = 0.5
) -> EngineStats:
    scheduler = SchedulerStats(
        num_running=3, num_waiting=7, num_preemptions=preemptions, num_preempted_tokens=0, kv_cache_usage=usage
    )
    return EngineStats(
        scheduler=scheduler,
        prompt_tokens=prompt,
        prompt_tokens_cached=0,
        generation_tokens=generated,
        prefix_cache_queries=queries,
        prefix_cache_hits=hits,
        prefix_cache_hit_rate=0.9,
    )


def test_words_and_speeds_without_an_engine():
    clock, bars = Clock(), []
    with Progress(2, enabled=lambda **given: bars.append(Bar(**given)) or bars[0], clock=clock) as progress:
        clock.now += 2.0
        progress.finished(output(10, 3, 5))
        clock.now += 2.0
        progress.finished(output(30, 4))
    (bar,) = bars
    assert bar.arguments["total"] == 2 and bar.arguments["desc"] == "Processed prompts"
    assert bar.arguments["postfix"] == "est. speed input: 0.00 toks/s, output: 0.00 toks/s"
    assert bar.postfixes[0] == "est. speed input: 5.00 toks/s, output: 4.00 toks/s"
    assert bar.postfixes[-1] == "est. speed input: 10.00 toks/s, output: 3.00 toks/s"
    assert sum(bar.updates) == 2 and bar.closed


def test_the_engines_numbers_count_from_the_bars_start():
    clock, bar = Clock(), Bar()
    given = [stats(1000, 500, queries=400, hits=100, preemptions=5)]
    progress = Progress(None, enabled=lambda **_: bar, stats=lambda: given[-1], clock=clock)
    clock.now += 4.0
    given.append(stats(1400, 520, queries=400, hits=100, preemptions=5, usage=0.125))
    progress.tick()
    given.append(stats(1400, 520, queries=600, hits=150, preemptions=7, usage=0.125))
    clock.now += 4.0
    progress.tick()
    assert bar.postfixes == [
        "est. speed input: 100.00 toks/s, output: 5.00 toks/s, running: 3, waiting: 7, KV cache: 12.5%",
        "est. speed input: 50.00 toks/s, output: 2.50 toks/s, running: 3, waiting: 7, KV cache: 12.5%, "
        "prefix hits: 25.0%, preemptions: 2",
    ]


def test_ten_thousand_requests_a_second_draw_ten_times():
    clock, bar = Clock(), Bar()
    asked = []
    with Progress(
        10_000, enabled=lambda **_: bar, stats=lambda: asked.append(1) or stats(0, 0), clock=clock
    ) as progress:
        for _ in range(10_000):
            clock.now += 1e-4
            progress.finished(output(1, 1))
            progress.tick()
    assert sum(bar.updates) == 10_000
    assert len(bar.updates) == bar.refreshes <= 11
    assert len(asked) <= 12


def test_tqdm_itself_with_an_unknown_total():
    text, clock = io.StringIO(), Clock()
    with Progress(None, enabled=functools.partial(tqdm, file=text, ncols=120), clock=clock) as progress:
        for _ in range(3):
            clock.now += 1.0
            progress.finished(output(8, 2))
    last = text.getvalue().rsplit("\r", 1)[-1]
    assert last.startswith("Processed prompts: 3req [")
    assert "est. speed input: 8.00 toks/s, output: 2.00 toks/s" in last


def test_a_line_of_the_log_is_no_part_of_the_bar(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = LogHandler()
    bar = functools.partial(tqdm, ncols=60, mininterval=0, miniters=1)
    with Progress(2, enabled=bar) as progress:
        progress.tick()
        handler.emit(logging.LogRecord("jaxllm", logging.INFO, "", 0, "said in between", None, None))
    lines = [line.split("\r")[-1] for line in terminal.getvalue().split("\n")]
    assert lines[0] == "said in between"
    assert lines[1].startswith("Processed prompts")


def test_without_a_bar_nothing_is_asked_or_written(capsys):
    asked = []
    with Progress(3, enabled=False, stats=lambda: asked.append(1) or stats(0, 0)) as progress:
        progress.finished(output(1, 1))
        progress.tick()
    assert not asked
    assert capsys.readouterr() == ("", "")


def test_a_notebook_without_ipywidgets_gets_a_bar_and_no_warning():
    code = """
import sys, types
sys.modules["ipywidgets"] = None
ipython = types.ModuleType("IPython")
ipython.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = ipython
sys.modules["IPython.display"] = None
from jaxllm.engine.observe.progress import Progress
with Progress(1) as progress:
    pass
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Processed prompts" in result.stderr and "Warning" not in result.stderr
