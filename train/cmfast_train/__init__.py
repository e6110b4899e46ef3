# SPDX-License-Identifier: MIT
"""Training of consistency models with PyTorch. Start reading at `cmfast_train.methods.losses`, then `loop`."""
