# SPDX-License-Identifier: MIT
"""Charts with names of files that matplotlib would take for formulas, cannot draw, or has no letters for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from cmfast.bench.chart import chart_text, save_chart

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    "name",
    [os.fsdecode(b"n\xe9.onnx"), r"a$\frac$.onnx", "a$_{$.onnx", "one$.onnx", "模型.onnx", "a\nb.onnx", "\\$.onnx"],
    ids=ascii,
)
def test_any_name_of_a_file_is_drawn_without_a_word(name: str, tmp_path: Path) -> None:
    from matplotlib.figure import Figure  # a warning is an error in these tests

    figure = Figure(figsize=(4, 2))
    figure.suptitle(chart_text(name))
    figure.subplots(1, 1).barh([chart_text(name)], [1.0])
    save_chart(figure, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.size == (400, 200)
