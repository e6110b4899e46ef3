# SPDX-License-Identifier: MIT
"""The files that models are: their manifest, and how to find it in each format."""
