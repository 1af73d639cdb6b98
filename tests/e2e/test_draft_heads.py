"""Heads draft: what comes out is the model's, and every draft is the one that the published architecture makes."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.drafts import checks_that_cost, counted, results
from support.eagle_head import EagleOracle, write_eagle, write_eagle3
from support.mtp_layer import CONFIGS, MtpOracle, write_mtp
from support.own_process import found_by

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import engine_args
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.mtp import mtp_head
from jaxllm.models.registry import model_config
from jaxllm.startup.draft_setup import read_draft

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "block_size": 8,
}
#: a pool that does not hold two long requests
FEW = {"num_gpu_blocks_override": 18}
DRAFTS = 3
#: two tokens are likely, so that drafts are right now and then
BIAS = {20: 40.0, 40: 40.0}
LENGTHS = (1, 2, 5, 6, 70, 40, 57, 60)


class Case(NamedTuple):
    plain: LLM
    drafting: LLM
    #: (tokens, number, bias) -> drafts
    drafts: Callable[[list[int], int, dict[int, float]], list[int]]


@pytest.fixture(
    scope="module",
    params=[
        "eagle3",
        *(
            pytest.param(kind, marks=pytest.mark.thorough)
            for kind in ("eagle", "mtp of DeepSeek-V3", "mtp of Qwen3", "eagle3 of 2 layers")
        ),
        *(pytest.param(kind, marks=pytest.mark.large) for kind in ("eagle of 3 layers", "mtp of GLM-4.5")),
    ],
)
def case(request: Any, tiny_model: Path, tmp_path_factory: Any) -> Iterator[Case]:
    """A launch waits for the one before, so that none has fewer drafts since that one may have brought more tokens than
    it did.
    """
    method, _, what = request.param.partition(" of ")
    folder, config = tmp_path_factory.mktemp(method), {"method": method, "num_speculative_tokens": DRAFTS}
    if method == "mtp":
        model = write_mtp(folder, what)
        oracle = MtpOracle(model)
    else:
        write: Callable[..., Path] = {"eagle3": write_eagle3, "eagle": write_eagle}[method]
        model, head = tiny_model, write(folder, layers=int(what[:1] or 1))
        config["model"], oracle = str(head), EagleOracle(model, head)
    with (
        LLM(model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as plain,
        LLM(model, **ARGUMENTS, **FEW, async_scheduling=False, speculative_config=config) as drafting,
        # whatever is drafted is checked
        checks_that_cost(drafting, 0.0),
    ):
        yield Case(plain, drafting, oracle.drafts)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in (5, 7, 8, 30, 50, 3, 17, 64)]


def numbers(llm: LLM) -> tuple[int, int]:
    return counted(llm, "num_draft_tokens"), counted(llm, "num_accepted_tokens")


def replayed(case: Case, prompt: list[int], output: list[int]) -> tuple[int, int]:
    """(drafted, accepted) while `output` was made: steps begin with what the prompt's last step has sampled."""
    drafted = accepted = 0
    done = 1
    while done < len(output):
        count = min(DRAFTS, len(output) - done - 1)
        drafts = case.drafts([*prompt, *output[:done]], count, BIAS)
        right = next((i for i, draft in enumerate(drafts) if draft != output[done + i]), count)
        drafted, accepted, done = drafted + count, accepted + right, done + 1 + right
    return drafted, accepted


def test_every_draft_is_what_the_published_head_makes(case: Case):
    """The numbers of right drafts are those of a torch head that computes every sequence from nothing: behind chunks of
    prompts that end within blocks and at their ends, hits of the prefix cache that go on otherwise, wrong drafts, lots
    of which all were right, and weights that were away.
    """
    rng = random.Random(0)
    first = [rng.randrange(256) for _ in range(33)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logit_bias=BIAS)
    right = 0
    for number, prompt in enumerate(([7], first[:16], first, [*first[:24], *first[:9]], [*first, 5, 9])):
        if number == 1:
            case.drafting.sleep(level=1)
            case.drafting.wake_up()
        (wanted,) = case.plain.generate(prompt, params, use_tqdm=False)
        before = numbers(case.drafting)
        (got,) = case.drafting.generate(prompt, params, use_tqdm=False)
        output = list(got.outputs[0].token_ids)
        assert output == list(wanted.outputs[0].token_ids)
        drafted, accepted = (now - then for now, then in zip(numbers(case.drafting), before, strict=True))
        assert (drafted, accepted) == replayed(case, prompt, output)
        right += accepted
    assert right > 20


