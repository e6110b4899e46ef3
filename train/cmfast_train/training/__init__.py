# SPDX-License-Identifier: MIT
"""A run: the trainer, its networks, averages, folder and log."""
