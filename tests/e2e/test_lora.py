"""Adapters through the whole engine, against PEFT on torch: mixed in batches, more of them than there are slots."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import ADAPTERS, TABLES, Oracle, difference, save_adapter
from support.serving import get, served
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.entrypoints.cli import main
from jaxllm.runner.build import make_programs

PARAMS = SamplingParams(max_tokens=5, temperature=0.0, logprobs=1, ignore_eos=True)
#: fewer slots than adapters, and ranks below the highest
ARGUMENTS: dict[str, Any] = {**SMALL, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "block_size": 8}
NAMES: list[str | None] = [None, *ADAPTERS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    each = enumerate(ADAPTERS.items())
    return {name: save_adapter(model, folder / name, seed=seed, **config) for seed, (name, config) in each}


@pytest.fixture(scope="module")
def oracle(model: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model, adapters)


@pytest.fixture(scope="module")
def requests(adapters: dict[str, Path]) -> dict[str | None, LoRARequest | None]:
    return {None: None, **{name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), 1)}}


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(model, **ARGUMENTS)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def llm(engine: AsyncLLM) -> LLM:
    return engine.llm


@pytest.mark.parametrize("size", [1, 5, 32])
def test_batches_of_several_adapters_get_what_peft_says(llm: LLM, oracle: Oracle, requests: Any, size: int):
    names = [NAMES[(i + size) % len(NAMES)] for i in range(size)]
    prompts = [f"prompt {i} of {size}" * (1 + i % 4) for i in range(size)]
    outputs = llm.generate(prompts, PARAMS, lora_request=[requests[name] for name in names], use_tqdm=False)
    for name, output in zip(names, outputs, strict=True):
        assert output.lora_request == output.outputs[0].lora_request == requests[name]
        assert difference(oracle, name, output) < 1e-4
    # and the adapters are no small matter
    assert size < 5 or max(difference(oracle, None, o) for o, n in zip(outputs, names, strict=True) if n) > 0.1


def test_one_adapter_for_all_prompts_and_other_methods(llm: LLM, oracle: Oracle, requests: Any):
    all_of_it = requests["all"]
    for output in llm.generate(["one", "two"], PARAMS, lora_request=all_of_it, use_tqdm=False):
        assert difference(oracle, "all", output) < 1e-4
    (chat,) = llm.chat([{"role": "user", "content": "x"}], PARAMS, lora_request=all_of_it, use_tqdm=False)
    assert difference(oracle, "all", chat) < 1e-4
    (plain,) = llm.generate("one", PARAMS, lora_request=all_of_it, use_tqdm=False)
    assert "".join(llm.stream("one", PARAMS, lora_request=all_of_it)) == plain.outputs[0].text
    several = SamplingParams(max_tokens=3, temperature=1.0, seed=3, n=2, logprobs=1, ignore_eos=True)
    (output,) = llm.generate("one", several, lora_request=all_of_it, use_tqdm=False)
    assert len(output.outputs) == 2 and difference(oracle, "all", output) < 1e-4


def test_where_it_is_deterministic_bits_depend_on_no_other_request(model: Path, oracle: Oracle, requests: Any):
    """Nor on the slot that an adapter has, nor on what of a prompt is cached."""
    names = [NAMES[i % len(NAMES)] for i in range(10)]
    prompts = [f"a beginning of some length {i % 3}" * (1 + i % 2) for i in range(10)]
    with LLM(model, **ARGUMENTS, deterministic=True) as llm:

        def found(which: list[int]) -> dict[int, list[tuple[int, float]]]:
            chosen, loras = [prompts[i] for i in which], [requests[names[i]] for i in which]
            outputs = llm.generate(chosen, PARAMS, lora_request=loras, use_tqdm=False)
            assert max(difference(oracle, names[i], output) for i, output in zip(which, outputs, strict=True)) < 1e-4
            answers = (output.outputs[0] for output in outputs)
            return {
                i: [(token, found[token].logprob) for token, found in zip(a.token_ids, a.logprobs or [], strict=True)]
                for i, a in zip(which, answers, strict=True)
            }

        together = found(list(range(10)))
        assert {i: answer for i in reversed(range(10)) for answer in found([i]).values()} == together
        assert llm.reset_prefix_cache() and found([7, 2, 1]) == {i: together[i] for i in (7, 2, 1)}


def test_cached_blocks_are_an_adapters_own(llm: LLM, oracle: Oracle, requests: Any, adapters: Any, tmp_path: Path):
    prompt = "a prompt of several blocks, which are cached"
    first = requests["attention"]

    def run(request: LoRARequest | None, name: str | None) -> int:
        (output,) = llm.generate(prompt, PARAMS, lora_request=request, use_tqdm=False)
        assert difference(oracle, name, output) < 1e-4
        return output.num_cached_tokens

    assert run(None, None) == 0 and run(first, "attention") == 0
    assert run(first, "attention") == run(None, None) == 40
    # what is replaced leaves nothing behind
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["attention"], folder)
    assert run(LoRARequest("own", 9, folder), "attention") == 0
    assert run(LoRARequest("own", 9, folder), "attention") == 40
    shutil.rmtree(folder)
    shutil.copytree(adapters["all"], folder)
    assert run(LoRARequest("own", 9, folder, load_inplace=True), "all") == 0
    engine = llm.llm_engine
    assert 9 in engine.list_loras() and engine.remove_lora(9) and not engine.remove_lora(9)
    assert 9 not in engine.list_loras()


def test_adapters_are_added_and_pinned_beforehand(llm: LLM, oracle: Oracle, requests: Any):
    engine = llm.llm_engine
    engine.remove_lora(1)
    assert engine.add_lora(requests["attention"]) and not engine.add_lora(requests["attention"])
    assert engine.pin_lora(1)
    with pytest.raises(ValidationError, match="Pinning LoRA 2 would leave no other adapter a place .*max_loras=2"):
        engine.add_lora(requests["all"])
        engine.pin_lora(2)
    with pytest.raises(ValidationError, match="LoRA 77 is not registered"):
        engine.pin_lora(77)
    names = [name for name in NAMES if name] * 2
    outputs = llm.generate(["p"] * 6, PARAMS, lora_request=[requests[name] for name in names], use_tqdm=False)
    assert max(difference(oracle, name, output) for name, output in zip(names, outputs, strict=True)) < 1e-4
    engine.remove_lora(1)


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _tensors(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


#: what is done to an adapter -> what is said of it
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "the folder is not there"),
    "empty": (lambda f: (f / "adapter_config.json").unlink(), "the folder has no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "cut off": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\1" * 9), "cannot be read"),
    "DoRA": (lambda f: _config(f, use_dora=True), "use_dora=True is not supported"),
    "biases": (lambda f: _config(f, bias="all"), "bias='all' is not supported"),
    "another kind": (lambda f: _config(f, peft_type="IA3"), "peft_type must be 'LORA', got 'IA3'"),
    "other ranks": (lambda f: _config(f, r=3), "has rank 4, and adapter_config.json says 3"),
    "module": (
        lambda f: _tensors(f, lambda t: {name.replace("q_proj", "w_proj"): array for name, array in t.items()}),
        r"no module 'model.layers.0.self_attn.w_proj' that could have an adapter; those that could: down_proj, gate_",
    ),
    "tensor": (
        lambda f: _tensors(f, lambda t: {name.replace("lora_B.weight", "lora_C"): a for name, a in t.items()}),
        "the tensor .* is not supported",
    ),
    "half": (
        lambda f: _tensors(f, lambda t: {name: array for name, array in t.items() if "lora_A" in name}),
        "has one of lora_A and lora_B, and not the other",
    ),
    "another model": (
        lambda f: _tensors(
            f, lambda t: {name: array[:, :-1] if "lora_A" in name else array for name, array in t.items()}
        ),
        r"lora_A \[4, 63\] and lora_B \[64, 4\]; the model's matrix is \[64, 64\]",
    ),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_what_is_wrong_with_an_adapter_is_said_of_its_request_alone(
    llm: LLM, adapters: dict[str, Path], tmp_path: Path, problem: str
):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["attention"], folder)
    change, said = BROKEN[problem]
    change(folder)
    request = LoRARequest("broken", 50, folder)
    with pytest.raises(ValidationError, match=f"'broken'.*{said}"):
        llm.generate("a", PARAMS, lora_request=request, use_tqdm=False)
    good, bad = llm.generate(["a", "b"], PARAMS, lora_request=[None, request], use_tqdm=False, on_error="return")
    assert good.error is None and len(good.outputs[0].token_ids) == 5
    assert bad.error is not None and bad.outputs[0].finish_reason == "error"
    assert 50 not in llm.llm_engine.list_loras()


def test_what_an_adapter_asks_too_much(llm: LLM, model: Path, requests: Any, tmp_path: Path):
    large = LoRARequest("large", 60, save_adapter(model, tmp_path / "large", r=16, target_modules=["q_proj"]))
    with pytest.raises(ValidationError, match="LoRA rank 16 .* is greater than max_lora_rank 8. Set max_lora_rank to"):
        llm.generate("a", PARAMS, lora_request=large, use_tqdm=False)
    with pytest.raises(ValidationError, match=r"prompts \(2\) and lora_request \(1\) must be the same"):
        llm.generate(["a", "b"], PARAMS, lora_request=[requests["all"]], use_tqdm=False)
    with pytest.raises(ValidationError, match="lora_int_id=2 is the adapter 'all' of .* and not 'other'"):
        llm.generate(["a", "b"], PARAMS, lora_request=[requests["all"], LoRARequest("other", 2, "/x")], use_tqdm=False)
    with pytest.raises(TypeError, match="lora_request must be LoRARequest, got str"):
        llm.generate("a", PARAMS, lora_request="all", use_tqdm=False)  # pyright: ignore[reportArgumentType]


def test_steps_without_adapters_cost_what_they_did(llm: LLM, requests: Any):
    config, runner = llm.engine.model_files.config, llm.engine.runner
    programs: Any = runner.head.programs  # pyright: ignore[reportAttributeAccessIssue]
    without: Any = make_programs(dataclasses.replace(config, lora=None), config.params(), llm.memory_plan.num_blocks)
    assert not any(bucket.adapters for bucket in without.packings)
    for bucket in without.packings:
        # to the letter what is compiled where there are no adapters
        assert programs.lower_forward(bucket).as_text() == without.lower_forward(bucket).as_text()
    ran: list[bool] = []
    found = programs.forward
    try:
        programs.forward = lambda bucket: (ran.append(bucket.adapters), found(bucket))[1]
        llm.generate(["abc", "de"], PARAMS, use_tqdm=False)
        assert ran and not any(ran)
        llm.generate(["abc", "de"], PARAMS, lora_request=[requests["all"], None], use_tqdm=False)
        assert ran[-1]
    finally:
        del programs.forward


def test_embeddings_and_heads_of_adapters(model: Path, tmp_path: Path):
    """Whole ones and changes, of tokens to come and of those of the prompt; more adapters than there are slots."""
    each = enumerate(TABLES.items())
    adapters = {name: save_adapter(model, tmp_path / name, seed=seed, **config) for seed, (name, config) in each}
    oracle = Oracle(model, adapters)
    requests = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), 1)}
    names: list[str | None] = [None, *adapters]
    names = [names[(i * 2) % len(names)] for i in range(10)]
    params = dataclasses.replace(PARAMS, prompt_logprobs=0)
    with LLM(model, **ARGUMENTS, lora_embeddings=True) as llm:
        prompts = [f"prompt {i}" * (1 + i % 4) for i in range(len(names))]
        loras = [None if name is None else requests[name] for name in names]
        outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        for name, output in zip(names, outputs, strict=True):
            assert difference(oracle, name, output) < 1e-4
            assert name is None or difference(oracle, None, output) > 0.1
            prompt, scored = output.prompt_token_ids or [], output.prompt_logprobs or []
            theirs = oracle.logprobs(name, prompt[:1], prompt[1:])
            ours = [(entry or {})[token].logprob for token, entry in zip(prompt[1:], scored[1:], strict=True)]
            assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
        runner: Any = llm.engine.runner
        own = sum(stacks.num_bytes for stacks in runner._adapters)
        assert llm.memory_plan.adapter_bytes == own * 3 // 2 > 2 * 2 * 257 * 64 * 4
        folder = tmp_path / "other words"
        shutil.copytree(adapters["a head"], folder)
        _tensors(folder, lambda t: {n: np.repeat(a, 2, axis=0) if "lm_head" in n else a for n, a in t.items()})
        with pytest.raises(ValidationError, match="Its 257 added tokens are not supported"):
            llm.generate("x", PARAMS, lora_request=LoRARequest("other", 9, folder), use_tqdm=False)
        _changes_follow_the_weights(llm, model, adapters["changed tables"], tmp_path)


def _changes_follow_the_weights(llm: LLM, model: Path, adapter: Path, tmp_path: Path) -> None:
    """What an adapter adds to the model's tables is added to those that the model gets."""
    own, other = tmp_path / "own", tmp_path / "other model"
    shutil.copytree(adapter, own)
    # PEFT has saved what the tables were before they were changed, too
    _tensors(own, lambda tensors: {name: a for name, a in tensors.items() if "base_layer" not in name})
    shutil.copytree(model, other)
    weights = load_file(model / "model.safetensors")
    turned = {name: a[::-1].copy() if len(a) == 257 else a for name, a in weights.items()}
    save_file(turned, other / "model.safetensors", {"format": "pt"})
    oracle, request = Oracle(other, {"own": own}), LoRARequest("own", 10, own)
    (params,) = llm.apply_model(lambda params: params)
    (before,) = llm.generate("a change", PARAMS, lora_request=request, use_tqdm=False)
    llm.update_weights(dataclasses.replace(params, embedding=params.embedding[::-1], head=params.head[::-1]))
    (after,) = llm.generate("a change", PARAMS, lora_request=request, use_tqdm=False)
    assert difference(oracle, "own", after) < 1e-4 and difference(oracle, "own", before) > 0.1