def test_a_hit_of_a_block_that_the_same_step_writes(case: Case):
    """The first prompt leaves the second half a step, so that the next one fills a block and has room for the third,
    which is equal, and hits it.
    """
    rng = random.Random(1)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logit_bias=BIAS)
    first = dataclasses.replace(params, max_tokens=1)
    for _ in range(3):
        short, prompt = ([rng.randrange(256) for _ in range(length)] for length in (4, 9))
        before = numbers(case.drafting)
        _, *got = case.drafting.generate([short, prompt, prompt], [first, params, params], use_tqdm=False)
        assert [output.num_cached_tokens for output in got] == [0, 8]
        drafted, accepted = (now - then for now, then in zip(numbers(case.drafting), before, strict=True))
        wanted = [replayed(case, prompt, list(output.outputs[0].token_ids)) for output in got]
        assert [drafted, accepted] == [sum(each) for each in zip(*wanted, strict=True)]


def test_restricted_requests_have_the_hosts_drafts(case: Case):
    """The head reads them as soon as they are right, and drafts for their prefix as for any other."""
    rng = random.Random(2)
    prompt = [rng.randrange(256) for _ in range(12)]
    params = SamplingParams(temperature=0.0, max_tokens=30, structured_outputs={"regex": "(abc|def){9,19}"})
    (wanted,) = case.plain.generate(prompt, params, use_tqdm=False)
    (got,) = case.drafting.generate(prompt, params, use_tqdm=False)
    assert results([got]) == results([wanted])
    assert got.metrics is not None and got.metrics.num_accepted_tokens > 5
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logit_bias=BIAS)
    follow_up, before = [*prompt, *got.outputs[0].token_ids, 7], numbers(case.drafting)
    (later,) = case.drafting.generate(follow_up, free, use_tqdm=False)
    # the last token is computed where it was a draft, which hangs on how many a check had
    assert later.num_cached_tokens in (32, 40)
    drafted, accepted = (now - then for now, then in zip(numbers(case.drafting), before, strict=True))
    assert (drafted, accepted) == replayed(case, follow_up, list(later.outputs[0].token_ids))


def test_what_blocks_held_before_does_not_matter(case: Case):
    """Not even what is no number."""
    runner: Any = case.drafting.engine.core.cores[0]._runner  # pyright: ignore
    case.drafting.reset_prefix_cache()
    cache = runner._state.draft_cache
    spoiled = dataclasses.replace(cache, hidden=jnp.full_like(cache.hidden, jnp.nan))
    runner._state = dataclasses.replace(runner._state, draft_cache=spoiled)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logit_bias=BIAS)
    prompt, before = list(range(40, 61)), numbers(case.drafting)
    (got,) = case.drafting.generate(prompt, params, use_tqdm=False)
    drafted, accepted = (now - then for now, then in zip(numbers(case.drafting), before, strict=True))
    assert (drafted, accepted) == replayed(case, prompt, list(got.outputs[0].token_ids))


def test_beside_others_outputs_are_the_models(case: Case):
    """Sampled, with preemptions, hits of the prefix cache, a request that has no drafts, and then with other weights,
    which leave the head as it is.
    """
    sampled: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "logit_bias": BIAS, "ignore_eos": True}
    params = [SamplingParams(**sampled, max_tokens=length) for length in LENGTHS]
    params[3] = SamplingParams(temperature=0.0, max_tokens=30, structured_outputs={"regex": "(ab|cd){2,9}"})
    engines = case.plain, case.drafting
    before = numbers(case.drafting)
    (weights,) = case.drafting.apply_model(lambda params: params)
    assert weights.draft is None
    try:
        for changes in (False, False, True):
            if changes:
                other = dataclasses.replace(weights, norm=weights.norm * np.float32(0.9))
                for llm in engines:
                    llm.update_weights(other)
            wanted, got = (llm.generate(prompts(), params, use_tqdm=False) for llm in engines)
            assert results(got) == results(wanted)
            assert case.drafting.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0
    finally:
        for llm in engines:
            llm.update_weights(weights)
    drafted, accepted = (now - then for now, then in zip(numbers(case.drafting), before, strict=True))
    assert drafted > accepted > 50
    metrics = case.drafting.get_metrics()
    assert sum(metric.value for metric in metrics if metric.name == "vllm:num_preemptions")  # pyright: ignore


