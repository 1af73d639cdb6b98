"""``jaxllm run-batch`` on a real engine, and on one without a model where only the host matters."""

from __future__ import annotations

import gc
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.entrypoints.batch.journal import Journal
from jaxllm.entrypoints.batch.lines import read_lines
from jaxllm.entrypoints.batch.run import Batch
from jaxllm.entrypoints.batch.summary import Tally
from jaxllm.entrypoints.cli import main
from jaxllm.entrypoints.openai.parameters import SamplingReader
from jaxllm.entrypoints.openai.requests import Translator

CLOSED = {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> str:
    body = body or {"prompt": custom_id, "max_tokens": 3}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


class Folder:
    """A batch's files, and the command that runs it."""

    def __init__(self, path: Path, model: Path):
        self.path, self._model = path, model
        self.input, self.output = path / "in.jsonl", path / "out.jsonl"

    def run(self, *argv: str, text: str | None = None, model: str = "null", source: Path | str | None = None) -> int:
        if text is not None:
            self.input.write_text(text)
        engine = ["--model", str(self._model), "--max-model-len", "256", "--max-num-seqs", "16"]
        engine += ["--load-format", "null"] if model == "null" else []
        files = ["-i", str(source or self.input), "-o", str(self.output)]
        return main(["run-batch", *files, *engine, *argv])

    def results(self) -> dict[Any, dict[str, Any]]:
        """By custom_id; those without one by their id."""
        records = [json.loads(text) for text in self.output.read_text().splitlines()]
        found = {record["custom_id"] or record["id"]: record for record in records}
        assert len(found) == len(records)
        return found

    def texts(self) -> dict[Any, str]:
        found = {}
        for name, record in self.results().items():
            if record["error"] is None:
                choice = record["response"]["body"]["choices"][0]
                found[name] = choice["text"] if "text" in choice else choice["message"]["content"]
        return found


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Folder:
    return Folder(tmp_path, tiny_model)


def test_results_are_those_of_the_library(folder: Folder, engine: LLM, monkeypatch: pytest.MonkeyPatch):
    """The real (tiny) model: the same texts, log-probabilities and token counts as `generate` and `chat` give."""
    import jaxllm.llm

    class Shared:
        """In place of a second engine."""

        def __new__(cls, model: str, **arguments: Any) -> Any:
            assert arguments == {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16}
            return Shared.of

        of: Any = None

    Shared.of = type("Entered", (), {"__enter__": lambda _: engine, "__exit__": lambda *_: None})()
    monkeypatch.setattr(jaxllm.llm, "LLM", Shared)
    messages = [{"role": "user", "content": "What?"}]
    sampled: dict[str, Any] = {"temperature": 1, "seed": 5, "max_tokens": 6}
    text = "\n".join(
        [
            line("greedy", prompt="Hello", max_tokens=6, temperature=0, logprobs=2),
            line("sampled", prompt=["One", "Two"], **sampled),
            line("chat", CHAT, messages=messages, **sampled),
            line("several", prompt="Hello", n=2, **sampled),
        ]
    )
    assert folder.run("--enforce-eager", text=text, model="real") == 0
    bodies = {name: record["response"]["body"] for name, record in folder.results().items()}
    params = SamplingParams(**sampled)

    (greedy,) = engine.generate("Hello", SamplingParams(temperature=0, max_tokens=6, logprobs=2), use_tqdm=False)
    choice = bodies["greedy"]["choices"][0]
    assert choice["text"] == greedy.outputs[0].text
    assert greedy.outputs[0].logprobs is not None
    pairs = zip(greedy.outputs[0].token_ids, greedy.outputs[0].logprobs, strict=True)
    expected = [position[token_id].logprob for token_id, position in pairs]
    # in a batch of another size float32 is summed in another order
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert bodies["greedy"]["usage"]["prompt_tokens"] == len(greedy.prompt_token_ids)

    both = engine.generate(["One", "Two"], params, use_tqdm=False)
    assert [c["text"] for c in bodies["sampled"]["choices"]] == [o.outputs[0].text for o in both]
    (answer,) = engine.chat(messages, params, use_tqdm=False)
    assert bodies["chat"]["choices"][0]["message"]["content"] == answer.outputs[0].text
    (several,) = engine.generate("Hello", SamplingParams(temperature=1, seed=5, max_tokens=6, n=2), use_tqdm=False)
    assert [c["text"] for c in bodies["several"]["choices"]] == [c.text for c in several.outputs]


def test_calls_of_tools(folder: Folder, engine: LLM, monkeypatch: pytest.MonkeyPatch):
    """A grammar makes a call that has to be, and stands in for a model that writes one of its own accord."""
    import jaxllm.llm

    entered = type("Entered", (), {"__enter__": lambda _: engine, "__exit__": lambda *_: None})
    monkeypatch.setattr(jaxllm.llm, "LLM", lambda *_, **__: entered())
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {**schema, **CLOSED}}}]
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "max_tokens": 150}
    named = {"type": "function", "function": {"name": "weather"}}
    lines = [
        line("auto", CHAT, **asked, structured_outputs={"choice": [f"a</think>{written}"]}),
        line("named", CHAT, **asked, tool_choice=named, temperature=0),
    ]
    options = ["--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_r1"]
    assert folder.run(text=lines[1]) == 0
    (result,) = folder.results().values()
    (call,) = result["response"]["body"]["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert folder.run(*options, "--overwrite", text=lines[0]) == 0
    (choice,) = folder.results()["auto"]["response"]["body"]["choices"]
    assert (choice["finish_reason"], choice["message"]["reasoning_content"]) == ("tool_calls", "a")
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}


