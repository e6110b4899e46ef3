# SPDX-License-Identifier: MIT
"""The networks of a step: the student, its stop-gradient copy, target and teacher (`methods.step.Networks`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from cmfast_train.backends.torch_cuda import arithmetic
from cmfast_train.denoiser import Denoiser, denoised
from cmfast_train.methods.paths import Conditions, expand
from cmfast_train.networks.adm import timestep_embedding
from cmfast_train.networks.precision import full_precision
from cmfast_train.training.parallel import jvp

FEATURES = 64  # of the noise level, that its log-variance is linear in
STEP = 1e-3  # of central differences, relative to the direction


@final
class Student(nn.Module):
    """What a phase trains: the denoiser, the log-variance of its loss and the fake scores, where its method needs them.

    One module, because DDP and FSDP synchronise the gradients of what is called through them and of nothing else.

    Args:
        denoiser: the model in training.
        log_variance: learn the log-variance of the loss (`Needs.log_variance`).
        fakes: further denoisers (`Needs.fake_scores`).
    """

    def __init__(self, denoiser: Denoiser, log_variance: bool, fakes: Sequence[Denoiser] = ()) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.fakes = nn.ModuleList(fakes)
        self.log_variance = nn.Linear(FEATURES, 1, dtype=torch.float32) if log_variance else None
        if self.log_variance is not None:
            nn.init.zeros_(self.log_variance.weight)
            nn.init.zeros_(self.log_variance.bias)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        sigma_next: Tensor | None = None,
        parts: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return the network's output F [B, *shape] and the log-variance u(sigma) [B], zero where none is learned.

        With parts, samples that the fake scores have denoised, [B, *shape], in place of the output.
        """
        if parts:
            return denoised_in_parts(self.fakes, x, sigma, conditions, parts), torch.zeros_like(sigma)
        output = output_of(self.denoiser, x, sigma, conditions, sigma_next)
        if self.log_variance is None:
            return output, torch.zeros_like(sigma)
        with full_precision(sigma):
            t = torch.atan(sigma / self.denoiser.spec.sigma_data)
            return output, self.log_variance(timestep_embedding(100 * t, FEATURES))[:, 0]


