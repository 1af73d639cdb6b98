"""Options of ``vllm serve`` without a meaning here, with another name, or are refused: as data, what happens to each.

Shell scripts that start vLLM's server start this one.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any, NamedTuple

from jaxllm.api.errors import ValidationError
from jaxllm.config.argument import refuse_unless
from jaxllm.config.command_line import add_option
from jaxllm.config.option_values import seconds

logger = logging.getLogger("jaxllm")


class Option(NamedTuple):
    why: str
    #: what asks for nothing; a switch's is a bool
    quiet: tuple[Any, ...] = ()


_ONE_PROCESS = "one process answers"
_NO_DOCS = "there are no pages of documentation"
_NO_PAYLOADS = "neither prompts nor answers are logged"
_IN_ANSWERS = "answers have it anyway"
_A_PROXY = "put a server in front for that, such as nginx or Caddy, and --host or --uds behind it"
_NO_TLS = f"it has no TLS: {_A_PROXY}"
_OWN_PARSERS = "jaxllm runs no code for it: --tool-call-parser and --reasoning-parser have names"

NO_EFFECT: dict[str, Option] = {
    "allow_credentials": Option("a key is in a header, and no cookie is read", (False,)),
    "allowed_methods": Option("web pages of --allowed-origins may use all that is answered"),
    "allowed_headers": Option("web pages of --allowed-origins may use all that is answered"),
    "api_server_count": Option(_ONE_PROCESS, ("1",)),
    "disable_access_log_for_endpoints": Option("--no-access-log leaves out all requests"),
    "disable_frontend_multiprocessing": Option(_ONE_PROCESS, (False, True)),
    "disable_fastapi_docs": Option(_NO_DOCS, (False, True)),
    "enable_offline_docs": Option(_NO_DOCS, (False,)),
    "enable_log_deltas": Option(_NO_PAYLOADS, (True, False)),
    "enable_log_outputs": Option(_NO_PAYLOADS, (False,)),
    "max_log_len": Option(_NO_PAYLOADS),
    "enable_prompt_tokens_details": Option(_IN_ANSWERS, (False, True)),
    "enable_server_load_tracking": Option("/load answers always", (False, True)),
    "exclude_tools_when_tool_choice_none": Option("tools are never shown where tool_choice is none", (False, True)),
    "h11_max_header_count": Option("uvicorn's own limits hold"),
    "h11_max_incomplete_event_size": Option("--max-body-size is the limit"),
    "log_config_file": Option("JAXLLM_LOGGING_LEVEL says how much is logged"),
    "log_error_stack": Option("what fails unexpectedly is always logged with its stack", (False, True)),
    "root_path": Option("paths are answered as a proxy hands them on, without what it has taken off"),
    "uvicorn_log_level": Option("JAXLLM_LOGGING_LEVEL says how much is logged, --no-access-log leaves out requests"),
}
REFUSED: dict[str, Option] = {
    **dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers"), Option(_NO_TLS)),
    "ssl_cert_reqs": Option(_NO_TLS, ("0",)),
    "enable_ssl_refresh": Option(_NO_TLS, (False,)),
    "middleware": Option(_A_PROXY),
    "chat_template_content_format": Option("templates get text, and parts where some are pictures", ("auto", "string")),
    "enable_request_id_headers": Option("answers have their id in the body", (False,)),
    "headless": Option("there are no engines in other processes", (False,)),
    "grpc_port": Option("it answers over HTTP"),
    "tool_parser_plugin": Option(_OWN_PARSERS),
    "reasoning_parser_plugin": Option(_OWN_PARSERS),
    "tool_server": Option("it runs no tools: the client does"),
    "response_role": Option("answers are the assistant's", ("assistant",)),
    "return_tokens_as_token_ids": Option('a request asks for it: "return_tokens_as_token_ids": true', (False,)),
    "enable_force_include_usage": Option('a request asks for it: "stream_options": {"include_usage": true}', (False,)),
    "enable_tokenizer_info_endpoint": Option("/tokenize and /detokenize are there", (False,)),
    "sse_keep_alive_interval": Option("streams have no comments in between", ("0",)),
    "tokens_only": Option("leave it out: requests may have token ids as prompts", (False,)),
}


def add_vllm_options(group: argparse._ActionsContainer) -> None:
    """Add all of them to a parser, without lines of ``--help``."""
    for name, option in {**NO_EFFECT, **REFUSED}.items():
        is_switch = bool(option.quiet) and all(isinstance(value, bool) for value in option.quiet)
        add_option(group, name, None if is_switch else str, None)
    add_option(group, "disable_uvicorn_access_log", None, None, default=False)
    add_option(group, "shutdown_timeout", seconds, None, default=None)


def settle(arguments: argparse.Namespace) -> None:
    """Refuse what asks for something that is not there, say what has no effect, and put what has another name here
    under that.

    Raises ValidationError, which names the option and what to do.
    """
    given = vars(arguments)
    for name, (why, quiet) in REFUSED.items():
        refuse_unless(f"--{name.replace('_', '-')}", given.get(name), quiet, f"not supported: {why}")
    reasons: dict[str, list[str]] = {}
    for name, (why, quiet) in NO_EFFECT.items():
        if given.get(name) is not None and given[name] not in quiet:
            reasons.setdefault(why, []).append(f"--{name.replace('_', '-')}")
    if reasons:
        text = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
        logger.warning("These options have no effect in jaxllm: %s.", text)
    if arguments.disable_uvicorn_access_log:
        arguments.access_log = False
    if arguments.shutdown_timeout is not None:
        if arguments.drain_seconds is not None:
            raise ValidationError("--shutdown-timeout and --drain-seconds are two names of one thing; set one.")
        # vLLM's default, which ends everything at once, is a second here
        arguments.drain_seconds = arguments.shutdown_timeout
