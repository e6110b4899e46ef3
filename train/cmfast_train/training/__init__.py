# SPDX-License-Identifier: MIT
"""A training run: trainer, networks, averages, folder and log."""