@final
class StepNetworks:
    """The networks of a phase (`methods.step.Networks`). All evaluations of one step draw the same dropout masks.

    Args:
        model: the student as Accelerate wrapped it: gradients go through it alone.
        student: the module inside.
        target: a module whose weights are an average of the student's, or None.
        teacher: the model that is distilled, or None.
        finite: differentiate by central differences instead of forward mode.
        devices: CUDA device indices whose random state counts for dropout; [] on a CPU.
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

    def student(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Return x0 [B, *shape] of the denoiser in training, with gradient."""
        return denoised(self._model(x, sigma, conditions)[0], x, sigma, self._student.denoiser.spec)

    def stopgrad(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Return x0 [B, *shape] of the same weights, without gradient."""
        output, _ = self._no_grad(self._student, x, sigma, conditions)
        return denoised(output, x, sigma, self._student.denoiser.spec)

    def target(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Return x0 [B, *shape] of the average of the weights, without gradient."""
        assert self._target is not None, "the method's row has no target_decay"
        return self._frozen(self._target, x, sigma, conditions)

    def teacher(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Return x0 [B, *shape] of the teacher, without gradient; an unconditional one ignores the conditions."""
        assert self._teacher is not None, "the method's row distils nothing"
        return self._frozen(self._teacher, x, sigma, conditions)

    def fake(self, x: Tensor, sigma: Tensor, conditions: Conditions, parts: Sequence[int]) -> Tensor:
        """Return x0 [B, *shape] of the denoisers that learn the student's samples, with gradient."""
        self._student.fakes.train()
        x0: Tensor = self._model(x, sigma, conditions, parts=parts)[0]
        return x0

    def scores(self, x: Tensor, sigma: Tensor, conditions: Conditions, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return x0 [B, *shape] of the teacher and of `fake`, differentiable in x."""
        assert self._teacher is not None, "the method's row distils nothing"
        teacher = self._teacher(x, sigma, **conditions_of(self._teacher, conditions))
        # As the teacher is: dropout would be a difference between them. They stay so while the gradient is taken.
        self._student.fakes.eval()
        return teacher, denoised_in_parts(self._student.fakes, x, sigma, conditions, parts)

    def output(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, sigma_next: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return F [B, *shape] and the log-variance u(sigma) [B], with gradient."""
        output, log_variance = self._model(x, sigma, conditions, sigma_next)
        return output, log_variance

    def output_stopgrad(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, sigma_next: Tensor | None = None
    ) -> Tensor:
        """Return F [B, *shape], without gradient."""
        f: Tensor = self._no_grad(self._student, x, sigma, conditions, sigma_next)[0]
        return f

    def output_along(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, sigma_next: Tensor | None, dx: Tensor, dsigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return F and its derivative along (dx [B, *shape], dsigma [B]), without gradient."""

        def output(x: Tensor, sigma: Tensor) -> Tensor:
            return self.output_stopgrad(x, sigma, conditions, sigma_next)

        if self._finite:
            exact = self._output_in_float32(conditions, sigma_next)
            return output(x, sigma), central_difference(exact, x, sigma, dx, dsigma)
        return jvp(output, (x, sigma), (dx, dsigma))

    def _output_in_float32(
        self, conditions: Conditions, sigma_next: Tensor | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return F as a function of (x, sigma) that always computes in float32: differences are small."""

        def output(x: Tensor, sigma: Tensor) -> Tensor:
            # Not cudnn.flags: flags that are not given get its own defaults, enabled=False among them.
            with torch.autocast(x.device.type, enabled=False), arithmetic(tf32=False, benchmark=None):
                f: Tensor = self._no_grad(output_of, self._student.denoiser, x, sigma, conditions, sigma_next)
            return f

        return output

    def _frozen(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        own = conditions_of(denoiser, conditions)
        x0: Tensor = self._no_grad(lambda x, sigma: denoiser(x, sigma, **own), x, sigma)
        return x0

    def _no_grad(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Evaluate without gradient, with the dropout masks that the next evaluation will draw."""
        with torch.no_grad():
            return same_dropout(function, self._devices)(*inputs)


def output_of(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, conditions: Conditions, sigma_next: Tensor | None = None
) -> Tensor:
    """Return F [B, *shape] of a denoiser, evaluated with those of the conditions that it has.

    In mixed precision a custom network returns half precision; what follows is float32.
    """
    output = denoiser.output(x, sigma, conditions_of(denoiser, conditions), sigma_next)
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def denoised_in_parts(
    denoisers: Iterable[Any], x: Tensor, sigma: Tensor, conditions: Conditions, parts: Sequence[int]
) -> Tensor:
    """Return x0 [B, *shape], the first parts[0] samples of the first denoiser, and so on."""
    sizes = list(parts)
    given = [{name: values.split(sizes)[i] for name, values in conditions.items()} for i in range(len(sizes))]
    each = zip(denoisers, x.split(sizes), sigma.split(sizes), given, strict=True)
    return torch.cat([denoiser(x, sigma, **conditions_of(denoiser, own)) for denoiser, x, sigma, own in each])


def conditions_of(denoiser: Denoiser, conditions: Conditions) -> dict[str, Tensor]:
    """Return those of the conditions that a denoiser has."""
    return {each.name: conditions[each.name] for each in denoiser.spec.conditions}


def same_dropout(denoise: Callable[..., Any], devices: list[int]) -> Callable[..., Any]:
    """Return `denoise` with the random state restored after each call.

    A call of `denoise` right afterwards draws the same dropout masks: both ends of a pair must see the same network.

    Args:
        denoise: a function that draws dropout masks.
        devices: CUDA device indices whose random state counts; [] on a CPU.
    """

    def run(*inputs: Any) -> Any:
        with torch.random.fork_rng(devices=devices):
            return denoise(*inputs)

    return run


def central_difference(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, dx: Tensor, dsigma: Tensor
) -> Tensor:
    """Return the derivative of function(x [B, *shape], sigma [B]) along (dx, dsigma), to second order.

    The step is 0.001 of the direction, and short enough that no noise level changes by more than a tenth.
    """
    step = torch.minimum(torch.full_like(sigma, STEP), 0.1 * sigma / dsigma.abs().clamp(min=1e-12))
    h = expand(step, x)
    ahead, behind = function(x + h * dx, sigma + step * dsigma), function(x - h * dx, sigma - step * dsigma)
    return (ahead - behind) / (2 * h)
