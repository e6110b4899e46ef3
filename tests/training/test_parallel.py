# SPDX-License-Identifier: MIT
"""Sharding, recomputation and forward derivatives: none of them changes what is computed.

Run as a program by torch.distributed.run, this file is one process of a sharded training.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from cmfast_train.training.ema import update_ema
from cmfast_train.training.parallel import blocks, fill, fill_optimizer, jvp, leave, recompute, shard, whole
from helpers import helpers_on_path
from helpers.specs import image_spec

SHAPE: dict[str, Any] = {"image_size": 8, "channel_mult": (1, 2), "attention": (4,), "res_blocks": 1}
NETWORKS: dict[str, NetworkConfig] = {
    "adm": AdmConfig(**SHAPE, model_channels=32, head_channels=32, dropout=0.3),
    "song": SongConfig(**SHAPE, model_channels=32, dropout=0.3),
    "dhariwal": DhariwalConfig(**SHAPE, model_channels=64, dropout=0.3),
    "seed": CloneofsimoConfig(image_size=8, width=32),
}
# Two channels a group at least: where a norm has one, it cancels a bias, whose gradient is then rounding alone.
TRAINED = AdmConfig(**SHAPE | {"channel_mult": (1, 1)}, model_channels=64, head_channels=32)
BATCH, MIDDLE, STEPS = 8, 4, 8  # from its sixth step on, RAdam divides by the gradients' size


def network_of(name: str) -> nn.Module:
    network = build_network(NETWORKS[name])
    randomise(network)
    return network


def train(
    *stops: int, first: int = 0, begin: dict[str, Any] | None = None, mesh: DeviceMesh | None = None
) -> list[dict[str, Any]]:
    """Run steps [first, stops[-1]) of a training against its own average; return the states before `stops`, whole."""
    network = build_network(TRAINED).train()
    randomise(network)
    average = copy.deepcopy(network).requires_grad_(False)
    if mesh:
        shard(network, mesh)
        shard(average, mesh)
    weights, averages = dict(network.named_parameters()), dict(average.named_parameters())
    assert all(isinstance(tensor, DTensor) == bool(mesh) for tensor in (*weights.values(), *averages.values()))
    optimizer = torch.optim.RAdam(network.parameters(), lr=1e-3, foreach=True)
    if begin:
        fill(weights, begin["weights"])
        fill(averages, begin["averages"])
        fill_optimizer(optimizer, begin["optimizer"])
    rank, processes = (mesh.get_rank(), mesh.size()) if mesh else (0, 1)
    states = []
    for step in range(first, stops[-1]):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 3, 8, 8, generator=generator).chunk(processes)[rank]
        c_noise = torch.rand(BATCH, generator=generator).chunk(processes)[rank]
        for some, at in zip(x.chunk(2), c_noise.chunk(2), strict=True):  # two micro-batches
            with torch.no_grad():
                target = average(some / 2, at)
            loss = (network(some, at) - target).square().mean()
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(averages.values(), weights.values(), 0.5)
        assert all(bool(weight.isfinite().all()) for weight in weights.values())
        if step + 1 in stops:
            state = {"weights": weights, "averages": averages, "optimizer": optimizer.state_dict()}
            states.append(copy.deepcopy(whole(state, keep=rank == 0)))
    return states


# Sharded.


@pytest.fixture(scope="module")
def states(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the states of plain and of sharded trainings, by name."""
    folder = tmp_path_factory.mktemp("sharded")
    found = dict(zip(("plain, middle", "plain"), train(MIDDLE, STEPS), strict=True))
    torch.save(found["plain, middle"], folder / "plain, middle.pt")
    result = run(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, folder, **helpers_on_path()
    )
    assert result.returncode == 0, result.stderr
    for file in folder.glob("*.pt"):
        found[file.stem] = torch.load(file, weights_only=True)
    (found["sharded, then plain"],) = train(STEPS, first=MIDDLE, begin=found["sharded, middle"])
    return found


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return flat(dict(enumerate(tree)), name)
    return {name: tree}


@pytest.mark.parametrize("name", ["sharded", "plain, then sharded", "sharded, then plain"])
def test_two_sharded_processes_train_as_a_plain_one_does(name: str, states: dict[str, Any]) -> None:
    one, two = flat(states["plain"]), flat(states[name])
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            # Gradients are summed in another order; seen: 1.2e-7, an ulp.
            np.testing.assert_allclose(two[key], value, rtol=0, atol=2e-6, err_msg=key)
        else:
            assert value == two[key], key


