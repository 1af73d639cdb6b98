"""``jaxllm run-batch`` has options of its own."""

from __future__ import annotations

import argparse

from jaxllm.command_options import add_engine_options
from jaxllm.entrypoints.encodings import add_encoding_option
from jaxllm.entrypoints.openai.adapters import add_lora_modules_option
from jaxllm.entrypoints.openai.tools.options import add_tool_option


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Add where the lines come from and where the results go, and the engine's options; the parser has to resolve
    conflicts, for the options that mean more here.
    """
    parser.description = (
        "Each line of the input is an OpenAI API call: {custom_id, method: POST, url, body}, with the urls "
        "/v1/chat/completions, /v1/completions and /v1/embeddings. Each gets one line of output, as it finishes. "
        "The exit status is 0 when all lines succeeded, 3 when some were refused, 1 when the batch did not finish."
    )
    batch = parser.add_argument_group("batch options")
    table = parser.add_argument_group("CSV and Parquet input (Parquet needs pyarrow)")
    # what they are for comes first, and the last word on an option of both
    add_engine_options(parser)
    batch.add_argument("-i", "--input-file", required=True, metavar="FILE", help="JSONL, CSV or Parquet; -: stdin")
    batch.add_argument("-o", "--output-file", required=True, metavar="FILE", help="JSONL; -: stdout")
    batch.add_argument("--resume", action="store_true", help="go on with the output: skip the lines that it has")
    batch.add_argument("--overwrite", action="store_true", help="begin the output anew")
    names = batch.add_mutually_exclusive_group()
    names.add_argument(
        "--served-model-name",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="what the lines may call the model (default: --model); the answer of one that names none has the first",
    )
    names.add_argument(
        "--ignore-model-field",
        action="store_true",
        help="run the lines with this model, whatever they call theirs, unless it is a name of --lora-modules",
    )
    add_lora_modules_option(batch)
    add_tool_option(batch)
    add_encoding_option(batch)
    table.add_argument("--prompt-column", metavar="NAME", help="column of prompts (default: prompt)")
    table.add_argument("--messages-column", metavar="NAME", help="column of conversations: lists of messages, or JSON")
    table.add_argument("--id-column", metavar="NAME", help="column of custom_ids (default: custom_id, else row-N)")
    table.add_argument("--url", metavar="URL", help="the API call of every row (default: by the column)")
    table.add_argument("--body", metavar="JSON", help="""the rest of every row's body, such as '{"max_tokens": 64}'""")