@pytest.mark.thorough
def test_a_head_that_knows_what_follows_is_never_wrong(tiny_model: Path, tmp_path: Path):
    """The model's next token depends on the last one alone, and the head scores the same embedding: with two launches
    under way, preemptions, and requests beside each other.
    """
    model, head = tmp_path / "model", tmp_path / "head"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    write_eagle(head)
    for folder in (model, head):
        tensors = load_file(folder / "model.safetensors")
        for name, array in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "fc.bias")):
                tensors[name] = np.zeros_like(array)
        if "fc.weight" in tensors:
            tensors["fc.weight"] = np.eye(*tensors["fc.weight"].shape, dtype=np.float32)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"method": "eagle", "model": str(head), "num_speculative_tokens": DRAFTS}
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in LENGTHS]
    with LLM(model, **ARGUMENTS, **FEW, speculative_config=config) as llm, checks_that_cost(llm, 0.0):
        for _ in range(2):
            llm.generate(prompts(), params, use_tqdm=False)
        drafted, accepted = numbers(llm)
    assert drafted == accepted > 150


def test_what_drafts_is_told_by_its_files_not_by_its_path(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A folder whose path sounds like a head holds a model, and one that does not, a head."""
    target = model_config(json.loads((tiny_model / "config.json").read_text()))
    assert isinstance(target, DecoderConfig)
    cases: dict[str, tuple[Callable[[Path], Any], str | None, str]] = {
        "eagle-nest/llama": (lambda folder: shutil.copytree(tiny_model, folder), None, "draft_model"),
        "head": (write_eagle3, "eagle3", "eagle3"),
        "EAGLE-llama": (write_eagle, "eagle", "eagle"),
    }
    for name, (write, kind, method) in cases.items():
        write(tmp_path / name)
        args = engine_args(str(tiny_model), spec_model=str(tmp_path / name), spec_tokens=2)
        assert args.speculative_config is not None
        with caplog.at_level("INFO", "jaxllm"):
            draft = read_draft(args, args.speculative_config, target, max_model_len=None)
        assert (draft.head and draft.head.kind) == kind
        assert f"{name} is taken for method={method!r}" in caplog.messages[-1]


def test_what_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path):
    def refused(text: str, config: dict[str, Any], **drafts: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValidationError, match=text):
            LLM(tiny_model, **ARGUMENTS, speculative_config={"num_speculative_tokens": 2, **drafts})

    write_eagle3(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    eagle3 = {"method": "eagle3", "model": str(tmp_path)}
    del own["eagle_aux_hidden_state_layer_ids"]
    refused("inputs of the model's layers 2, 1, -1, and the model has 2", own, **eagle3)
    refused("'Qwen2ForCausalLM' is none of EAGLE's", {**own, "architectures": ["Qwen2ForCausalLM"]}, **eagle3)
    refused("hidden_size is 48, and the model's is 64", own, method="eagle", model=str(tmp_path))
    refused("'mtp' is for DeepseekV3ForCausalLM.* this is LlamaForCausalLM", own, method="mtp")
    for name, tensor in (("DeepSeek-V3", "model.layers.2.eh_proj"), ("Qwen3", "mtp.fc")):
        with pytest.raises(ValidationError, match=f"there is no tensor {tensor}.weight"):
            mtp_head(CONFIGS[name], model_config(CONFIGS[name]), lambda name: False)


@pytest.mark.thorough
def test_over_two_devices_drafts_are_those_of_one(tmp_path: Path):
    found = found_by("support.split_head", tmp_path)
    assert found["2"] == found["1"]
    drafted, accepted = found["1"]["drafts"]
    assert drafted > accepted > 20
