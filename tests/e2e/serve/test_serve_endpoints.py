"""The endpoints that do not generate: tokens, pooling, control, and what the server tells of itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import prometheus_client.parser
import pytest
from safetensors.numpy import load_file, save_file
from support.serving import MESSAGES, Closed, get, sent, served
from support.tiny_model import SMALL

import jaxllm
from jaxllm import AsyncLLM, SamplingParams


def test_tokens_there_and_back(url: str, engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch):
    tokenizer = engine.engine.get_tokenizer()
    ids = tokenizer.encode("Hé", add_special_tokens=False)
    told = get(url, "/tokenize", {"prompt": "Hé", "return_token_strs": True})[2]
    expected = {"count": 3, "max_model_len": 256, "tokens": ids}
    assert told == {**expected, "token_strs": tokenizer.convert_ids_to_tokens(ids)}
    (output,) = engine.llm.chat(MESSAGES, SamplingParams(max_tokens=1), use_tqdm=False)
    assert get(url, "/tokenize", {"messages": MESSAGES})[2]["tokens"] == output.prompt_token_ids
    with monkeypatch.context() as patch:  # the ids are looked at beside what the server does meanwhile
        size, asking = len(tokenizer), []
        patch.setattr(type(tokenizer), "__len__", lambda _: asking.append(threading.current_thread().name) or size)
        assert get(url, "/detokenize", {"tokens": ids})[2] == {"prompt": "Hé"}
        assert [name.split("_")[0] for name in asking] == ["tokenizer"]
    for path, body, text in (
        ("/tokenize", {}, "prompt or messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "/etc/passwd"}, "--trust-request-chat-template"),
        ("/detokenize", {"tokens": [5000]}, "Token id 5000 is out of vocabulary"),
        ("/v1/embeddings", {"input": "x"}, "only supported for pooling models"),
        ("/score", {"text_1": "x", "text_2": "y"}, "only supported for pooling models"),
    ):
        status, _, told = get(url, path, body)
        assert status == 400 and text in told["error"]["message"], path


def test_the_engine_is_steered(engine: AsyncLLM, url: str, client: openai.OpenAI):
    for path in ("/sleep?level=1", "/wake_up", "/reset_prefix_cache"):
        status, _, told = get(url, path, b"")
        assert status == 403 and "--enable-admin-endpoints" in told["error"]["message"], path
    assert get(url, "/is_sleeping")[2] == {"is_sleeping": False}
    with served(engine, admin_endpoints=True) as admin:
        assert get(admin, "/sleep?level=7", b"")[0] == 400 and get(admin, "/sleep?level=x", b"")[0] == 400
        assert get(admin, "/sleep?level=1", b"")[0] == 200
        assert get(url, "/is_sleeping")[2] == {"is_sleeping": True}
        with pytest.raises(openai.InternalServerError) as refusal:
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert refusal.value.status_code == 503 and refusal.value.response.headers["retry-after"] == "1"
        assert get(admin, "/wake_up", b"")[0] == 200 and get(url, "/is_sleeping")[2] == {"is_sleeping": False}
        assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
        assert get(admin, "/reset_prefix_cache", b"")[::2] == (200, {"success": True})
    adapter = {"lora_name": "a", "lora_path": "/etc"}
    status, _, told = get(url, "/v1/load_lora_adapter", adapter)
    assert status == 403 and "--enable-admin-endpoints" in told["error"]["message"]
    with served(engine, admin_endpoints=True) as admin:
        status, _, told = get(admin, "/v1/load_lora_adapter", adapter)
        assert status == 400 and "LoRA is not enabled: start with --enable-lora" in told["error"]["message"]


def test_who_runs_the_server_looks_into_it(engine: AsyncLLM, url: str):
    for path in ("/pause", "/resume", "/start_profile", "/stop_profile", "/reset_mm_cache"):
        assert get(url, path, b"")[0] == 403, path
    assert get(url, "/server_info")[0] == 403 and get(url, "/is_paused")[2] == {"is_paused": False}
    with served(engine, admin_endpoints=True) as admin:
        told = get(admin, "/server_info?config_format=json")[2]
        assert told["vllm_config"]["model_config"]["max_model_len"] == 256
        assert "engine_args" not in told["vllm_config"] and told["system_env"]["jaxllm"] == jaxllm.__version__
        assert "max_model_len=256" in get(admin, "/server_info")[2]["vllm_config"]
        assert get(admin, "/pause", b"")[::2] == (200, {"status": "paused"})
        assert get(admin, "/is_paused")[2] == {"is_paused": True}
        assert get(admin, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 503
        assert get(admin, "/resume", b"")[::2] == (200, {"status": "resumed"})
        assert get(admin, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200
        assert get(admin, "/pause?mode=soon", b"")[0] == 400
        assert get(admin, "/reset_mm_cache", b"")[0] == 200
        status, _, told = get(admin, "/stop_profile", b"")
        assert status == 400 and "none was started. Call start_profile first" in told["error"]["message"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/audio/transcriptions", "jaxllm takes no audio"),
        ("/v1/messages", "/v1/chat/completions takes OpenAI's"),
        ("/collective_rpc", "LLM.collective_rpc does it"),
        ("/update_weights", "LLM.update_weights takes them"),
    ],
)
def test_what_vllms_server_has_besides_is_refused_with_what_to_do(url: str, path: str, words: str):
    status, _, told = get(url, path, {"model": "tiny"})
    assert status == 501 and f"{path} is refused" in told["error"]["message"] and words in told["error"]["message"]


def test_pooling(tiny_model: Path):
    """The same engine, made to pool: against what the library gives."""
    texts = ["One", "Two, and more", "three"]
    with contextlib.closing(Closed(AsyncLLM(tiny_model, **SMALL, runner="pooling", convert="embed"))) as pooling:
        vectors = [o.outputs.embedding for o in pooling.engine.llm.embed(texts, use_tqdm=False)]
        scores = [o.outputs.score for o in pooling.engine.llm.score(texts[0], texts[1:], use_tqdm=False)]
        with served(pooling.engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            # the client asks for base64 where nothing is said
            forms: list[dict[str, Any]] = [{}, {"encoding_format": "float"}]
            for form in forms:
                answer = client.embeddings.create(model="tiny", input=texts, **form)
                for one, vector in zip(answer.data, vectors, strict=True):
                    assert one.embedding == pytest.approx(vector, rel=1e-5, abs=1e-6)
                assert answer.usage.prompt_tokens == sum(map(len, texts))
            told = get(url, "/pooling", {"input": texts, "task": "embed"})[2]["data"]
            assert [len(one["data"]) for one in told] == [len(vectors[0])] * 3
            told = get(url, "/score", {"text_1": texts[0], "text_2": texts[1:]})[2]["data"]
            assert [one["score"] for one in told] == pytest.approx(scores, rel=1e-5, abs=1e-6)
            body = {"query": texts[0], "documents": texts[1:], "top_n": 1}
            (best,) = get(url, "/v1/rerank", body)[2]["results"]
            assert best["relevance_score"] == pytest.approx(max(scores), rel=1e-5)
            assert best["document"]["text"] == texts[1 + best["index"]]
            for path in ("/score", "/rerank"):
                asked = {"text_1": "x", "text_2": "y"} if path == "/score" else {"query": "x", "documents": ["y"]}
                status, _, told = get(url, path, {**asked, "priority": 1})
                assert status == 400 and "priority scheduling is not enabled" in told["error"]["message"]
            # whoever leaves has a place until the work is done
            body = json.dumps({"text_1": "x", "text_2": ["y" * 200] * 300}).encode()
            with sent(url, "/score", body):
                while not pooling.engine.engine.client.has_unfinished:
                    time.sleep(0.001)
                assert get(url, "/load")[2] == {"server_load": 1}
            while get(url, "/load")[2] != {"server_load": 0}:
                time.sleep(0.001)
            assert not pooling.engine.engine.client.has_unfinished
            with pytest.raises(openai.BadRequestError, match="matryoshka"):
                client.embeddings.create(model="tiny", input="x", dimensions=4)
            with pytest.raises(openai.BadRequestError, match="generative models"):
                client.completions.create(model="tiny", prompt="x")


def test_classes(tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "classifier")
    config = json.loads((folder / "config.json").read_text())
    names = {str(number): name for number, name in enumerate(("good", "bad", "ugly"))}
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": names}
    config["label2id"] = {name: int(number) for number, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    weights["score.weight"] = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    texts = ["One", "Two, and more", "three"]
    with contextlib.closing(Closed(AsyncLLM(folder, **SMALL))) as closing:
        expected = [output.outputs.probs for output in closing.engine.llm.classify(texts, use_tqdm=False)]
        with served(closing.engine) as url:
            for path in ("/classify", "/invocations"):
                status, _, told = get(url, path, {"input": texts})
                assert status == 200 and told["id"].startswith("classify-"), told
                assert told["usage"]["prompt_tokens"] == sum(map(len, texts))
                for one, probs in zip(told["data"], expected, strict=True):
                    assert one["probs"] == pytest.approx(probs, rel=1e-5) and one["num_classes"] == 3
                    assert one["label"] == names[str(int(np.argmax(probs)))]
            status, _, told = get(url, "/v1/embeddings", {"input": "x"})
            assert status == 400 and "Embedding API is not supported by this model" in told["error"]["message"]


def test_one_endpoint_for_all(url: str):
    """SageMaker's."""
    sampled = {"temperature": 0, "max_tokens": 4, "return_token_ids": True}
    for path, body in (
        ("/v1/chat/completions", {"messages": MESSAGES, **sampled}),
        ("/v1/completions", {"prompt": ["x", "y"], **sampled}),
    ):
        told = get(url, "/invocations", body)[2]
        assert told["choices"] == get(url, path, body)[2]["choices"] and told["object"] in (
            "chat.completion",
            "text_completion",
        )
    text = get(url, "/invocations", {"prompt": "x", "max_tokens": 2, "stream": True})[2]
    assert text.endswith("data: [DONE]\n\n")
    for body, said in (({"query": "x", "documents": ["y"]}, "pooling models"), ({"x": 1}, "none of messages, prompt")):
        status, _, told = get(url, "/invocations", body)
        assert status == 400 and said in told["error"]["message"]


