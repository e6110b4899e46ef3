# SPDX-License-Identifier: MIT
"""The training methods: one module a family, one row each in `table`. Importing this package needs no torch.

`method` defines a row and finds one by its name, `table` has ours, `step` defines the input of a step function.
docs/extending.md shows how another package adds a method.
"""

from cmfast_train.methods import table as table  # fills ROWS
from cmfast_train.methods.method import Method, Needs, find, names, register, setting

__all__ = ["Method", "Needs", "find", "names", "register", "setting"]
