"""Backends run a model's ops: `reference` (torch, fp32, plain: the truth), `cpu` (SIMD kernels), `cuda`."""
