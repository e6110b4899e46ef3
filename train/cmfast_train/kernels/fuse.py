# SPDX-License-Identifier: MIT
"""Make a network as fast as PyTorch's operations and our Triton kernels allow, for inference: `fuse`."""

from __future__ import annotations

import functools

import torch

from cmfast.errors import BackendError, one_line
from cmfast_train.backends.torch_noise import has_triton
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.adm import AdmUnet
from cmfast_train.networks.edm import DhariwalUnet, SongUnet


def fuse(denoiser: Denoiser) -> None:
    """Replace the network of a denoiser by one that computes the same, up to rounding, with far fewer launches.

    Call it last: after `to_precision`, after loading weights and moving them to a device. The new network takes
    the tensors of the old one, has no state dict of its own, and no derivative; `networks` says what it leaves out.

    Raises:
        BackendError: Triton is not installed or does not work, or the network is none of adm, song, dhariwal.
    """
    kind = type(denoiser.network)
    if kind not in (AdmUnet, SongUnet, DhariwalUnet):
        raise BackendError(
            f"the fused kernels are for the networks adm, song and dhariwal, not for {kind.__name__}; "
            "use another variant"
        )
    try:
        import triton  # noqa: F401
    except ImportError:
        raise BackendError("the fused kernels need triton, which is not installed: pip install triton") from None
    if why := why_no_kernels(next(denoiser.parameters()).device):
        raise BackendError(f"the fused kernels do not run here: {why}; use another variant")
    from cmfast_train.kernels.networks import fused

    denoiser.network = fused(denoiser.network)


@functools.cache
def why_no_kernels(device: torch.device) -> str:
    """Return why Triton's kernels do not run on a device, "" if they do: a small one is compiled, run and compared."""
    if not has_triton():
        return "triton is not installed"
    try:
        from cmfast_train.kernels.group_norm_training import norm_act

        x = torch.arange(128.0, device=device).view(1, 32, 2, 2).to(memory_format=torch.channels_last)
        one = torch.ones(32, device=device)
        with torch.no_grad():
            off = norm_act(x, 8, one, one, 1e-5) - norm_act(x.cpu(), 8, one.cpu(), one.cpu(), 1e-5).to(device)
        return "" if float(off.abs().max()) < 1e-4 else "its kernels compute something else here"
    except Exception as err:  # no compiler of C for Triton's launchers, no such card, ...
        return f"triton does not work here ({one_line(err, 200)})"
