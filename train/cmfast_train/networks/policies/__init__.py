# SPDX-License-Identifier: MIT
"""What robot policies have beside the 1-D U-Net: the encoder of their cameras."""
