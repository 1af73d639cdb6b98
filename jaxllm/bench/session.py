"""The benchmarks drive jaxllm as they do its peers: it is loaded once, and timed by the same code.

``python -m jaxllm.bench.session`` is a process that is told what to do as its peers are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jaxllm
from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import Counter
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.bench.peers.protocol import Request, Session, serve

if TYPE_CHECKING:
    from jaxllm.api.outputs import RequestOutput
    from jaxllm.llm import LLM


class JaxLLMSession(Session):
    """An engine that is loaded.

    Args:
        detokenize: whether outputs become text, as they do for who uses the engine.
        ready: wait for all of the engine's programs, which rounds are not to compete with.
    """

    def __init__(self, llm: LLM, *, detokenize: bool, ready: bool = True):
        if ready:
            llm.wait_until_ready()
        self.llm = llm
        self._detokenize = detokenize
        #: the newest round's
        self.outputs: list[RequestOutput] = []
        plan = llm.memory_plan
        names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
        self.facts: dict[str, Any] = {
            "version": jaxllm.__version__,
            **{name: getattr(plan, name) for name in names},
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
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length, detokenize=self._detokenize)
            for _, length in requests
        ]
        self.outputs = self.llm.generate(list(map(self.prompt, requests)), params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in self.outputs]

    def prompt(self, request: Request) -> Any:
        """What the engine is given of a request."""
        return {"prompt_token_ids": request[0]}

    def times_per_token(self) -> list[float]:
        """Return mean seconds of a token after the first, for each request of the newest round."""
        return [output.metrics.time_per_output_token for output in self.outputs if output.metrics]

    def drafts(self) -> dict[str, int] | None:
        """Return how many steps of a request had drafts since the engine's start, their drafts, and the right ones of
        them; None where nobody makes any.
        """
        metrics = {metric.name: metric for metric in self.llm.get_metrics() if isinstance(metric, Counter)}
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        found = {name: metrics.get(f"vllm:spec_decode_{name}") for name in names}
        return {name: int(metric.value) for name, metric in found.items() if metric is not None} or None


def load(message: dict[str, Any]) -> JaxLLMSession:
    """Return the session that the message "load" describes."""
    from jaxllm.llm import LLM

    llm = LLM(message["model"], **message["engine_args"])
    return JaxLLMSession(llm, detokenize=False, ready=not message.get("includes_startup"))


if __name__ == "__main__":
    serve(load)
