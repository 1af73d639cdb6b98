"""What the engine did, step by step and request by request."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.api.extras import plotting
from jaxllm.api.metric import Metric, to_dict
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.engine.observe.stage_record import StageRecord, bubble, busy_shares

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step. Times are in seconds; those of the clock count from the trace's start."""

    #: the engine's number of it
    step: int
    #: when the scheduler was asked for it
    start: float
    #: tokens of requests that get more than one, or whose prompt is not done: prompts, and what a preemption lost
    num_prefill_tokens: int
    #: where drafts may be checked, the tokens that came
    num_decode_tokens: int
    #: requests in the step
    num_seqs: int
    #: after the scheduler's decision
    num_running: int
    num_waiting: int
    #: share of the KV cache in use, in [0, 1], after the scheduler's decision
    kv_cache_usage: float
    #: of this decision
    num_preemptions: int
    #: what the compiled program has room for; 0 where the runner has no buckets
    bucket_tokens: int
    bucket_seqs: int
    #: the scheduler's time from `start` on
    schedule_time: float
    #: packing, uploading and launching
    launch_time: float
    #: when the host began to wait for the result
    read_start: float
    #: how long it waited
    wait_time: float
    #: tokens appended, stops checked, blocks freed
    update_time: float
    #: when the host began with the step's outputs
    output_start: float
    #: text made, stop strings looked for, outputs built
    output_time: float
    #: when the device began with it, at the earliest: at its launch, or when the step before was done
    device_start: float
    #: from `device_start` until the host had the result. Never overlaps the step before. It is exact while the host
    #: waits for the device; where the host comes late (`wait_time` near 0), the device may have been done earlier
    device_time: float
    #: number of the replica that ran it
    engine: int = 0
    #: blocks of the KV cache that it copied to the host's memory, and from there
    num_blocks_out: int = 0
    num_blocks_in: int = 0
    #: drafts that it checked, and those of them that were right
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    #: of its launch; and of all of them together, as `StepShape` has it
    num_steps: int = 1
    num_logits: int = 0
    decode_context: int = 0
    chunk_pairs: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decode_tokens

    @property
    def host_time(self) -> float:
        """Seconds in which the host worked for the step; it did not wait in them."""
        return self.schedule_time + self.launch_time + self.update_time + self.output_time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request. Times are in seconds from the trace's start, negative before it, None where it did not happen."""

    request_id: str
    num_prompt_tokens: int
    #: prompt tokens that the prefix cache had
    num_cached_tokens: int
    num_output_tokens: int
    #: None: it had not ended when the trace did
    finish_reason: str | None
    queued: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    #: from each preemption to the return
    preempted: tuple[tuple[float, float], ...] = ()
    #: number of the replica that had it
    engine: int = 0
    #: drafts that were checked for it, and those of them that were right
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    #: in hexadecimal, of the full blocks of its prompt, where the prefix cache was asked for them
    block_hashes: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def spans(self) -> list[tuple[str, float, float]]:
        """("queued" | "prefill" | "decode", start, end), one after the other."""
        marks = [("queued", self.queued), ("prefill", self.scheduled), ("decode", self.first_token)]
        ends = [self.scheduled, self.first_token, self.last_token]
        return [
            (name, start, end)
            for (name, start), end in zip(marks, ends, strict=True)
            if start is not None and end is not None
        ]


_STEP_FIELDS = tuple(field.name for field in dataclasses.fields(StepRecord))


