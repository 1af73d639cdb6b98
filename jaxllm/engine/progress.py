"""The progress bar of a batch, with vLLM's words."""

from __future__ import annotations

import time

from tqdm.auto import tqdm

from jaxllm.outputs import RequestOutput


class Progress:
    """Counts finished requests and shows the speed of input and output."""

    def __init__(self, total: int | None, done: int, *, enabled: bool):
        self._bar = tqdm(
            total=total, initial=done, desc="Processed prompts", unit="req", dynamic_ncols=True, disable=not enabled
        )
        self._start = time.perf_counter()
        self._input = self._output = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def finished(self, output: RequestOutput) -> None:
        self._input += len(output.prompt_token_ids)
        self._output += sum(len(completion.token_ids) for completion in output.outputs)
        seconds = max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"est. speed input: {self._input / seconds:.2f} toks/s, output: {self._output / seconds:.2f} toks/s",
            refresh=False,
        )
        self._bar.update()
