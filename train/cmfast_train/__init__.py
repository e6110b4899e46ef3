# SPDX-License-Identifier: MIT
"""Training of consistency models with PyTorch. Start reading at `methods.losses`, then `training.trainer`."""
