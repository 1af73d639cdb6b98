"""What the stages found, with every measurement beside its ceiling and its target; as JSON and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu_check.records import HAS_GPU
from gpu_check.stages import STAGES, Stage

#: transformers' tokens per second, times this, is what jaxllm should reach
THROUGHPUT_TARGET = 5.0
_BANNER = "REHEARSAL on a CPU with tiny shapes: no number below says anything about a GPU."
_KINDS = {"bytes": ("copy", 1e9, "GB/s"), "flops": ("matmul", 1e12, "TFLOP/s")}


class Report:
    """The results so far.

    Args:
        facts: of the run itself: date, commit, arguments.
    """

    def __init__(self, facts: Mapping[str, Any], *, rehearsal: bool):
        self._facts, self._rehearsal = dict(facts), rehearsal
        self._stages: dict[str, dict[str, Any]] = {}
        self._ceilings: dict[str, float] = {}

    def add(self, stage: Stage, result: dict[str, Any]) -> None:
        """Take over a stage's result, judged by the ceilings known so far."""
        for record in result["records"]:
            if record["kind"] == "measurement":
                self._judge(record)
        _judge_throughput([r for r in result["records"] if r["kind"] == "throughput"], self._rehearsal)
        self._stages[stage.name] = {"title": stage.title, "is_correctness": stage.is_correctness, **result}

    def _judge(self, record: dict[str, Any]) -> None:
        for quantity, (name, _, _) in _KINDS.items():
            rate = record[quantity] / record["seconds"] if record[quantity] else None
            record[f"{quantity}_per_second"] = rate
            if rate and record["operation"] == f"ceiling: {name}":
                self._ceilings[name] = max(self._ceilings.get(name, 0.0), rate)
        quantity = {name: quantity for quantity, (name, _, _) in _KINDS.items()}.get(record["bound"])
        ceiling = self._ceilings.get(record["bound"] or "")
        record["ratio"] = record["passed"] = None
        # a CPU's ratio would look like a result
        if quantity and ceiling and not self._rehearsal:
            record["ratio"] = record[f"{quantity}_per_second"] / ceiling
            if record["target"] is not None:
                record["passed"] = record["ratio"] >= record["target"]

    @property
    def is_correct(self) -> bool:
        """Whether every stage about correctness that was asked for has passed."""
        return all(stage["status"] == "passed" for stage in self._stages.values() if stage["is_correctness"])

    @property
    def has_no_gpu(self) -> bool:
        """Whether a stage has found that out."""
        found = [record for stage in self._stages.values() for record in stage["records"]]
        return any(record["kind"] == "check" and record["name"] == HAS_GPU and not record["passed"] for record in found)

    @property
    def missed(self) -> list[str]:
        """Targets that were not reached, and stages that did not get that far."""
        found = [f"{name}: {stage['status']}" for name, stage in self._stages.items() if stage["status"] != "passed"]
        for stage in self._stages.values():
            for record in stage["records"]:
                if record["kind"] != "check" and record.get("passed") is False:
                    what = record.get("label") or record["system"]
                    found.append(f"{record.get('operation', 'throughput')} {what}: {record['ratio']:.2f}")
        return found

    def document(self) -> dict[str, Any]:
        return {
            "what": "jaxllm gpu-check" + (" REHEARSAL (on a CPU; not a GPU result)" if self._rehearsal else ""),
            "rehearsal": self._rehearsal,
            **self._facts,
            "is_correct": self.is_correct,
            "missed": self.missed,
            "ceilings": {} if self._rehearsal else self._ceilings,
            "stages": self._stages,
        }

    def write(self, path: Path) -> None:
        """Replace the file as a whole: whoever is interrupted leaves the last complete one."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.document(), indent=1) + "\n")
        os.replace(partial, path)

    def table(self) -> str:
        lines = [_BANNER, ""] if self._rehearsal else []
        for stage in STAGES:
            if stage.name in self._stages:
                lines += _stage_lines(stage.title, self._stages[stage.name])
        verdict = "correct" if self.is_correct else "NOT CORRECT"
        lines.append(f"{'rehearsal: ' if self._rehearsal else ''}{verdict}; {len(self.missed)} missed")
        lines += [f"  {missed}" for missed in self.missed]
        if self._rehearsal:
            lines += ["", _BANNER]
        return "\n".join(lines)


def _judge_throughput(found: list[dict[str, Any]], rehearsal: bool) -> None:
    """Beside each other engine: how many times faster jaxllm is."""
    ours = max((record["tokens_per_second"] for record in found if record["system"] == "jaxllm"), default=None)
    for record in found:
        record["ratio"] = record["target"] = record["passed"] = None
        if ours and record["system"] != "jaxllm" and not rehearsal:
            record["ratio"], record["target"] = ours / record["tokens_per_second"], THROUGHPUT_TARGET
            record["passed"] = record["ratio"] >= record["target"]


def _stage_lines(title: str, stage: Mapping[str, Any]) -> Iterable[str]:
    yield f"{title}: {stage['status']} ({stage['seconds']:.0f} s)"
    for record in stage["records"]:
        if record["kind"] == "check":
            detail = f" ({record['detail']})" if record["detail"] else ""
            yield f"  {'ok  ' if record['passed'] else 'FAIL'} {record['name']}{detail}"
        elif record["kind"] == "measurement":
            yield f"  {record['operation']:24} {record['label']:44} {_numbers(record)}"
        elif record["kind"] == "throughput":
            shown = f"{record['tokens_per_second']:12,.0f} tokens/s"
            if record["ratio"] is not None:
                shown += f"  jaxllm is {record['ratio']:.2f} times as fast{_verdict(record)}"
            yield f"  {record['system']:69} {shown}"
    yield from (f"  | {line}" for line in stage.get("output", ()))
    yield ""


def _numbers(record: Mapping[str, Any]) -> str:
    shown = f"{record['seconds'] * 1e6:12,.1f} us"
    for quantity, (name, unit, text) in _KINDS.items():
        rate = record[f"{quantity}_per_second"]
        if rate and record["bound"] in (None, name):
            shown += f" {rate / unit:10,.1f} {text}"
    if record["ratio"] is not None:
        shown += f"  {record['ratio']:6.1%} of {record['bound']}{_verdict(record)}"
    if "host_seconds" in record:
        shown += f"  host {record['host_seconds'] * 1e6:,.0f} us"
    if "sampler_share" in record:
        shown += f", sampler {record['sampler_share']:.1%}"
    return shown


def _verdict(record: Mapping[str, Any]) -> str:
    if record["passed"] is None:
        return ""
    return f"  (target {record['target']:g}: {'reached' if record['passed'] else 'MISSED'})"
