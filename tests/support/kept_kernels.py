"""Where tests keep the machine code of kernels for CPUs: where engines do. What has changed is compiled anew."""

from __future__ import annotations

from jaxllm.config.cache_folder import cache_folder

KERNELS_FOLDER = cache_folder() / "kernels"
