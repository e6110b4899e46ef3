# SPDX-License-Identifier: MIT
"""The commands of the trainer: parsing and printing."""
