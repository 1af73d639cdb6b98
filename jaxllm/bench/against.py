"""Engines of one process with different arguments run the same requests in turns."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench.measurements import Samples, turns
from jaxllm.bench.peers.protocol import Request, timed_round
from jaxllm.bench.report import table
from jaxllm.bench.session import JaxLLMSession
from jaxllm.command_options import engine_arguments
from jaxllm.config.engine_args import engine_args
from jaxllm.llm import LLM

#: the engine that the command line describes
GIVEN = "as given"
#: axes of the mesh, whose product is how many devices an engine has
_AXES = ("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size")


class Variants:
    """The engine that the command line describes, those of ``--against``, and what they took.

    All are loaded at once, each with a KV cache of its own, so ``--kv-cache-memory-bytes`` has to leave room for them.
    Seconds of the processor are beside those of the clock, since other programs disturb them less.

    Args:
        cases: sets of requests, each measured on its own.
        samples: of each case, by engine.
    """

    def __init__(self, arguments: argparse.Namespace, cases: list[list[Request]], samples: list[dict[str, Samples]]):
        self._arguments, self._cases, self.samples = arguments, cases, samples
        self.processor_seconds: list[dict[str, list[float]]] = [{name: [] for name in each} for each in samples]
        self.facts: dict[str, dict[str, Any]] = {}

    @staticmethod
    def names(arguments: argparse.Namespace) -> list[str]:
        """What the engines are called, the one that the command line describes first. Raises ValidationError for two of
        the same arguments, and for one without any.
        """
        found = [", ".join(f"{name}={value}" for name, value in each.items()) for each in arguments.against]
        if "" in found or len(set(found)) < len(found):
            raise ValidationError(f"--against {found}: give each engine arguments of its own, and none of them twice.")
        return [GIVEN, *found]

    def run(self) -> None:
        """Measure. Raises `JaxLLMError` for arguments that are refused, and requests that do not fit."""
        model, given = engine_arguments(self._arguments)
        asked = dict(zip(self.names(self._arguments), [{}, *self._arguments.against], strict=True))
        merged = {name: {**given, **changes} for name, changes in asked.items()}
        models = {name: each.pop("model", model) for name, each in merged.items()}
        for name, each in merged.items():  # before the first of them takes its time to start
            try:
                engine_args(models[name], **each)
            except TypeError as error:  # an argument that does not exist
                raise ValidationError(f"--against {name}: {error}") from None
        with contextlib.ExitStack() as stack:
            sessions: dict[str, JaxLLMSession] = {}
            # A CPU becomes as many devices as the first engine asks for.
            for name in sorted(merged, key=lambda name: -_devices(merged[name])):
                llm = stack.enter_context(LLM(models[name], **merged[name]))
                sessions[name] = JaxLLMSession(llm, detokenize=not self._arguments.disable_detokenize)
                self.facts[name] = sessions[name].facts
                for case in self._cases:
                    sessions[name].check(case)
            for index, case in enumerate(self._cases):
                for turn in turns(self._arguments):
                    for name in asked:
                        self._round(sessions[name], index, name, case, turn)

    def _round(self, session: JaxLLMSession, index: int, name: str, case: list[Request], turn: int) -> None:
        prefill = None
        if not self._arguments.no_phases:
            prefill = timed_round(session, [(ids, 1) for ids, _ in case])["seconds"]
        busy = time.process_time()
        seconds = timed_round(session, case)["seconds"]
        self.samples[index][name].add(turn, seconds, prefill)
        if turn >= 0:
            self.processor_seconds[index][name].append(time.process_time() - busy)

    def table(self) -> str:
        """Medians of each engine, and in brackets how many times as fast it is as the one as given."""
        names = list(self.samples[0])
        rows = [["requests", "median", *names]]
        for case, samples, busy in zip(self._cases, self.samples, self.processor_seconds, strict=True):
            medians = {name: samples[name].medians() for name in names}
            for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s"):
                if all(key in found for found in medians.values()):
                    rates = [medians[name][key] for name in names]
                    shown = [f"{rate:.1f} ({rate / rates[0]:.2f}x)" for rate in rates[1:]]
                    label = key.replace("_per_s", "/s").replace("_", " ")
                    rows.append([str(len(case)), label, f"{rates[0]:.1f}", *shown])
            used = [statistics.median(busy[name]) for name in names]
            shown = [f"{seconds:.2f} ({used[0] / seconds:.2f}x)" for seconds in used[1:]]
            rows.append([str(len(case)), "processor seconds", f"{used[0]:.2f}", *shown])
        return table(rows)

    def record(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        cases = [
            {name: {**found.record(), "processor_seconds": busy[name]} for name, found in samples.items()}
            for samples, busy in zip(self.samples, self.processor_seconds, strict=True)
        ]
        return {"engines": self.facts, "cases": cases}


def _devices(arguments: dict[str, Any]) -> int:
    found = 1
    for axis in _AXES:
        found *= int(arguments.get(axis, 1))
    return found
