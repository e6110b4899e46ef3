# SPDX-License-Identifier: MIT
"""Int8 for CPUs: which products are quantized (`products`), with which ranges (`calibration`), how (`graph`).

`quantization` puts it together and gives products back to float32 until the file is accurate enough.
"""
