"""Text from many prompts: as a list, as they finish, or queued by one call and collected by another."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

from jaxllm.api import checks
from jaxllm.api.sampling_params import DEFAULT_MAX_TOKENS, SamplingParams
from jaxllm.api.tracebacks import ShortTracebacks
from jaxllm.engine.observe.progress import Progress

if TYPE_CHECKING:
    from jaxllm.api.outputs import RequestOutput
    from jaxllm.engine.io.feed import Feed
    from jaxllm.engine.io.feeds import Feeds
    from jaxllm.engine.io.prompts import Prompt

logger = logging.getLogger("jaxllm")


Params = SamplingParams | Iterable[SamplingParams] | None
OnOutput = Callable[["RequestOutput"], object]
Bar = bool | Callable[..., Any]


class Generation:
    """The calls of one engine that continue prompts; `LLM`'s methods say what the arguments are."""

    def __init__(self, feeds: Feeds):
        self._feeds = feeds
        #: around each call
        self.notice: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
        self._told_of_default = False
        #: what was enqueued and not collected, one a call
        self._enqueued: list[Feed] = []

    def run(
        self, prompts: Iterable[Any], params: Params, use_tqdm: Bar, on_output: OnOutput | None, **options: Any
    ) -> list[RequestOutput]:
        """The outputs in the prompts' order; with `on_output`, which takes them as they finish, none.

        Args:
            options: `Feeds.feed`'s.
        """
        if on_output is not None:
            checks.function("on_output", on_output)
        outputs = self._outputs(self._feeds.feed(prompts, params, **options), prompts, use_tqdm)
        if on_output is None:
            return sorted(outputs, key=lambda output: output.index)
        for output in outputs:
            on_output(output)
        return []

    def as_completed(
        self, prompts: Iterable[Any], params: Params, use_tqdm: Bar, **options: Any
    ) -> Generator[RequestOutput, None, None]:
        """Each output when it is finished."""
        return self._outputs(self._feeds.feed(prompts, params, check_first=False, **options), prompts, use_tqdm)

    def enqueue(
        self,
        prompts: Iterable[Prompt],
        params: Params,
        priority: int | Iterable[int] | None,
        tokenization_kwargs: Mapping[str, Any] | None,
        lora_request: Any = None,
    ) -> list[str]:
        """Queue prompts, all of them or none; returns their requests' ids."""
        listed = list(prompts)
        feed = self._feeds.feed(
            listed,
            params,
            priority=priority,
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
            window=max(len(listed), 1),
        )
        try:
            ids = feed.submit()
        except BaseException:
            feed.close()
            raise
        self._enqueued.append(feed)
        return ids

    def collect(self, use_tqdm: Bar) -> list[RequestOutput]:
        """Run what was enqueued to its end; the outputs come in the order of submission."""
        feeds, self._enqueued = self._enqueued, []
        outputs: list[RequestOutput] = []
        try:
            total = sum(feed.num_read for feed in feeds)
            with self.notice(), Progress(total, enabled=use_tqdm, stats=self._feeds.client.core.stats) as progress:
                for feed in feeds:
                    outputs += sorted(feed.outputs(progress), key=lambda output: output.index)
        finally:
            for feed in feeds:
                feed.close()
        return outputs

    def _outputs(self, feed: Feed, prompts: Iterable[Any], use_tqdm: Bar) -> Generator[RequestOutput, None, None]:
        total = len(prompts) if isinstance(prompts, Sized) else None
        cut_at_default = True
        with (
            ShortTracebacks(),
            self.notice(),
            Progress(total, enabled=use_tqdm, stats=self._feeds.client.core.stats) as progress,
            contextlib.closing(feed.outputs(progress)) as outputs,
        ):
            for output in outputs:
                cut_at_default = cut_at_default and _cut_at_default(output)
                yield output
        if feed.num_read and cut_at_default and not self._told_of_default:
            self._told_of_default = True
            logger.info(
                "Every output was cut at %d tokens, the default of max_tokens: a larger max_tokens in SamplingParams, "
                "or in the bodies of a batch file, makes longer ones.",
                DEFAULT_MAX_TOKENS,
            )


def _cut_at_default(output: RequestOutput) -> bool:
    return all(
        completion.finish_reason == "length" and len(completion.token_ids) == DEFAULT_MAX_TOKENS
        for completion in output.outputs
    )