def test_the_training_above_moves_the_weights_by_more_than_the_tolerance(states: dict[str, Any]) -> None:
    for part in ("weights", "averages"):
        for name, weight in states["plain"][part].items():
            assert (weight - states["plain, middle"][part][name]).abs().max() > 3e-5, (part, name)


def test_a_sharded_training_that_is_continued_ends_with_the_same_bits(states: dict[str, Any]) -> None:
    one, two = flat(states["sharded"]), flat(states["sharded, then sharded"])
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, Tensor) else value == two[key], key


def test_a_sharded_network_has_the_same_derivatives_also_in_half_precision(states: dict[str, Any]) -> None:
    one, two = states["plain, once"], states["sharded, once"]
    torch.testing.assert_close(one["derivative"], two["derivative"])
    for name, gradient in one["half"].items():
        # A sum rounded the other way is off by 2^-8; without its part of the gradients, by all of it.
        assert (two["half"][name] - gradient).norm() < 0.05 * gradient.norm() + 1e-6, name


def test_what_is_not_sharded_is_gathered_and_filled_as_it_is() -> None:
    tree = {"a": [torch.ones(2, requires_grad=True), 3], "b": ("c", {})}
    assert whole(tree)["b"] == tree["b"]
    assert torch.equal(whole(tree)["a"][0], torch.ones(2))
    assert whole(tree, keep=False) == {"a": [None, 3], "b": ("c", {})}


# Recomputed.


def kept_bytes(network: nn.Module) -> tuple[int, Tensor, list[Tensor]]:
    """Return the bytes of activations that one pass keeps for its gradients, the loss and the gradients."""
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    x, c_noise = torch.randn(16, 3, 8, 8), torch.rand(16)  # images enough that activations outweigh products of weights
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(x, c_noise).square().mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return sum(kept.values()), loss.detach(), list(gradients)


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputation_gives_the_same_gradients_with_dropout_from_less_memory(name: str) -> None:
    network = network_of(name).train()
    keys = list(network.state_dict())
    before, loss, gradients = kept_bytes(network)
    recompute(network)
    after, loss_again, gradients_again = kept_bytes(network)
    assert list(network.state_dict()) == keys
    assert torch.equal(loss, loss_again)
    for one, two in zip(gradients, gradients_again, strict=True):
        assert torch.equal(one, two)
    assert after < before / 2


def test_dropout_decides_the_gradients_compared_above() -> None:
    network = network_of("adm")
    _, loss, _ = kept_bytes(network.train())
    assert kept_bytes(network.eval())[1] != loss


