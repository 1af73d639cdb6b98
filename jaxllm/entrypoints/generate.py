"""``jaxllm generate`` completes prompts from the command line, from a file or from standard input."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import CompletionOutput, RequestOutput
from jaxllm.command_options import build_llm, build_sampling_params
from jaxllm.entrypoints.openai.logprobs import chat_logprobs
from jaxllm.entrypoints.prompt_files import read_prompts, read_stdin

#: exit status when some prompts were refused and the others completed
SOME_FAILED = 3


def run(arguments: argparse.Namespace) -> int:
    """Complete all prompts as one batch; print each text as soon as it and those of the prompts before it are there."""
    sampling_params = build_sampling_params(arguments)
    prompts = _prompts(arguments)
    beginning = list(itertools.islice(prompts, 2))
    if not beginning:
        if arguments.input_file:
            raise ValidationError(f"The input {arguments.input_file!r} is empty: there are no prompts in it.")
        raise ValidationError(
            "There are no prompts: give them as arguments, with --input-file, or on standard input, one a line."
        )
    prompts = itertools.chain(beginning, prompts)
    # a bar and texts on one terminal would overwrite each other
    shows_bar = sys.stderr.isatty() and not sys.stdout.isatty()
    num_refused = 0
    with build_llm(arguments) as llm:
        outputs = llm.as_completed(prompts, sampling_params, on_error="return", use_tqdm=shows_bar)
        for output in in_order(outputs):
            if output.error is not None:
                num_refused += 1
                print(f"jaxllm: error: prompt {output.index + 1}: {output.error}", file=sys.stderr)
            if arguments.json:
                print(_as_json(output), flush=True)
            elif output.error is None:
                print(_as_text(output, alone=len(beginning) == 1), flush=True)
    return SOME_FAILED if num_refused else 0


def in_order(outputs: Iterable[RequestOutput]) -> Iterator[RequestOutput]:
    """Return outputs by their index, each as soon as all before it have come."""
    waiting: dict[int, RequestOutput] = {}
    turn = 0
    for output in outputs:
        waiting[output.index] = output
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1


def _prompts(arguments: argparse.Namespace) -> Iterator[Any]:
    if arguments.prompt_column and not arguments.input_file:
        raise ValidationError("--prompt-column is for --input-file with a CSV or Parquet file.")
    if arguments.encoding and not arguments.input_file:
        raise ValidationError("--encoding is for --input-file.")
    if arguments.input_file:
        if arguments.prompts:
            raise ValidationError("Give prompts as arguments or with --input-file, not both.")
        return read_prompts(arguments.input_file, arguments.prompt_column, arguments.encoding)
    return read_stdin() if arguments.prompts in ([], ["-"]) else iter(arguments.prompts)


def _as_text(output: RequestOutput, *, alone: bool) -> str:
    texts = [_with_logprobs(completion) for completion in output.outputs]
    if len(texts) > 1:
        texts = [f"--- {number}\n{text}" for number, text in enumerate(texts, start=1)]
    text = "\n".join(texts)
    return text if alone else f"=== {output.prompt}\n{text}\n"


def _with_logprobs(completion: CompletionOutput) -> str:
    """The text, and below it a line a token where log-probabilities were asked for: its own, then the likeliest."""
    lines = [completion.text]
    for token_id, position in zip(completion.token_ids, completion.logprobs or (), strict=False):
        likeliest = sorted((entry for entry in position.values() if entry.rank), key=lambda entry: entry.rank or 0)
        shown = (f"{entry.decoded_token!r} {entry.logprob:.3f}" for entry in likeliest)
        own = position[token_id]
        lines.append(f"{own.logprob:9.3f}  {own.decoded_token!r:<16} of {', '.join(shown)}")
    return "\n".join(lines)


def _as_json(output: RequestOutput) -> str:
    completions = [_completion(completion) for completion in output.outputs]
    # one completion is the prompt's own; several are told apart
    told = completions[0] if len(completions) == 1 else {"outputs": completions}
    record = {"prompt": output.prompt, **told}
    record["prompt_tokens"] = len(output.prompt_token_ids)
    record["output_tokens"] = sum(len(completion.token_ids) for completion in output.outputs)
    if output.error is not None:
        record["error"] = output.error
    return json.dumps(record, ensure_ascii=False)


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {"text": completion.text, "finish_reason": completion.finish_reason}
    if completion.logprobs is not None:
        # -1: what was asked for is there, whatever its number
        record["logprobs"] = chat_logprobs(completion.token_ids, completion.logprobs, -1, as_ids=False)
    return record
