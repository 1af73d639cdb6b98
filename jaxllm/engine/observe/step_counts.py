"""What is counted of every step, so that somebody may say later which argument would have helped (`jaxllm.tuning`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from jaxllm.api.metric import Counter, Gauge, Metric
from jaxllm.engine.observe.step_observer import StepObserver

if TYPE_CHECKING:
    from jaxllm.engine.scheduling.scheduler import Scheduler
    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.engine.step import SchedulerOutput

#: share of the KV cache in use below which requests that wait for a row need not wait
HALF = 0.5


class StepCounts(StepObserver):
    """Counters of one scheduler since its start: a few additions a step, none for a token.

    Args:
        bucket: (tokens, sequences) of a step -> those of the program that runs it; None: there are none.
        clock: seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        bucket: Callable[[int, int], tuple[int, ...]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._scheduler, self._bucket, self._clock = scheduler, bucket, clock
        self._turn = self._read_start = self._waited = 0.0
        self.steps = self.full_steps = self.rowless_steps = self.starved_steps = 0
        self.tokens = self.bucket_tokens = 0
        #: seconds in which the host worked, waited for the device, and waited for prompts while nothing ran
        self.host_seconds = self.wait_seconds = self.tokenizer_seconds = 0.0
        #: most requests that ran and waited at once, most that ran, and tokens of the longest of those that ended
        self.most_requests = self.most_running = self.longest_request = 0

    def turn_begins(self) -> None:
        self._turn, self._waited = self._clock(), 0.0

    def scheduled(self, step: SchedulerOutput) -> None:
        if not step.rows:
            return
        scheduler, config = self._scheduler, self._scheduler.config
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        self.steps += 1
        self.most_running = max(self.most_running, running)
        self.most_requests = max(self.most_requests, running + waiting)
        tokens = step.step_sizes()[0]
        if self._bucket is not None and not step.goes_on_alone:
            self.tokens += tokens
            self.bucket_tokens += self._bucket(tokens, len(step.rows))[0]
        if tokens >= config.max_num_batched_tokens and not step.goes_on_alone:
            self.full_steps += 1
        rows = config.max_num_active_seqs or config.max_num_seqs
        if waiting and running >= rows and scheduler.kv_cache_manager.usage < HALF:
            self.rowless_steps += 1

    def read_begins(self, step: SchedulerOutput) -> None:
        self._read_start = self._clock()

    def read(self, step: SchedulerOutput) -> None:
        waited = self._clock() - self._read_start
        self._waited += waited
        self.wait_seconds += waited

    def turn_ends(self) -> None:
        self.host_seconds += self._clock() - self._turn - self._waited

    def processed(self, step: SchedulerOutput, updates: StepUpdates) -> None:
        for request in updates.ended:
            self.longest_request = max(self.longest_request, len(request.all_token_ids))

    def prompts_are_missing(self) -> None:
        """Prompts have been read and are not tokenized yet; count the step if it has room for them."""
        scheduler, config = self._scheduler, self._scheduler.config
        rows = config.max_num_active_seqs or config.max_num_seqs
        if not len(scheduler.waiting) and len(scheduler.running) < rows:
            self.starved_steps += 1

    def metrics(self, labels: Mapping[str, str]) -> list[Metric]:
        """They are jaxllm's own; vLLM has none like them."""
        counters = {
            "jaxllm:steps": self.steps,
            "jaxllm:steps_full": self.full_steps,
            "jaxllm:steps_without_row": self.rowless_steps,
            "jaxllm:steps_starved": self.starved_steps,
            "jaxllm:step_tokens": self.tokens,
            "jaxllm:step_bucket_tokens": self.bucket_tokens,
            "jaxllm:host_seconds": self.host_seconds,
            "jaxllm:device_wait_seconds": self.wait_seconds,
            "jaxllm:tokenizer_wait_seconds": self.tokenizer_seconds,
        }
        gauges = {
            "jaxllm:most_requests": self.most_requests,
            "jaxllm:most_running": self.most_running,
            "jaxllm:longest_request": self.longest_request,
        }
        lost, media = self._scheduler.kv_cache_manager.lost_hits, self._scheduler.media
        if lost is not None:
            counters |= {
                "jaxllm:prefix_cache_evicted": lost.evicted_tokens,
                "jaxllm:prefix_cache_salted": lost.salted_tokens,
                "jaxllm:prefix_cache_salted_requests": lost.salted_requests,
            }
            gauges["jaxllm:prefix_cache_missing_blocks"] = lost.missing_blocks
        if media is not None:
            counters["jaxllm:steps_encoder_full"] = media.num_waiting_steps
            gauges["jaxllm:most_encoder_tokens"] = media.most_wanted
        found: list[Metric] = [Counter(name, dict(labels), value) for name, value in counters.items()]  # pyright: ignore
        return [*found, *(Gauge(name, dict(labels), value) for name, value in gauges.items())]
