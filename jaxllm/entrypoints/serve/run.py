"""``jaxllm serve`` starts an engine and answers until it is told to end."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.api.extras import how_to_install
from jaxllm.command_options import engine_arguments
from jaxllm.engine.interrupt import whole_module
from jaxllm.entrypoints.openai.adapters import lora_modules
from jaxllm.entrypoints.openai.requests import NOT_FOR_TEMPLATES
from jaxllm.entrypoints.openai.tools.options import reasoning_parser
from jaxllm.entrypoints.serve.listening import LOOPBACK, is_loopback, listen
from jaxllm.entrypoints.serve.settings import Settings
from jaxllm.entrypoints.serve.vllm_options import settle

_NEEDED = ("fastapi", "uvicorn")


def run(arguments: argparse.Namespace) -> int:
    """Serve. Returns 0 when Ctrl-C or SIGTERM ended it."""
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise JaxLLMError(f"jaxllm serve needs {' and '.join(_NEEDED)}: {how_to_install('serve')}")
    model, given = _engine(arguments)
    settings = _settings(arguments, model, given)
    # a port that is taken is found before the model is loaded
    with listen(arguments.host, arguments.port, arguments.uds) as (socket, url):
        with contextlib.closing(_Closing(whole_module("jaxllm.async_llm").AsyncLLM(model, **given))) as started:
            _answer(started.engine, settings, arguments, socket, url)
    return 0


class _Closing:
    def __init__(self, engine: Any):
        self.engine = engine

    def close(self) -> None:
        self.engine.shutdown()


def _engine(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the model and the engine's arguments."""
    named = getattr(arguments, "model", None)
    if arguments.model_tag is not None:
        if named not in (None, arguments.model_tag):
            raise ValidationError(f"MODEL is {arguments.model_tag!r} and --model is {named!r}: give one of them.")
        arguments.model = arguments.model_tag
    return engine_arguments(arguments, disable_log_stats=False)


def _settings(arguments: argparse.Namespace, model: Any, given: dict[str, Any]) -> Settings:
    """Return the server's settings; what is no argument of the engine is taken out of `given`."""
    settle(arguments)
    served = given.pop("served_model_name", None) or model
    names = [str(name) for name in (served if isinstance(served, list) else [served])]
    if arguments.enable_auto_tool_choice and arguments.tool_call_parser is None:
        raise ValidationError("--enable-auto-tool-choice requires --tool-call-parser.")
    keys, template_options = _keys(arguments), arguments.default_chat_template_kwargs or {}
    if taken := next((name for name in template_options if name in NOT_FOR_TEMPLATES), None):
        raise ValidationError(f"--default-chat-template-kwargs cannot set {taken!r}, which requests set themselves.")
    return Settings(
        model_names=tuple(names),
        lora_modules=tuple(lora_modules(arguments.lora_modules)),
        api_keys=keys,
        max_queue=arguments.max_queue,
        max_body=arguments.max_body_size,
        allowed_hosts=_hosts(arguments, keys),
        admin_endpoints=arguments.enable_admin_endpoints,
        allowed_origins=_origins(arguments.allowed_origins),
        tool_call_parser=arguments.tool_call_parser,
        reasoning_parser=reasoning_parser(given),
        trust_request_chat_template=arguments.trust_request_chat_template,
        template_options=template_options,
    )


def _origins(given: list[str]) -> tuple[str, ...]:
    """Return the web pages that may use the server; vLLM's way to name them is a JSON list."""
    if len(given) != 1 or not given[0].startswith("["):
        return tuple(given)
    try:
        return tuple(map(str, json.loads(given[0])))
    except ValueError as error:
        raise ValidationError(f"--allowed-origins {given[0]}: this is no JSON list: {error}.") from None


def _keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return what opens the server. A key that is empty is most likely a variable that was not set."""
    given = [("--api-key", key) for key in arguments.api_key]
    if (environment := os.environ.get("JAXLLM_API_KEY")) is not None:
        given.append(("JAXLLM_API_KEY", environment))
    for name, key in given:
        if not key or key != key.strip():
            raise ValidationError(
                f"{name} has {key!r}: a key is text without spaces around it, such as that of `openssl rand -hex 32`. "
                "Leave it out for a server that is open."
            )
    return tuple(key for _, key in given)


def _hosts(arguments: argparse.Namespace, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return what the server may be called; none: anything."""
    if arguments.allowed_hosts is not None:
        return tuple(arguments.allowed_hosts)
    if keys or arguments.uds is not None or not is_loopback(arguments.host):
        return ()
    return (*LOOPBACK, f"[{arguments.host}]" if ":" in arguments.host else arguments.host)


def _answer(engine: Any, settings: Settings, arguments: argparse.Namespace, socket: Any, url: str) -> None:
    """Answer until a signal comes, and what runs has ended."""
    uvicorn, app = whole_module("uvicorn"), whole_module("jaxllm.entrypoints.serve.app")
    drain = arguments.drain_seconds
    config = uvicorn.Config(
        app.make_app(engine, settings),
        access_log=arguments.access_log,
        log_level="info" if arguments.access_log else "warning",
        timeout_graceful_shutdown=None if drain is None else max(int(drain), 1),
        server_header=False,
        # nothing is done at the start and at the end but what is done here
        lifespan="off",
    )
    # whoever reads the line may connect at once
    socket.listen()
    print(f"jaxllm serve: {', '.join(settings.model_names)} at {url}", file=sys.stderr, flush=True)
    with _ends_by_signal():
        uvicorn.Server(config).run(sockets=[socket])


@contextlib.contextmanager
def _ends_by_signal() -> Iterator[None]:
    """The server handles signals, and raises them again once it has ended: that is no error."""

    def end(*_: Any) -> None:
        raise SystemExit(0)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            yield
    finally:
        signal.signal(signal.SIGTERM, previous)