def test_options_of_requests_beside_adapters(llm: LLM, oracle: Oracle, requests: Any):
    own, prompt = requests["all"], "options beside adapters"
    shaped = SamplingParams(
        max_tokens=8, temperature=0.0, logprobs=1, structured_outputs=StructuredOutputsParams(regex="(ab|cd){2,4}")
    )
    (output,) = llm.generate(prompt, shaped, lora_request=own, use_tqdm=False)
    assert re.fullmatch("(ab|cd){2,4}", output.outputs[0].text)
    scored = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    (output,) = llm.generate(prompt, scored, lora_request=own, use_tqdm=False)
    ids = output.prompt_token_ids or []
    scores = zip(ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
    ours = [entry[token].logprob for token, entry in scores if entry]
    assert ours == pytest.approx(oracle.logprobs("all", ids[:1], ids[1:]), abs=1e-4)
    found = llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True), lora_request=own)
    best = found[0].sequences[0]
    theirs = oracle.logprobs("all", ids, best.tokens[len(ids) :])
    assert best.cum_logprob == pytest.approx(sum(theirs), abs=1e-3)
    # weights that are put away and come back leave nothing behind of adapters, which come back too
    for level in (1, 2):
        llm.sleep(level=level)
        llm.wake_up()
        (output,) = llm.generate(prompt, PARAMS, lora_request=own, use_tqdm=False)
        assert difference(oracle, "all", output) < 1e-4
    # and weights that are read anew leave the adapters where they are
    llm.collective_rpc("reload_weights")
    (output,) = llm.generate(prompt, PARAMS, lora_request=own, use_tqdm=False)
    assert output.num_cached_tokens == 0 and difference(oracle, "all", output) < 1e-4


