# SPDX-License-Identifier: MIT
"""What is made of a graph: one module a format."""
