# SPDX-License-Identifier: MIT
"""The training methods, their losses and schedules."""
