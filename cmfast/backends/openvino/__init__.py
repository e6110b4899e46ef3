# SPDX-License-Identifier: MIT
"""OpenVINO: `backend` is what `cmfast.backends` opens, `compiled` keeps graphs compiled for the shapes of calls."""
