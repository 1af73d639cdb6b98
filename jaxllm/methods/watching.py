"""`LLM`'s methods that watch it run."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache_folder import cache_folder
from jaxllm.config.engine_args import EngineArgs
from jaxllm.engine.observe.trace import Trace
from jaxllm.engine.observe.trace_recorder import TraceRecorder
from jaxllm.methods.base import EngineMethods
from jaxllm.runner.profile import Profile

if TYPE_CHECKING:
    import os

    from prometheus_client import CollectorRegistry

    from jaxllm.engine.observe.metrics import Metric
    from jaxllm.engine.observe.prometheus import MetricsServer


class WatchingMethods(EngineMethods):
    """Metrics, traces and profiles of one engine. All of them may be called while another thread drives it."""

    _metrics_server: MetricsServer | None = None
    _profile: Profile | None = None
    _profile_folder: Path

    def _start_watching(self, args: EngineArgs) -> None:
        """Do what the engine's arguments ask for. Raises ValidationError when the port is taken."""
        folder = args.profiler_config.torch_profiler_dir or None
        self._profile_folder = Path(folder) if folder else cache_folder() / "profiles"
        if args.metrics_port is not None:
            self.serve_metrics(args.metrics_port)

    def _stop_watching(self) -> None:
        """Close the port. What the engine's end does to traces and profiles, they hear from the engine. Idempotent."""
        if self._metrics_server is not None:
            self._metrics_server.close()
            self._metrics_server = None

    def get_metrics(self) -> list[Metric]:
        """A snapshot of all counters, gauges and histograms, by vLLM's names.

        They are collected whether or not ``disable_log_stats`` is set: it is about the line in the log alone.
        """
        return self._client.core.metrics()

    def prometheus_registry(self) -> CollectorRegistry:
        """The metrics for prometheus_client, in a registry of their own: `generate_latest`, `push_to_gateway`, an
        application of yours. Every use of it takes a new snapshot, from any thread.
        """
        from jaxllm.engine.observe.prometheus import metrics_registry

        return metrics_registry(self._client.core.metrics)

    def serve_metrics(self, port: int = 0, address: str = "127.0.0.1") -> MetricsServer:
        """Answer Prometheus on ``http://address:port/metrics`` until the engine ends, or the result is closed.

        Args:
            port: 0 takes a free one; the result's `port` and `url` say which. An earlier call's port is closed.
            address: of the interface to listen on. The default is reached from this machine alone.

        Raises:
            ValidationError: the port is taken, or the address is not this machine's.
        """
        from jaxllm.engine.observe.prometheus import MetricsServer

        registry = self.prometheus_registry()
        self._stop_watching()
        self._metrics_server = server = MetricsServer(registry, port, address)
        weakref.finalize(self, server.close)
        return server

    def trace(self) -> Trace:
        """Record what each step does: ``with llm.trace() as trace: llm.generate(...)``, or `start` and `stop`.

        The trace has the records (`steps`, `requests`), gives them as arrays or a table, draws them and writes them
        for Perfetto. Several may be on at once; while none is, steps cost what they did.
        """
        core, bucket = self._client.core, self._started.runner.bucket
        recorders: list[TraceRecorder] = []

        def attach(trace: Trace) -> None:
            recorders.append(TraceRecorder(trace, core.scheduler, bucket))
            core.observe(recorders[-1])

        def detach(trace: Trace) -> None:
            while recorders:
                recorder = recorders.pop()
                core.stop_observing(recorder)
                recorder.close()

        return Trace(attach, detach)

    def start_profile(self, prefix: str | None = None, *, path: str | os.PathLike[str] | None = None) -> Path:
        """Begin to write a profile with `jax.profiler`: all that host and device do, down to single kernels.

        Args:
            prefix: a folder of this profile's own inside of `path`.
            path: where profiles go; None: the engine's ``profiler_config["torch_profiler_dir"]``, else the folder
                ``profiles`` in jaxllm's cache.

        Returns:
            The folder, which is written when the profile stops.

        Raises:
            RuntimeError: this process writes one already.
        """
        if prefix is not None and (not isinstance(prefix, str) or not prefix or Path(prefix).name != prefix):
            raise ValidationError(f"prefix must be the name of a folder, got {prefix!r}; path= says where it lies.")
        core = self._client.core
        folder = self._profile_folder if path is None else Path(path)
        self._profile = Profile(folder / prefix if prefix else folder)
        core.observe(self._profile)
        return self._profile.folder

    def stop_profile(self) -> Path:
        """Write the profile; returns its folder, for ``tensorboard --logdir``. Its trace files open in Perfetto too.

        Raises:
            RuntimeError: none was started.
        """
        profile, self._profile = self._profile, None
        if profile is None:
            raise RuntimeError("no profile was started; call start_profile first")
        self._client.core.stop_observing(profile)
        return profile.stop()
