# SPDX-License-Identifier: MIT
"""The training methods: one module a family, one row each in `table`. Importing this package needs no torch.

`method` defines a row, `table` finds one by name, `step` defines the input of a step function. docs/extending.md shows
how another package adds a method.
"""

from cmfast_train.methods.method import Method, Needs, setting
from cmfast_train.methods.table import find, names, register

__all__ = ["Method", "Needs", "find", "names", "register", "setting"]
