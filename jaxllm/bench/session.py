"""jaxllm as the benchmarks drive it: loaded once, timed by the same code as its peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jaxllm
from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.bench.peers.protocol import Request

if TYPE_CHECKING:
    from jaxllm.api.outputs import RequestOutput
    from jaxllm.llm import LLM


class JaxLLMSession:
    """An engine that is loaded; a `peers.protocol.Session`.

    Args:
        detokenize: whether outputs become text, as they do for who uses the engine.
        temperature: of the sampling; 0 is greedy.
    """

    def __init__(self, llm: LLM, *, detokenize: bool, temperature: float = 0.0):
        self.llm = llm
        self._detokenize = detokenize
        self._temperature = temperature
        #: the newest round's
        self.outputs: list[RequestOutput] = []
        plan = llm.memory_plan
        self.facts: dict[str, Any] = {
            "version": jaxllm.__version__,
            "max_model_len": plan.max_model_len,
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_num_batched_tokens,
            "startup_s": dict(llm.startup_times),
        }

    def check(self, requests: list[Request]) -> None:
        """Raise ValidationError where a request does not fit into max_model_len: it would end early."""
        for ids, length in requests:
            if len(ids) + length > self.facts["max_model_len"]:
                raise ValidationError(
                    f"A prompt of {len(ids)} tokens and {length} more are {len(ids) + length}, and "
                    f"max_model_len={self.facts['max_model_len']}: give a larger --max-model-len, or shorter lengths."
                )

    def reset(self) -> None:
        self.llm.reset_prefix_cache()

    def generate(self, requests: list[Request]) -> list[list[int]]:
        self.check(requests)
        params = [
            SamplingParams(
                temperature=self._temperature, ignore_eos=True, max_tokens=length, detokenize=self._detokenize
            )
            for _, length in requests
        ]
        self.outputs = self.llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in self.outputs]
