# SPDX-License-Identifier: MIT
"""Networks F(c_in x, c_noise, label). One file each."""
