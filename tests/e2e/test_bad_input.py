"""Bad input: a text that says what is wrong, and nobody else is harmed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import SMALL

from jaxllm import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from jaxllm.api.errors import JaxLLMError, ModelNotFoundError, ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.runner.runner import Runner
from jaxllm.weights.errors import WeightsError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
GOOD: list[Any] = ["A good prompt", [1, 2, 3, 4, 5] * 9, {"prompt_token_ids": [200]}]


@pytest.fixture(scope="module")
def alone(engine: LLM) -> list[list[int]]:
    """What the good prompts give when each is the only one."""
    return [engine.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for prompt in GOOD]


def assert_idle(llm: LLM) -> None:
    core = llm.engine.core.cores[0]
    assert not core.has_unfinished and not core._in_flight
    assert core.scheduler.kv_cache_manager.pool.num_used == 0


def changed(**fields: Any) -> SamplingParams:
    """Parameters whose fields were set after construction, which does not check them."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for name, value in fields.items():
        setattr(params, name, value)
    return params


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "lone surrogate": ("a\ud800b", "lone surrogate"),
    "unknown key": ({"promt": "a"}, "the prompt has the key 'promt', which does not exist"),
    "later key": ({"prompt": "a", "encoder_prompt": "b"}, "'encoder_prompt', which is not supported yet"),
    "image": (
        {"prompt": "a", "multi_modal_data": {"image": "b"}},
        "'multi_modal_data', and this engine reads text only",
    ),
    "image in a message": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "a message has a part that is no text, and this engine reads text only",
    ),
    "empty text": ("", "prompt cannot be empty"),
    "no token ids": ([], "prompt cannot be empty"),
    "empty mapping": ({}, "must have 'prompt', 'prompt_token_ids', 'prompt_embeds' or 'messages'"),
    "mapping of no ids": ({"prompt_token_ids": []}, "prompt cannot be empty"),
    "id too large": ([1, 257, 3], "Token id 257 is out of vocabulary: the model has 257 tokens, 0 to 256"),
    "huge id": ([2**70], "Token id 1180591620717411303424 is out of vocabulary"),
    "negative id": ([1, -1], "Token id -1 is out of vocabulary"),
    "float id": ([1, 2.0], "token ids must be integers, got 2.0"),
    "boolean id": ([True, 5], "token ids must be integers, got True"),
    "a column in a mapping": ({"prompt": ["a", "b"]}, "got a list of texts: ['a', 'b']. Several prompts are one list"),
    "text among ids": ([1, "2"], "token ids must be integers, got '2'"),
    "none": (None, "a prompt must be text or token ids, got NoneType"),
    "a number": (3.5, "a prompt must be text or token ids, got float"),
    "bytes": (b"abc", "a prompt must be text or token ids, got bytes"),
    "mapping of a number": ({"prompt": 3}, "a prompt must be text or token ids, got int"),
    "too long": ([7] * 256, r"(length 256) is longer than the maximum model length of 256"),
    "far too long": ("x" * 5000, r"(length 5000) is longer than the maximum model length of 256"),
    "salt": ({"prompt": "a", "cache_salt": 3}, "cache_salt must be a non-empty string, got 3"),
}

