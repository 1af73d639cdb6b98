"""``jaxllm demo`` asks a real model a batch of questions, and sums up how it went."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxllm.command_options import build_llm, build_sampling_params, engine_arguments

if TYPE_CHECKING:
    from jaxllm.api.outputs import CompletionOutput, RequestOutput
    from jaxllm.llm import LLM

#: the same for all, and longer than a block, so that the prefix cache has something to find
SYSTEM_PROMPT = (
    "You are a friendly and careful assistant. You answer in at most three short sentences, in plain English, and you "
    "say so when you do not know something. You never make up numbers, names or quotations."
)

QUESTIONS = (
    "What is the capital of France, and which river runs through it?",
    "Explain what a prime number is to a ten-year-old.",
    "Write a haiku about the sea in winter.",
    "What is 17 + 25?",
    "Translate into Spanish: 'Where is the nearest train station?'",
    "Give me three names for a small black cat.",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "What should I pack for a weekend of hiking?",
    "Summarise in one sentence: Photosynthesis is the process by which green plants turn light, water and carbon "
    "dioxide into sugar and oxygen.",
    "What is the difference between a virus and a bacterium?",
    "Who wrote 'Pride and Prejudice'?",
    "Suggest a simple dinner with rice, eggs and spinach.",
    "Is the sentence 'She don't like apples' correct? If not, correct it.",
    "How does a bicycle stay upright when it is moving?",
    "Name the planets of the solar system in order from the sun.",
    "Tell me a short joke about computers.",
    "What does the word 'serendipity' mean?",
    "How many minutes are there in a day?",
    "Write a polite email asking a neighbour to turn the music down.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a batch amounted to. Rates are tokens per second over the whole batch; latencies are seconds."""

    requests: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    mean_ttft: float
    max_ttft: float
    preemptions: int

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput], seconds: float) -> Summary:
        """Sum up `outputs` (at least one), which took `seconds` together."""
        latencies = [output.metrics.first_token_latency for output in outputs]
        return cls(
            requests=len(outputs),
            seconds=seconds,
            prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
            cached_tokens=sum(output.num_cached_tokens for output in outputs),
            output_tokens=sum(len(completion.token_ids) for output in outputs for completion in output.outputs),
            mean_ttft=sum(latencies) / len(latencies),
            max_ttft=max(latencies),
            preemptions=sum(output.metrics.num_preemptions for output in outputs),
        )

    def __str__(self) -> str:
        rows = (
            ("Requests", f"{self.requests} in {self.seconds:.2f} s"),
            ("Prompt tokens", f"{self.prompt_tokens} ({self.prompt_tokens / self.seconds:.1f} tokens/s)"),
            ("Output tokens", f"{self.output_tokens} ({self.output_tokens / self.seconds:.1f} tokens/s)"),
            ("Time to first token", f"mean {self.mean_ttft * 1e3:.0f} ms, longest {self.max_ttft * 1e3:.0f} ms"),
            ("Prefix cache hits", f"{self.cached_tokens} tokens ({self.cached_tokens / self.prompt_tokens:.1%})"),
            ("Preemptions", f"{self.preemptions}"),
        )
        return _table(rows)


def run(arguments: argparse.Namespace) -> int:
    """Answer `QUESTIONS` as one batch; print the answers, then the summary."""
    sampling_params = build_sampling_params(arguments)
    conversations = [
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}] for question in QUESTIONS
    ]
    with build_llm(arguments) as llm:
        start = time.perf_counter()
        outputs = llm.chat(conversations, sampling_params, use_tqdm=True)
        seconds = time.perf_counter() - start
        for question, output in zip(QUESTIONS, outputs, strict=True):
            print(_exchange(question, output))
        _print_summary(llm, Summary.of(outputs, seconds), str(engine_arguments(arguments)[0]))
    return 0


def _exchange(question: str, output: RequestOutput) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    asked = textwrap.fill(question, width, initial_indent="> ", subsequent_indent="  ")
    answers = (_indented(completion, width) for completion in output.outputs)
    return "\n".join([f"\n{_bold(asked)}", *answers])


def _indented(completion: CompletionOutput, width: int) -> str:
    mark = " ..." if completion.finish_reason == "length" else ""
    lines = (completion.text.strip() + mark).splitlines()
    return "\n".join(
        textwrap.fill(line, width, initial_indent="    ", subsequent_indent="    ", replace_whitespace=False)
        for line in lines
    )


def _print_summary(llm: LLM, summary: Summary, model: str) -> None:
    phases = llm.startup_times
    start = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
    print(f"\n{_bold('Summary')}: {model}")
    print(summary)
    print(_table((("Start", f"{sum(phases.values()):.1f} s ({start})"),)))
    print(f"\n{llm.memory_plan}")


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"  {name + ':':<21} {value}" for name, value in rows)


def _bold(text: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[1m{text}\033[0m"
