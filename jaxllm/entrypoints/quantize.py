"""``jaxllm quantize`` writes a model with quantized weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxllm.config.option_values import positive
from jaxllm.engine.interrupt import whole_module

#: `quantizing.scheme.METHODS`, of which nothing is imported until the command runs
METHODS = ("awq", "gptq", "int8", "fp8", "int4")
#: `weights.checkpoint.Checkpoint`'s words for what is not quantized
DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_quantize_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a named model, a directory, a .gguf file, or a hub id")
    parser.add_argument(
        "--method",
        required=True,
        choices=METHODS,
        help="awq and gptq look at text; int8, fp8 and int4 (compressed-tensors) round to the nearest",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="appears when it is complete")
    parser.add_argument("--bits", type=positive, metavar="N", help="GPTQ's may be 2, 3, 4 or 8 (default: 4)")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="columns that share a scale, -1: a row (default: 128, or 64 or 32 where that divides rows)",
    )
    parser.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="without zero points (default: GPTQ without, AWQ and int4 with)",
    )
    parser.add_argument("--desc-act", action="store_true", help="GPTQ's act-order: columns with large inputs first")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="NAME",
        help="a matrix that stays as it is, by its module's name, or re: and what matches the beginning of names (may "
        "be repeated)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a text, or .jsonl with text, prompt or messages (default: Python's documentation of its own language)",
    )
    parser.add_argument("--num-samples", type=positive, metavar="N", help="sequences that are looked at (default: 128)")
    parser.add_argument(
        "--sequence-length", type=positive, default=512, metavar="N", help="tokens of a sequence (default: 512)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of which sequences are drawn (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of what is not quantized; auto (default): as the checkpoint has it",
    )
    parser.add_argument("--no-perplexity", action="store_true", help="do not measure it, before and after")
    parser.add_argument("--revision", metavar="NAME", help="of a hub's model")
    parser.add_argument("--hf-token", metavar="TOKEN", help="of the hub")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Quantize, and print the report."""
    report = whole_module("jaxllm.quantizing.api").quantize(
        arguments.model,
        arguments.output,
        method=arguments.method,
        bits=arguments.bits,
        group_size=arguments.group_size,
        symmetric=arguments.symmetric,
        desc_act=arguments.desc_act,
        ignore=arguments.ignore,
        calibration=arguments.calibration,
        num_samples=arguments.num_samples,
        sequence_length=arguments.sequence_length,
        seed=arguments.seed,
        dtype=arguments.dtype,
        perplexity=not arguments.no_perplexity,
        revision=arguments.revision,
        hf_token=arguments.hf_token,
    )
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0
