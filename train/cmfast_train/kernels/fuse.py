# SPDX-License-Identifier: MIT
"""Make a network as fast as PyTorch's operations and our Triton kernels allow, for inference: `fuse`."""

from __future__ import annotations

from cmfast.errors import EngineError
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.adm import AdmUnet
from cmfast_train.networks.edm import DhariwalUnet, SongUnet
from cmfast_train.training.fused import why_no_kernels


def fuse(denoiser: Denoiser) -> None:
    """Replace the network of a denoiser by one that computes the same, up to rounding, with far fewer launches.

    Call it last: after `to_precision`, after loading weights and moving them to a device. The new network takes
    the tensors of the old one, has no state dict of its own, and no derivative; `networks` says what it leaves out.

    Raises:
        EngineError: Triton is not installed or does not work, or the network is none of adm, song, dhariwal.
    """
    kind = type(denoiser.network)
    if kind not in (AdmUnet, SongUnet, DhariwalUnet):
        raise EngineError(
            f"the fused kernels are for the networks adm, song and dhariwal, not for {kind.__name__}; "
            "use another variant"
        )
    try:
        import triton  # noqa: F401
    except ImportError:
        raise EngineError("the fused kernels need triton, which is not installed: pip install triton") from None
    if why := why_no_kernels(next(denoiser.parameters()).device):
        raise EngineError(f"the fused kernels do not run here: {why}; use another variant")
    from cmfast_train.kernels.networks import fused

    denoiser.network = fused(denoiser.network)