BAD_PARAMS: dict[str, tuple[SamplingParams, str]] = {
    "nan temperature": (changed(temperature=math.nan), "temperature must be a finite number, got nan"),
    "negative temperature": (changed(temperature=-1), "temperature must be in [0, 2], got -1"),
    "text as top_p": (changed(top_p="0.9"), "top_p must be a number, got '0.9' of type str"),
    "no tokens": (changed(max_tokens=0), "max_tokens must be at least 1, got 0"),
    "bias outside": (changed(logit_bias={300: 1.0}), "logit_bias contains out-of-vocabulary token ids [300]"),
    "nan bias": (changed(logit_bias={3: math.nan}), "logit_bias[3] must be a finite number, got nan"),
    "too many biases": (changed(logit_bias=dict.fromkeys(range(321), 1.0)), "out-of-vocabulary"),
    "allowed outside": (changed(allowed_token_ids=[1, 257]), "out-of-vocabulary token ids [257]"),
    "nothing allowed": (changed(allowed_token_ids=[]), "allowed_token_ids must not be empty"),
    "long bad word": (changed(bad_words=["123456789"]), "a bad word has 10 tokens; at most 8 are supported"),
    "many bad words": (changed(bad_words=[f"w{i}" for i in range(40)]), "bad_words make 80 token sequences"),
    "too many logprobs": (changed(logprobs=21), "greater than max allowed: 20"),
    "nothing left": (changed(allowed_token_ids=[40], bad_words=["I"]), "together leave no token to generate"),
    "too many prompt logprobs": (changed(prompt_logprobs=21), "Requested prompt logprobs of 21"),
    "all prompt logprobs": (changed(prompt_logprobs=-1), "Requested prompt logprobs of 257"),
    "logprobs of no token": (changed(logprob_token_ids=[257]), "logprob_token_ids contains out-of-vocabulary"),
    "logprobs of too many tokens": (changed(logprob_token_ids=[1] * 129), "at most 128 ids, got 129"),
    "two kinds of logprobs": (changed(logprobs=3, logprob_token_ids=[1]), "must equal len(logprob_token_ids)"),
    "uncomputed prompt logprobs": (
        changed(prompt_logprobs=1, skip_reading_prefix_cache=False),
        "skip_reading_prefix_cache cannot be False",
    ),
}

CASES = [pytest.param(prompt, GREEDY, words, id=name) for name, (prompt, words) in BAD_PROMPTS.items()]
CASES += [pytest.param("fine", params, words, id=name) for name, (params, words) in BAD_PARAMS.items()]


@pytest.mark.parametrize(("prompt", "params", "words"), CASES)
def test_a_bad_request_fails_alone(engine: LLM, alone: list[list[int]], prompt: Any, params: Any, words: str):
    for place in (0, 2, 3):
        prompts, all_params = list(GOOD), [GREEDY] * 3
        prompts.insert(place, prompt)
        all_params.insert(place, params)
        outputs = engine.generate(prompts, all_params, use_tqdm=False, on_error="return")
        bad = outputs.pop(place)
        assert bad.outputs[0].finish_reason == "error" and bad.finished and not bad.outputs[0].token_ids
        assert words in (bad.error or "") and f"error={bad.error!r}" in repr(bad)
        assert [output.outputs[0].token_ids for output in outputs] == alone
        assert all(output.error is None for output in outputs)
    assert_idle(engine)


@pytest.mark.parametrize(("prompt", "params", "words"), CASES)
def test_a_bad_request_stops_its_call_before_anything_has_run(
    engine: LLM, alone: list[list[int]], prompt: Any, params: Any, words: str
):
    steps = engine.engine.core.cores[0].scheduler._num_scheduled
    with pytest.raises(ValidationError, match=re.escape(words)):
        engine.generate([*GOOD, prompt], [GREEDY] * 3 + [params], use_tqdm=False)
    assert engine.engine.core.cores[0].scheduler._num_scheduled == steps
    assert_idle(engine)


