# SPDX-License-Identifier: MIT
"""A network that takes squares of pixels as channels, on the backends of a CPU, float32 and with float16 weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.backends import open_backend
from cmfast.noise import gaussian
from cmfast_export import cli
from cmfast_export.verify import verify_denoiser
from cmfast_train.checkpoint import Checkpoint, save_checkpoint
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from helpers.specs import image_spec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of 8x12 pixels in three colours, by squares of 2x2, every weight random."""
    config = AdmConfig(
        image_size=(8, 12), channels=3, classes=4, patch=2, model_channels=32, res_blocks=1, channel_mult=(1, 1),
        attention=(), head_channels=32,
    )  # fmt: skip
    network = AdmUnet(config)
    randomise(network)
    spec = image_spec(image=config.image_shape, classes=config.classes)
    path = tmp_path_factory.mktemp("patches") / "m.pt"
    save_checkpoint(Checkpoint(spec=spec, network=config, weights=network.state_dict()), path)
    return path


@pytest.mark.parametrize(
    ("needs", "options", "out"),
    [
        ("onnxruntime", (), "m.onnx"),
        ("openvino", ("--format", "openvino"), "m.xml"),
        ("ncnn", ("--format", "ncnn"), "m_ncnn"),
        ("onnxruntime", ("--weights", "fp16"), "small.onnx"),
    ],
)
def test_a_backend_computes_what_pytorch_computes(
    needs: str, options: tuple[str, ...], out: str, model: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    pytest.importorskip(needs)
    made = call(cli.main, model, *options, "-o", tmp_path / out)
    assert made.returncode == 0, made.stderr
    file, room = tmp_path / out, 5e-3 if "fp16" in options else 1e-4
    parity = verify_denoiser(cmfast.load(file).backend, open_backend(model), batches=(1, 3))
    assert parity.worst.max_abs <= room
    noise = np.stack([gaussian(5, range(3), k, (3, 8, 12)) for k in range(2)])
    ours, torchs = (cmfast.load(each).from_noise(noise, (80.0, 0.8), [0, 1, 3]) for each in (file, model))
    np.testing.assert_allclose(ours, torchs, rtol=0, atol=10 * room)
    assert torchs.std() > 0.1
