"""``jaxllm chat`` holds a conversation in the terminal, and shows answers as they are generated."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.command_options import build_llm, build_sampling_params

if TYPE_CHECKING:
    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.llm import LLM

Message = dict[str, str]

_HELP = "/exit ends, /clear forgets the conversation, Ctrl-C stops an answer."


def run(arguments: argparse.Namespace) -> int:
    """Read what the user says, line by line, and answer, until ``/exit`` or the end of the input."""
    sampling_params = build_sampling_params(arguments)
    beginning: list[Message] = []
    if arguments.system_prompt:
        beginning.append({"role": "system", "content": arguments.system_prompt})
    # One conversation is one request, so one row is all that has to be compiled.
    with build_llm(arguments, max_num_seqs=1) as llm:
        _converse(llm, sampling_params, beginning)
    return 0


def _converse(llm: LLM, sampling_params: SamplingParams, beginning: list[Message]) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives input() editing and history
        print(_HELP)
    messages = list(beginning)
    while True:
        try:
            said = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}")
            continue
        if said == "/exit":
            return
        if said == "/clear":
            messages = list(beginning)
        elif said.startswith("/"):
            print(_HELP)
        elif said:
            question = {"role": "user", "content": said}
            answer = _answer(llm, [*messages, question], sampling_params)
            if answer:
                messages += [question, {"role": "assistant", "content": answer}]


def _answer(llm: LLM, messages: list[Message], sampling_params: SamplingParams) -> str:
    """Print the answer as it comes; return what came, which an interruption may have cut short."""
    pieces: list[str] = []
    try:
        with contextlib.closing(llm.stream_chat(messages, sampling_params)) as stream:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except ValidationError as error:
        print(f"{error} (/clear forgets the conversation so far)", file=sys.stderr)
        return ""
    return "".join(pieces)
