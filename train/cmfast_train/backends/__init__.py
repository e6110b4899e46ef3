# SPDX-License-Identifier: MIT
"""Models run by PyTorch, as the runtime's backends."""