def test_what_is_more_than_any_vocabulary_has_is_all_of_it(engine: LLM):
    """A number that fits no array would fail in a step, which is others' too."""
    few, many = (SamplingParams(top_k=top_k, seed=1, max_tokens=8, ignore_eos=True) for top_k in (0, 10**30))
    outputs = engine.generate(["hello", "hello", GOOD[1]], [few, many, GREEDY], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_the_good_ones_are_as_alone_after_all_that(engine: LLM, alone: list[list[int]]):
    outputs = engine.generate(GOOD, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == alone


CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "number as prompts": (lambda e: e.generate(5), ValidationError, "prompts must be .* got 5 of type int"),
    "none as prompts": (lambda e: e.generate(None), ValidationError, "prompts must be .* got None"),
    "params of another type": (lambda e: e.generate("a", {"n": 1}), TypeError, r"got dict: pass SamplingParams\("),
    "number of params": (lambda e: e.generate(["a"], [GREEDY] * 2), ValidationError, r"prompts \(1\) and params \(2\)"),
    "number of priorities": (lambda e: e.generate("a", GREEDY, priority=[1, 2]), ValidationError, r"priority \(2\)"),
    "priority": (lambda e: e.generate("a", GREEDY, priority="high"), ValidationError, "priority must be an integer"),
    "priority under fcfs": (lambda e: e.generate("a", GREEDY, priority=1), ValidationError, 'scheduling_policy="prio'),
    "on_error": (lambda e: e.generate("a", GREEDY, on_error="ignore"), ValidationError, "on_error must be"),
    "adapter without enable_lora": (
        lambda e: e.generate("a", GREEDY, lora_request=LoRARequest("a", 1, "/adapters/a")),
        ValidationError,
        "Got lora_request .* but LoRA is not enabled! Pass enable_lora=True",
    ),
    "argument": (lambda e: e.generate("a", GREEDY, lora=1), TypeError, "lora"),
    "taker of outputs": (
        lambda e: e.generate("a", on_output=5),
        ValidationError,
        "on_output must be a function, got 5",
    ),
    "number as template": (
        lambda e: e.chat([{"role": "user", "content": "a"}], chat_template=5),
        ValidationError,
        "chat_template must be a Jinja template or its file, got 5",
    ),
    "endless template": (
        lambda e: e.chat([{"role": "user", "content": "a"}], chat_template="{% for i in range(10**9) %}a{% endfor %}"),
        ValidationError,
        "chat template cannot render the conversation: Range too big",
    ),
    "number as id": (lambda e: e.abort(5), ValidationError, "request_id must be a list, got 5 of type int"),
    "number as function": (lambda e: e.apply_model(5), ValidationError, "function must be a function, got 5"),
    "number as method": (lambda e: e.collective_rpc(5), ValidationError, "method must be a function, got 5"),
    "number as trace": (lambda e: e.advise(5), ValidationError, "trace must be a Trace, of llm.trace.., got 5"),
    "no params": (lambda e: e.generate(["a"], []), ValidationError, r"prompts \(1\) and params \(0\)"),
    "template path": (
        lambda e: e.chat([{"role": "user", "content": "a"}], chat_template="/no/such.jinja"),
        ValidationError,
        "neither an existing file nor a Jinja template",
    ),
    "broken template": (
        lambda e: e.chat([{"role": "user", "content": "a"}], chat_template="{% for %}"),
        ValidationError,
        "chat template cannot render",
    ),
    "image": (
        lambda e: e.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ValidationError,
        "this engine reads text only",
    ),
    "no content": (
        lambda e: e.chat([{"role": "user"}]),
        ValidationError,
        "content of message 0 must be text, got None",
    ),
    "messages": (lambda e: e.chat("hello"), ValidationError, "messages must be"),
    "number as messages": (lambda e: e.chat(3), ValidationError, "messages must be"),
    "number as conversation": (lambda e: e.chat([3]), ValidationError, "messages must be"),
    "message": (lambda e: e.chat([["hello"]]), ValidationError, "must have a .role. and a .content."),
    "message without role": (lambda e: e.chat([{"content": "a"}]), ValidationError, "'role'"),
    "nan": (lambda e: SamplingParams(temperature=math.nan), ValidationError, "temperature must be a finite number"),
    "parameter": (
        lambda e: e.generate("a", temperature=0.5, n=2),
        TypeError,
        r"LLM.generate\(\) has no argument 'temperature', which is a field of SamplingParams: pass "
        r"sampling_params=SamplingParams\(temperature=0.5, n=2\)",
    ),
    "parameter of chat": (lambda e: e.stream_chat([], max_tokens=5), TypeError, r"SamplingParams\(max_tokens=5\)"),
    "parameter of embed": (
        lambda e: e.embed("a", dimensions=5),
        TypeError,
        r"pooling_params=PoolingParams\(dimensions=5\)",
    ),
    "parameter of a search": (
        lambda e: e.beam_search("a", beam_width=2),
        TypeError,
        r"BeamSearchParams\(beam_width=2\)",
    ),
    "argument of the template": (
        lambda e: e.chat([], enable_thinking=False),
        TypeError,
        r"chat_template_kwargs=\{'enable_thinking': False\}",
    ),
    "close argument": (lambda e: e.generate("a", sampling_parms=GREEDY), TypeError, "Did you mean 'sampling_params'"),
    "none in a list": (
        lambda e: e.generate(["a", None]),
        ValidationError,
        r"prompts\[1\]: a prompt .* NoneType: None, an empty cell",
    ),
    "nan in a list": (
        lambda e: e.generate(["a", math.nan]),
        ValidationError,
        r"prompts\[1\]: .*float: nan, an empty cell",
    ),
    "none in an iterator": (lambda e: e.generate(iter(["a", None])), ValidationError, r"prompts\[1\]: .*NoneType"),
    "none in a search": (
        lambda e: e.beam_search(["a", None], BeamSearchParams(beam_width=1, max_tokens=1)),
        ValidationError,
        r"prompts\[1\]: .*NoneType",
    ),
    "none as a conversation": (
        lambda e: e.chat([[{"role": "user", "content": "a"}], None]),
        ValidationError,
        r"messages\[1\]: messages must be",
    ),
    "close name": (lambda e: SamplingParams(temprature=1), TypeError, "did you mean 'temperature'"),  # pyright: ignore
    "removed name": (lambda e: SamplingParams(best_of=2), TypeError, "best_of"),  # pyright: ignore
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_bad_call_says_what_is_wrong(engine: LLM, call: tuple[Callable[[Any], Any], type[Exception], str]):
    function, kind, words = call
    with pytest.raises(kind, match=words):
        function(engine)
    assert_idle(engine)


def test_a_table_is_refused_by_its_columns(engine: LLM):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"id": [1, 2], "question": ["Why?", "How?"]})
    words = re.escape("is a DataFrame: give one of its columns, such as df['question']. Its columns are 'id', ")
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    calls = (engine.generate, engine.as_completed, engine.enqueue, lambda prompts: engine.beam_search(prompts, params))
    for call in (*calls, lambda prompt: list(engine.stream(prompt))):
        with pytest.raises(ValidationError, match=words):
            call(table)
    with pytest.raises(ValidationError, match=r"'content': text\}\] for text in df\['question'\]\]"):
        engine.chat(table)
    with pytest.raises(ValidationError, match=r"is a Series of integers.*list\(column\).*\[str\(number\)"):
        engine.generate(table["id"])
    outputs = engine.generate(table["question"], GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["Why?", "How?"]
    forms: list[Any] = [list(table["id"]), table["id"].to_numpy(), (1, 2), iter([1, 2])]
    for ids in forms:
        (output,) = engine.generate(ids, GREEDY, use_tqdm=False)
        assert output.prompt_token_ids == [1, 2]
    assert_idle(engine)


def test_an_argument_of_the_engine_cannot_be_set_while_it_runs(engine: LLM):
    with pytest.raises(AttributeError, match=r"max_model_len cannot be changed .*LLM\(model, max_model_len=512\)"):
        engine.max_model_len = 512
    held: Any = engine.engine.args
    with pytest.raises(AttributeError, match=r"max_model_len cannot be changed .*LLM\(model, max_model_len=512\)"):
        held.max_model_len = 512
    other: Any = dataclasses.replace(held)
    other.max_model_len = 512
    assert other.max_model_len == 512 != held.max_model_len
    with pytest.raises(AttributeError, match=r"SamplingParams\(temperature=0.5\)"):
        engine.temperature = 0.5


def test_tools_that_the_template_does_not_write(engine: LLM, caplog: pytest.LogCaptureFixture):
    """They are left out of the prompt, which is said once."""
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    for template in ("{{ messages[0].content }}{{ tools[0].function.name }}", None, None):
        (output,) = engine.chat(
            [{"role": "user", "content": "x"}], GREEDY, use_tqdm=False, tools=tools, chat_template=template
        )
        assert ("weather" in (output.prompt or "")) == (template is not None)
        said = [record.getMessage() for record in caplog.records if "writes no tools" in record.getMessage()]
        assert len(said) == (template is None)


def test_tools_that_are_none(engine: LLM):
    for tools in (3, "weather", ["weather"]):
        with pytest.raises(ValidationError, match=r"tools must be a list of mappings such as .*; got ") as refusal:
            engine.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=False, tools=tools)  # pyright: ignore
        assert repr(tools) in str(refusal.value)


