"""Kernels for CPUs, written as LLVM code, and called by XLA as typed FFI targets."""
