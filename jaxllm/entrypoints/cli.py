"""The command ``jaxllm``. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

import jaxllm
from jaxllm.api.errors import JaxLLMError
from jaxllm.bench.options import add_benchmarks
from jaxllm.command_options import add_engine_options, add_sampling_options
from jaxllm.config.command_line import with_hyphens
from jaxllm.entrypoints.batch.options import add_batch_options
from jaxllm.entrypoints.plan import add_plan_options
from jaxllm.runner.compile.workers import leave_if_held_up


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit status."""
    parser = build_parser()
    arguments = parser.parse_args(with_hyphens(sys.argv[1:] if argv is None else argv))
    try:
        return arguments.run(arguments)
    except JaxLLMError as error:
        print(f"jaxllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxllm: interrupted", file=sys.stderr)
        if argv is None:
            leave_if_held_up(130)
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough; the interpreter's last flush must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets ``run``, a function from the parsed arguments to the exit status."""
    parser = argparse.ArgumentParser(prog="jaxllm", description="An LLM inference engine compiled by XLA.")
    parser.add_argument("--version", action="version", version=f"jaxllm {jaxllm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    fetch = commands.add_parser("fetch", allow_abbrev=False, help="bring named models onto this machine")
    fetch.add_argument("names", nargs="+", metavar="NAME", help="a named model, such as smollm2-135m-instruct")
    fetch.set_defaults(run=_fetch)

    generate = commands.add_parser("generate", allow_abbrev=False, help="complete prompts")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="-, or none: standard input, one prompt a line")
    generate.add_argument(
        "--input-file", metavar="FILE", help="prompts: .csv, .parquet, .jsonl, or a text file with one a line"
    )
    generate.add_argument("--prompt-column", metavar="NAME", help="of a CSV or Parquet file (default: prompt)")
    generate.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    add_engine_options(generate)
    add_sampling_options(generate, max_tokens=128, temperature=0.0)
    generate.set_defaults(run=_lazily("jaxllm.entrypoints.generate"))

    batch = commands.add_parser("run-batch", allow_abbrev=False, help="run a file of OpenAI API calls; resumable")
    add_batch_options(batch)
    add_engine_options(batch)
    batch.set_defaults(run=_lazily("jaxllm.entrypoints.batch.run"))

    chat = commands.add_parser(
        "chat", allow_abbrev=False, help="talk to a model; answers are shown as they are generated"
    )
    chat.add_argument("--system-prompt", metavar="TEXT", help="what the model is told before the conversation")
    add_engine_options(chat)
    add_sampling_options(chat, max_tokens=1024, temperature=0.7, top_p=0.95)
    chat.set_defaults(run=_lazily("jaxllm.entrypoints.chat"))

    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        conflict_handler="resolve",
        help="what an engine would need, on a GPU that need not be there",
        description="Plan the memory of an engine, without its weights and without its device. Exits with 1 when the "
        "model does not fit, and says with which value of which argument it does.",
    )
    add_plan_options(plan)
    plan.set_defaults(run=_lazily("jaxllm.entrypoints.plan"))

    add_benchmarks(commands.add_parser("bench", allow_abbrev=False, help="measure"))

    demo = commands.add_parser("demo", allow_abbrev=False, help="answer a batch of questions, and sum up how it went")
    add_engine_options(demo)
    add_sampling_options(demo, max_tokens=64, temperature=0.0)
    demo.set_defaults(run=_demo)
    return parser


def _fetch(arguments: argparse.Namespace) -> int:
    from jaxllm.weights.fetch import fetch

    for name in arguments.names:
        print(fetch(name))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from jaxllm.entrypoints.demo import run

    return run(arguments)


def _lazily(module: str) -> Callable[[argparse.Namespace], int]:
    """Return the `run` of a module that is imported when it is called: a command loads only what it needs."""
    return lambda arguments: importlib.import_module(module).run(arguments)
