"""``jaxllm generate``: complete prompts from the command line or from standard input."""

from __future__ import annotations

import argparse
import json
import sys

from jaxllm.entrypoints.options import build_llm, build_sampling_params
from jaxllm.errors import ValidationError
from jaxllm.outputs import RequestOutput


def run(arguments: argparse.Namespace) -> int:
    """Complete all prompts as one batch; print the texts in the order of the prompts."""
    sampling_params = build_sampling_params(arguments)
    prompts = arguments.prompts or _prompts_from_stdin()
    if not prompts:
        raise ValidationError("There are no prompts: give them as arguments, or on standard input, one a line.")
    with build_llm(arguments) as llm:
        outputs = llm.generate(prompts, sampling_params, use_tqdm=sys.stderr.isatty())
    for output in outputs:
        print(_as_json(output) if arguments.json else _as_text(output, alone=len(outputs) == 1))
    return 0


def _prompts_from_stdin() -> list[str]:
    if sys.stdin.isatty():
        print("Reading prompts from the keyboard, one a line; Ctrl-D ends them.", file=sys.stderr)
    return [line for line in (line.rstrip("\r\n") for line in sys.stdin) if line.strip()]


def _as_text(output: RequestOutput, *, alone: bool) -> str:
    text = output.outputs[0].text
    return text if alone else f"=== {output.prompt}\n{text}\n"


def _as_json(output: RequestOutput) -> str:
    completion = output.outputs[0]
    record = {
        "prompt": output.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": len(completion.token_ids),
    }
    return json.dumps(record, ensure_ascii=False)
