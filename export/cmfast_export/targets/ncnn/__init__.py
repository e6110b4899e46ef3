# SPDX-License-Identifier: MIT
"""The target ncnn: a folder that ncnn reads, converted by pnnx and run before it has its name."""