def test_a_role_that_nobody_knows(engine: LLM, caplog: pytest.LogCaptureFixture):
    """The model's own template passes it on, which is said once; one that would leave the message out refuses it."""
    user, other = ({"role": role, "content": f"says the {role}"} for role in ("user", "usr"))
    for _ in range(2):
        (output,) = engine.chat([user, other], GREEDY, use_tqdm=False)
        assert output.prompt == "user: says the user\nusr: says the usr\n"
    (said,) = [record.getMessage() for record in caplog.records if "role" in record.getMessage()]
    assert said.startswith("The chat template gets the role 'usr', which is none of system,")
    assert said.endswith("Did you mean 'user'?")
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValidationError, match="leaves message 1 out: it does not know the role 'usr'"):
        engine.chat([user, other], GREEDY, chat_template=template, use_tqdm=False)
    # what the template names is its own business
    template = template.replace("'user'", "'user' or m.role == 'usr' and false")
    (output,) = engine.chat([user, other], GREEDY, chat_template=template, use_tqdm=False)
    assert output.prompt == "says the user"


def test_no_prompts_give_no_outputs(engine: LLM):
    assert engine.generate([], GREEDY, use_tqdm=False) == []


# The constructor.

ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "close name": ({"max_num_seq": 4}, TypeError, "unexpected keyword argument 'max_num_seq'. Did you mean 'max_num_s"),
    "unknown name": ({"banana": 1}, TypeError, "unexpected keyword argument 'banana'"),
    "not yet": ({"enable_eplb": True}, ValidationError, "enable_eplb=True is not supported yet"),
    "never": ({"worker_use_ray": True}, ValidationError, "jaxllm is one process"),
    "text": ({"max_num_seqs": "many"}, ValidationError, "max_num_seqs must be a whole number such as"),
    "float": ({"max_model_len": 1.5}, ValidationError, "max_model_len must be an integer, got 1.5 of type float"),
    "too long": ({"max_model_len": 513}, ValidationError, "Set max_model_len <= 512"),
    "share": ({"gpu_memory_utilization": 1.5}, ValidationError, r"must be in \(0, 1\], got 1.5"),
    "contradiction": ({"max_num_seqs": 64}, ValidationError, r"max_num_batched_tokens \(32\) must be greater than"),
    "dtype": ({"dtype": "float8"}, ValidationError, "dtype must be one of .* got 'float8'"),
    "classifier": (
        {"convert": "classify"},
        ValidationError,
        "needs a classifier, and LlamaForCausalLM has none: its weights have no 'score.weight'.*convert=.embed",
    ),
    "format": ({"load_format": "gguf"}, ValidationError, "holds safetensors weights"),
    "default params": (
        {"override_generation_config": {"temperature": 9}},
        ValidationError,
        r"temperature must be in \[0, 2\], got 9",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_bad_argument_says_what_is_wrong(tiny_model: Path, case: tuple[dict[str, Any], type[Exception], str]):
    arguments, kind, words = case
    with pytest.raises(kind, match=words):
        LLM(tiny_model, **{**SMALL, **arguments})


def test_a_model_that_is_not_there(tmp_path: Path):
    for missing in (tmp_path / "none.gguf", str(tmp_path / "folder" / "model"), "./nothing.gguf"):
        with pytest.raises(ModelNotFoundError, match="does not exist"):
            LLM(missing)
    with pytest.raises(FileNotFoundError):
        LLM(tmp_path / "none.gguf")
    with pytest.raises(ModelNotFoundError, match="neither config.json nor a .gguf file"):
        LLM(tmp_path)
    with pytest.raises(ValidationError, match="Did you mean 'smollm2-135m-instruct'"):
        LLM("smollm2-135m")
    with pytest.raises(ValidationError, match="model must be a name or a path, got 5"):
        LLM(5)  # pyright: ignore[reportArgumentType]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


GGUF_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", "truncated"),
    "another file": (lambda data: b"PK\x03\x04" + data[4:4096], "GGUF"),
    "header cut": (lambda data: data[:1000], "truncated|ends"),
    "weights cut": (cut, "truncated|ends"),
    "version": (lambda data: data[:4] + b"\x63\0\0\0" + data[8:4096], "version 99"),
    "absurd count": (lambda data: data[:8] + b"\xff" * 8 + data[16:4096], "."),
    "scrambled": (lambda data: data[:24] + bytes(reversed(data[24:4096])), "."),
}


