"""jaxllm and its peers run the same requests in turns: only one computes at a time, and all meet the same machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxllm.bench import report
from jaxllm.bench.datasets import BenchRequest
from jaxllm.bench.engine_process import EngineProcess
from jaxllm.bench.measurements import Samples, turns
from jaxllm.bench.peer_setup import OWN, PeerSetup

#: processor time that an engine may use while it is not its turn: of the turn, and in any case
_IDLE_SHARE, _IDLE_SECONDS = 0.05, 0.1
#: what the table shows; other rates have the same ratios
_SHOWN = ("prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s")


class Comparison:
    """The engines of a comparison, and what they took.

    Args:
        cases: sets of requests; each is measured on its own.
    """

    def __init__(self, arguments: argparse.Namespace, cases: list[list[BenchRequest]]):
        self._arguments = arguments
        self._setup = PeerSetup(arguments)
        self._cases = cases
        self.names = self._setup.names
        self.samples = [{name: Samples.of(case) for name in self.names} for case in cases]
        self.facts: dict[str, dict[str, Any]] = {}
        self.peak_rss_bytes = dict.fromkeys(self.names, 0)
        #: by case and engine, the first token of each request
        self._first_tokens: list[dict[str, list[int]]] = [{} for _ in cases]

    def run(self) -> None:
        """Measure. Raises `JaxLLMError` when an engine fails."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-bench-")))
            engines: dict[str, EngineProcess] = {}
            if not self._arguments.include_startup:
                for name in self.names:
                    engines[name] = stack.enter_context(contextlib.closing(self._setup.start(name)))
                    self._load(engines[name])
            for index, case in enumerate(self._cases):
                file = folder / f"{index}.json"
                file.write_text(json.dumps([[request.prompt_token_ids, request.output_len] for request in case]))
                for turn in turns(self._arguments):
                    for name in self.names:
                        if engines:
                            self._turn(turn, index, str(file), engines, name)
                        else:
                            self._turn_from_start(turn, index, str(file), name)

    def _turn(self, turn: int, index: int, file: str, engines: dict[str, EngineProcess], name: str) -> None:
        """Measure an engine that is loaded, while the others have nothing to do."""
        before = {other: process.cpu_seconds() for other, process in engines.items() if other != name}
        prefill = None if self._arguments.no_phases else self._round(engines[name], file, index, 1)
        seconds = self._round(engines[name], file, index, None)
        self.samples[index][name].add(turn, seconds, prefill)
        _say(f"{_round_name(turn)}, {len(self._cases[index])} requests, {name}: {seconds:.2f} s")
        for other, then in before.items():
            used = engines[other].cpu_seconds() - then
            if used > max(_IDLE_SECONDS, _IDLE_SHARE * (seconds + (prefill or 0))):
                _say(f"warning: {other} used {used:.2f} s of processor time in another's turn")

    def _turn_from_start(self, turn: int, index: int, file: str, name: str) -> None:
        began = time.perf_counter()
        with contextlib.closing(self._setup.start(name)) as engine:
            self._load(engine)
            loaded = time.perf_counter() - began
            self._round(engine, file, index, None)
            seconds = time.perf_counter() - began
        self.samples[index][name].add(turn, seconds)
        _say(f"{_round_name(turn)}, {name}: {seconds:.2f} s, {loaded:.2f} s of it until it is loaded")

    def _load(self, engine: EngineProcess) -> None:
        longest = max(len(request.prompt_token_ids) + request.output_len for case in self._cases for request in case)
        _say(f"{engine.name}: loading")
        # jaxllm is the first of the engines, and its limits are those of all
        message = self._setup.load_message(engine.name, self.facts.get(OWN, {}), longest)
        reply = engine.ask({**message, "includes_startup": self._arguments.include_startup})
        self.facts[engine.name] = reply["facts"]

    def _round(self, engine: EngineProcess, file: str, index: int, output_len: int | None) -> float:
        reply = engine.ask({"op": "round", "requests": file, "output_len": output_len})
        self.peak_rss_bytes[engine.name] = max(self.peak_rss_bytes[engine.name], reply["peak_rss_bytes"])
        self._first_tokens[index][engine.name] = reply["first_tokens"]
        return reply["seconds"]

    # Results.

    def table(self) -> str:
        """Return medians of each engine, and in brackets jaxllm's ratio to it: above 1, jaxllm is faster."""
        shown = {name: name.replace("_per_s", "/s").replace("_", " ") for name in _SHOWN}
        if self._arguments.include_startup:
            shown = {"seconds": "seconds, start included"}
        rows = [["requests", "median", *self.names]]
        for index, samples in enumerate(self.samples):
            medians = {name: samples[name].medians() for name in self.names}
            count, ratios = str(len(self._cases[index])), self._ratios(index)
            for key, label in shown.items():
                if all(key in found for found in medians.values()):
                    others = [f"{medians[name][key]:.1f} ({ratios[name][key]:.2f}x)" for name in self.names[1:]]
                    rows.append([count, label, f"{medians[OWN][key]:.1f}", *others])
            same = [f"{self._agreement(index, name):.0%}" for name in self.names[1:]]
            rows.append([count, "same first tokens", "", *same])
        rows.append(["", "peak RSS, MB", *(f"{self.peak_rss_bytes[name] / 1e6:.0f}" for name in self.names)])
        return report.table(rows)

    def record(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        return {
            "dtype": self._setup.dtype,
            "threads": self._setup.threads,
            "engines": self.facts,
            "engine_peak_rss_bytes": self.peak_rss_bytes,
            "cases": [
                {
                    "engines": {name: found.record() for name, found in samples.items()},
                    "ratios": self._ratios(index),
                    "same_first_tokens": {name: self._agreement(index, name) for name in self.names[1:]},
                }
                for index, samples in enumerate(self.samples)
            ],
        }

    def _ratios(self, index: int) -> dict[str, dict[str, float]]:
        """For each peer, how many times as fast jaxllm is, by each median that both have."""
        medians = {name: found.medians() for name, found in self.samples[index].items()}
        own = medians.pop(OWN)
        return {
            name: {
                key: found[key] / own[key] if key == "seconds" else own[key] / found[key] for key in own.keys() & found
            }
            for name, found in medians.items()
        }

    def _agreement(self, index: int, name: str) -> float:
        """Return the share of a case's requests whose first token is the same as jaxllm's."""
        own, other = self._first_tokens[index][OWN], self._first_tokens[index][name]
        return sum(a == b for a, b in zip(own, other, strict=True)) / len(own)


def _round_name(turn: int) -> str:
    return f"round {turn + 1}" if turn >= 0 else "warm-up"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
