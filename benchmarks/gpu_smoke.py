# SPDX-License-Identifier: MIT
"""What `gpu.py smoke` looks at: whether this card, this driver and these libraries do what cmfast counts on.

Every line has `ok`, where there is something that can be wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import gpu_extra
from cmfast.bench.timing import machine
from cmfast.formats.values import PRECISIONS
from cmfast_train.backends.torch_cuda import arithmetic
from cmfast_train.networks.adm import Attention, randomise
from gpu_bench import ceiling_items
from gpu_cells import Bench, Cell
from gpu_items import Item, NotHere
from gpu_lines import Line
from networks import OF_PRESET, random_model

# Relative: products in float32 come to some 3e-7, Winograd's convolutions to ten times that; TF32, with operands of 11
# bits, to 3e-4.
FLOAT32_ERROR = 3e-5
ATTENTION = {"cuda": (8, 384, 6, 32), "cpu": (1, 64, 1, 8)}  # batch, channels, heads, side: ImageNet-64's largest


def smoke_items(bench: Bench, networks: tuple[str, ...]) -> Iterator[Item]:
    """Yield all items, most valuable first; `networks` are those that are trained and captured."""
    device, network = bench.device, networks[0]
    yield Item(name="device", run=functools.partial(device_line, device))
    yield from ceiling_items(device)
    for dtype in ("bfloat16", "float16", "float32"):
        yield Item(name=f"attention {dtype}", run=functools.partial(attention, device, dtype))
    yield Item(name="float32", run=functools.partial(float32, device))
    yield Item(name="dropout masks", run=functools.partial(masks, device), expect_s=2.0)
    for way in ("cuda_graph", "channels_last cuda_graph", "fused cuda_graph"):
        yield Item(name=f"replay {way}", run=functools.partial(replay, bench, network, way), expect_s=2.0)
    for precision in ("bf16", "fp16", "fp32"):
        run = functools.partial(train_steps, device, network, precision)
        yield Item(name=f"train {precision}", run=run, expect_s=3.0)
    yield Item(name="noise", run=functools.partial(gpu_extra.noise, device), expect_s=2.0)
    yield Item(name="noise kernels", run=functools.partial(gpu_extra.noise_kernels, device), expect_s=2.0)


def device_line(device: str) -> Line:
    """Return what the device and its libraries are."""
    found: Line = {"kind": "device", "machine": machine(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cpu":
        return found
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "memory_mib": properties.total_memory // 2**20,
        "multiprocessors": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
        "arch_list": torch.cuda.get_arch_list(),
    }


def attention(device: str, dtype: str) -> Line:
    """Return the kernels that ran for our attention, in both memory formats, and the error against float64.

    ok: none of them has written the scores out, as PyTorch's plain way of products and softmax does.
    """
    batch, channels, heads, side = ATTENTION[device]
    block = Attention(channels, heads).to(device)
    randomise(block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=generator).to(device, getattr(torch, dtype))
    with torch.inference_mode():
        want = block.double()(x.double())
    block.to(x.dtype)
    found: dict[str, Any] = {}
    for name, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        given = x.to(memory_format=layout)
        with torch.inference_mode(), arithmetic(tf32=False):
            block.to(memory_format=layout)
            got = block(given)
            names = _kernels(lambda given=given: block(given), device)
        kernels = sorted({key[:160] for key in names if _is_attention(key)})
        error = float((got.double() - want).abs().max() / want.abs().max())
        found[name] = {"kernels": kernels, "fused": any(_is_fused(key) for key in kernels), "error": error}
    fused = all(each["fused"] for each in found.values())
    return {"kind": "attention", "dtype": dtype, **found, "ok": fused or device == "cpu"}


def _kernels(call: Any, device: str) -> list[str]:
    """Return the names of what a call runs on the device."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if device == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return [event.key for event in profiler.key_averages()]


def _is_attention(key: str) -> bool:
    return any(word in key.lower() for word in ("attention", "flash", "fmha", "softmax", "sdpa"))


def _is_fused(key: str) -> bool:
    """Whether a kernel is one of those that keep the scores on the chip: flash, memory-efficient, or cuDNN's."""
    key = key.lower()
    return any(word in key for word in ("flash", "fmha", "efficient_attention", "cudnn_attention", "sdpa_sm"))


def float32(device: str) -> Line:
    """Return the errors of a float32 product and convolution against float64, with TF32 off and on.

    ok: off is off in both. On, they say how much TF32 rounds.
    """
    generator = torch.Generator().manual_seed(0)
    a, b, x, w = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((512, 512), (512, 512), (8, 128, 32, 32), (128, 128, 3, 3))
    )
    works: dict[str, Any] = {
        "product": lambda kind: kind(a) @ kind(b),
        "convolution": lambda kind: functional.conv2d(kind(x), kind(w), padding=1),
    }
    found: dict[str, Any] = {}
    for tf32 in (False, True):
        for name, work in works.items():
            with torch.inference_mode(), arithmetic(tf32=tf32):
                want, got = work(Tensor.double), work(Tensor.float)
            found[f"{name}, TF32 {'on' if tf32 else 'off'}"] = float((got - want).norm() / want.norm())
    off = max(found["product, TF32 off"], found["convolution, TF32 off"])
    return {"kind": "float32", **found, "allowed": FLOAT32_ERROR, "ok": off <= FLOAT32_ERROR}