@pytest.mark.parametrize("damage", GGUF_DAMAGE.values(), ids=GGUF_DAMAGE)
def test_a_corrupt_gguf_file(smollm2_gguf: Path, tmp_path: Path, damage: tuple[Callable[[bytes], bytes], str]):
    change, words = damage
    file = tmp_path / "model.gguf"
    file.write_bytes(change(smollm2_gguf.read_bytes()))
    with pytest.raises(WeightsError, match=words) as caught:
        LLM(file)
    assert str(file) in str(caught.value)
    assert isinstance(caught.value, JaxLLMError)


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def rename(header: dict[str, Any]) -> None:
    header["model.layers.1.mlp.up_proj.weight.old"] = header.pop("model.layers.1.mlp.up_proj.weight")


def reshape(header: dict[str, Any]) -> None:
    header["model.layers.0.mlp.down_proj.weight"]["shape"] = [128, 64]


SAFETENSORS_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", "truncated|corrupt|not safetensors"),
    "length": (lambda data: b"\xff" * 8 + data[8:], "truncated|corrupt|not safetensors"),
    "json": (lambda data: data[:8] + b"}" + data[9:], "truncated|corrupt|not safetensors"),
    "cut": (cut, "truncated|corrupt|not safetensors"),
    "a tensor less": (lambda data: with_header(data, rename), "'model.layers.1.mlp.up_proj.weight'"),
    "another shape": (
        lambda data: with_header(data, reshape),
        r"'model.layers.0.mlp.down_proj.weight' has shape \(128, 64\), the model's config asks for \(64, 128\)",
    ),
}


