"""jaxllm and its peers over the same requests, in turns: only one computes at a time, and all meet the same weather."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxllm.bench.engine_process import EngineProcess
from jaxllm.bench.peer_setup import OWN, PeerSetup
from jaxllm.bench.rates import Samples, Sizes
from jaxllm.bench.requests import BenchRequest

#: processor time that an engine may use while it is not its turn: of the turn, and in any case
_IDLE_SHARE, _IDLE_SECONDS = 0.05, 0.1
#: other rates have the same ratios
_SHOWN = {
    "prefill_tokens_per_s": "prefill tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "output_tokens_per_s": "output tokens/s",
}


class Comparison:
    """Engines and what they took.

    Args:
        cases: sets of requests; each is measured on its own.
    """

    def __init__(self, arguments: argparse.Namespace, cases: list[list[BenchRequest]]):
        self._arguments = arguments
        self._setup = PeerSetup(arguments)
        self._cases = cases
        self.names = self._setup.names
        self.samples = [{name: Samples(sizes=Sizes.of(case)) for name in self.names} for case in cases]
        self.facts: dict[str, dict[str, Any]] = {}
        self.peak_rss_bytes: dict[str, int] = {}
        #: by case and engine, the first token of each request
        self._first_tokens: list[dict[str, list[int]]] = [{} for _ in cases]
        self._limits: dict[str, Any] = {}

    def run(self) -> None:
        """Measure. Raises `JaxLLMError` when an engine fails."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-bench-")))
            files = []
            for index, case in enumerate(self._cases):
                files.append(str(folder / f"{index}.json"))
                Path(files[-1]).write_text(
                    json.dumps([[request.prompt_token_ids, request.output_len] for request in case])
                )
            if self._arguments.include_startup:
                self._with_startup(files)
            else:
                self._loaded(files, stack)

    def _loaded(self, files: list[str], stack: contextlib.ExitStack) -> None:
        engines = {}
        for name in self.names:
            engines[name] = self._setup.start(name)
            stack.callback(engines[name].close)
            self._load(engines[name])
        for index, file in enumerate(files):
            for turn in range(-self._arguments.num_iters_warmup, self._arguments.num_iters):
                for name, engine in engines.items():
                    idle = {other: process.cpu_seconds() for other, process in engines.items() if other != name}
                    prefill = None if self._arguments.no_phases else self._round(engine, file, 1)["seconds"]
                    reply = self._round(engine, file, None)
                    self._first_tokens[index][name] = reply["first_tokens"]
                    if turn >= 0:
                        samples = self.samples[index][name]
                        samples.seconds.append(reply["seconds"])
                        samples.prefill_seconds += [] if prefill is None else [prefill]
                    _say(f"{_turn(turn)}, {len(self._cases[index])} requests, {name}: {reply['seconds']:.2f} s")
                    for other, before in idle.items():
                        used = engines[other].cpu_seconds() - before
                        if used > max(_IDLE_SECONDS, _IDLE_SHARE * (reply["seconds"] + (prefill or 0))):
                            _say(f"warning: {other} used {used:.2f} s of processor time in another's turn")

    def _with_startup(self, files: list[str]) -> None:
        for index, file in enumerate(files):
            for turn in range(-self._arguments.num_iters_warmup, self._arguments.num_iters):
                for name in self.names:
                    began = time.perf_counter()
                    engine = self._setup.start(name)
                    with contextlib.closing(engine):
                        loaded = self._load(engine)
                        self._first_tokens[index][name] = self._round(engine, file, None)["first_tokens"]
                        seconds = time.perf_counter() - began
                    if turn >= 0:
                        self.samples[index][name].seconds.append(seconds)
                    _say(f"{_turn(turn)}, {name}: {seconds:.2f} s, {loaded - began:.2f} s of it until it is loaded")

    def _load(self, engine: EngineProcess) -> float:
        """Load an engine and return the time at which that was done."""
        longest = max(len(request.prompt_token_ids) + request.output_len for case in self._cases for request in case)
        _say(f"{engine.name}: loading")
        reply = engine.ask(self._setup.load_message(engine.name, self._limits, longest))
        if engine.name == OWN:
            self._limits = reply["facts"]
        self.facts[engine.name] = reply["facts"]
        return time.perf_counter()

    def _round(self, engine: EngineProcess, file: str, output_len: int | None) -> dict[str, Any]:
        reply = engine.ask({"op": "round", "requests": file, "output_len": output_len})
        before = self.peak_rss_bytes.get(engine.name, 0)
        self.peak_rss_bytes[engine.name] = max(before, reply["peak_rss_bytes"])
        return reply

    # Results.

    def agreement(self, index: int, name: str) -> float:
        """Share of a case's requests whose first token is the same as jaxllm's."""
        own, other = self._first_tokens[index][OWN], self._first_tokens[index][name]
        return sum(a == b for a, b in zip(own, other, strict=True)) / len(own)

    def table(self) -> str:
        """Medians of each engine, and in brackets jaxllm's ratio to it: above 1, jaxllm is faster."""
        head = ["requests", "median", *self.names]
        rows = []
        for index, samples in enumerate(self.samples):
            medians = {name: samples[name].medians() for name in self.names}
            measures = {"seconds": "seconds, start included"} if self._arguments.include_startup else _SHOWN
            for key, label in measures.items():
                if any(key not in medians[name] for name in self.names):
                    continue
                own = medians[OWN][key]
                cells = [f"{own:.1f}"]
                for name in self.names[1:]:
                    other = medians[name][key]
                    cells.append(f"{other:.1f} ({other / own if key == 'seconds' else own / other:.2f}x)")
                rows.append([str(len(self._cases[index])), label, *cells])
            same = [f"{self.agreement(index, name):.0%}" for name in self.names[1:]]
            rows.append([str(len(self._cases[index])), "same first tokens", "", *same])
        rows.append(["", "peak RSS, MB", *(f"{self.peak_rss_bytes[name] / 1e6:.0f}" for name in self.names)])
        return _aligned([head, *rows])

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        cases = []
        for index, samples in enumerate(self.samples):
            medians = {name: samples[name].medians() for name in self.names}
            cases.append(
                {
                    "engines": {name: samples[name].record() for name in self.names},
                    "ratios": {
                        name: {
                            key: medians[name][key] / value if key == "seconds" else value / medians[name][key]
                            for key, value in medians[OWN].items()
                            if key in medians[name]
                        }
                        for name in self.names[1:]
                    },
                    "same_first_tokens": {name: self.agreement(index, name) for name in self.names[1:]},
                }
            )
        return {
            "dtype": self._setup.dtype,
            "threads": self._setup.threads,
            "engines": self.facts,
            "engine_peak_rss_bytes": self.peak_rss_bytes,
            "cases": cases,
        }


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _turn(turn: int) -> str:
    return f"round {turn + 1}" if turn >= 0 else "warm-up"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
