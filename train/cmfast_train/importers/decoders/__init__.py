# SPDX-License-Identifier: MIT
"""Decoders of latents: from what an autoencoder's encoder makes of an image back to the image, in few steps."""
