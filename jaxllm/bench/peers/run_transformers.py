"""transformers is a peer by `generate` on padded batches, or by its continuous batching.

It needs torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Request, Session, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

#: tokens
_PAGE_SIZE = 256


class Static(Session):
    """`generate`, a batch at a time: prompts padded on the left, and as many steps as the longest output needs."""

    def __init__(self, model: Any, batch_size: int):
        self._model = model
        self._batch_size = batch_size
        self.facts = facts()

    def generate(self, requests: list[Request]) -> list[list[int]]:
        outputs = []
        for first in range(0, len(requests), self._batch_size):
            outputs += self._batch(requests[first : first + self._batch_size])
        return outputs

    def _batch(self, requests: list[Request]) -> list[list[int]]:
        width = max(len(ids) for ids, _ in requests)
        ids = torch.zeros((len(requests), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(requests):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        # without an end-of-sequence id nothing ends early
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(length for _, length in requests), eos_token_id=None, pad_token_id=0
        )
        with torch.inference_mode():
            made = self._model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        return [row[:length] for row, (_, length) in zip(made, requests, strict=True)]


class Continuous(Session):
    """transformers' own paged continuous batching, its thread and its cache kept from round to round."""

    def __init__(self, model: Any, slots: int, longest: int):
        # one of its pages is empty at worst, for each request
        pages = slots * (-(-longest // _PAGE_SIZE) + 1)
        config = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=pages,
            max_batch_tokens=max(512, slots),
            max_requests_per_batch=slots,
            allow_block_sharing=False,
        )
        greedy = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=0)
        self._manager = model.init_continuous_batching(greedy, config)
        self._manager.start()
        self.facts = facts()

    def generate(self, requests: list[Request]) -> list[list[int]]:
        names = [self._manager.add_request(ids, max_new_tokens=length) for ids, length in requests]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            result = self._manager.get_result(timeout=1.0)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("transformers' continuous batching has ended")
            elif result.error:
                raise RuntimeError(result.error)
            elif result.is_finished():
                done[result.request_id] = result.generated_tokens
        return [done[name] for name in names]


def facts() -> dict[str, Any]:
    return {
        "version": transformers.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "oneDNN bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False,
    }


def load(message: dict[str, Any]) -> Session:
    torch.set_num_threads(message["threads"])
    model = AutoModelForCausalLM.from_pretrained(message["model"], dtype=getattr(torch, message["dtype"])).eval()
    model.generation_config = GenerationConfig()
    if message["mode"] == "continuous":
        return Continuous(model, message["max_num_seqs"], message["longest"])
    return Static(model, message["max_num_seqs"])


if __name__ == "__main__":
    serve(load)
