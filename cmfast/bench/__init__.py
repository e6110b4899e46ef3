# SPDX-License-Identifier: MIT
"""Measuring as a library: contenders in turns, the machine, its ceilings, what a time goes to."""
