"""``jaxllm run-batch`` runs a file of OpenAI API calls through the engine, and appends results as they finish.

Every line of input gets exactly one line of output, in the order in which the requests finish. A line that is refused
gets an error with status 400 (404 for a model that is not there) and harms no other. ``--resume`` skips the lines that
the output has, refused ones among them (the same call would be refused again; to have some tried again, take their
lines out of the output); lines that were running when the last run ended have none and run again. Lines are known by
their custom_id, and those without one by their number, so the input must not be reordered in between.

Memory does not grow with the input but for the custom_ids, which are remembered in about 16 bytes each.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.command_options import engine_arguments
from jaxllm.engine.interrupt import whole_module
from jaxllm.entrypoints.batch.digests import DigestSet
from jaxllm.entrypoints.batch.journal import DUPLICATE, Journal
from jaxllm.entrypoints.batch.lines import (
    LineError,
    NumberedLine,
    check_place,
    count_lines,
    parse_line,
    read_lines,
    same_file,
)
from jaxllm.entrypoints.batch.rows import read_table
from jaxllm.entrypoints.batch.summary import Tally
from jaxllm.entrypoints.openai.adapters import NamedAdapters, lora_modules
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.parameters import SamplingReader
from jaxllm.entrypoints.openai.reasoning import ReasoningParser
from jaxllm.entrypoints.openai.requests import EMBEDDINGS, Call, Translator
from jaxllm.entrypoints.openai.responses import new_id, response_body
from jaxllm.entrypoints.openai.tools.options import reasoning_parser
from jaxllm.entrypoints.openai.tools.parsers import PARSERS
from jaxllm.entrypoints.tables import SUFFIXES, is_table

if TYPE_CHECKING:
    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.llm import LLM

#: exit status when every line has its result and some of them are errors
SOME_FAILED = 3
#: prompts that are embedded together
_EMBED_TOGETHER = 256


def run(arguments: argparse.Namespace) -> int:
    """Run the batch. The exit status is 0 when all lines succeeded, those of earlier runs included."""
    lines = _open_lines(arguments)
    if same_file(arguments.input_file, arguments.output_file):
        raise ValidationError(f"Input and output are the same file, {arguments.input_file!r}.")
    # what is wrong with the input is found before the output is touched and the model is loaded
    first = next(lines, None)
    with Journal(arguments.output_file, resume=arguments.resume, overwrite=arguments.overwrite) as journal:
        if first is None:
            print(f"run-batch: the input {arguments.input_file!r} is empty: there is nothing to run.", file=sys.stderr)
            return SOME_FAILED if journal.num_failed else 0
        lines = itertools.chain([first], lines)
        if arguments.resume and _nothing_left(arguments, journal):
            print(f"run-batch: all lines have their results in {arguments.output_file!r}.", file=sys.stderr)
            return SOME_FAILED if journal.num_failed else 0
        model, given = engine_arguments(arguments)
        served = given.pop("served_model_name", None) or model
        names = [str(name) for name in (served if isinstance(served, list) else [served])]
        tools, reasoning = arguments.tool_call_parser, reasoning_parser(given)
        modules = lora_modules(arguments.lora_modules)
        if not arguments.ignore_model_field:
            _warn_of_model(first, [*names, *(name for name, _ in modules)])
        with whole_module("jaxllm.llm").LLM(model, **given) as llm:
            total = None if is_table(arguments.input_file) else count_lines(arguments.input_file)
            tally = Tally(total, show=sys.stderr.isatty())
            adapters = NamedAdapters(llm.engine.adapters_or_none, names)
            for name, path in modules:
                adapters.load(name, path)
            translator = Translator(
                adapters=adapters,
                model_names=names,
                any_model=arguments.ignore_model_field,
                sampling=SamplingReader(llm.get_default_sampling_params()),
                tools=PARSERS[tools] if tools else None,
                reasoning=ReasoningParser.of(reasoning, llm.get_tokenizer) if reasoning else None,
            )
            batch = Batch(llm, journal, tally, translator)
            try:
                with tally.told_regularly():
                    batch.run(lines)
            except BaseException:
                tally.close()
                resumable = arguments.output_file != "-"
                kept = "what is finished is kept, --resume goes on" if resumable else "the batch did not finish"
                print(f"run-batch: {tally}; {kept}", file=sys.stderr)
                raise
            tally.close()
    print(f"run-batch: {tally}", file=sys.stderr)
    return SOME_FAILED if tally.failed or journal.num_failed else 0


def _nothing_left(arguments: argparse.Namespace, journal: Journal) -> bool:
    """Whether every line is finished, as far as that can be seen before the input is read for good."""
    if not Path(arguments.input_file).expanduser().is_file():  # a pipe is read once
        return False
    seen = DigestSet()
    for number, line in _open_lines(arguments):
        try:
            custom_id = parse_line(number, line).custom_id
            finished = journal.is_finished(custom_id) if seen.add(custom_id) else journal.is_refused(number)
        except APIError as error:
            finished = isinstance(error, LineError) and journal.is_refused(number)
        if not finished:
            return False
    return True


def _warn_of_model(first: NumberedLine, names: list[str]) -> None:
    """Say before the model is loaded that the first line, and most likely the others, is for another one."""
    try:
        body = parse_line(*first).body
    except APIError:
        return
    model = body.get("model") if isinstance(body, Mapping) else None
    if isinstance(model, str) and model not in names:
        print(
            f"run-batch: line {first[0]} is for the model {model!r}, and this is {', '.join(map(repr, names))}: such "
            f"lines are refused. --served-model-name {model} runs them, and --ignore-model-field whatever their model.",
            file=sys.stderr,
        )


def _open_lines(arguments: argparse.Namespace) -> Iterator[NumberedLine]:
    check_place("The input", arguments.input_file)
    check_place("The output", arguments.output_file)
    if arguments.output_file.lower().endswith(SUFFIXES):
        raise ValidationError(f"The output {arguments.output_file!r} would be JSONL, one result a line: call it so.")
    if is_table(arguments.input_file):
        return read_table(arguments.input_file, arguments)
    for name in ("prompt_column", "messages_column", "id_column", "url", "body"):
        if getattr(arguments, name) is not None:
            raise ValidationError(f"--{name.replace('_', '-')} is for CSV and Parquet input; a JSONL line has its own.")
    return read_lines(arguments.input_file, arguments.encoding)


@dataclasses.dataclass(slots=True)
class _Pending:
    """A line that runs: its prompts' outputs as far as they are there."""

    number: int
    custom_id: str
    call: Call
    outputs: list[Any]
    num_missing: int