def test_a_bad_line_fails_alone(folder: Folder, capfd: pytest.CaptureFixture[str]):
    deep = "[" * 100_000
    bad = {
        "batch_req_2": "{not json",
        "batch_req_4": "[1, 2]",
        "batch_req_5": '{"method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}',
        "batch_req_6": '{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}',
        "method": '{"custom_id": "method", "method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}}',
        "key": '{"custom_id": "key", "method": "POST", "url": "/v1/completions", "bdy": {"prompt": "x"}}',
        "url": line("url", "/v1/images", prompt="x"),
        "embed": line("embed", "/v1/embeddings", input="x"),
        "param": line("param", prompt="x", tempreature=1),
        "empty": line("empty", prompt=""),
        "long": line("long", prompt="x" * 300),
        "ids": line("ids", prompt=[5000]),
        "one of two": line("one of two", prompt=["fine", ""]),
        "role": line("role", CHAT, messages=[{"content": "x"}]),
        "model": line("model", prompt="x", model="gpt"),
        "batch_req_18": deep,
        "batch_req_19": '{"custom_id": "\\ud800", "method": 1',
    }
    broken = list(bad.values())
    text = [
        line("first"),
        broken[0],
        "   ",
        *broken[1:],
        line("last", CHAT, messages=[{"role": "user", "content": "é"}]),
    ]
    folder.input.write_bytes(b"\xef\xbb\xbf" + "\n".join(text).encode() + b"\n\xff\xfe\n")
    assert folder.run() == 3
    results = folder.results()
    assert folder.texts().keys() == {"first", "last"}
    assert results.keys() == {"first", "last", *bad, "batch_req_21"}
    for name in bad:
        record = results[name]
        assert record["response"]["status_code"] == (404 if name == "model" else 400), name
        assert record["error"]["message"] == record["response"]["body"]["error"]["message"]
        if record["custom_id"] is None:
            assert f"line {name.removeprefix('batch_req_')}: " in record["error"]["message"]
    assert "longer than the maximum model length" in results["long"]["error"]["message"]
    assert f"2 completed, {len(bad) + 1} failed" in capfd.readouterr().err


def test_the_second_of_two_equal_custom_ids_is_an_error(folder: Folder):
    text = "\n".join([line("a"), line("b"), line("a"), line("b")])
    for argv in ([], ["--resume"]):
        assert folder.run(*argv, text=text) == 3
        records = [json.loads(text) for text in folder.output.read_text().splitlines()]
        assert sorted((r["custom_id"], r["id"], r["response"]["status_code"]) for r in records) == [
            ("a", "batch_req_1", 200),
            ("a", "batch_req_3", 400),
            ("b", "batch_req_2", 200),
            ("b", "batch_req_4", 400),
        ]


