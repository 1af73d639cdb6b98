"""The command ``jaxllm``. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jaxllm
from jaxllm.api.errors import JaxLLMError
from jaxllm.bench.options import add_benchmarks
from jaxllm.command_options import add_engine_options, add_sampling_options
from jaxllm.config.command_line import with_hyphens
from jaxllm.entrypoints.advise import add_advise_options
from jaxllm.entrypoints.batch.options import add_batch_options
from jaxllm.entrypoints.command_parser import CommandParser
from jaxllm.entrypoints.encodings import add_encoding_option
from jaxllm.entrypoints.plan import add_plan_options
from jaxllm.entrypoints.quantize import add_quantize_options
from jaxllm.entrypoints.serve.options import add_serve_options
from jaxllm.entrypoints.simulate import add_simulate_options
from jaxllm.entrypoints.tune import add_tune_options
from jaxllm.entrypoints.warm import add_warm_options
from jaxllm.runner.compile.workers import leave
from jaxllm.weights.named_models import NAMED_MODELS


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
            leave(130)
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough; the interpreter's last flush must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets ``run``, a function from the parsed arguments to the exit status."""
    parser = CommandParser(
        prog="jaxllm",
        description="An LLM inference engine compiled by XLA.",
        epilog="jaxllm COMMAND --help says what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"jaxllm {jaxllm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int], **more: Any) -> argparse.ArgumentParser:
        description = more.pop("description", f"{text[0].upper()}{text[1:]}.")
        made = commands.add_parser(name, allow_abbrev=False, help=text, description=description, **more)
        made.set_defaults(run=run)
        return made

    generate = command("generate", "complete prompts", _lazily("jaxllm.entrypoints.generate"))
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="-, or none: standard input, one prompt a line")
    generate.add_argument(
        "--input-file", metavar="FILE", help="prompts: .csv, .parquet, .jsonl, or a text file with one a line"
    )
    generate.add_argument("--prompt-column", metavar="NAME", help="of a CSV or Parquet file (default: prompt)")
    add_encoding_option(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    add_engine_options(generate)
    add_sampling_options(generate, max_tokens=128, temperature=0.0)

    text = "talk to a model; answers are shown as they are generated"
    chat = command("chat", text, _lazily("jaxllm.entrypoints.chat"))
    chat.add_argument("--system-prompt", metavar="TEXT", help="what the model is told before the conversation")
    add_engine_options(chat)
    add_sampling_options(chat, without=("n", "logprobs"), max_tokens=1024, temperature=0.7, top_p=0.95)

    text = "answer OpenAI's API over HTTP"
    serve = command("serve", text, _lazily("jaxllm.entrypoints.serve.run"), conflict_handler="resolve")
    add_serve_options(serve)

    text = "run a file of OpenAI API calls; resumable"
    batch = command("run-batch", text, _lazily("jaxllm.entrypoints.batch.run"), conflict_handler="resolve")
    add_batch_options(batch)

    plan = command(
        "plan",
        "what an engine would need, on a GPU that need not be there",
        _lazily("jaxllm.entrypoints.plan"),
        conflict_handler="resolve",
        description="Plan the memory of an engine, without its weights and without its device. Exits with 1 when the "
        "model does not fit, and says with which value of which argument it does.",
    )
    add_plan_options(plan)

    explain = command(
        "explain",
        "how a model is split, and what its devices exchange",
        _lazily("jaxllm.entrypoints.plan", "run_explain"),
        conflict_handler="resolve",
        description="Explain how a model is split over devices: the memory plan of each, where every array lies, what "
        "steps read, compute and exchange, and how long that takes at least. Needs no weights and no device. Exits "
        "with 1 when the model does not fit.",
    )
    add_plan_options(explain)

    warm = command(
        "warm",
        "compile an engine's programs ahead of its first start",
        _lazily("jaxllm.entrypoints.warm"),
        conflict_handler="resolve",
        description="Compile what an engine of these arguments runs, and keep it for starts on machines like this one. "
        "Reads no weights; what is there already is left.",
    )
    add_warm_options(warm)

    text = "which argument, at which value, would have helped"
    advise = command(
        "advise",
        text,
        _lazily("jaxllm.entrypoints.advise"),
        conflict_handler="resolve",
        description="Say which argument, at which value, would have helped: of a trace that was saved, or of the "
        "metrics of a vLLM or jaxllm server. Needs no model and no device.",
    )
    add_advise_options(advise)

    simulate = command(
        "simulate",
        "how a workload fares with arguments that nobody has run",
        _lazily("jaxllm.entrypoints.simulate"),
        conflict_handler="resolve",
        description="Replay a workload through the engine's own scheduler, block pool and prefix cache, in place of "
        "the model the time that its steps take: as a trace has it, as --measure finds it on this machine, or as "
        "--device of a GPU that need not be there.",
    )
    add_simulate_options(simulate)

    tune = command(
        "tune",
        "search the engine arguments that suit a workload best",
        _lazily("jaxllm.entrypoints.tune"),
        conflict_handler="resolve",
        description="Search the engine arguments that suit a workload best, those given held fixed: in the simulator "
        "first, then the best few are measured in turns on this machine. Writes a configuration for --config, with the "
        "reason and the effect beside every value, and a page with plots. Ctrl-C gives the best so far; the same "
        "command goes on where it was interrupted. Exits with 1 when nothing keeps the constraints.",
    )
    add_tune_options(tune)

    text = "write a model with quantized weights: AWQ, GPTQ, int8, fp8 or int4"
    quantize = command("quantize", text, _lazily("jaxllm.entrypoints.quantize"))
    add_quantize_options(quantize)

    fetch = command(
        "fetch",
        "bring named models onto this machine",
        _fetch,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["models:", *(f"  {name:<30}{_about(name)}" for name in NAMED_MODELS)]),
    )
    fetch.add_argument("names", nargs="+", metavar="NAME", help="one of the models below")

    bench = commands.add_parser("bench", allow_abbrev=False, help="measure", description="Measure.")
    add_benchmarks(bench)

    demo = command("demo", "answer a batch of questions, and sum up how it went", _lazily("jaxllm.entrypoints.demo"))
    add_engine_options(demo)
    add_sampling_options(demo, without=("logprobs",), max_tokens=64, temperature=0.0)

    text = "versions, devices, caches; what is broken or slow, and the remedy"
    command("doctor", text, _lazily("jaxllm.entrypoints.doctor.report"))
    return parser


def _about(name: str) -> str:
    model = NAMED_MODELS[name]
    return f"{model.size / 1e6:>5.0f} MB  {model.licence.partition(';')[0]}"


def _fetch(arguments: argparse.Namespace) -> int:
    from jaxllm.weights.fetch import fetch

    for name in arguments.names:
        print(fetch(name))
    return 0


def _lazily(module: str, name: str = "run") -> Callable[[argparse.Namespace], int]:
    """Return a function of a module that is imported when it is called: a command loads only what it needs."""
    return lambda arguments: getattr(importlib.import_module(module), name)(arguments)
