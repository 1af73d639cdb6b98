"""The progress bar of a batch, with vLLM's words."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.api.outputs import RequestOutput
    from jaxllm.api.pooling_outputs import PoolingRequestOutput
    from jaxllm.engine.observe.metrics import EngineStats

#: seconds between two looks of the bar; a batch of small requests finishes thousands a second
REFRESH_INTERVAL = 0.1


class Progress:
    """Counts finished requests, and shows the speed and the state of the engine.

    Args:
        total: requests of the batch; None when it is not known.
        done: of these, finished already.
        enabled: False shows nothing; a callable makes the bar, with tqdm's arguments, in place of `tqdm.auto.tqdm`.
        stats: where the engine's numbers come from; None: speeds come from the outputs, and there is nothing else.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int | None,
        done: int = 0,
        *,
        enabled: bool | Callable[..., Any] = True,
        stats: Callable[[], EngineStats] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._bar: Any = None
        if not enabled:
            return
        make = enabled if callable(enabled) else bar_class()
        self._clock, self._stats = clock, stats
        self._before = stats() if stats else None
        self._input = self._output = self._finished = 0
        self._start = self._shown = clock()
        self._bar = make(
            total=total,
            initial=done,
            desc="Processed prompts",
            unit="req",
            dynamic_ncols=True,
            postfix=f"est. speed input: {0:.2f} toks/s, output: {0:.2f} toks/s",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show()
            self._bar.close()

    def finished(self, output: RequestOutput | PoolingRequestOutput) -> None:
        """Count a request, all of whose completions have ended."""
        if self._bar is not None:
            self._finished += 1
            self._input += len(output.prompt_token_ids)
            if isinstance(output.outputs, list):
                self._output += sum(len(completion.token_ids) for completion in output.outputs)
            self.tick()

    def tick(self) -> None:
        """Show the present state, if the bar has not been drawn for a while; cheap enough for every step."""
        if self._bar is not None and self._clock() - self._shown >= REFRESH_INTERVAL:
            self._show()

    def _show(self) -> None:
        self._shown = self._clock()
        self._bar.set_postfix_str(self._postfix(), refresh=False)
        finished, self._finished = self._finished, 0
        if not self._bar.update(finished):
            self._bar.refresh()

    def _postfix(self) -> str:
        seconds = max(self._shown - self._start, 1e-9)
        prompt_tokens, generated = self._input, self._output
        state = ""
        if self._stats is not None and self._before is not None:
            now, before = self._stats(), self._before
            # what runs has computed tokens too, so that the speed of long requests shows before the first one ends
            prompt_tokens = now.prompt_tokens - before.prompt_tokens
            generated = now.generation_tokens - before.generation_tokens
            scheduler = now.scheduler
            state = f", running: {scheduler.num_running}, waiting: {scheduler.num_waiting}"
            state += f", KV cache: {100 * scheduler.kv_cache_usage:.1f}%"
            if queries := now.prefix_cache_queries - before.prefix_cache_queries:
                state += f", prefix hits: {100 * (now.prefix_cache_hits - before.prefix_cache_hits) / queries:.1f}%"
            if preemptions := scheduler.num_preemptions - before.scheduler.num_preemptions:
                state += f", preemptions: {preemptions}"
        return (
            f"est. speed input: {prompt_tokens / seconds:.2f} toks/s, output: {generated / seconds:.2f} toks/s{state}"
        )


def bar_class() -> Callable[..., Any]:
    """tqdm's notebook bar where a notebook can show it, else the one of text."""
    import warnings

    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # a notebook without ipywidgets gets the bar of text, which needs no excuse
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm
    return tqdm
