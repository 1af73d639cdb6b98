"""Metrics, traces and profiles of one engine."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import Metric, since
from jaxllm.engine.observe.stage_record import stage_records
from jaxllm.engine.observe.trace import Trace
from jaxllm.engine.observe.trace_recorder import TraceRecorder

if TYPE_CHECKING:
    import os

    from prometheus_client import CollectorRegistry

    from jaxllm.engine.client import EngineClient
    from jaxllm.engine.observe.engine_settings import EngineSettings
    from jaxllm.engine.observe.prometheus import MetricsServer
    from jaxllm.engine.step import StageTimer


class Watching:
    """What watches an engine run. All of it may be called while another thread drives the engine.

    Args:
        bucket: tokens and sequences of a step -> what the runner pads it to.
        profile: begins a profile in a folder; the result watches the steps, and has `folder` and `stop`.
        profiles: the folder of profiles that are given none.
        settings: what the engine was started with.
    """

    def __init__(
        self,
        client: EngineClient,
        bucket: Callable[[int, int], tuple[int, ...]],
        profile: Callable[[Path], Any],
        profiles: Path,
        settings: EngineSettings,
    ):
        self._client, self._bucket, self.settings = client, bucket, settings
        self._begin_profile, self._profiles = profile, profiles
        self._profile: Any = None
        #: the port that is open
        self.server: MetricsServer | None = None

    def prometheus_registry(self) -> CollectorRegistry:
        """The metrics, in a registry of their own."""
        from jaxllm.engine.observe.prometheus import metrics_registry

        return metrics_registry(self._client.core.metrics)

    def serve_metrics(self, port: int = 0, address: str = "127.0.0.1") -> MetricsServer:
        """Answer Prometheus until the engine ends, or the result is closed."""
        from jaxllm.engine.observe.prometheus import MetricsServer

        registry = self.prometheus_registry()
        self.close()
        self.server = server = MetricsServer(registry, port, address)
        weakref.finalize(self, server.close)
        return server

    def trace(self) -> Trace:
        """What records each step while it is on."""
        core, bucket = self._client.core, self._bucket
        cores = core.cores
        recorders: list[TraceRecorder] = []
        timers: list[tuple[StageTimer, int, float]] = []

        before: list[list[Metric]] = []

        def attach(trace: Trace) -> None:
            trace.settings = self.settings
            before.append(core.metrics())
            zero = time.monotonic()
            for number, one in enumerate(cores):
                recorders.append(TraceRecorder(trace, one.scheduler, bucket, engine=number, zero=zero))
                one.observe(recorders[-1])
                timer = one.time_stages()
                if timer is not None:
                    timers.append((timer, number, zero))

        def detach(trace: Trace) -> None:
            stopped, recorders[:] = list(recorders), []
            while before:
                trace.metrics = since(before.pop(), core.metrics())
            for one, recorder in zip(cores, stopped, strict=False):
                one.stop_observing(recorder)
                recorder.close()
            timed, timers[:] = list(timers), []
            for timer, number, zero in timed:
                trace.stages += stage_records(timer.stop(), zero, number)

        return Trace(attach, detach)

    def start_profile(self, prefix: str | None = None, *, path: str | os.PathLike[str] | None = None) -> Path:
        """Begin to write a profile; returns its folder."""
        if prefix is not None and (not isinstance(prefix, str) or not prefix or Path(prefix).name != prefix):
            raise ValidationError(f"prefix must be the name of a folder, got {prefix!r}; path= says where it lies.")
        core = self._client.core
        folder = self._profiles if path is None else Path(path)
        self._profile = self._begin_profile(folder / prefix if prefix else folder)
        core.observe(self._profile)
        return self._profile.folder

    def stop_profile(self) -> Path:
        """Write the profile; returns its folder. Raises ValidationError where none was started."""
        profile, self._profile = self._profile, None
        if profile is None:
            raise ValidationError("stop_profile without a profile: none was started. Call start_profile first.")
        self._client.core.stop_observing(profile)
        return profile.stop()

    def close(self) -> None:
        """Close the port. What the engine's end does to traces and profiles, they hear from the engine. Idempotent."""
        if self.server is not None:
            self.server.close()
            self.server = None
