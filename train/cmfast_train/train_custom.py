# SPDX-License-Identifier: MIT
"""Training of a custom network from Python: `cmfast_train.train`. The command is `cmfast-train --network`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmfast.errors import CmfastError, shown
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.config.train_config import ARRAYS, TrainConfig
from cmfast_train.denoiser import Denoiser
from cmfast_train.training.initial_model import Own
from cmfast_train.training.trainer import train as train_run

Arrays = Mapping[str, Tensor | npt.NDArray[Any]]


@final
@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run left.

    Attributes:
        denoiser: the model of the last phase, its weights averaged (EMA), on the CPU; `export_onnx` takes it.
        out: the folder of the run with model.pt, state.pt, log.jsonl, samples and phases; None without `out`.
    """

    denoiser: Denoiser
    out: Path | None


def train(
    config: TrainConfig,
    *,
    denoiser: Denoiser,
    data: Arrays | str | os.PathLike[str] | Dataset[Any],
    out: str | os.PathLike[str] | None = None,
    teacher: Denoiser | None = None,
) -> Trained:
    """Train a denoiser by the methods of `config.phases`, one after the other, or continue a stopped run.

    The same call with the same `out` resumes: to the bit on a CPU. Numbers are trained on as they are, so scale them
    before, to a standard deviation near the denoiser's sigma_data; a warning names data that are far from it.

    Args:
        config: phases, batch, seed and so on: TrainConfig(phases=(phase("edm", 400_000), phase("ect", 400_000))).
            Lengths are in samples. The conventions are the denoiser's.
        denoiser: what `wrap` returns: the network, its first weights and its conventions. It is left as it is. Methods
            that need other formulas around a diffusion model change the scaling, edm to boundary and back.
        data: {"x": [N, *shape], **conditions}, NumPy's or PyTorch's arrays: x float32, or uint8 of images; a class
            whole numbers [N]; a tensor float32 [N, *sizes]. Or the path of a .npz file or of a folder of .npy files
            with these names; or a Dataset with a length whose items are such mappings of one sample.
        out: folder of the run; None: nothing is kept but what is returned, and a stopped run begins again.
        teacher: what a method that needs a teacher distils; it may be the denoiser itself. Default: the newest earlier
            model that the phase's method can distil.

    Returns:
        The trained model and the folder.

    Raises:
        CmfastError: the denoiser, the data, the methods or the folder do not fit; the line says what to change.
        CheckFailed: the loss became infinite or NaN.
        KeyboardInterrupt: a signal stopped the run, after a checkpoint of its last step.
    """
    if not torch.is_grad_enabled():
        raise CmfastError("training needs gradients: call train outside torch.no_grad() and torch.inference_mode()")
    if not isinstance(config, TrainConfig):
        raise CmfastError(f"config must be a cmfast_train.TrainConfig, got {shown(config)}")
    for name, model in (("denoiser", denoiser), ("teacher", teacher)):
        if not isinstance(model, Denoiser) and not (name == "teacher" and model is None):
            raise CmfastError(f"{name} must be what cmfast_train.wrap(net, ...) returns, got {shown(model)}")
    if config.data != ARRAYS:
        raise CmfastError(f"the config has data={config.data}, and data= brings the data: leave it out of the config")
    if data is None:
        raise CmfastError('data= is missing: pass {"x": [N, *shape], **conditions}, a .npz file, or a Dataset')
    if config.init or config.teacher:
        raise CmfastError("init and teacher are files for cmfast-train; pass the models: denoiser=, teacher=")
    own = Own(denoiser=denoiser, teacher=teacher)
    with contextlib.ExitStack() as kept:
        folder = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="cmfast-")) if out is None else out)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        kept.enter_context(torch.random.fork_rng(devices))  # the caller's numbers go on as if there had been no run
        file = train_run(config, folder, None, own, data)
        trained = load_checkpoint(file).denoiser(denoiser)
    given = dict(denoiser.network.named_parameters())
    for name, weight in trained.network.named_parameters():
        weight.requires_grad_(given[name].requires_grad)
    return Trained(denoiser=trained, out=None if out is None else folder)
