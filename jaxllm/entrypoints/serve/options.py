"""``jaxllm serve`` has options of its own."""

from __future__ import annotations

import argparse

from jaxllm.command_options import add_engine_options
from jaxllm.config.command_line import add_option
from jaxllm.config.option_values import count, json_object, seconds, size
from jaxllm.entrypoints.openai.adapters import add_lora_modules_option
from jaxllm.entrypoints.openai.tools.options import add_tool_option
from jaxllm.entrypoints.serve.settings import MAX_BODY
from jaxllm.entrypoints.serve.vllm_options import add_vllm_options

PORT = 8000


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add where the server listens and whom it answers, and the engine's options; the parser has to resolve conflicts,
    for the options that mean more here.
    """
    parser.description = (
        "Answer OpenAI's API over HTTP: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models and others. "
        "Ctrl-C lets what runs end, and a second one ends it."
    )
    server = parser.add_argument_group("server options")
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="as --model")
    add_engine_options(parser)
    server.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    add_option(server, "port", count, "0: a free one", default=PORT, shown=PORT)
    server.add_argument("--uds", metavar="FILE", help="listen at this socket in place of an address")
    server.add_argument(
        "--served-model-name",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="what requests may call the model (default: --model); the answer to one that names none has the first",
    )
    server.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="what requests have to bring (may be repeated; default: nothing; JAXLLM_API_KEY has one as well)",
    )
    add_option(
        server,
        "max_queue",
        count,
        "requests that may wait before others get status 503 (default: any number)",
        default=None,
    )
    add_option(server, "max_body_size", size, "bytes of a request", default=MAX_BODY, shown="16MiB")
    server.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages that may use the server, such as https://example.org, or * (default: its own)",
    )
    server.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=None,
        metavar="NAME",
        help="what the server may be called in a request's Host, or * (default: where it listens on loopback without a "
        "key, localhost, 127.0.0.1 and [::1]; elsewhere anything)",
    )
    add_option(
        server,
        "enable_admin_endpoints",
        None,
        "answer /sleep, /wake_up, /reset_prefix_cache and what loads adapters, for everyone who may use the server",
        default=False,
        shown=False,
    )
    add_lora_modules_option(server)
    add_tool_option(server)
    add_option(
        server, "enable_auto_tool_choice", None, "vLLM's switch; --tool-call-parser is what decides", default=False
    )
    add_option(
        server, "trust_request_chat_template", None, "requests may bring a chat template", default=False, shown=False
    )
    add_option(
        server,
        "default_chat_template_kwargs",
        json_object,
        "what chat templates get where a request's chat_template_kwargs say nothing",
        default=None,
    )
    add_option(
        server,
        "drain_seconds",
        seconds,
        "after Ctrl-C or SIGTERM, what still runs is ended (default: never)",
        default=None,
    )
    add_option(server, "access_log", None, "log a line a request", default=True, shown=True)
    add_vllm_options(server)
