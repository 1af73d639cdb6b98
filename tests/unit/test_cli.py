"""The commands, with a recording stand-in for the engine: what they ask of it, and what they print of its answers."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxllm import command_options as options
from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, failed_output
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.entrypoints import demo
from jaxllm.entrypoints.cli import main
from jaxllm.weights.named_models import NAMED_MODELS


class FakeLLM:
    """Answers in upper case, and records how it was called."""

    made: list[FakeLLM] = []
    #: raised by stream_chat after its first piece, or before it
    interruption: BaseException | None = None
    refusal: Exception | None = None

    def __init__(self, model: str, **arguments: Any) -> None:
        self.model, self.arguments = model, arguments
        self.calls: list[tuple[Any, SamplingParams]] = []
        self.closed = False
        self.startup_times = {"weights": 1.0, "compile": 2.5}
        self.memory_plan = "KV cache: 12 blocks"
        FakeLLM.made.append(self)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def as_completed(
        self, prompts: Iterable[str], sampling_params: SamplingParams, on_error: str, use_tqdm: bool
    ) -> Iterator[RequestOutput]:
        """Prompts that hold "bad" are refused, and the last one finishes first."""
        assert on_error == "return"
        listed = list(prompts)
        self.calls.append((listed, sampling_params))
        for i, prompt in reversed(list(enumerate(listed))):
            output = (
                failed_output(str(i), prompt, "no good")
                if "bad" in prompt
                else self._output(i, prompt, sampling_params)
            )
            output.index = i
            yield output

    def chat(self, messages: list[Any], sampling_params: SamplingParams, use_tqdm: bool) -> list[RequestOutput]:
        self.calls.append((messages, sampling_params))
        return [self._output(i, talk[-1]["content"], sampling_params) for i, talk in enumerate(messages)]

    def stream_chat(self, messages: list[dict[str, str]], sampling_params: SamplingParams) -> Iterator[str]:
        self.calls.append(([dict(message) for message in messages], sampling_params))
        if FakeLLM.refusal:
            raise FakeLLM.refusal
        text = messages[-1]["content"].upper()
        yield text[:3]
        if FakeLLM.interruption:
            raise FakeLLM.interruption
        yield text[3:]

    @staticmethod
    def _output(index: int, prompt: str, params: SamplingParams | None = None) -> RequestOutput:
        n = params.n if params else 1
        logprobs = None
        if params and params.logprobs:
            logprobs = [{1: Logprob(-0.5, 2, "A"), 7: Logprob(-0.25, 1, "B")}, {2: Logprob(-2.0, 1, "C")}]
        completions = [
            CompletionOutput(
                index=i, text=prompt.upper() + "!" * i, token_ids=[1, 2], finish_reason="length", logprobs=logprobs
            )
            for i in range(n)
        ]
        return RequestOutput(
            request_id=str(index),
            prompt=prompt,
            prompt_token_ids=[1] * 10,
            outputs=completions,
            finished=True,
            num_cached_tokens=4,
            metrics=RequestMetrics(first_token_latency=0.1 * (index + 1), num_preemptions=index % 2),
        )


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    module = types.ModuleType("jaxllm.llm")
    module.__dict__["LLM"] = FakeLLM
    monkeypatch.setitem(sys.modules, "jaxllm.llm", module)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "interruption", None)
    monkeypatch.setattr(FakeLLM, "refusal", None)
    return FakeLLM


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_generate_passes_only_what_was_given(engine: type[FakeLLM], capsys: pytest.CaptureFixture[str]):
    argv = ["generate", "hello", "--model", "m_m", "--max_num_seqs=4", "--no-enable-prefix-caching", "--enforce_eager"]
    argv += ["--max-model-len", "1k", "--kv-cache-memory-bytes", "1G", "--gpu-memory-utilization", "0.5"]
    argv += ["--top-k", "5", "--stop", "a_b", "--stop", "c", "--seed", "3", "--max-tokens", "7", "--temperature", "1"]
    assert main(argv) == 0
    (llm,) = engine.made
    assert llm.model == "m_m" and llm.closed
    assert llm.arguments == {
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "max_model_len": 1000,
        "kv_cache_memory_bytes": 2**30,
        "gpu_memory_utilization": 0.5,
        "seed": 3,
    }
    prompts, params = llm.calls[0]
    assert prompts == ["hello"]
    assert params == SamplingParams(top_k=5, stop=["a_b", "c"], max_tokens=7, temperature=1)
    assert capsys.readouterr().out == "HELLO\n"


def test_generate_reads_prompts_from_standard_input(
    engine: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    say(monkeypatch, "one", "", "two ")
    assert main(["generate", "--json"]) == 0
    assert engine.made[0].model == "smollm2-135m-instruct"
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == ["ONE", "TWO "]
    assert records[0] == {
        "prompt": "one",
        "text": "ONE",
        "finish_reason": "length",
        "prompt_tokens": 10,
        "output_tokens": 2,
    }


def test_several_texts_are_told_apart(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a", "b"]) == 0
    assert capsys.readouterr().out == "=== a\nA\n\n=== b\nB\n\n"


def test_a_refused_prompt_leaves_the_others(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a", "bad", "c"]) == 3
    printed = capsys.readouterr()
    assert printed.out == "=== a\nA\n\n=== c\nC\n\n"
    assert "jaxllm: error: prompt 2: no good" in printed.err
    assert main(["generate", "a", "bad", "--json"]) == 3
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.get("error") for record in records] == [None, "no good"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "one\r\n\ntwo\n"),
        ("p.jsonl", '"one"\n\n"two"\n'),
        ("p.csv", 'prompt,other\n"one",1\ntwo,2\n'),
    ],
)
def test_generate_reads_prompts_from_a_file(
    engine: type[FakeLLM], tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / name).write_text(text, newline="")
    assert main(["generate", "--input-file", str(tmp_path / name)]) == 0
    assert engine.made[0].calls[0][0] == ["one", "two"]
    assert capsys.readouterr().out == "=== one\nONE\n\n=== two\nTWO\n\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--input-file", "f.txt"], "not both"),
        (["--input-file", "nowhere.txt"], "cannot be read"),
        (["--input-file", "f.txt", "--prompt-column", "p"], "is for CSV and Parquet"),
        (["--prompt-column", "p"], "is for --input-file"),
        (["--encoding", "latin-1"], "is for --input-file"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused_before_the_engine_is_built(
    engine: type[FakeLLM], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", *argv]) == 1
    assert message in capsys.readouterr().err
    assert engine.made == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", b"prompt\nM\xfcnchen\n", "not UTF-8: line 2 has the byte 0xFC. It is likely latin-1"),
        ("p.txt", "one\ntwo \u201cquoted\u201d\n".encode("cp1252"), "line 2 has the byte 0x93. It is likely cp1252"),
        ("p.jsonl", b"5\n7\n", "line 1: a prompt must be text or a list of token ids, got the number 5"),
    ],
)
def test_files_that_would_come_out_wrong_are_refused_before_the_engine_is_built(
    engine: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: bytes, message: str
):
    (tmp_path / name).write_bytes(text)
    assert main(["generate", "--input-file", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err
    assert engine.made == []


def test_a_file_in_the_encoding_that_is_given(engine: type[FakeLLM], tmp_path: Path):
    for name, text in (("p.csv", "prompt\nM\xfcnchen\nB\xe4r\n"), ("p.txt", "M\xfcnchen\nB\xe4r\n")):
        (tmp_path / name).write_bytes(text.encode("cp1252"))
        assert main(["generate", "--input-file", str(tmp_path / name), "--encoding", "cp1252"]) == 0
        assert engine.made[-1].calls[0][0] == ["M\xfcnchen", "B\xe4r"]


def test_bad_values_end_before_the_engine_is_built(
    engine: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", "x", "--temperature", "nan"]) == 1
    assert "jaxllm: error: temperature must be a finite number, got nan." in capsys.readouterr().err
    say(monkeypatch)
    assert main(["generate"]) == 1
    assert "There are no prompts" in capsys.readouterr().err
    for name, text in (("empty.jsonl", ""), ("header.csv", "prompt\n"), ("blank.txt", "\n\n")):
        path = str(tmp_path / name)
        (tmp_path / name).write_text(text)
        assert main(["generate", "--input-file", path]) == 1
        assert f"The input '{path}' is empty: there are no prompts in it." in capsys.readouterr().err
    assert engine.made == []


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["generate", "--max-model-len", "1.5"],
            "generate: error: argument --max-model-len: '1.5' is not a whole number",
        ),
        (["generate", "-tp", "two"], "--tensor-parallel-size: 'two' is not a whole number (1, 2 and 4 are)"),
        (["generate", "--temperature", "hot"], "generate: error: argument --temperature: 'hot' is not a number"),
        (
            ["generate", "--max-num-seq", "8", "x"],
            "error: there is no option --max-num-seq; did you mean --max-num-seqs?",
        ),
        (["generate", "--max_token=8"], "error: there is no option --max-token; did you mean --max-tokens?"),
        (["generate", "--no-prefix-caching"], "did you mean --no-enable-prefix-caching?"),
        (["generate", "--qqqqqq"], "generate: error: there is no option --qqqqqq ("),
        (["chat", "--system", "x"], "chat: error: there is no option --system; did you mean --system-prompt?"),
        # what is missing is not what is wrong
        (["run-batch", "--input", "x"], "there is no option --input; did you mean --input-file?"),
        (["run-batch"], "run-batch: error: the following arguments are required: -i/--input-file, -o/--output-file"),
        (["chat", "hello"], "chat: error: there is no place for 'hello'"),
        (["chat", "-x"], "chat: error: there is no option -x"),
        (["--model", "m", "chat"], "jaxllm: error: --model is in front of the command: options follow it"),
        (["generat"], "jaxllm: error: there is no command 'generat'; did you mean generate?"),
        (["nothing"], "jaxllm: error: there is no command 'nothing'; there are generate, chat, serve, run-batch"),
        (["bench", "nope"], "jaxllm bench: error: there is no command 'nope'; there are tokenizer, host, throughput"),
        (["bench", "latencies"], "jaxllm bench: error: there is no command 'latencies'; did you mean latency?"),
    ],
)
def test_a_wrong_command_line_gets_one_line(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refusal:
        main(argv)
    assert refusal.value.code == 2
    printed = capsys.readouterr()
    assert text in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert "--help says more" in printed.err


@pytest.mark.parametrize(("argv", "listed"), [([], "run-batch"), (["bench"], "serve-trace")])
def test_without_a_command_they_are_listed(argv: list[str], listed: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refusal:
        main(argv)
    assert refusal.value.code == 2
    printed = capsys.readouterr().err
    assert f"\n  {listed} " in printed and len(printed.splitlines()) < 27
    # each has a line that fits a terminal
    lines = printed.partition("commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(lines) >= 7 and all(re.match(r"  [a-z-]+  +\S", line) and len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("generate", "usage: jaxllm generate [options] [PROMPT ...]"),
        ("run-batch", "usage: jaxllm run-batch [options] -i FILE -o FILE"),
        ("plan", "usage: jaxllm plan [options] [MODEL]"),
        ("explain", "usage: jaxllm explain [options] [MODEL]"),
        ("fetch", "usage: jaxllm fetch [options] NAME ..."),
    ],
)
def test_usage_is_one_line(command: str, usage: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"{usage}\n\n")


def test_the_dtypes_of_caches_are_listed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "--kv-cache-dtype {auto,float32,bfloat16,float16,fp8_e4m3,fp8_e5m2,int8}" in capsys.readouterr().out


def test_the_named_models_are_listed_with_their_sizes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["fetch", "--help"])
    printed = capsys.readouterr().out
    for name, model in NAMED_MODELS.items():
        assert re.search(rf"^  {re.escape(name)} +{model.size / 1e6:.0f} MB  \S", printed, re.MULTILINE), name


def test_several_completions_are_told_apart(engine: type[FakeLLM], capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a", "--n", "2", "--temperature", "0.8"]) == 0
    assert engine.made[0].calls[0][1] == SamplingParams(n=2, temperature=0.8, max_tokens=128)
    assert capsys.readouterr().out == "--- 1\nA\n--- 2\nA!\n"
    assert main(["generate", "a", "--n", "2", "--temperature", "0.8", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [completion["text"] for completion in record["outputs"]] == ["A", "A!"]
    assert record["output_tokens"] == 4
    # greedy is what the command does by itself
    assert main(["generate", "a", "--n", "2"]) == 1
    message = "n must be 1 when using greedy sampling, got 2. Completions differ with a temperature above 0"
    assert message in capsys.readouterr().err


def test_log_probabilities_are_shown(engine: type[FakeLLM], capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a", "--logprobs", "1"]) == 0
    assert engine.made[0].calls[0][1].logprobs == 1
    text, *tokens = capsys.readouterr().out.splitlines()
    assert text == "A"
    assert [line.split() for line in tokens] == [
        ["-0.500", "'A'", "of", "'B'", "-0.250,", "'A'", "-0.500"],
        ["-2.000", "'C'", "of", "'C'", "-2.000"],
    ]
    assert main(["generate", "a", "--logprobs", "1", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["logprobs"]["content"]
    assert [(entry["token"], entry["logprob"]) for entry in content] == [("A", -0.5), ("C", -2.0)]
    assert [entry["token"] for entry in content[0]["top_logprobs"]] == ["B", "A"]


@pytest.mark.parametrize("command", [["generate", "x"], ["demo"], ["chat"]])
def test_a_schema_is_given_as_json_or_as_a_file(
    engine: type[FakeLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
):
    schema = json.dumps({"type": "object", "properties": {"a_b": {"type": "integer"}}})
    (tmp_path / "s.json").write_text(schema)
    for value in (schema, str(tmp_path / "s.json")):
        say(monkeypatch, "hello")
        assert main([*command, "--json-schema", value]) == 0
        assert engine.made[-1].calls[0][1].structured_outputs == StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"type": "nope"}', "Grammar error: Invalid type: nope"),
        ("{'type': 1}", "is not JSON"),
        ("nowhere.json", "neither JSON"),
        ("", "neither JSON"),
    ],
)
def test_a_schema_that_is_none_is_refused(
    engine: type[FakeLLM], value: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", "x", "--json-schema", value]) == 1
    assert message in capsys.readouterr().err
    assert engine.made == []


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", 12), ("-1", -1), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("2M", 2 << 20), ("0.5g", 5 * 10**8)],
)
def test_counts(text: str, number: int):
    assert options.count(text) == number


def test_words_after_two_hyphens_are_prompts(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "--", "--a_b"]) == 0
    assert capsys.readouterr().out == "--A_B\n"


def test_chat_keeps_the_conversation(
    engine: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    say(monkeypatch, "hello", "", "again", "/clear", "fresh", "/exit", "never")
    assert main(["chat", "--system-prompt", "Be brief.", "--max-tokens", "5"]) == 0
    (llm,) = engine.made
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "hello"}]
    assert [messages for messages, _ in llm.calls] == [
        first,
        [*first, {"role": "assistant", "content": "HELLO"}, {"role": "user", "content": "again"}],
        [system, {"role": "user", "content": "fresh"}],
    ]
    assert llm.calls[0][1].max_tokens == 5
    assert llm.closed
    assert capsys.readouterr().out == "HELLO\nAGAIN\nFRESH\n"


def test_an_interrupted_answer_is_kept_as_far_as_it_came(
    engine: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    say(monkeypatch, "hello", "again")
    engine.interruption = KeyboardInterrupt()
    assert main(["chat"]) == 0
    assert engine.made[0].calls[1][0][1] == {"role": "assistant", "content": "HEL"}
    assert "HEL [stopped]" in capsys.readouterr().out


def test_a_refused_message_does_not_end_the_conversation(
    engine: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    say(monkeypatch, "too long", "short")
    engine.refusal = ValidationError("The prompt is longer than max_model_len.")
    assert main(["chat"]) == 0
    assert engine.made[0].calls[1][0] == [{"role": "user", "content": "short"}]
    assert "longer than max_model_len" in capsys.readouterr().err


def test_demo_asks_one_batch_and_sums_it_up(
    engine: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["demo", "--max-num-seqs", "8"]) == 0
    (llm,) = engine.made
    assert llm.arguments == {"max_num_seqs": 8}
    ((conversations, params),) = llm.calls
    assert len(conversations) >= 16 and len({str(conversation) for conversation in conversations}) == len(conversations)
    assert params.is_greedy
    printed = capsys.readouterr().out
    # Lines are wrapped to the terminal, so only words are looked for.
    for question in demo.QUESTIONS:
        assert question.split()[-1].upper() in printed
    count = len(demo.QUESTIONS)
    assert f"Requests:             {count} in " in printed
    assert f"Prompt tokens:        {10 * count} (" in printed
    assert f"Output tokens:        {2 * count} (" in printed
    assert f"Prefix cache hits:    {4 * count} tokens (40.0%)" in printed
    assert f"Preemptions:          {count // 2}" in printed
    assert "Start:                3.5 s (weights 1.0 s, compile 2.5 s)" in printed
    assert "KV cache: 12 blocks" in printed


def test_summary_rates_and_latencies():
    outputs = [FakeLLM._output(i, "p") for i in range(3)]
    summary = demo.Summary.of(outputs, seconds=2.0)
    assert summary.mean_ttft == pytest.approx(0.2) and summary.max_ttft == pytest.approx(0.3)
    assert "30 (15.0 tokens/s)" in str(summary) and "6 (3.0 tokens/s)" in str(summary)
    assert "mean 200 ms, longest 300 ms" in str(summary)


def test_fetch_refuses_unknown_names(capsys: pytest.CaptureFixture[str]):
    assert main(["fetch", "nothing-like-it"]) == 1
    assert "There is no model named 'nothing-like-it'." in capsys.readouterr().err


def test_the_module_runs_as_a_command():
    result = subprocess.run([sys.executable, "-m", "jaxllm", "--version"], capture_output=True, text=True, check=False)
    assert result.stdout == "jaxllm 0.1.0\n", result.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path: Any):
    # The reader is gone before anything is written, as in `jaxllm ... | head -0`.
    code = "import sys; from jaxllm.entrypoints import cli; cli._fetch = lambda _: print('x' * 10**6, flush=True); "
    code += "sys.exit(cli.main(['fetch', 'x']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
