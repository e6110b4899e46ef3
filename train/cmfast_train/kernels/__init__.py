# SPDX-License-Identifier: MIT
"""Kernels in Triton, for CUDA. Nothing imports them, or Triton, before the first one is launched."""
