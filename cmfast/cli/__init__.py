# SPDX-License-Identifier: MIT
"""The commands of the runtime, one module each; nothing heavy is imported before the arguments are understood."""
