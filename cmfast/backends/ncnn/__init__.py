# SPDX-License-Identifier: MIT
"""ncnn: `backend` is what `cmfast.backends` opens."""
