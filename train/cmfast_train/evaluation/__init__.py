# SPDX-License-Identifier: MIT
"""The quality of samples."""