def test_what_the_server_tells_of_itself(client: openai.OpenAI, url: str, engine: AsyncLLM):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == 256  # pyright: ignore[reportAttributeAccessIssue]
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    with contextlib.closing(connection):
        connection.request("HEAD", "/health")
        assert connection.getresponse().status == 200
    assert get(url, "/health")[::2] == (200, "") and get(url, "/ping")[0] == 200
    assert get(url, "/version")[2] == {"version": jaxllm.__version__}
    assert get(url, "/load")[2] == {"server_load": 0}
    status, headers, text = get(url, "/metrics")
    families = {family.name for family in prometheus_client.parser.text_string_to_metric_families(text)}
    assert status == 200 and {"vllm:num_requests_running", "vllm:generation_tokens"} <= families
    assert headers["content-type"].startswith("text/plain; version=")
    paths = get(url, "/openapi.json")[2]["paths"]
    assert {"/v1/chat/completions", "/v1/completions"} <= paths.keys()


def test_the_page(url: str):
    status, headers, page = get(url, "/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    script = get(url, "/page.js")[2]
    # what the script looks for is there, and nothing comes from elsewhere
    for name in set(re.findall(r'\$\("(\w+)"\)', script)):
        assert f'id="{name}"' in page, name
    assert "http" not in page + script
    told = get(url, "/stats")[2]
    assert set(re.findall(r"stats\.(\w+)", script)) <= told.keys() and "KV cache" in told["memory_plan"]
