# SPDX-License-Identifier: MIT
"""Editing with a consistency model: Algorithm 4 of "Consistency Models" (arXiv:2303.01469) and its relatives.

    from cmfast import editing

    images = editing.inpaint(model, known, mask, steps=18)     # draw what the mask leaves open
    images = editing.colorize(model, grey)                     # colours for a grey image
    images = editing.upscale(model, low)                       # an image whose block averages are `low`
    images = editing.sdedit(model, strokes, sigma=5)           # an image from coarse strokes
    images = editing.denoise(model, noisy, sigma=0.5)          # the image under noise of a known level
    images = editing.interpolate(model, (0, 1), n=8)           # from the sample of one seed to that of another

All run on any denoiser file and backend, need numpy only, and return what `Model.sample` returns. All but `colorize`
take signals and action sequences as well as images. The projections are in `cmfast.editing.constraints`.
"""

from __future__ import annotations

from cmfast.editing.compare import save_comparison
from cmfast.editing.constrained import colorize, inpaint, upscale
from cmfast.editing.noisy import denoise, interpolate, sdedit

__all__ = ["colorize", "denoise", "inpaint", "interpolate", "save_comparison", "sdedit", "upscale"]
