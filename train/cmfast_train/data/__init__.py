# SPDX-License-Identifier: MIT
"""Images to train on."""