class Batch:
    """Takes a batch's lines through an engine.

    Args:
        translator: reads the lines' bodies.
    """

    def __init__(self, llm: LLM, journal: Journal, tally: Tally, translator: Translator):
        self._llm, self._journal, self._tally = llm, journal, tally
        self._translator = translator
        self._seen = DigestSet()
        self._embeds = "embed" in getattr(llm, "supported_tasks", ())

    def run(self, lines: Iterator[NumberedLine]) -> None:
        """Run all lines to their end."""
        pending = (p for number, line in lines if (p := self._admit(number, line)) is not None)
        if self._embeds:
            self._embed(pending)
        else:
            self._generate(pending)

    def _admit(self, number: int, line: Any) -> _Pending | None:
        """Return the line as what has to run; None when it is finished already, or is refused."""
        custom_id: str | None = None
        try:
            request = parse_line(number, line)
            custom_id = request.custom_id
            if not self._seen.add(custom_id):
                raise LineError(number, custom_id, f"custom_id {custom_id!r:.80} was there before", code=DUPLICATE)
            if self._journal.is_finished(custom_id):
                self._tally.skip()
                return None
            call = self._translator.translate(request.url, request.body)
            if (call.url == EMBEDDINGS) != self._embeds:
                raise APIError(f"The model does not support {call.url}.", param="url")
        except APIError as error:
            if isinstance(error, LineError):
                custom_id = error.custom_id
                if error.code is not None and self._journal.is_refused(number):
                    self._tally.skip()
                    return None
            self._refuse(number, custom_id, error)
            return None
        return _Pending(number, custom_id, call, [None] * len(call.prompts), len(call.prompts))

    def _generate(self, lines: Iterator[_Pending]) -> None:
        #: position of a prompt in the call below -> its line, and which of the line's prompts it is
        running: dict[int, tuple[_Pending, int]] = {}
        positions = itertools.count()

        def feed() -> Iterator[tuple[Any, Call]]:
            for line in lines:
                for part, prompt in enumerate(line.call.prompts):
                    running[next(positions)] = line, part
                    yield prompt, line.call

        prompts, params, priorities, adapters = itertools.tee(feed(), 4)
        outputs = self._llm.as_completed(
            (prompt for prompt, _ in prompts),
            cast("Iterator[SamplingParams]", (call.params for _, call in params)),
            priority=(call.priority for _, call in priorities),
            lora_request=(call.lora_request for _, call in adapters),
            on_error="return",
        )
        for output in outputs:
            line, part = running.pop(output.index)
            if any(completion.finish_reason == "abort" for completion in output.outputs):
                # not the request's fault: it has no result, and runs again with --resume
                raise JaxLLMError(f"The engine ended a request: {output.error or 'it was aborted'}.")
            self._take(line, part, output)

    def _embed(self, lines: Iterator[_Pending]) -> None:
        # only an engine that embeds has the method
        llm: Any = self._llm
        parts = ((line, part, prompt) for line in lines for part, prompt in enumerate(line.call.prompts))
        while group := list(itertools.islice(parts, _EMBED_TOGETHER)):
            # what is cut to another length is another call
            for length in dict.fromkeys(_kept(line) for line, _, _ in group):
                same = [part for part in group if _kept(part[0]) == length]
                prompts, params = [prompt for _, _, prompt in same], [line.call.pooling for line, _, _ in same]
                adapters = [line.call.lora_request for line, _, _ in same]
                outputs = llm.embed(
                    prompts, pooling_params=params, lora_request=adapters, on_error="return", use_tqdm=False
                )
                for (line, part, _), output in zip(same, outputs, strict=True):
                    self._take(line, part, output)

    def _take(self, line: _Pending, part: int, output: Any) -> None:
        line.outputs[part] = output
        line.num_missing -= 1
        if line.num_missing:
            return
        try:
            body = response_body(line.call, line.outputs)
        except APIError as error:
            self._refuse(line.number, line.custom_id, error)
            return
        self._write(line.number, line.custom_id, HTTPStatus.OK, body, None)
        self._tally.complete(body["usage"])

    def _refuse(self, number: int, custom_id: str | None, error: APIError) -> None:
        told = {"code": error.code or str(error.status), "message": error.message}
        self._write(number, custom_id, error.status, error.body(), told)
        self._tally.fail()

    def _write(
        self, number: int, custom_id: str | None, status: int, body: dict[str, Any], error: dict[str, Any] | None
    ) -> None:
        response = {"status_code": int(status), "request_id": new_id(), "body": body}
        self._journal.write(number, {"custom_id": custom_id, "response": response, "error": error})


def _kept(line: _Pending) -> int | None:
    """Return how many tokens of its prompts are kept."""
    return line.call.pooling.truncate_prompt_tokens if line.call.pooling else None
