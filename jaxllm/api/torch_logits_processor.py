"""vLLM's logits processors: classes whose methods take torch tensors, on the host.

A compiled step calls them back with the logits of the rows that it samples (`sampling.processors`). Every request has
an object of the class to itself, in which it is the whole batch, at index 0: so what one request gets depends on no
other, however steps are put together. An object whose request has ended is used again.

What an object raises is its request's error alone: the step goes on, and whoever reads it asks who has failed.

torch is the user's: nothing here imports it before such a class is given.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import importlib
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from jaxllm.api.errors import ValidationError

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.api.sampling_params import SamplingParams

logger = logging.getLogger("jaxllm")

#: the extra argument by which a step says whose each row is; no request can set it
REQUEST = "vllm's request"
#: float32 holds every whole number below it
_NUM_KEYS = 2**24
#: stands for prompt tokens that are vectors
_EMBEDDED = 0

State = TypeVar("State")

#: a function of one request: (output ids, logits [V]) -> logits, or (prompt ids, output ids, logits [V]) -> logits
RequestLogitsProcessor: TypeAlias = Callable[..., Any]


class MoveDirectionality(enum.Enum):
    """How a request changes its index; here none does."""

    UNIDIRECTIONAL = 1
    SWAP = 2


@dataclasses.dataclass(frozen=True)
class BatchUpdate:
    """Which requests came to a processor's batch and which have left it, by their indices: removed ones first, then
    added, then moved. Of those added, the list of output ids grows with every token.
    """

    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple[int, SamplingParams, list[int] | None, list[int]]]
    moved: Sequence[tuple[int, int, MoveDirectionality]]


class LogitsProcessor(abc.ABC):
    """What a processor's class has. `vllm_config` is `LLM.llm_engine.vllm_config`, `device` torch's CPU."""

    @classmethod  # noqa: B027 (a class need not have it)
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for what a request must not ask for: it is refused, alone."""

    @abc.abstractmethod
    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None: ...

    @abc.abstractmethod
    def apply(self, logits: Any) -> Any:
        """Logits float32 [1, V] -> the same, new or changed in place."""

    @abc.abstractmethod
    def is_argmax_invariant(self) -> bool:
        """Whether the most likely token stays so: such a processor sees logits that are divided by the temperature."""

    @abc.abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each `apply`; None: the batch is the same."""


class AdapterLogitsProcessor(LogitsProcessor):
    """A class of functions of one request each."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.req_info: dict[int, Callable[[Any], Any]] = {}

    @abc.abstractmethod
    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        """The function of a new request; None: its logits stay."""

    def _new_state(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> Callable[[Any], Any] | None:
        function = self.new_req_logits_processor(params)
        if function is None:
            return None
        if len(inspect.signature(function).parameters) < 3:
            return lambda logits: function(output_ids, logits)
        if prompt_ids is None:
            raise ValueError(
                f"{type(self).__name__} asks for the prompt's token ids, and the prompt is made of vectors"
            )
        return lambda logits: function(prompt_ids, output_ids, logits)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.req_info, batch_update, self._new_state)

    def apply(self, logits: Any) -> Any:
        for index, function in self.req_info.items():
            logits[index] = function(logits[index])
        return logits


def process_dict_updates(
    req_entries: MutableMapping[int, State],
    batch_update: BatchUpdate | None,
    new_state: Callable[[SamplingParams, list[int] | None, list[int]], State | None],
) -> bool:
    """Keep a state for each index of the batch whose request has one (`new_state`), and say whether any changed."""
    if batch_update is None:
        return False
    before = dict(req_entries)
    for index in batch_update.removed:
        req_entries.pop(index, None)
    for index, params, prompt_ids, output_ids in batch_update.added:
        req_entries.pop(index, None)
        if (state := new_state(params, prompt_ids, output_ids)) is not None:
            req_entries[index] = state
    for source, target, direction in batch_update.moved:
        moved, replaced = req_entries.pop(source, None), req_entries.pop(target, None)
        if moved is not None:
            req_entries[target] = moved
        if replaced is not None and direction is MoveDirectionality.SWAP:
            req_entries[source] = replaced
    return before != req_entries


class _Processor(Protocol):
    """An object of a class of vLLM's."""

    def apply(self, logits: Any) -> Any: ...
    def is_argmax_invariant(self) -> bool: ...
    def update_state(self, batch_update: BatchUpdate | None) -> None: ...


