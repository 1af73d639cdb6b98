"""What the machine computes on, under the names of vLLM's ``current_platform``."""

from __future__ import annotations

from typing import Any


class Platform:
    """JAX's default device; asking for it starts JAX, which takes the device as an engine would."""

    @property
    def device_type(self) -> str:
        """ "cpu" or "cuda"."""
        platform = self._device().platform
        return "cuda" if platform == "gpu" else platform

    @property
    def device_name(self) -> str:
        return self.device_type

    def get_device_name(self, device_id: int = 0) -> str:
        """The driver's name for the device, such as "NVIDIA H100 80GB HBM3"."""
        return self._device(device_id).device_kind

    def device_count(self) -> int:
        import jax

        return jax.local_device_count()

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"

    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    is_cuda_alike = is_cuda

    def is_rocm(self) -> bool:
        """False, as for every other platform of vLLM's that jaxllm has no kernels for."""
        return False

    is_tpu = is_xpu = is_out_of_tree = is_rocm

    def _device(self, device_id: int = 0) -> Any:
        import jax

        return jax.local_devices()[device_id]


current_platform = Platform()
