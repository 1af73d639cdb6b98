"""The whole host around the fake device: requests in, outputs out, no model."""

from __future__ import annotations

from support.fake_device import FakeDevice

from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.core import EngineCore
from jaxllm.engine.observe.metrics import EngineMetrics
from jaxllm.engine.request import Request


class FakeEngine:
    """An `EngineCore` over a `FakeDevice` of few blocks."""

    def __init__(self, *, num_blocks: int = 64, max_num_seqs: int = 4, max_num_batched_tokens: int = 16) -> None:
        scheduler = SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=128
        )
        cache = CacheConfig(
            block_size=8, num_blocks=num_blocks, groups=(KVCacheGroup(layers=(0,)),), enable_prefix_caching=True
        )
        self.device = FakeDevice(cache, scheduler)
        self.core = EngineCore(scheduler, cache, self.device, None, EngineMetrics("fake", max_model_len=128))

    def add(self, request_id: str, prompt: list[int], max_tokens: int) -> Request:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(request_id, prompt, params)
        self.device.salts[request_id] = None
        self.core.add_request(request, None)
        return request

    def run(self) -> list[RequestOutput]:
        """Step until nothing is left."""
        outputs = []
        while self.core.has_unfinished:
            outputs += [output for output in self.core.step() if output.finished]
        return outputs + self.core.drain()