def test_a_copy_of_a_recomputing_network_runs_its_own_blocks() -> None:
    network = network_of("adm").eval()
    recompute(network)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    assert kept_bytes(other)[1] > 0 == kept_bytes(network)[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_hold_nearly_all_weights_once(name: str) -> None:
    network = network_of(name)
    inside = [id(weight) for block in blocks(network) for weight in block.parameters()]
    assert len(set(inside)) == len(inside)
    sizes = {id(weight): weight.numel() for weight in network.parameters()}
    assert sum(sizes[i] for i in inside) > 0.7 * sum(sizes.values())


# Forward derivatives.


def along_a_path(name: str, precision: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor, Any]:
    """Return a denoiser's output and its derivative along a noising path, and the path: h -> output at sigma + h."""
    denoiser = Denoiser(network_of(name), image_spec(image=(3, 8, 8), c_noise="ln/4")).eval().to(memory_format=layout)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    sigma = torch.tensor([0.1, 0.5, 2.0, 20.0])
    x = x0 + sigma[:, None, None, None] * noise

    def at(h: float) -> Tensor:  # h: relative to sigma
        with torch.no_grad():
            return denoiser(x + (h * sigma)[:, None, None, None] * noise, (1 + h) * sigma)

    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output, tangent = jvp(denoiser, (x, sigma), (sigma[:, None, None, None] * noise, sigma))
    return output, tangent, at


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_forward_derivative_is_the_limit_of_finite_differences(name: str, layout: torch.memory_format) -> None:
    output, tangent, at = along_a_path(name, torch.float32, layout)
    h = 0.02  # error of the formula: h^4 of the fifth derivative; of rounding: 1e-7 / h
    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert (tangent - slope).norm() < 1e-3 * slope.norm()
    assert (output - at(0)).norm() < 1e-6 * output.norm()
    assert not tangent.requires_grad
    assert tangent.dtype == torch.float32


def test_the_forward_derivative_in_half_precision_is_the_one_in_full_up_to_rounding() -> None:
    _, full, _ = along_a_path("adm", torch.float32, torch.contiguous_format)
    _, half, _ = along_a_path("adm", torch.bfloat16, torch.channels_last)
    assert 1e-4 < (half - full).norm() / full.norm() < 0.05  # bfloat16 has eight bits
    assert half.dtype == torch.float32


def test_the_forward_derivative_runs_through_recomputing_blocks_and_draws_dropout_as_a_call_does() -> None:
    network = network_of("adm").train()
    recompute(network)
    x, c_noise = torch.randn(2, 3, 8, 8), torch.rand(2)
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = network(x, c_noise)
    torch.manual_seed(1)
    output, _ = jvp(network, (x, c_noise), (torch.ones_like(x), torch.ones_like(c_noise)))
    torch.testing.assert_close(output, expected.detach())


def gradients(network: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the gradients in bfloat16 of a pass whose target is a pass without gradients, in the same autocast."""
    x, c_noise = torch.ones(2, 3, 8, 8), torch.rand(2, generator=torch.Generator().manual_seed(0))
    with accelerator.autocast():
        with torch.no_grad():
            target = network(x / 2, c_noise)
        loss = (network(x, c_noise) - target).square().mean()
    loss.backward()
    found: dict[str, Tensor] = whole({name: weight.grad for name, weight in network.named_parameters()})
    return found


def one_process(folder: Path) -> None:
    """Train on this process's share of each batch, with its share of the weights; the first writes the states."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    states = dict(zip(("sharded, middle", "sharded"), train(MIDDLE, STEPS, mesh=mesh), strict=True))
    if accelerator.is_main_process:
        for name, state in states.items():
            torch.save(state, folder / f"{name}.pt")
    accelerator.wait_for_everyone()
    for name in ("sharded", "plain"):
        begin = torch.load(folder / f"{name}, middle.pt", weights_only=True, mmap=True)
        (state,) = train(STEPS, first=MIDDLE, begin=begin, mesh=mesh)
        if accelerator.is_main_process:
            torch.save(state, folder / f"{name}, then sharded.pt")
    accelerator.wait_for_everyone()
    plain, sharded = copied = [build_network(TRAINED) for _ in range(2)]
    for network in copied:
        randomise(network)
    recompute(sharded)
    shard(sharded, mesh)
    x, c_noise = torch.randn(2, 3, 8, 8), torch.full([2], 0.5)
    states = {
        name: {"derivative": jvp(network, (x, c_noise), (x, c_noise))[1], "half": gradients(network, accelerator)}
        for name, network in (("plain", plain), ("sharded", sharded))
    }
    if accelerator.is_main_process:
        for name, state in states.items():
            torch.save(state, folder / f"{name}, once.pt")
    leave(SystemExit(0))


# The end of a process.

EXCHANGING = """
import atexit, sys, torch
from torch.distributed import HashStore, all_reduce, group, init_process_group
from cmfast_train.training import parallel
from cmfast_train.cli.train import main
init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
held = group.WORLD  # as DTensor's caches hold it
for _ in range(2000):
    all_reduce(torch.ones(1000), async_op=True)
atexit.register(print, "the interpreter ends")
"""
ENDS = {
    "done": ("parallel.leave(SystemExit(0))", 0, ""),
    "an error of the user": ("sys.argv = ['', 'digits', '--out', 'out', '--set', 'lr=1']\nmain()", 2, "cmfast-train: "),
    "a bug": ("parallel.leave(ZeroDivisionError('a bug'))", 1, "ZeroDivisionError: a bug\n"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_process_with_threads_of_gloo_ends_without_being_aborted(name: str) -> None:
    last, code, said = ENDS[name]
    script = f"{EXCHANGING}print('begun')\n{last}\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr  # -6 where the interpreter ends first, mostly
    assert result.stdout == "begun\n"
    assert said in result.stderr
    assert "terminate" not in result.stderr


def test_the_only_process_of_a_run_goes_on_to_its_plain_end() -> None:
    leave(SystemExit(0))


if __name__ == "__main__":
    one_process(Path(sys.argv[1]))
