"""The engine's state, seen and changed from outside: caches, sleep, weights."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from jaxllm.api.errors import ValidationError
from jaxllm.methods.base import EngineMethods

Result = TypeVar("Result")

_TAGS = ("weights", "kv_cache", "scheduling")


class ControlMethods(EngineMethods):
    """reset_prefix_cache, sleep, wake_up, apply_model, collective_rpc."""

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes. Returns False, and does nothing, while requests run.

        Args:
            reset_running_requests: preempt what runs first; it is computed anew.
            reset_connector: without effect, there is no connector.
        """
        with self._client.lock:
            if reset_running_requests:
                self._client.preempt_all()
            return self._client.core.reset_prefix_cache()

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give the device's memory back, and keep the compiled programs for `wake_up`.

        Args:
            level: 0 only pauses; 1 drops the KV cache and moves the weights to the host's memory (on CPU, where that
                is the same memory, they stay where they are); 2 drops both, and `wake_up` reads the weights anew.
            mode: what happens to requests: "abort" ends them (``finish_reason="abort"``), "wait" runs them to their
                end first, "keep" computes them anew after `wake_up`.

        While the engine sleeps, requests are refused with a RuntimeError.
        """
        if isinstance(level, bool) or level not in (0, 1, 2):
            raise ValidationError(f"level must be 0, 1 or 2, got {level!r}.")
        if mode not in ("abort", "wait", "keep"):
            raise ValidationError(f'mode must be "abort", "wait" or "keep", got {mode!r}.')
        with self._client.lock:
            self._client.pause(mode)
            self._client.core.sleep(level)

    def wake_up(self, tags: Iterable[str] | None = None) -> bool:
        """Undo `sleep`, wholly or (with `tags` among "weights", "kv_cache", "scheduling") in part.

        Returns:
            Whether the engine is awake: nothing sleeps any more.
        """
        wanted = set(_TAGS if tags is None else [tags] if isinstance(tags, str) else tags)
        if unknown := wanted.difference(_TAGS):
            raise ValidationError(f"tags must be among {', '.join(_TAGS)}; got {', '.join(map(repr, unknown))}.")
        with self._client.lock:
            return self._client.core.wake_up(wanted)

    @property
    def is_sleeping(self) -> bool:
        return self._client.core.is_sleeping

    def release_kv_cache_memory(self) -> None:
        """Drop the KV cache alone; ``wake_up(["kv_cache"])`` makes a new one."""
        with self._client.lock:
            self._client.pause("abort")
            self._client.core.sleep(0, kv_cache=True)

    def apply_model(self, function: Callable[[Any], Result]) -> list[Result]:
        """What `function` makes of the model's weights, a pytree of `jax.Array`; a list of one, as there is one
        process.
        """
        with self._client.lock:
            self._client.core.check_awake()
            return [function(self._started.runner.params)]

    def update_weights(self, params: Any) -> None:
        """Go on with other weights: a pytree like `apply_model` shows, with the same shapes and dtypes; or a state of
        `flax.nnx`, or the module, that `jaxllm.flax.to_nnx` gave, in any float dtype.

        Its layers are a tuple of segments, each stacked on the first axis of every array: one of all layers, as engines
        on the CPU have them, one of each layer, as engines on a GPU have them, or others. Segments that are not the
        engine's are joined or cut, which takes new arrays.

        The prefix cache, which the old weights made, is dropped.

        Raises:
            ValidationError: another structure, shape or dtype; the text names the first difference.
            RuntimeError: requests are running.
        """
        with self._client.lock:
            if self._client.has_unfinished:
                raise RuntimeError("weights cannot change while requests run: wait for them, or sleep() first")
            runner = self._started.runner
            if "flax.nnx" in sys.modules and runner.params is not None:
                from jaxllm.flax import is_nnx, to_params

                if is_nnx(params):
                    params = to_params(params, like=runner.params)
            runner.set_params(params)
            self._client.core.reset_prefix_cache()

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Call something on the runner, which is what vLLM's workers are here; a list of one result.

        Args:
            method: the name of one of the runner's methods (``"reload_weights"``), or a function of the runner.
            timeout: without effect: the call is made in this thread.

        Raises:
            ValidationError: the runner has no such method.
        """
        runner = self._started.runner
        if isinstance(method, str):
            known = [name for name in dir(type(runner)) if not name.startswith("_")]
            if method not in known:
                raise ValidationError(f"the runner has no method {method!r}; it has {', '.join(known)}.")
            call = getattr(runner, method)
        else:
            call = functools.partial(method, runner)
        with self._client.lock:
            return [call(*args, **(kwargs or {}))]

    def get_world_size(self, include_dp: bool = True) -> int:
        """Devices that the engine uses."""
        return self._started.config.target.num_devices