def masks(device: str) -> Line:
    """Return the difference of a network's output in the derivative's pass and in the gradient's.

    ok: both draw the same dropout masks, in both memory formats. Other masks differ by about the size of the output.
    """
    from cmfast_train.training.step_networks import StepNetworks, Student

    model = random_model("digits")
    config = dataclasses.replace(model.network, dropout=0.3, attention=(4,))  # type: ignore[type-var]
    network = type(random_model("digits").denoiser().network)(config)
    randomise(network)
    denoiser = dataclasses.replace(model, network=config, weights=network.state_dict()).denoiser()
    student = Student(denoiser.to(device), log_variance=False).train()
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *model.spec.image, generator=generator).to(device)
    sigma, conditions = torch.full((4,), 2.0, device=device), {"label": torch.arange(4, device=device)}
    found = {}
    for name, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        student.to(memory_format=layout)
        networks = StepNetworks(student, student, None, None, False, devices)
        with arithmetic(tf32=False):
            torch.manual_seed(1)
            along, _ = networks.output_along(x, sigma, conditions, None, x, sigma)
            output, _ = networks.output(x, sigma, conditions)
        found[name] = float((along - output).abs().max() / output.abs().max())
    return {"kind": "masks", **found, "allowed": 1e-3, "ok": max(found.values()) <= 1e-3}


def replay(bench: Bench, network: str, way: str) -> Line:
    """Return how far the images of a captured graph are from eager's, for two batches of noise in turns.

    ok: the second replay draws from the second noise, and the first noise again gives the first images to the bit.
    """
    if bench.device == "cpu":
        raise NotHere("a CPU has no CUDA graphs")
    cell = Cell(network=network, precision="bf16", batch=8, steps=2)
    eager, backend = bench.eager(network, "bf16"), bench.open(network, "bf16", way)
    noise, conditions, sigmas = bench.inputs(cell)
    first, other, again = (backend.loop(each, sigmas, conditions) for each in (noise, -noise, noise))
    difference = float(np.abs(first - eager.loop(noise, sigmas, conditions)).max())
    moved = float(np.abs(first - other).max())
    same = bool((first == again).all())
    return {
        "kind": "replay", "network": network, "way": way, "difference": difference, "moved": moved, "same": same,
        "ok": same and moved > 0.1 and difference <= 0.3,
    }  # fmt: skip


def train_steps(device: str, network: str, precision: str) -> Line:
    """Return the losses of some steps of `edm` and of `ect`, of a preset's network on random images.

    ok: all are finite. In bf16 there are enough steps on a GPU for them to be recorded as a CUDA graph; `graph` says
    whether they were.
    """
    from accelerate.state import AcceleratorState

    from cmfast_train.config.presets import phase
    from cmfast_train.training.trainer import train

    if device == "cpu" and precision == "fp16":
        raise NotHere("training in fp16 needs CUDA")
    # A process has one precision for all its Accelerators; this is how accelerate's own tests have several.
    AcceleratorState._reset_state(reset_partial_state=True)
    preset = OF_PRESET[network]
    batch, steps = (preset.batch, 40 if precision == "bf16" else 4) if device == "cuda" else (8, 4)
    phases = (phase("edm", steps * batch), phase("ect", steps * batch, stages=(6, 6)))
    config = dataclasses.replace(
        preset, data="folder", batch=batch, phases=phases, device=device, precision=precision,
        checkpoint_images=10**9, log_images=steps // 4 * batch, grid=4, tensorboard=False,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    height, width = preset.image_sides
    with tempfile.TemporaryDirectory() as temporary:
        data, out = Path(temporary) / "images.npz", Path(temporary) / "run"
        shape = (2 * batch, height, width, preset.channels)
        np.savez(data, images=generator.integers(0, 256, shape, np.uint8), labels=np.arange(2 * batch) % 10)
        train(config, out, data)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses, rates = ([line[name] for line in lines if name in line] for name in ("loss", "images_per_s"))
    graph = next((line["graph"] for line in lines if "graph" in line), None)
    return {
        "kind": "train", "network": network, "precision": precision, "dtype": PRECISIONS[precision], "batch": batch,
        "losses": losses, "steps": steps, "images_per_s": rates, "graph": graph,
        "ok": len(losses) == 8 and all(map(math.isfinite, losses)),
    }  # fmt: skip
