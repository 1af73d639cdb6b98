"""The adapters (LoRA) that an engine knows, and those of them that the host's memory has.

Reading one runs in a thread of its own, beside the engine's steps: a request waits for its adapter, and nobody else
does.
"""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, Protocol

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.engine.cache.block_hash import ExtraKey


class AdapterFiles(Protocol):
    """An adapter where it lies."""

    def have_changed(self) -> bool:
        """Whether they are no longer those that were checked."""
        ...

    def read(self) -> Any:
        """The matrices, as the runner takes them. Whatever it raises is the adapter's fault."""
        ...


#: checks an adapter
Open = Callable[[LoRARequest], AdapterFiles]
#: seconds that the engine waits for an adapter, where it has nothing else to do
PATIENCE = 0.02


class Adapter:
    """One adapter as it was when it was loaded. What takes its place later is another one.

    Attributes:
        key: keys and values depend on it; no other adapter has the same one.
        matrices: what the runner takes; None: the host's memory does not have it.
        error: why it cannot be read; None: nobody knows of anything.
    """

    def __init__(self, request: LoRARequest, version: int, files: AdapterFiles):
        self.request, self.files = request, files
        self.key = ExtraKey(kind="lora", value=f"{request.lora_name}\0{request.path}\0{version}")
        self.matrices: Any = None
        self.error: str | None = None
        self.is_pinned = False
        self.loading: concurrent.futures.Future[Any] | None = None


class AdapterStore:
    """The adapters of one engine, by their numbers. Any thread may ask.

    Args:
        open: checks an adapter.
        max_loras: adapters that the device has at once.
        max_cpu_loras: adapters that the host's memory has at once, at least as many.
    """

    def __init__(self, open: Open, *, max_loras: int, max_cpu_loras: int):
        self._open, self._max_loras, self._most = open, max_loras, max_cpu_loras
        self._lock = threading.RLock()
        self._adapters: dict[int, Adapter] = {}
        #: those that the host has or reads, the one that nobody asked for the longest first
        self._loaded: collections.OrderedDict[Adapter, None] = collections.OrderedDict()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "load adapters")
        self._num_versions = 0

    def get(self, request: LoRARequest) -> Adapter:
        """The adapter of a request, which is registered if nobody knows it.

        Raises:
            TypeError: it is no `LoRARequest`.
            ValidationError: it cannot be loaded, or its number is another one's.
        """
        if not isinstance(request, LoRARequest):
            raise TypeError(f"lora_request must be LoRARequest, got {type(request).__name__}")
        known = self._known(request)
        if known is not None:
            return known
        # not with the lock, for which the engine's steps wait
        files = self._open(request)
        with self._lock:
            return self._known(request) or self._register(request, files)

    def _known(self, request: LoRARequest) -> Adapter | None:
        """What a request means, if it is known; what is loaded in place of itself is it, unless its files differ."""
        with self._lock:
            known = self._adapters.get(request.lora_int_id)
            if known is None:
                return None
            is_same = (known.request.lora_name, known.request.path) == (request.lora_name, request.path)
            if request.load_inplace:
                return known if is_same and not known.files.have_changed() else None
            # as in vLLM, whose scripts give one number to several names of one folder
            if known.request.path != request.path:
                raise ValidationError(
                    f"lora_int_id={request.lora_int_id} is the adapter {known.request.lora_name!r} of "
                    f"{known.request.path}, and not {request.lora_name!r} of {request.path}. Take another number, or "
                    "load_inplace=True to replace it."
                )
            return known

    def add(self, request: LoRARequest) -> bool:
        """Register an adapter and begin to read it; whether nobody knew it. Raises what `get` does."""
        known = self.numbers()
        self.is_ready(self.get(request))
        return request.lora_int_id not in known or request.load_inplace

    def _register(self, request: LoRARequest, files: AdapterFiles) -> Adapter:
        self._num_versions += 1
        old = self._adapters.get(request.lora_int_id)
        adapter = self._adapters[request.lora_int_id] = Adapter(request, self._num_versions, files)
        if old is not None:
            adapter.is_pinned = old.is_pinned
            self._forget(old)
        if len(self._loaded) < self._most:
            self.is_ready(adapter)
        return adapter

    def remove(self, number: int) -> bool:
        """Forget an adapter; whether it was known. Requests that run with it go on."""
        with self._lock:
            adapter = self._adapters.pop(number, None)
            if adapter is not None:
                self._forget(adapter)
            return adapter is not None

    def pin(self, number: int) -> bool:
        """Keep an adapter in memory, on the device once it is there. Raises ValidationError where it is not known, or
        where others would have no room.
        """
        with self._lock:
            adapter = self._adapters.get(number)
            if adapter is None:
                known = ", ".join(map(str, sorted(self._adapters))) or "none"
                raise ValidationError(f"Pinning failed. LoRA {number} is not registered (registered: {known}).")
            pinned = sum(other.is_pinned for other in self._adapters.values() if other is not adapter)
            if pinned + 1 >= self._max_loras:
                raise ValidationError(
                    f"Pinning LoRA {number} would leave no other adapter a place on the device (max_loras="
                    f"{self._max_loras}, pinned: {pinned}). Set max_loras to at least {pinned + 2}."
                )
            adapter.is_pinned = True
            return True

    def numbers(self) -> set[int]:
        """Of the adapters that are known."""
        with self._lock:
            return set(self._adapters)

    def is_ready(self, adapter: Adapter) -> bool:
        """Whether the host has an adapter's matrices, or nobody ever will (`Adapter.error`); it is read if not."""
        with self._lock:
            if adapter.matrices is None and adapter.loading is None and adapter.error is None:
                adapter.loading = self._pool.submit(adapter.files.read)
            if adapter.loading is not None and adapter.loading.done():
                self._take(adapter, adapter.loading)
            if adapter.error is not None:
                return True
            self._loaded[adapter] = None
            self._loaded.move_to_end(adapter)
            others = [other for other in self._loaded if other.loading is None and not other.is_pinned]
            for other in others[: max(len(self._loaded) - self._most, 0)]:
                if other is not adapter:
                    self._forget(other)
            return adapter.matrices is not None

    def _take(self, adapter: Adapter, loading: concurrent.futures.Future[Any]) -> None:
        adapter.loading = None
        try:
            adapter.matrices = loading.result()
        except Exception as error:  # whatever it is, it is this adapter's
            adapter.error = f"Loading LoRA adapter {adapter.request.lora_name!r} failed: {error}"
            self._forget(adapter)
            if self._adapters.get(adapter.request.lora_int_id) is adapter:
                # the files may be better the next time
                del self._adapters[adapter.request.lora_int_id]

    def _forget(self, adapter: Adapter) -> None:
        self._loaded.pop(adapter, None)
        adapter.matrices = None
        # nor does it keep a slot on the device that nobody could unpin
        adapter.is_pinned = False

    def shutdown(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def adapter_of(adapters: AdapterStore | None, request: LoRARequest | None) -> Adapter | None:
    """The adapter that a request asks for. Raises what `AdapterStore.get` does, and ValidationError where the engine
    takes none.
    """
    if request is None:
        return None
    if adapters is None:
        raise ValidationError(
            f"Got lora_request {request} but LoRA is not enabled! Pass enable_lora=True when making the LLM "
            "(--enable-lora)."
        )
    return adapters.get(request)