def test_a_step_without_adapters_is_the_program_of_an_engine_without_them(llm: LLM, model: Path):
    with LLM(model, **SMALL, block_size=8) as plain:
        texts = []
        for engine in (llm, plain):
            programs: Any = engine.engine.runner.head.programs  # pyright: ignore[reportAttributeAccessIssue]
            lines = programs.forward(programs.bucket(1, 1)).as_text().splitlines()
            # but for the lines of Python that an operation is from
            texts.append([re.sub(r", metadata=\{.*?\}", "", line) for line in lines if " = " in line])
    assert texts[0] == texts[1] and len(texts[0]) > 100


def test_the_memory_plan_counts_them(model: Path, llm: LLM):
    runner: Any = llm.engine.runner
    config = llm.engine.model_files.config
    own = sum(stacks.num_bytes for stacks in runner._adapters)
    # one on its way
    assert config.adapter_bytes == llm.memory_plan.adapter_bytes == own * 3 // 2 <= llm.memory_plan.state_bytes
    assert "of it LoRA" in str(llm.memory_plan) and "2 adapters of rank 8, and one on its way" in str(llm.memory_plan)


def _logprobs(choice: Any) -> tuple[list[int], list[float]]:
    tokens = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
    return tokens, choice.logprobs.token_logprobs


