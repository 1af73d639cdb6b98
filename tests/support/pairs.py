"""Every capability beside every other one: engines with many settings on, asked for every pair of requests' options.

``python -m support.pairs FOLDER`` prints one JSON object, by engine, of what each request got. An engine that has two
settings on and answers as the plain engine does shows that these two work together, and with everything that was asked.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from support.quantized_checkpoints import write
from support.tiny_model import EOS, SMALL, byte_tokenizer

from jaxllm import LLM, AsyncLLM, BeamSearchParams, LogitsProcessor, SamplingParams
from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import RequestOutputKind
from jaxllm.speculative import adaptive

TOKEN = byte_tokenizer().get_vocab()
LETTERS = [TOKEN[letter] for letter in "abcdefghijklm"]
BUDGET = 2
#: option of a request -> its parameters
KINDS: dict[str, dict[str, Any]] = {
    "seed": {"temperature": 1.3, "top_p": 0.95, "seed": 11},
    "n": {"n": 2, "temperature": 1.0, "seed": 5},
    "logprobs": {"logprobs": 3},
    "prompt logprobs": {"prompt_logprobs": 2},
    "structured outputs": {"structured_outputs": {"regex": "(ab|cd|fg){2,9}"}},
    "stop string": {"stop": ["c", "ab"]},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": LETTERS[7:]},
    "bad words": {"bad_words": ["a", "dd"]},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "logit bias": {"logit_bias": {TOKEN["d"]: 4.0}},
    "logits processor": {"extra_args": {"bonus": 6.0}},
    "repetition detection": {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 3}},
    "thinking budget": {"thinking_token_budget": BUDGET, "allowed_token_ids": [*LETTERS, TOKEN[")"], EOS]},
}
#: setting of an engine -> its arguments; none of them changes what a request gets
SETTINGS: dict[str, dict[str, Any]] = {
    "prefix caching": {"enable_prefix_caching": True},
    "preemption": {"num_gpu_blocks_override": 14},
    "KV offloading": {"kv_offloading_size": "2MB"},
    # all layers
    "offloaded weights": {"cpu_offload_gb": 1},
    "chunked prefill": {"max_num_batched_tokens": 8},
    "several decode steps": {"num_decode_steps": 3, "enforce_eager": False},
    "drafts": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_min": 1},
        "enforce_eager": False,
    },
    "asynchronous scheduling": {"async_scheduling": True},
    "priorities": {"scheduling_policy": "priority"},
    "active requests": {"max_num_active_seqs": 3},
    # of matrices whose numbers the other engines have in float32
    "quantized weights": {"quantization": "awq"},
    "deterministic": {"deterministic": True},
    "tensor parallel": {"tensor_parallel_size": 2},
    "data parallel": {"data_parallel_size": 2},
}
PLAIN: dict[str, Any] = {
    **SMALL,
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 8,
    "num_gpu_blocks_override": 400,
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "reasoning_config": {"reasoning_start_str": "(", "reasoning_end_str": ")"},
}
ON_ONE = [name for name in SETTINGS if name not in ("drafts", "deterministic", "tensor parallel", "data parallel")]
#: engines by name -> the settings that are on; the model of all of them has sliding windows
ENGINES: dict[str, list[str]] = {
    "plain": [],
    "all": ON_ONE,
    "all, deterministic": [*ON_ONE, "drafts", "deterministic", "data parallel"],
    "all, split": [*ON_ONE, "drafts", "tensor parallel"],
}
#: engine -> who drafts in it, where n-grams do not; `support.drafter_pairs` has the others
DRAFTERS: dict[str, dict[str, Any]] = {"all, deterministic": {"method": "suffix", "num_speculative_tokens": 1}}
#: settings that a pooling engine takes; the others choose what is sampled, and it samples nothing
POOLING = [
    *("prefix caching", "KV offloading", "chunked prefill", "asynchronous scheduling", "priorities"),
    *("quantized weights", "offloaded weights", "tensor parallel"),
]
#: what is counted of an engine -> its metric
COUNTED = {
    "preemptions": "vllm:num_preemptions",
    "hits": "vllm:prefix_cache_hits",
    "hits on the host": "vllm:external_prefix_cache_hits",
    "right drafts": "vllm:spec_decode_num_accepted_tokens",
}
BEGINNING = "a beginning that fills blocks "


def asked(*, pairs: bool = True) -> dict[str, tuple[str, SamplingParams]]:
    """Each option, and each pair of options -> (prompt, parameters)."""
    requests = {}
    for kinds in [*((kind,) for kind in KINDS), *(itertools.combinations(KINDS, 2) if pairs else ())]:
        params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 14, "allowed_token_ids": [*LETTERS, EOS]}
        for kind in kinds:
            params |= KINDS[kind]
        prompt = BEGINNING + " and ".join(kinds) + " "
        # reasoning is open where its length is limited, and over elsewhere
        prompt += "(" if "thinking budget" in kinds else "()"
        requests[" + ".join(kinds)] = (prompt, SamplingParams(**params))
    return requests


def add_bonus(logits: Any, state: Any) -> Any:
    return logits.at[:, TOKEN["k"]].add(state.extra_args["bonus"])


def told(output: RequestOutput) -> dict[str, Any]:
    """What a request got, as JSON."""

    def numbers(entries: Any) -> list[Any]:
        return [sorted(value.logprob for value in entry.values()) for entry in entries or [] if entry]

    return {
        "token_ids": [list(completion.token_ids) for completion in output.outputs],
        "text": [completion.text for completion in output.outputs],
        "reason": [[completion.finish_reason, completion.stop_reason] for completion in output.outputs],
        "logprobs": [numbers(completion.logprobs) for completion in output.outputs],
        "prompt_logprobs": numbers(output.prompt_logprobs),
        "prompt_tokens": len(output.prompt_token_ids or []),
    }


def generated(llm: LLM, *, pairs: bool = True) -> dict[str, Any]:
    requests = asked(pairs=pairs)
    priority = [index % 3 for index in range(len(requests))] if llm_has_priorities(llm) else None
    prompts, params = zip(*requests.values(), strict=True)
    outputs = llm.generate(list(prompts), list(params), priority=priority, use_tqdm=False)
    return {name: told(output) for name, output in zip(requests, outputs, strict=True)}


def assert_same_answer(found: dict[str, Any], plain: dict[str, Any], name: str) -> None:
    """Every part of an answer is the other one's, which may have more; log-probabilities nearly."""
    for part, value in found.items():
        if "logprobs" not in part:
            assert value == plain[part], f"{name}: {part}"
            continue
        for mine, theirs in zip(_flat(value), _flat(plain[part]), strict=True):
            assert abs(mine - theirs) < 1e-3, f"{name}: {part}"


