# SPDX-License-Identifier: MIT
"""What is trained, what is asked on the way, and how: the other side of `objectives.Networks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cmfast_train.backends.torch_cuda import arithmetic
from cmfast_train.denoiser import Denoiser, denoised
from cmfast_train.methods.losses import same_dropout
from cmfast_train.networks.adm import timestep_embedding
from cmfast_train.networks.precision import full_precision
from cmfast_train.training.parallel import jvp

FEATURES = 64  # of the noise level, that its log-variance is linear in
STEP = 1e-3  # of central differences, relative to the direction


class Student(nn.Module):
    """The denoiser in training and, for continuous-time methods, the learned log-variance of its loss.

    One module, because DDP and FSDP synchronise the gradients of what is called through them and of nothing else.
    """

    def __init__(self, denoiser: Denoiser, adaptive: bool) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.log_variance = nn.Linear(FEATURES, 1, dtype=torch.float32) if adaptive else None
        if self.log_variance is not None:
            nn.init.zeros_(self.log_variance.weight)
            nn.init.zeros_(self.log_variance.bias)

    def forward(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, second: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the network's output F [B, C, H, W] and the log-variance u(sigma) [B], zero where none is learned."""
        output = self.denoiser.output(x, sigma, label, second)
        if self.log_variance is None:
            return output, torch.zeros_like(sigma)
        with full_precision(sigma):
            t = torch.atan(sigma / self.denoiser.spec.sigma_data)
            return output, self.log_variance(timestep_embedding(100 * t, FEATURES))[:, 0]


class Asked:
    """The networks of a step (`objectives.Networks`). All evaluations of one step draw the same dropout masks.

    model    the student as Accelerate wrapped it: gradients go through it alone
    student  the module inside
    target   a module whose weights are an average of the student's, or None
    teacher  the model that is distilled, or None
    finite   differentiate by central differences instead of forward mode
    devices  CUDA device indices whose random state counts for dropout; [] on a CPU
    """

    def __init__(
        self,
        model: nn.Module,
        student: Student,
        target: Denoiser | None,
        teacher: Denoiser | None,
        finite: bool,
        devices: list[int],
    ) -> None:
        self._model, self._student, self._target, self._teacher = model, student, target, teacher
        self._finite, self._devices = finite, devices

    def student(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        return denoised(self._model(x, sigma, label)[0], x, sigma, self._student.denoiser.spec)

    def itself(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        output, _ = self._aside(self._student, x, sigma, label)
        return denoised(output, x, sigma, self._student.denoiser.spec)

    def target(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        assert self._target is not None
        f: Tensor = self._aside(self._target, x, sigma, label)
        return f

    def teacher(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        assert self._teacher is not None
        f: Tensor = self._aside(self._teacher, x, sigma, label if self._teacher.spec.classes else None)
        return f

    def output(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, second: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output, log_variance = self._model(x, sigma, label, second)
        return output, log_variance

    def output_along(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, second: Tensor | None, dx: Tensor, dsigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        def output(x: Tensor, sigma: Tensor) -> Tensor:
            f: Tensor = self._aside(self._student, x, sigma, label, second)[0]
            return f

        if self._finite:
            return output(x, sigma), central_difference(self._exactly(label, second), x, sigma, dx, dsigma)
        return jvp(output, (x, sigma), (dx, dsigma))

    def _exactly(self, label: Tensor | None, second: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return F as a function of (x, sigma) in float32, whatever the run computes in: differences are small."""

        def output(x: Tensor, sigma: Tensor) -> Tensor:
            # Not cudnn.flags: what it is not given it sets to defaults of its own, among them enabled=False.
            with torch.autocast(x.device.type, enabled=False), arithmetic(tf32=False, benchmark=None):
                f: Tensor = self._aside(self._student.denoiser.output, x, sigma, label, second)
            return f

        return output

    def _aside(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Evaluate without gradient, with the dropout masks that the next evaluation will draw."""
        with torch.no_grad():
            return same_dropout(function, self._devices)(*inputs)


def central_difference(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, dx: Tensor, dsigma: Tensor
) -> Tensor:
    """Return the derivative of function(x [B, C, H, W], sigma [B]) along (dx, dsigma), to second order.

    The step is 0.001 of the direction, and short enough that no noise level changes by more than a tenth.
    """
    step = torch.minimum(torch.full_like(sigma, STEP), 0.1 * sigma / dsigma.abs().clamp(min=1e-12))
    image = step[:, None, None, None]
    ahead, behind = function(x + image * dx, sigma + step * dsigma), function(x - image * dx, sigma - step * dsigma)
    return (ahead - behind) / (2 * image)