class HostProcessor:
    """A class of vLLM's, and the objects of it that requests have. Any thread may use it.

    Args:
        kind: takes ``(vllm_config, device, is_pin_memory)``.

    Raises ValidationError where torch cannot be imported.
    """

    def __init__(self, kind: Callable[..., Any]):
        self.name = getattr(kind, "__qualname__", repr(kind))
        try:
            self._torch = importlib.import_module("torch")
        except ImportError as error:
            raise ValidationError(
                f"{self.name} is a class for torch tensors, and torch cannot be imported ({error}): pip install torch, "
                "or write it as a jax function, which also runs faster (jaxllm.LogitsProcessor)."
            ) from error
        self._kind, self._vllm_config = kind, None
        #: of requests: engines of the same arguments have it in common
        self.numbers = itertools.cycle(range(1, _NUM_KEYS))
        self._lock = threading.Lock()
        self._idle: list[_Processor] = []
        self._requests: dict[int, _Request] = {}
        #: by number, what was raised for requests and nobody has been told of, and how many tokens they had then
        self._failures: dict[int, tuple[int, str]] = {}

    def start(self, vllm_config: Any) -> None:
        """Make the first object, whose errors are the start's."""
        self._vllm_config = vllm_config
        self._idle.append(self._made())

    def _made(self) -> _Processor:
        return self._kind(self._vllm_config, self._torch.device("cpu"), False)

    def validate(self, params: SamplingParams) -> None:
        """Raises ValidationError where the class refuses a request's parameters."""
        check = getattr(self._kind, "validate_params", None)
        if check is None:
            return
        try:
            check(params)
        except ValueError as error:
            raise ValidationError(str(error)) from error
        except Exception as error:
            raise ValidationError(self._told(error)) from error

    def admit(self, key: int, params: SamplingParams) -> None:
        """Give a request an object, under the number that its rows will have."""
        with self._lock:
            self._failures.pop(key, None)  # of a step that nobody has read, the last time that the number was used
            try:
                processor = self._idle.pop() if self._idle else self._made()
            except Exception as error:  # noqa: BLE001 - it is the user's code
                self._failures[key] = 0, self._told(error)
            else:
                self._requests[key] = _Request(processor, params)

    def release(self, key: int) -> None:
        """Take it back; a step that is under way leaves the request's logits as they are."""
        with self._lock:
            request = self._requests.pop(key, None)
            if request is None:
                return
            try:
                request.end()
            except Exception as error:  # noqa: BLE001 - it is the user's code
                logger.warning("%s An object of it is given up, after the end of its request.", self._told(error))
            else:
                self._idle.append(request.processor)

    def failure(self, key: int, most_tokens: int) -> str | None:
        """What was raised for a request that had no more tokens than these, told once; its logits stayed as they were.
        A later step may be done already.
        """
        with self._lock:
            if key not in self._failures or self._failures[key][0] > most_tokens:
                return None
            return self._failures.pop(key)[1]

    def _told(self, error: Exception) -> str:
        return f"The logits processor {self.name} failed: {type(error).__name__}: {error}"

    def __call__(
        self,
        logits: np.ndarray,
        tokens: np.ndarray,
        length: np.ndarray,
        prompt_length: np.ndarray,
        temperature: np.ndarray,
        keys: np.ndarray,
    ) -> np.ndarray:
        """New logits float32 [R, V] of rows, as `sampling.processors.LogitsState` describes these.

        Args:
            keys: float32 [R], `REQUEST`.
        """
        import numpy as np  # a command line is parsed without it

        changed = np.array(logits)
        with self._lock, self._torch.no_grad():
            for row, key in enumerate(np.asarray(keys).astype(int).tolist()):
                request = self._requests.get(key)
                if request is None:
                    continue
                try:
                    request.see(np.asarray(tokens[row])[: int(length[row])].tolist(), int(prompt_length[row]))
                    changed[row] = self._applied(request.processor, changed[row : row + 1], float(temperature[row]))
                except Exception as error:  # noqa: BLE001 - it is the user's code
                    self._failures[key] = int(length[row]), self._told(error)
                    del self._requests[key]  # whatever state its object is in, nobody uses it again
        return changed

    def _applied(self, processor: _Processor, logits: np.ndarray, temperature: float) -> np.ndarray:
        scale = temperature if temperature > 0 and processor.is_argmax_invariant() else 1.0
        result = processor.apply(self._torch.from_numpy(logits / scale))
        shape = tuple(getattr(result, "shape", ()))
        if shape != logits.shape:
            raise ValueError(f"{self.name}.apply returned {shape or result!r:.80} for logits of shape {logits.shape}")
        return result.to(self._torch.float32).numpy()[0] * scale


class _Request:
    """A request and its own object."""

    def __init__(self, processor: _Processor, params: SamplingParams):
        self.processor = processor
        self._params = params
        self._outputs: list[int] | None = None

    def see(self, tokens: list[int], num_prompt_tokens: int) -> None:
        """Tell the object of all tokens that are there before it is applied."""
        prompt, outputs = tokens[:num_prompt_tokens], tokens[num_prompt_tokens:]
        if self._outputs is not None:
            self._outputs[:] = outputs
            self.processor.update_state(None)
            return
        self._outputs = outputs
        known = None if any(token < _EMBEDDED for token in prompt) else prompt
        added = ((0, self._params, known, self._outputs),)
        self.processor.update_state(BatchUpdate(batch_size=1, removed=(), added=added, moved=()))

    def end(self) -> None:
        if self._outputs is not None:
            self.processor.update_state(BatchUpdate(batch_size=0, removed=(0,), added=(), moved=()))


class RowRequests:
    """Which request each row of an engine has, for its processors on the host.

    Args:
        hosts: those, one at least.
    """

    def __init__(self, hosts: Sequence[HostProcessor]):
        self._hosts = hosts
        self._keys: dict[int, int] = {}

    def admit(self, row: int, params: SamplingParams) -> int:
        """A number for the request that enters a row, which the one before it leaves."""
        key = next(self._hosts[0].numbers)
        before, self._keys[row] = self._keys.get(row), key
        for host in self._hosts:
            if before is not None:
                host.release(before)
            host.admit(key, params)
        return key

    def of(self, rows: Iterable[int]) -> list[int]:
        """The numbers of the requests that rows have now."""
        return [self._keys[row] for row in rows]

    def failures(self, keys: Sequence[int], most_tokens: Sequence[int]) -> dict[int, str]:
        """What processors raised in a step that is done, told once.

        Args:
            keys: the step's requests.
            most_tokens: that each had in it.

        Returns:
            Index in `keys` -> the first processor's error.
        """
        found: dict[int, str] = {}
        for index, (key, most) in enumerate(zip(keys, most_tokens, strict=True)):
            for host in self._hosts:
                error = host.failure(key, most)
                if error is not None:
                    found.setdefault(index, error)
        return found


def is_vllms(kind: Any) -> bool:
    """Whether it is a class with the methods of vLLM's processors."""
    return inspect.isclass(kind) and all(callable(getattr(kind, name, None)) for name in ("apply", "update_state"))