def _flat(value: Any) -> list[float]:
    return [number for part in value for number in _flat(part)] if isinstance(value, list) else [value]


def llm_has_priorities(llm: LLM) -> bool:
    return llm.engine.core.config.policy == "priority"


def joined(deltas: list[RequestOutput]) -> dict[str, Any]:
    """Token ids and texts of a stream of deltas, put together by output."""
    ids: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for delta in deltas:
        for completion in delta.outputs:
            ids.setdefault(completion.index, []).extend(completion.token_ids)
            texts[completion.index] = texts.get(completion.index, "") + completion.text
    return {"token_ids": [ids[index] for index in sorted(ids)], "text": [texts[index] for index in sorted(texts)]}


def streamed(llm: LLM, *, pairs: bool = True) -> dict[str, Any]:
    """What `generated` gets, as deltas of engine steps."""
    requests, deltas = asked(pairs=pairs), {}
    for name, (prompt, params) in requests.items():
        params.output_kind = RequestOutputKind.DELTA
        llm.llm_engine.add_request(name, prompt, params)
        deltas[name] = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            deltas[output.request_id].append(output)
    return {name: joined(found) for name, found in deltas.items()}


async def streamed_by_tasks(model: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `streamed` gets, from tasks of one event loop."""

    async def one(prompt: str, params: SamplingParams) -> dict[str, Any]:
        params.output_kind = RequestOutputKind.DELTA
        return joined([output async for output in llm.generate(prompt, params)])

    llm = AsyncLLM(model, **arguments)
    requests = asked()
    found = await asyncio.gather(*(one(prompt, params) for prompt, params in requests.values()))
    llm.shutdown()
    return dict(zip(requests, found, strict=True))


def arguments_of(settings: list[str]) -> dict[str, Any]:
    arguments = dict(PLAIN)
    for setting in settings:
        arguments |= SETTINGS[setting]
    return arguments


def main() -> None:
    folder = Path(sys.argv[1])
    # with windows of 40 tokens
    windowed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 40}
    quantized, dense = write(folder, "awq", changes=windowed)
    found: dict[str, Any] = {}
    # whatever is drafted is checked
    adaptive.CPU_CHECK = adaptive.CPU_ROWS = adaptive.CPU_FEW_ROWS = 0.0
    beams = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    # the engine over several devices comes first: what JAX has cannot be changed later
    for name in sorted(ENGINES, key=lambda name: "split" not in name):
        settings = ENGINES[name]
        processors = [LogitsProcessor(add_bonus, extra_args={"bonus": 0.0})]
        arguments = {**arguments_of(settings), "logits_processors": processors}
        if name in DRAFTERS:
            arguments["speculative_config"] = DRAFTERS[name]
        model = quantized if "quantized weights" in settings else dense
        with LLM(model, **arguments) as llm:
            found[name] = {"generated": generated(llm), "streamed": streamed(llm)}
            prompts = [BEGINNING, "another one"]
            found[name]["beams"] = [[b.tokens for b in o.sequences] for o in llm.beam_search(prompts, beams)]
            llm.sleep(1)
            llm.wake_up()
            # to sleep is the engine's affair: what two options make of each other is asked before
            found[name]["after sleep"] = generated(llm, pairs=False)
            for kind, metric in COUNTED.items():
                found[name][kind] = sum(one.value for one in llm.get_metrics() if one.name == metric)  # pyright: ignore
        if name == "all, split":
            found[name]["tasks"] = asyncio.run(streamed_by_tasks(model, arguments))
    for name, settings in (("plain", []), ("all", POOLING)):
        arguments = arguments_of(settings)
        del arguments["reasoning_config"]
        model = quantized if "quantized weights" in settings else dense
        with LLM(model, runner="pooling", convert="embed", **arguments) as llm:
            texts = [BEGINNING + str(index) for index in range(6)]
            found.setdefault("pooling", {})[name] = [o.outputs.embedding for o in llm.embed(texts, use_tqdm=False)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
