"""Engines that are spread over virtual devices, that draft, or are deterministic, asked offline and over HTTP, in a
process that has JAX to itself.

``python -m support.served_engines FOLDER`` prints one JSON object: by engine, what it answered in each way.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from support.serving import Closed, get, served
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import AsyncLLM, SamplingParams

#: a drafter, and sizes that compile little
DRAFTS: dict[str, Any] = {
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1},
    **{"enforce_eager": False, "max_num_seqs": 2, "max_num_batched_tokens": 8},
}
#: name -> settings; the first engine makes as many devices as the others need
ENGINES: dict[str, dict[str, Any]] = {
    "stages of halves": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "kv_offloading_size": "1MB"},
    "halves that draft": {"tensor_parallel_size": 2, **DRAFTS},
    "replicas": {"data_parallel_size": 2, "deterministic": True, **DRAFTS},
    "one": {},
}
PROMPTS = [f"{'again and ' * (number % 4)}{number} is a number, and " for number in range(8)]
#: of a request -> parameters, by the position of its prompt
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7, "n": 2},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0.7, "seed": 3, "top_k": 9, "structured_outputs": {"regex": "(ab|cd|fg){4,9}"}},
]


def asked() -> list[dict[str, Any]]:
    """The requests, as bodies."""
    return [{"prompt": prompt, "max_tokens": 12, **KINDS[i % len(KINDS)]} for i, prompt in enumerate(PROMPTS)]


def answers(engine: AsyncLLM) -> dict[str, Any]:
    """The token ids of all requests: offline, over HTTP at the same time, and streamed; those of a chat as well."""
    bodies = asked()
    params = [SamplingParams(**{name: value for name, value in body.items() if name != "prompt"}) for body in bodies]
    outputs = engine.llm.generate(PROMPTS, params, use_tqdm=False)
    found: dict[str, Any] = {"offline": [[list(one.token_ids) for one in output.outputs] for output in outputs]}
    messages: Any = [{"role": "user", "content": PROMPTS[3]}]
    (chat,) = engine.llm.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    found["chat"] = [list(one.token_ids) for one in chat.outputs]

    with served(engine) as url, concurrent.futures.ThreadPoolExecutor(len(bodies)) as threads:

        def whole(body: dict[str, Any]) -> list[list[int]]:
            status, _, told = get(url, "/v1/completions", {**body, "return_token_ids": True})
            assert status == 200, told
            return [choice["token_ids"] for choice in told["choices"]]

        def streamed(body: dict[str, Any]) -> list[list[int]]:
            more = {"return_token_ids": True, "stream": True}
            _, _, text = get(url, "/v1/completions", {**body, **more})
            ids: list[list[int]] = [[] for _ in range(body.get("n", 1))]
            for line in text.split("\n\n"):
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        ids[choice["index"]] += choice["token_ids"]
            return ids

        found["served"] = list(threads.map(whole, bodies))
        found["streamed"] = list(threads.map(streamed, bodies))
        body = {"messages": messages, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
        _, _, told = get(url, "/v1/chat/completions", body)
        found["served chat"] = [choice["token_ids"] for choice in told["choices"]]
    return found


def main(folder: Path) -> None:
    write_tiny_model(folder)
    found = {}
    for name, settings in ENGINES.items():
        with contextlib.closing(Closed(AsyncLLM(folder, **{**SMALL, **settings}))) as closing:
            found[name] = answers(closing.engine)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
