"""``jaxllm run-batch`` has options of its own."""

from __future__ import annotations

import argparse


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Add where the lines come from and where the results go."""
    parser.description = (
        "Each line of the input is an OpenAI API call: {custom_id, method: POST, url, body}, with the urls "
        "/v1/chat/completions, /v1/completions and /v1/embeddings. Each gets one line of output, as it finishes. "
        "The exit status is 0 when all lines succeeded, 3 when some were refused, 1 when the batch did not finish."
    )
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="JSONL, CSV or Parquet; -: stdin")
    parser.add_argument("-o", "--output-file", required=True, metavar="FILE", help="JSONL; -: stdout")
    parser.add_argument("--resume", action="store_true", help="go on with the output: skip the lines that it has")
    parser.add_argument("--overwrite", action="store_true", help="begin the output anew")
    table = parser.add_argument_group("CSV and Parquet input (needs pyarrow: pip install '.[tables]')")
    table.add_argument("--prompt-column", metavar="NAME", help="column of prompts (default: prompt)")
    table.add_argument("--messages-column", metavar="NAME", help="column of conversations: lists of messages, or JSON")
    table.add_argument("--id-column", metavar="NAME", help="column of custom_ids (default: custom_id, else row-N)")
    table.add_argument("--url", metavar="URL", help="the API call of every row (default: by the column)")
    table.add_argument("--body", metavar="JSON", help="""the rest of every row's body, such as '{"max_tokens": 64}'""")