@pytest.mark.parametrize("damage", SAFETENSORS_DAMAGE.values(), ids=SAFETENSORS_DAMAGE)
def test_corrupt_safetensors(tiny_model: Path, tmp_path: Path, damage: tuple[Callable[[bytes], bytes], str]):
    change, words = damage
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    file = model / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(WeightsError, match=words):
        LLM(model, **SMALL)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("{", WeightsError, "not readable JSON"),
        ("[]", WeightsError, "expected a JSON object, found list"),
        ("{}", ValidationError, "architectures"),
        ('{"architectures": ["T5Model"]}', ValidationError, "T5Model.*LlamaForCausalLM"),
        ('{"architectures": ["LlamaForCausalLM"]}', ValidationError, "config.json has no field"),
    ],
)
def test_a_corrupt_config(tmp_path: Path, text: str, kind: type[Exception], words: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(kind, match=words):
        LLM(tmp_path, skip_tokenizer_init=True, load_format="dummy")


def test_parts_of_text_are_one_message(engine: LLM):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    outputs = engine.chat(
        [[{"role": "user", "content": parts}], [{"role": "user", "content": "one\ntwo"}]], GREEDY, use_tqdm=False
    )
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids


def test_a_bad_conversation_fails_alone(engine: LLM):
    good = [{"role": "user", "content": "a"}]
    outputs = engine.chat([good, [{"role": "user", "content": 5}], good], GREEDY, use_tqdm=False, on_error="return")
    assert [output.error is None for output in outputs] == [True, False, True]
    assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids


# What a notebook or a terminal shows of a refusal.


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


TOO_LONG = [1] * 300
TOO_LONG_CALLS: dict[str, Callable[[LLM], object]] = {
    "generate": lambda llm: llm.generate([TOO_LONG], GREEDY, use_tqdm=False),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "x" * 300}], GREEDY, use_tqdm=False),
    "as_completed": lambda llm: list(llm.as_completed([TOO_LONG], GREEDY)),
    "stream": lambda llm: list(llm.stream(TOO_LONG, GREEDY)),
    "add_request": lambda llm: llm.llm_engine.add_request("a", TOO_LONG, GREEDY),
    "constructor": lambda _: LLM("no/such/model"),
    "argument": lambda _: LLM("x", gpu_memory_utilization=7),
    "from_config": lambda _: LLM.from_config("no-such-configuration"),
}


