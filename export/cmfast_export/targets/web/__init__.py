# SPDX-License-Identifier: MIT
"""The target web: a page that draws in the browser. `page` writes it, `assets` is what it is made of."""
