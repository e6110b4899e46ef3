# SPDX-License-Identifier: MIT
"""CUDA without torch: memory, streams and graphs (`runtime`), kernels (`kernels`), drawing (`drawing`)."""
