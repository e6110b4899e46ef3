# SPDX-License-Identifier: MIT
"""The training methods: one module a family, one row each in `table`. Importing this package needs no torch.

`method` says what a row holds, `table` finds one by its name, `step` says what a method is given. docs/extending.md
adds a method from outside.
"""

from cmfast_train.methods.method import Method, Needs, setting
from cmfast_train.methods.table import find, names, register

__all__ = ["Method", "Needs", "find", "names", "register", "setting"]