class Trace:
    """A record of the engine's steps while it is on: as a context manager, or between `start` and `stop`.

    Args:
        attach: makes the engine tell this trace of its steps.
        detach: ends that.
    """

    def __init__(self, attach: Callable[[Trace], None], detach: Callable[[Trace], None]) -> None:
        self._attach, self._detach = attach, detach
        #: in the order in which they ran, on each replica
        self.steps: list[StepRecord] = []
        #: in the order in which they ended; those that have not come last, once the trace has stopped
        self.requests: list[RequestRecord] = []
        #: of a pipeline, what each stage did, once the trace has stopped
        self.stages: list[StageRecord] = []
        #: what the engine was started with, and what its counters counted meanwhile, once the trace has stopped
        self.settings: EngineSettings | None = None
        self.metrics: list[Metric] = []
        #: number of a replica -> `expert_load` of what it ran
        self.expert_loads: dict[int, np.ndarray] = {}

    def start(self) -> Trace:
        """Begin anew: what an earlier use has recorded is dropped."""
        self.stop()
        self.steps, self.requests, self.stages, self.metrics, self.expert_loads = [], [], [], [], {}
        self._attach(self)
        return self

    def stop(self) -> Trace:
        """Record nothing more. Steps whose results nobody has read yet are left out. Idempotent."""
        self._detach(self)
        return self

    def __enter__(self) -> Trace:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bubble(self) -> float | None:
        """The share of the time in which a pipeline's stages had nothing to do, in [0, 1]; None: there are no stages,
        or the trace has not stopped.
        """
        return bubble(self.stages)

    @property
    def expert_load(self) -> np.ndarray | None:
        """int64 [layers with experts, experts]: how many tokens each expert got, of all replicas; None: nobody counted
        (`LLM(..., record_expert_load=True)`).
        """
        return sum(self.expert_loads.values()) if self.expert_loads else None  # pyright: ignore[reportReturnType]

    def __repr__(self) -> str:
        if not self.steps:
            return "Trace(no steps)"
        arrays = self.arrays()
        seconds = float((arrays["read_start"] + arrays["wait_time"]).max() - arrays["start"].min())
        replicas = len(self.engines)
        prefill, decode = int(arrays["num_prefill_tokens"].sum()), int(arrays["num_decode_tokens"].sum())
        return (
            f"Trace({len(self.steps)} steps and {len(self.requests)} requests in {seconds:.3f} s"
            f"{f' on {replicas} replicas' if replicas > 1 else ''}; "
            f"{prefill} prefill and {decode} decode tokens; "
            f"KV cache at most {100 * arrays['kv_cache_usage'].max():.1f}% full; "
            f"{int(arrays['num_preemptions'].sum())} preemptions; {self._drafts_text(arrays)}"
            f"device busy {arrays['device_time'].sum():.3f} s"
            f"{self._stages_text()})"
        )

    def _drafts_text(self, arrays: dict[str, np.ndarray]) -> str:
        drafted, accepted = (int(arrays[name].sum()) for name in ("num_drafted_tokens", "num_accepted_tokens"))
        return f"{accepted} of {drafted} drafts right ({100 * accepted / drafted:.0f}%); " if drafted else ""

    def _stages_text(self) -> str:
        shares = [f"{100 * share:.0f}%" for share in busy_shares(self.stages)]
        return f"; {len(shares)} stages busy {', '.join(shares)} of the time" if shares else ""

    @property
    def engines(self) -> list[int]:
        """Numbers of the replicas that ran steps."""
        return sorted({step.engine for step in self.steps})

    def arrays(self, engine: int | None = None) -> dict[str, np.ndarray]:
        """The steps' fields as arrays of int64 or float64, one entry a step.

        Args:
            engine: of this replica; None: of all.
        """
        steps = [step for step in self.steps if engine is None or step.engine == engine]
        return {name: np.array([getattr(step, name) for step in steps], dtype=_dtype(name)) for name in _STEP_FIELDS}

    def to_dict(self) -> dict[str, Any]:
        """``{"steps": [...], "requests": [...], "stages": [...]}``, "settings" and "metrics" of an engine, and
        "expert_load" where it is counted; of what JSON knows."""
        return {
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "requests": [
                dataclasses.asdict(request)
                | {
                    "preempted": [list(times) for times in request.preempted],
                    "block_hashes": list(request.block_hashes),
                }
                for request in self.requests
            ],
            "stages": [dataclasses.asdict(record) for record in self.stages],
            **({} if self.settings is None else {"settings": self.settings.to_dict()}),
            **({} if not self.metrics else {"metrics": [to_dict(metric) for metric in self.metrics]}),
            **({} if self.expert_load is None else {"expert_load": self.expert_load.tolist()}),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, for ``jaxllm advise PATH``."""
        Path(path).write_text(json.dumps(self.to_dict()), encoding="utf-8")

    def to_pandas(self) -> pandas.DataFrame:
        """The steps as a table, indexed by step.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas() needs pandas: `pip install pandas`. arrays() has the same columns."
            ) from error

        return pandas.DataFrame(self.arrays()).set_index("step")

    def plot(self) -> Figure:
        """Tokens, sequences, KV cache and time of the steps, as a picture: notebooks show it, `savefig` writes it.

        Raises:
            ImportError: matplotlib is not there.
        """
        with plotting():
            from jaxllm.engine.observe.trace_plot import plot
        return plot(self)

    def save_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write a trace for https://ui.perfetto.dev and chrome://tracing: the host, the device, every request."""
        from jaxllm.engine.observe.chrome_trace import save

        save(self, path)


def _dtype(name: str) -> type:
    return float if name in _FLOATS else int


_FLOATS = {field.name for field in dataclasses.fields(StepRecord) if field.type == "float"}
