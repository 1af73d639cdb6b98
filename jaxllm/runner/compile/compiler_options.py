"""What XLA is told besides its own settings, and why."""

from __future__ import annotations

import jax

#: XLA:CPU widens bf16 operands of the products it cannot do natively. Its loop-invariant code motion then lifts the
#: widening of *all* stacked layers out of the scan: a float32 copy of the weights every step (measured: 9x slower at
#: 8 rows, 432 MB more). LLVM's expensive passes take a seventh of the compile time and make no step faster.
CPU_OPTIONS: dict[str, str | bool] = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_llvm_disable_expensive_passes": True,
}
YNN_FUSIONS, ONLY_PRODUCTS = "xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
#: XLA's fusions of YNNPACK add up wrongly in JAX 0.10 (jax issue 39103); products by themselves are right, and what
#: stands in their place has other bits in other programs
RIGHT_SUMS: dict[str, str | bool] = {}
if jax.__version_info__ < (0, 11):
    RIGHT_SUMS[YNN_FUSIONS] = ONLY_PRODUCTS
CPU_OPTIONS |= RIGHT_SUMS
#: Besides, of programs without layers, whose time is the product with the head: XLA's older code generator compiles
#: them twice as fast (forward steps would run 10% slower). JAX 0.11 has it no more, and right sums of YNNPACK, whose
#: largest number of a row with a NaN is still one of the others.
CPU_HEAD_OPTIONS: dict[str, str | bool] = {}
if jax.__version_info__ < (0, 11):
    CPU_HEAD_OPTIONS["xla_cpu_use_fusion_emitters"] = False
else:
    CPU_HEAD_OPTIONS[YNN_FUSIONS] = ONLY_PRODUCTS
#: Besides, of the sampler that an engine begins with: without optimization it takes a third of the time to compile, and
#: two to four times as long to run
CPU_FIRST_OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
#: XLA:GPU computes things again rather than keep them when it believes that memory does not suffice. It does not know
#: that kernels write the KV cache in place, and counts a cache more than there is: with separate layers it repeated the
#: product of queries, keys and values in each (measured: 21 launches a layer instead of 15). What fits is planned here.
GPU_OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "rematerialization"}

#: Besides, of programs that copy weights from the host (`models.offloaded`): XLA:GPU orders launches so that copies run
#: beside products for sm_90 and later only, unless it is asked to.
GPU_COPY_OPTIONS: dict[str, str | bool] = {"xla_gpu_enable_latency_hiding_scheduler": True}
