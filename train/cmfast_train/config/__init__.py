# SPDX-License-Identifier: MIT
"""The configuration of a run: its settings, its phases, presets, and how a command line changes them."""
