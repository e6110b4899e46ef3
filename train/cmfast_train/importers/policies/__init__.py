# SPDX-License-Identifier: MIT
"""Robot policies: sequences of actions from an encoded observation, by a 1-D U-Net (`networks.unet1d`)."""
