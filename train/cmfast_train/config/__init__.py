# SPDX-License-Identifier: MIT
"""What a run is told: settings, phases, presets."""
