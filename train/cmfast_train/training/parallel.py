# SPDX-License-Identifier: MIT
"""How a network is trained that is too large or too slow for one device as it is: what `trainer` asks for by name.

shard, whole, fill, fill_optimizer   the weights cut up over the processes (FSDP2, torch.distributed.fsdp.fully_shard)
together                             work of one process, whose failure all have to hear of
leave                                the end of a process of a run of several
recompute                            activations computed again in the backward pass instead of kept
jvp                                  the derivative along a direction, forward mode

None of them changes what is computed, beyond rounding, or the names of the parameters. Sharding is PyTorch's own and
not Accelerate's: on a CPU, Accelerate trains by DDP whatever it was asked; on a GPU it would round the weights of the
noise embedding to half precision. It keeps the processes, the optimiser and the precision.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from cmfast.errors import CmfastError
from cmfast_train.networks import adm, edm
from cmfast_train.networks.cloneofsimo import CloneofsimoUnet

T = TypeVar("T")


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks that a network is a sequence of: nearly all of its weights and of its arithmetic."""
    kinds = (nn.Sequential,) if isinstance(network, CloneofsimoUnet) else (adm.ResBlock, adm.Attention, edm.Block)
    return [module for module in network.modules() if isinstance(module, kinds)]


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the weights up over the processes of a mesh, in place: each keeps its part, and sees a block's while it runs.

    mesh  torch.distributed.device_mesh.init_device_mesh(device type, (processes,))

    From here on the parameters are DTensors, so the optimiser and averages come after. Every process must hold the
    same weights before, contiguous ones; a network on the CPU moves to the mesh's device block by block. Call the
    module, not its forward; copy it before, not after. For mixed precision, run it in torch.autocast, whose cache is
    off in this process from here on.
    """
    for module in [*blocks(network), network]:
        # Also the outermost: an average is only ever run forwards, and would go on with the weights of its first run.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # Autocast would keep the half-precision weights of a pass without gradients, and the next, with them, get none.
    torch.set_autocast_cache_enabled(False)


def whole(tree: Any, keep: bool = True) -> Any:
    """Return nested dicts, lists and tuples with every sharded tensor put together on the CPU; every process calls it.

    keep  whether this process wants them: the others help and get None in their place
    """
    if isinstance(tree, Mapping):
        return {name: whole(value, keep) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(value, keep) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    tensor = tree.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
        return tensor.cpu() if keep else None
    return tensor if keep else None


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole values into tensors of the same names, sharded or not; every process passes the same values."""
    for name, tensor in tensors.items():
        if values[name].shape != tensor.shape:  # copy_ would repeat a smaller one
            raise ValueError(f"{name} has the shape {list(values[name].shape)} instead of {list(tensor.shape)}")
        tensor.copy_(_part(values[name], tensor))


def fill_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load `whole(optimizer.state_dict())`, of however many processes, into an optimiser of these."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        i: {
            name: _part(value, weights[i]) if isinstance(value, Tensor) and value.shape == weights[i].shape else value
            for name, value in of_weight.items()
        }
        for i, of_weight in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def together(accelerator: Accelerator, work: Callable[[], T] | None) -> T | None:
    """Do work in the processes that have some while the others wait; return its result, or None where there is none.

    If it fails in one process all raise: the others would wait for it for ever, in their next exchange of gradients.
    """
    result, error = None, None
    try:
        result = work() if work is not None else None
    except Exception as err:
        error = err
    if accelerator.num_processes > 1:
        said = gather_object([None if error is None else str(error) or type(error).__name__])
        if error is None and any(said):
            raise CmfastError(f"another process has stopped: {next(filter(None, said))}")
    if error is not None:
        try:
            raise error
        finally:
            del error  # a cycle with its traceback would keep what the work had on a GPU
    return result


def leave(end: SystemExit | Exception) -> None:
    """End this process as `end` would, if it is one of several; return if it is not.

    The interpreter's own end is not safe there. A thread of Gloo that lets go of the last tensor of an exchange asks
    for Python's lock; while the interpreter ends, that aborts the process ("terminate called without an active
    exception", https://github.com/pytorch/pytorch/issues/190489). `destroy_process_group` joins these threads only if
    nothing else holds the group, and DTensor's caches hold it to the end. So the process ends without the interpreter,
    until PyTorch releases tensors safely then.
    """
    if not torch.distributed.is_initialized():
        return
    code = end.code if isinstance(end, SystemExit) else 1
    if not isinstance(end, SystemExit):
        sys.excepthook(type(end), end, end.__traceback__)
    if not code:  # after an error others may be in an exchange, and NCCL would wait for them
        torch.distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def recompute(network: nn.Module) -> None:
    """Let the blocks of a network keep only their inputs for the backward pass, and run again in it, in place.

    About a third more time for a fraction of the memory. Dropout draws the same masks again. Without gradients the
    blocks run as they are.
    """
    for block in blocks(network):
        block.forward = functools.partial(_recomputed, block.forward)


def jvp(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return function(*primals) and its derivative along the tangents, both without gradient. Dropout: as it is drawn.

    Our networks run in it uncompiled, in any precision and memory layout.
    """
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no forward derivative
        _PlainNorms(),
        warnings.catch_warnings(),
    ):
        # Until PyTorch's own formulas for forward mode, loaded at its first use, do without torch.jit.script.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        with forward_ad.dual_level():  # torch.func.jvp wraps whatever is made in it, also FSDP's buffers
            duals = map(forward_ad.make_dual, primals, tangents)
            output, tangent = forward_ad.unpack_dual(function(*duals))
    return output, torch.zeros_like(output) if tangent is None else tangent


class _PlainNorms(TorchFunctionMode):
    """PyTorch's forward derivative of a group norm is a view of its input, which channels_last does not allow.

    What comes out has the layout that went in, which the next convolution takes as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.group_norm or args[0].is_contiguous():
            return func(*args, **(kwargs or {}))
        output = func(args[0].contiguous(), *args[1:], **(kwargs or {}))
        return output.contiguous(memory_format=torch.channels_last)


def _recomputed(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    output: Tensor = checkpoint(forward, *inputs, use_reentrant=False)
    return output


def _part(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole value, cut as another tensor is, without asking the other processes."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