def test_a_server_has_adapters_beside_its_model(engine: AsyncLLM, oracle: Oracle, adapters: dict[str, Path]):
    extra = {"return_tokens_as_token_ids": True, "ignore_eos": True}
    prompt = list(b"a prompt")
    with (
        served(engine, lora_modules=(("first", str(adapters["attention"])),), admin_endpoints=True) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):

        def far(model: str, name: str | None) -> float:
            asked = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 1, "extra_body": extra}
            answer = client.completions.create(model=model, **asked)
            assert answer.model == model
            tokens, found = _logprobs(answer.choices[0])
            theirs = oracle.logprobs(name, prompt, tokens)
            return max(abs(a - b) for a, b in zip(found, theirs, strict=True))

        assert far("tiny", None) < 1e-4 and far("first", "attention") < 1e-4
        added = {"lora_name": "second", "lora_path": str(adapters["all"])}
        assert get(url, "/v1/load_lora_adapter", added)[0] == 200
        assert far("second", "all") < 1e-4
        base = str(engine.llm.engine.args.model), None
        own = {"first": (str(adapters["attention"]), "tiny"), "second": (str(adapters["all"]), "tiny")}
        models: Any = client.models.list()
        assert {each.id: (each.root, each.parent) for each in models} == {"tiny": base, "alias": base, **own}
        (info,) = (metric for metric in engine.llm.get_metrics() if metric.name == "vllm:lora_requests_info")
        told = {"max_lora": "2", "waiting_lora_adapters": "", "running_lora_adapters": ""}
        assert told.items() <= info.labels.items()
        status, _, told = get(url, "/v1/load_lora_adapter", added)
        assert status == 400 and "has already been loaded" in told["error"]["message"]
        replaced = {"lora_name": "second", "lora_path": str(adapters["attention"]), "load_inplace": True}
        assert get(url, "/v1/load_lora_adapter", replaced)[0] == 200
        assert far("second", "attention") < 1e-4 and far("second", "attention") < 1e-4
        status, _, told = get(url, "/v1/load_lora_adapter", {"lora_name": "third", "lora_path": "/no/such"})
        assert status == 400 and "the folder is not there" in told["error"]["message"]
        status, _, told = get(url, "/v1/unload_lora_adapter", {"lora_name": "second", "lora_int_id": 99})
        assert status == 400 and "lora_int_id=99 is not 'second'" in told["error"]["message"]
        assert get(url, "/v1/unload_lora_adapter", {"lora_name": "second"})[0] == 200
        assert get(url, "/v1/unload_lora_adapter", {"lora_name": "second"})[0] == 404
        with pytest.raises(openai.NotFoundError, match="The model `second` does not exist"):
            far("second", None)
    for number in engine.llm.llm_engine.list_loras():
        engine.llm.llm_engine.remove_lora(number)


def test_lines_of_a_batch_name_adapters(model: Path, oracle: Oracle, adapters: dict[str, Path], tmp_path: Path):
    body = {"prompt": list(b"a line"), "max_tokens": 4, "temperature": 0, "logprobs": 1}
    body |= {"return_tokens_as_token_ids": True, "ignore_eos": True}
    names: dict[str, str | None] = {"base": None, "some": "some layers", "all": "all"}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": name, **body}}
        for name in [*names, "nobody"]
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = [f"--{name.replace('_', '-')}={value}" for name, value in ARGUMENTS.items() if value is not True]
    asked += [f"--{name.replace('_', '-')}" for name, value in ARGUMENTS.items() if value is True]
    modules = [f"some={adapters['some layers']}", json.dumps({"name": "all", "path": str(adapters["all"])})]
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    served = ["--served-model-name", "base", "--lora-modules", *modules]
    assert main(["run-batch", *files, "--model", str(model), *asked, *served]) == 3
    found = {line["custom_id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert found["nobody"]["response"]["status_code"] == 404
    for name, adapter in names.items():
        choice = found[name]["response"]["body"]["choices"][0]
        tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
        theirs = oracle.logprobs(adapter, list(b"a line"), tokens)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(theirs, abs=1e-4)