@pytest.mark.parametrize("call", TOO_LONG_CALLS)
def test_a_refusal_shows_the_callers_lines_alone(engine: LLM, call: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(JaxLLMError) as caught:
        TOO_LONG_CALLS[call](engine)
    text = shown(caught.value)
    assert "/jaxllm/" not in text and text.count("Traceback") == 1
    assert text.count("\n  File ") == 2, "this function, and the lambda"
    monkeypatch.setenv("JAXLLM_FULL_TRACEBACK", "1")
    with pytest.raises(JaxLLMError) as caught:
        TOO_LONG_CALLS[call](engine)
    assert "/jaxllm/" in shown(caught.value)


def test_a_refusal_under_asyncio_shows_the_callers_lines_alone(engine: LLM):
    # the engine is driven by its thread for as long as it is a face of it
    llm = AsyncLLM.__new__(AsyncLLM)
    llm._drive(engine)

    async def main() -> None:
        with pytest.raises(ValidationError) as caught:
            async for _ in llm.generate(TOO_LONG, GREEDY):
                pass
        assert "/jaxllm/" not in shown(caught.value) and shown(caught.value).count("\n  File ") == 1

    asyncio.run(main())
    llm._thread.close()


def test_what_the_caller_was_handling_is_still_shown(engine: LLM):
    with pytest.raises(ValidationError) as caught:
        try:
            raise KeyError("the caller's own")
        except KeyError:
            engine.generate([TOO_LONG], GREEDY, use_tqdm=False)
    assert "the caller's own" in shown(caught.value) and "/jaxllm/" not in shown(caught.value)


def test_a_failure_that_is_no_refusal_shows_where_it_happened(engine: LLM, monkeypatch: pytest.MonkeyPatch):
    def broken(self: Runner, scheduled: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Runner, "execute", broken)
    with pytest.raises(RuntimeError) as caught:
        engine.generate("x", GREEDY, use_tqdm=False)
    assert "/jaxllm/engine/core.py" in shown(caught.value)
