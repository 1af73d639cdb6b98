"""``jaxllm serve`` says what is wrong with its command line before it loads a model."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.entrypoints.cli import build_parser, main
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.serve import run
from jaxllm.entrypoints.serve.listening import listen
from jaxllm.entrypoints.serve.load import Load


def settings(*argv: str) -> Any:
    arguments = build_parser().parse_args(["serve", *argv])
    return run._settings(arguments, *run._engine(arguments))


def test_without_the_extra_a_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else found(name))
    assert main(["serve", "no/such/model"]) == 1
    printed = capsys.readouterr().err
    assert "jaxllm serve needs fastapi and uvicorn: " in printed and "'.[serve]'" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["m", "--model", "n"], "MODEL is 'm' and --model is 'n'"),
        (["m", "--enable-auto-tool-choice"], "requires --tool-call-parser"),
        (["no/such/model", "--port", "70000"], "cannot listen at 127.0.0.1:70000"),
        (["no/such/model", "--uds", "/"], "no socket"),
        (["m", "--api-key", ""], "--api-key has ''"),
        (["m", "--api-key", "k", "--api-key", " "], "--api-key has ' '"),
    ],
)
def test_what_is_wrong_is_said_at_once(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", *argv]) == 1
    assert text in capsys.readouterr().err


def test_what_the_command_line_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXLLM_API_KEY", "from outside")
    assert settings("m").model_names == ("m",) and settings("--model", "n").model_names == ("n",)
    found = settings(
        *("m", "--served-model-name", "a", "b", "--api-key", "k", "--max-queue", "3", "--max-body-size", "1MiB"),
        *("--tool-call-parser", "hermes", "--enable-auto-tool-choice", "--reasoning-parser", "qwen3"),
        *("--allowed-origins", "https://a", "https://b"),
    )
    assert (found.model_names, found.api_keys) == (("a", "b"), ("k", "from outside"))
    assert (found.max_queue, found.max_body) == (3, 2**20)
    assert (found.tool_call_parser, found.reasoning_parser) == ("hermes", "qwen3")
    assert not found.admin_endpoints and settings("m", "--enable-admin-endpoints").admin_endpoints
    assert found.allowed_origins == ("https://a", "https://b") and not found.trust_request_chat_template
    nested = settings("m", "--structured-outputs-config", '{"reasoning_parser": "deepseek_r1"}')
    assert nested.reasoning_parser == "deepseek_r1"


def test_options_of_vllms_scripts(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]):
    found = settings(
        *("m", "--disable-log-requests", "--disable-fastapi-docs", "--uvicorn-log-level", "warning"),
        *("--api-server-count", "4", "--response-role", "assistant", "--disable-frontend-multiprocessing", "-O3"),
        *("--default-chat-template-kwargs", '{"enable_thinking": false}', "--chat-template-content-format", "auto"),
        *("--allowed-origins", '["https://a.org", "*"]'),
    )
    assert found.allowed_origins == ("https://a.org", "*")
    assert found.template_options == {"enable_thinking": False}
    assert "no effect in jaxllm: --api-server-count (one process answers); --uvicorn-log-level (JAXLLM" in caplog.text
    assert "fastapi-docs" not in caplog.text
    for option, words in (
        (("--response-role", "bot"), "answers are the assistant's"),
        (("--chat-template-content-format", "openai"), "templates get text"),
        (("--allowed-origins", "[*]"), "this is no JSON list"),
        (("--tool-parser-plugin", "mine.py"), "--tool-call-parser and --reasoning-parser have names"),
        (("--shutdown-timeout", "3", "--drain-seconds", "4"), "two names of one thing"),
        (("--default-chat-template-kwargs", '{"tools": []}'), "cannot set 'tools', which requests set"),
    ):
        with pytest.raises(ValidationError, match=words):
            settings("m", *option)
    for option, text in (("--drain-seconds", "inf"), ("--drain-seconds", "-1"), ("--shutdown-timeout", "nan")):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["serve", "m", f"{option}={text}"])
        assert f"{text!r} is no number of seconds" in capsys.readouterr().err
    parsed = build_parser().parse_args(["serve", "m", "--disable-uvicorn-access-log", "--shutdown-timeout", "3"])
    run._settings(parsed, *run._engine(parsed))
    assert (parsed.access_log, parsed.drain_seconds) == (False, 3)


def test_a_key_that_was_not_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXLLM_API_KEY", "")
    with pytest.raises(ValidationError, match="JAXLLM_API_KEY has ''.* Leave it out for a server that is open"):
        settings("m")


def test_names_of_the_server():
    """Where only this machine reaches it, and nothing else keeps pages out."""
    local = {"localhost", "127.0.0.1", "[::1]"}
    assert set(settings("m").allowed_hosts) == local
    assert set(settings("m", "--host", "127.0.0.2").allowed_hosts) == {*local, "127.0.0.2"}
    assert set(settings("m", "--host", "::1").allowed_hosts) == local
    for argv in (["--host", "0.0.0.0"], ["--host", "box"], ["--api-key", "k"], ["--uds", "s"]):
        assert settings("m", *argv).allowed_hosts == ()
    assert settings("m", "--allowed-hosts", "box", "--api-key", "k").allowed_hosts == ("box",)


def test_sockets(tmp_path: Path):
    with listen("127.0.0.1", 0, None) as (bound, url):
        bound.listen()
        port = bound.getsockname()[1]
        assert url == f"http://127.0.0.1:{port}"
        with pytest.raises(ValidationError, match="Another --port may be free"), listen("127.0.0.1", port, None):
            pass
    path = str(tmp_path / "s")
    left = socket.socket(socket.AF_UNIX)
    left.bind(path)
    left.close()  # as a server that was killed leaves it
    with listen("", 0, path) as (bound, url):
        bound.listen()
        assert url == f"unix:{path}" and (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        with pytest.raises(ValidationError, match="Another server listens"), listen("", 0, path):
            pass
    assert not (tmp_path / "s").exists()


def test_load():
    load = Load(2, 1)
    with load.taken(2):
        with load.taken(1), pytest.raises(APIError, match="3 sequences run or wait, and 3 may") as refusal:
            with load.taken(1):
                pass
        assert (refusal.value.status, refusal.value.retry_after) == (503, 1)
        assert (load.calls, load.sequences) == (1, 2)
    # one that is larger than all there is runs alone
    with load.taken(10):
        assert load.sequences == 10
    assert (load.calls, load.sequences) == (0, 0)
    with pytest.raises(APIError, match="and this one has 16385") as refusal, Load(2, None).taken(16385):
        pass
    assert refusal.value.status == 400