def test_resuming_runs_what_is_missing(folder: Folder, capfd: pytest.CaptureFixture[str]):
    text = "\n".join([*(line(f"r{i}") for i in range(20)), "broken", line("bad", prompt="x", n=0)])
    assert folder.run(text=text) == 3
    whole = folder.texts()
    kept = folder.output.read_bytes().splitlines(keepends=True)
    folder.output.write_bytes(b"".join(kept[:9]) + kept[9][:-7])
    assert folder.run("--resume") == 3
    assert folder.texts() == whole and len(folder.results()) == 22
    assert folder.output.read_bytes().startswith(b"".join(kept[:9]))
    assert "9 finished before" in capfd.readouterr().err
    before = folder.output.read_bytes()
    # nothing is left to do, no model is read for it, and what failed has failed
    assert folder.run("--resume", "--model", "a-folder-that-is-not-there") == 3
    assert folder.output.read_bytes() == before
    assert "all lines have their results" in capfd.readouterr().err
    assert folder.run("--overwrite", text=line("new")) == 0
    assert folder.results().keys() == {"new"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "exists. --resume finishes what it lacks"),
        (["--resume", "--overwrite"], "not both"),
        (["-o", "-", "--resume"], "--resume needs an output file"),
        (["-i", "https://host/in.jsonl"], "is a URL"),
        (["-o", "s3://host/out.jsonl"], "is a URL"),
        (["-i", "nowhere.jsonl", "--overwrite"], "cannot be read: No such file"),
        (["-o", "out.csv"], "would be JSONL"),
        (["--body", "{}", "--overwrite"], "--body is for CSV and Parquet"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(
    folder: Folder, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    folder.output.write_text('{"id": "batch_req_1", "custom_id": "a", "error": null}\n')
    assert folder.run("--model", "no/such/model", *argv, text=line("a")) == 1
    assert message in capsys.readouterr().err


def test_the_input_is_not_overwritten(folder: Folder, capsys: pytest.CaptureFixture[str]):
    assert folder.run("-o", str(folder.input), "--overwrite", text=line("a")) == 1
    assert "are the same file" in capsys.readouterr().err
    assert folder.input.read_text() == line("a")


def test_standard_input_and_output(folder: Folder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{line('a')}\n{line('b')}".encode())))
    assert folder.run("-i", "-", "-o", "-") == 0
    assert {json.loads(text)["custom_id"] for text in capfd.readouterr().out.splitlines()} == {"a", "b"}


def test_served_model_names(folder: Folder, capsys: pytest.CaptureFixture[str]):
    text = "\n".join([line("a", prompt="x", model="mine"), line("b", prompt="x", model="other")])
    assert folder.run("--served-model-name", "mine", text=text) == 3
    results = folder.results()
    assert results["a"]["response"]["body"]["model"] == "mine"
    assert results["b"]["response"]["status_code"] == 404
    assert "run-batch: line" not in capsys.readouterr().err
    for names in (["--served-model-name", "mine", "other"], ["--ignore-model-field"]):
        assert folder.run("--overwrite", *names) == 0
        assert [folder.results()[name]["response"]["body"]["model"] for name in "ab"] == ["mine", "other"]
    # said before the engine starts, which here it does not
    with pytest.raises(SystemExit):
        folder.run("--served-model-name", "mine", "--ignore-model-field")
    assert folder.run("--overwrite", "--model", "./nothing") == 1
    assert "line 1 is for the model 'mine', and this is './nothing'" in capsys.readouterr().err


def test_tables(folder: Folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    prompts = ["1", 'two, "quoted"\nlines', "drei é"]
    table = pyarrow.table({"prompt": prompts, "name": ["x", "y", "z"], "other": [1, 2, 3]})
    csv.write_csv(table, folder.path / "p.csv")
    parquet.write_table(table, folder.path / "p.parquet")
    folder.run(text="\n".join(line(f"row-{i + 1}", prompt=prompt, max_tokens=2) for i, prompt in enumerate(prompts)))
    expected = folder.texts()
    for name in ("p.csv", "p.parquet"):
        source = folder.path / name
        assert folder.run("--overwrite", "--body", '{"max_tokens": 2}', source=source) == 0
        assert folder.texts() == expected
        assert folder.run("--overwrite", "--id-column", "name", source=source) == 0
        assert folder.texts().keys() == {"x", "y", "z"}


def test_conversations_in_tables(folder: Folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    talks = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b", "name": "n"}]]
    parquet.write_table(pyarrow.table({"talk": talks}), folder.path / "p.parquet")
    csv.write_csv(pyarrow.table({"talk": [*map(json.dumps, talks), "oops"]}), folder.path / "p.csv")
    folder.run(text="\n".join(line(f"row-{i + 1}", CHAT, messages=talk) for i, talk in enumerate(talks)))
    expected = folder.texts()
    assert folder.run("--overwrite", "--messages-column", "talk", source=folder.path / "p.parquet") == 0
    assert folder.texts() == expected
    assert folder.run("--overwrite", "--messages-column", "talk", source=folder.path / "p.csv") == 3
    assert folder.texts() == expected
    assert "messages should be a valid list; got 'oops'" in folder.results()["row-3"]["error"]["message"]
    # a column of prompts, as conversations of one message
    csv.write_csv(pyarrow.table({"q": ["a", "b"]}), folder.path / "q.csv")
    chat = ["--prompt-column", "q", "--url", CHAT]
    assert folder.run("--overwrite", *chat, source=folder.path / "q.csv") == 0
    assert folder.texts() == expected


def test_a_bad_row_of_a_table_fails_alone(folder: Folder):
    (folder.path / "p.csv").write_bytes(b"prompt\nfine\noops, a comma\nmore\ncaf\xe9\n")
    as_it_is = ["--encoding", "utf-8", "--body", '{"max_tokens": 3}']
    assert folder.run(*as_it_is, source=folder.path / "p.csv") == 3
    lines = [json.loads(text) for text in folder.output.read_text().splitlines()]
    failed = sorted(str(record["error"]["message"]) for record in lines if record["error"])
    assert len(lines) == 4 and len(failed) == 2
    assert "line 2: the row has 2 values, and there are 1 columns" in failed[0]
    assert "lone surrogate" in failed[1]
    assert folder.run("--resume", *as_it_is, source=folder.path / "p.csv") == 3
    assert len(folder.output.read_text().splitlines()) == 4


def test_an_input_in_another_encoding(folder: Folder, capsys: pytest.CaptureFixture[str]):
    """A table is refused before the engine starts and the output is touched, or read as the option says."""
    body = ["--body", '{"max_tokens": 3}', "--overwrite"]
    text, table = "prompt\nMünchen\ncafé\n", folder.path / "p.csv"
    table.write_bytes(text.encode("latin-1"))
    folder.output.write_text("kept")
    assert folder.run("--model", "no/such/model", *body, source=table) == 1
    assert "line 2 has the byte 0xFC. It is likely latin-1: --encoding latin-1." in capsys.readouterr().err
    assert folder.output.read_text() == "kept"
    assert folder.run("--encoding", "latin-1", *body, source=table) == 0
    found = folder.texts()
    table.write_bytes(text.encode())
    assert folder.run(*body, source=table) == 0
    assert folder.texts() == found and len(found) == 2

    # as some shells write it
    words = enumerate(("München", "café"), start=1)
    lines = "\n".join(line(f"row-{i}", prompt=word, max_tokens=3) for i, word in words)
    folder.input.write_bytes(lines.replace("\\u00fc", "ü").replace("\\u00e9", "é").encode("utf-16"))
    assert folder.run("--model", "no/such/model", "--overwrite") == 1
    assert "is UTF-16: --encoding utf-16" in capsys.readouterr().err
    assert folder.run("--encoding", "utf-16", "--overwrite") == 0
    assert folder.texts() == found


EMPTY = [("in.jsonl", ""), ("in.jsonl", "\n \n"), ("p.csv", ""), ("p.csv", "prompt\n")]


@pytest.mark.parametrize(("name", "text"), EMPTY)
def test_an_empty_input_starts_no_engine(folder: Folder, name: str, text: str, capsys: pytest.CaptureFixture[str]):
    (folder.path / name).write_text(text)
    assert folder.run("--model", "no/such/model", source=folder.path / name) == 0
    assert "is empty: there is nothing to run" in capsys.readouterr().err
    assert folder.output.read_text() == ""


def test_without_a_terminal_a_line_says_now_and_then_how_it_goes(capsys: pytest.CaptureFixture[str]):
    tally, turns = Tally(10, show=False), iter([False, False, True])
    for _ in range(3):
        tally.complete({"prompt_tokens": 2, "completion_tokens": 5})
    tally.fail()
    with tally.told_regularly(lambda _: next(turns)):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for said in lines:
        assert said.startswith("run-batch: 4 of 10 lines, about 0 s left; 3 completed, 1 failed; ")
    with Tally(10, show=True).told_regularly(lambda _: pytest.fail("the bar is there")):
        pass


def test_tables_without_their_columns(folder: Folder, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("pyarrow")
    (folder.path / "p.csv").write_text("text\nhello\n")
    (folder.path / "p.parquet").write_bytes(b"")
    assert folder.run(source=folder.path / "p.csv") == 1
    assert "has no column 'prompt'; its columns are text" in capsys.readouterr().err
    monkey = pytest.MonkeyPatch()
    monkey.setitem(sys.modules, "pyarrow", None)
    with monkey.context():
        assert folder.run(source=folder.path / "p.parquet") == 1
    monkey.undo()
    assert "pip install '.[tables]'" in capsys.readouterr().err


def test_embeddings_run_in_groups(tmp_path: Path):
    """A stand-in for an engine that embeds: a text becomes its length, and "bad" is refused."""
    calls: list[list[Any]] = []

    class Embedder:
        supported_tasks = ("embed",)

        def embed(
            self,
            prompts: list[Any],
            *,
            pooling_params: list[Any],
            lora_request: list[Any],
            on_error: str,
            use_tqdm: bool,
        ) -> list[Any]:
            assert (on_error, use_tqdm) == ("return", False) and lora_request == [None] * len(prompts)
            # all prompts of a call are cut to one length
            assert len({params.truncate_prompt_tokens for params in pooling_params}) == 1
            calls.append(prompts)
            return [
                SimpleNamespace(
                    outputs=SimpleNamespace(embedding=[float(len(prompt))]),
                    prompt_token_ids=[1] * len(prompt),
                    error="no good" if prompt == "bad" else None,
                )
                for prompt in prompts
            ]

    url = "/v1/embeddings"
    texts = [line(f"r{i}", url, input=["x" * i, "xx"]) for i in range(1, 301)]
    texts += [line("cut", url, input="a long text", truncate_prompt_tokens=3)]
    texts += [line("bad", url, input=["fine", "bad"]), line("chat", CHAT, messages=[{"role": "user", "content": "x"}])]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(texts))
    output = tmp_path / "out.jsonl"
    tally = Tally(None, show=False)
    translator = Translator(model_names=["m"], sampling=SamplingReader(SamplingParams()))
    with Journal(str(output)) as journal:
        Batch(cast(LLM, Embedder()), journal, tally, translator).run(read_lines(str(source)))
    assert [len(group) for group in calls] == [256, 256, 90, 1]
    records = {record["custom_id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert (tally.completed, tally.failed, len(records)) == (301, 2, 303)
    data = records["r200"]["response"]["body"]["data"]
    assert [entry["embedding"] for entry in data] == [[200.0], [2.0]]
    assert records["bad"]["error"]["message"] == "prompt 1: no good"
    assert "does not support /v1/chat/completions" in records["chat"]["error"]["message"]


def test_memory_does_not_grow_with_the_input(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    """Living objects are counted while 8,000 lines run: one that a line left behind would be seen."""
    counts: list[tuple[int, int]] = []
    original, written = Journal.write, 0

    def write(self: Journal, number: int, record: dict[str, Any]) -> None:
        nonlocal written
        original(self, number, record)
        written += 1
        if written % 1000 == 0:
            gc.collect()
            counts.append((written, sys.getallocatedblocks()))

    monkeypatch.setattr(Journal, "write", write)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    with open(folder.input, "w") as file:
        for i in range(8_000):
            file.write(line(f"r{i}", CHAT, **chat) if i % 2 else line(f"r{i}", prompt=f"{i}", max_tokens=2))
            file.write("\n")
    assert folder.run("--max-num-seqs", "128") == 0
    early = min(blocks for count, blocks in counts if 2_000 <= count < 4_000)
    late = min(blocks for count, blocks in counts if count >= 6_000)
    assert late - early < 0.2 * 4_000, counts
