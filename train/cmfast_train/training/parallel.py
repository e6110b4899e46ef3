# SPDX-License-Identifier: MIT
"""Several processes, large networks, and derivatives along a direction.

shard, whole, fill, fill_optimizer   weights sharded over the processes (FSDP2, torch.distributed.fsdp.fully_shard)
of_the_first                         weights that processes start from
together                             work of one process, whose failure stops all
leave                                the end of a process of a distributed run
recompute                            activations recomputed in the backward pass
jvp                                  the derivative along a direction, forward mode

None of them changes the result, beyond rounding, or the names of the parameters. Sharding is PyTorch's own and not
Accelerate's: on a CPU, Accelerate always trains with DDP; on a GPU it would round the weights of the noise embedding to
half precision. Accelerate keeps the processes, the optimiser and the precision.
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
from accelerate.utils import broadcast_object_list, gather_object
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
    """Return the blocks that a network consists of: nearly all of its weights and its arithmetic.

    A custom network that has a method `blocks` says which they are; else it is one.
    """
    own = getattr(network, "blocks", None)
    if callable(own) and not isinstance(own, nn.Module):  # a list of modules, often called so, is callable, too
        return list(own())
    kinds = (nn.Sequential,) if isinstance(network, CloneofsimoUnet) else (adm.ResBlock, adm.Attention, edm.Block)
    return [module for module in network.modules() if isinstance(module, kinds)]


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights over the processes of a mesh, in place: each keeps its part, and gathers a block while it runs.

    From here on the parameters are DTensors, so optimiser and averages come after. Every process must hold the same
    contiguous weights before; a network on the CPU moves to the mesh's device block by block. Call the module, not its
    forward; copy it before, not after. For mixed precision, run it in torch.autocast, whose cache is off in this
    process from here on.

    Args:
        network: to be sharded.
        mesh: torch.distributed.device_mesh.init_device_mesh(device type, (processes,)).
    """
    # The output of a custom network may be a view; nothing here writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for module in [*blocks(network), network]:
        # Also the outermost: an average only runs forwards, and would keep the weights of its first run.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # Autocast would cache the half-precision weights of a pass without gradients, and the next pass would get none.
    torch.set_autocast_cache_enabled(False)


def whole(tree: Any, keep: bool = True) -> Any:
    """Return nested dicts, lists and tuples with every sharded tensor gathered on the CPU; every process must call it.

    Args:
        tree: of tensors and plain values.
        keep: whether this process needs the tensors; the others take part and get None in their place.
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


def of_the_first(accelerator: Accelerator, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights [CPU] that the first process passes, in every process."""
    if accelerator.num_processes == 1:
        return weights
    passed = [dict(weights) if accelerator.is_main_process else {}]
    broadcast_object_list(passed)
    return passed[0]


def together(accelerator: Accelerator, work: Callable[[], T] | None) -> T | None:
    """Run work in some processes while the others wait; return its result, None in a process without work.

    Args:
        accelerator: the processes.
        work: of this process, if it has any.

    Raises:
        CmfastError: another process has failed. Without it, this one would wait for ever in its next exchange.
    """
    result, error = None, None
    try:
        result = work() if work is not None else None
    except Exception as err:
        error = err
    if accelerator.num_processes > 1:
        errors = gather_object([None if error is None else str(error) or type(error).__name__])
        if error is None and any(errors):
            raise CmfastError(f"another process has stopped: {next(filter(None, errors))}")
    if error is not None:
        try:
            raise error
        finally:
            del error  # a cycle with its traceback would keep the GPU memory of the work
    return result


def leave(end: SystemExit | Exception) -> None:
    """End this process as `end` would, if the run is distributed; else return.

    Finalising the interpreter is not safe there. A thread of Gloo that releases the last tensor of an exchange takes
    Python's lock; during finalisation that aborts the process ("terminate called without an active exception",
    https://github.com/pytorch/pytorch/issues/190489). `destroy_process_group` joins these threads only if nothing else
    holds the group, and DTensor's caches hold it to the end. So the process ends without finalisation, until PyTorch
    releases such tensors safely.
    """
    if not torch.distributed.is_initialized():
        return
    code = end.code if isinstance(end, SystemExit) else 1
    if not isinstance(end, SystemExit):
        sys.excepthook(type(end), end, end.__traceback__)
    if not code:  # after an error, others may be in an exchange, and NCCL would wait for them
        torch.distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def recompute(network: nn.Module) -> None:
    """Let the blocks of a network keep only their inputs and run again in the backward pass, in place.

    About a third more time for a fraction of the memory. Dropout draws the same masks again. Without gradients nothing
    changes.
    """
    found = blocks(network)
    if not found:
        raise CmfastError(
            f"recompute=true needs the blocks of the network: give {type(network).__name__} a method blocks() that "
            "returns a list of modules, each called once"
        )
    for block in found:
        block.forward = functools.partial(_recomputed, block.forward)


def jvp(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return function(*primals) and its derivative along the tangents, both without gradient, in forward mode.

    Networks run uncompiled, in any precision and memory layout.
    """
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no forward derivative
        _PlainNorms(),
        warnings.catch_warnings(),
    ):
        # Until PyTorch's formulas for forward mode, loaded at the first use, do without torch.jit.script.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        with forward_ad.dual_level():  # torch.func.jvp wraps all tensors made in it, also FSDP's buffers
            duals = map(forward_ad.make_dual, primals, tangents)
            output, tangent = forward_ad.unpack_dual(function(*duals))
    return output, torch.zeros_like(output) if tangent is None else tangent


_NORMS = tuple(getattr(torch.nn.functional, f"{kind}_norm") for kind in ("group", "layer", "instance", "batch", "rms"))


class _PlainNorms(TorchFunctionMode):
    """What PyTorch's forward derivatives of norms need.

    That of a group norm takes a view of its input, which channels_last does not allow. The output has the layout of the
    input, so the next convolution does not have to copy it. And of a half-precision input with float32 weights, which
    autocast leaves so on a CPU, the derivative is float32 beside a half-precision output, which the next layer refuses:
    norms are float32, as autocast has them on a GPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _NORMS:
            return func(*args, **(kwargs or {}))
        if args[0].dtype in (torch.float16, torch.bfloat16):
            args = (args[0].float(), *args[1:])
        if func is not torch.nn.functional.group_norm or args[0].is_contiguous():
            return func(*args, **(kwargs or {}))
        output = func(args[0].contiguous(), *args[1:], **(kwargs or {}))
        is_last = args[0].ndim == 4 and args[0].is_contiguous(memory_format=torch.channels_last)
        return output.contiguous(memory_format=torch.channels_last) if is_last else output


def _recomputed(forward: Callable[..., Tensor], *inputs: Tensor, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    output: Tensor = checkpoint(forward, *inputs, use_reentrant=False, **named)
    return output


def _part(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole value, sharded like another tensor, without communication."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
