# SPDX-License-Identifier: MIT
"""Triton kernels without a card: compiled for cards that are not here, or interpreted by a script of their own."""
