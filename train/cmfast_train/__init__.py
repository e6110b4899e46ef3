# SPDX-License-Identifier: MIT
"""Training of consistency models with PyTorch. Start reading at `methods.consistency`, then `training.trainer`."""
