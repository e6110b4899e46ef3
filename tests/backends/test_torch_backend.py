# SPDX-License-Identifier: MIT
"""PyTorch as a backend: loops, precisions, refusals, and on the CPU as much of its way on a GPU as there is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import cmfast
from cmfast import sampling
from cmfast.backends import VARIANTS, DrawBackend, Drawn, Inputs, LoopBackend, TimedBackend, open_backend, variant_words
from cmfast.errors import BackendError, CmfastError
from cmfast.model import Model
from cmfast_train.backends import pytorch as backend_module
from cmfast_train.backends import torch_cuda, torch_noise
from cmfast_train.backends.diffusers_pipeline import open_folder
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.backends.torch_cuda import OnCuda, arithmetic
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.denoiser import Denoiser
from cmfast_train.kernels.fuse import fuse

Factory = Callable[..., Path]
U64 = 2**64 - 1
LEVELS = {1: (80.0,), 2: (80.0, 0.8), 4: (80.0, 24.4, 5.84, 0.9)}

# A backbone in half precision rounds some twenty tensors in a row, features of about one, by up to 2^-11 (fp16) or 2^-9
# (bf16) of their size. The errors add up to less than twenty of the largest; c_out is 0.5 at most, so there is room.
TOLERANCES = {"fp32": 1e-6, "fp16": 20 * 2.0**-11, "bf16": 20 * 2.0**-9}


def noise_of(model: Model, steps: int, batch: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.stack([cmfast.gaussian(seed, range(batch), k, model.spec.image) for k in range(steps)])


# The loop.


@pytest.mark.parametrize("precision", ["", "fp16", "bf16"])
@pytest.mark.parametrize("variant", ["", "channels_last"])
@pytest.mark.parametrize("steps", LEVELS)
def test_the_loop_on_tensors_draws_the_images_of_the_loop_on_arrays_to_the_bit(
    steps: int, variant: str, precision: str, tiny_checkpoint: Factory
) -> None:
    model = Model(open_backend(tiny_checkpoint(10), variant=variant, precision=precision))
    assert isinstance(model.backend, LoopBackend)
    noise, label = noise_of(model, steps, 3), np.array([3, 1, 4])
    got = model.from_noise(noise, LEVELS[steps], label)
    want = sampling.sample(lambda x, sigma: model.denoise(x, sigma, label), noise, LEVELS[steps], model.spec)
    # numpy and torch round the same float32 operations alike: x0 + std z, and the clip.
    np.testing.assert_array_equal(got, want)
    assert (np.abs(got) < 0.99).mean() > 0.5, "only what clipping makes equal"
    assert got.dtype == np.float32


def test_the_loop_checks_the_label_as_the_denoiser_does(tiny_checkpoint: Factory) -> None:
    model = Model(TorchBackend(tiny_checkpoint(10)))
    noise = noise_of(model, 1, 2)
    with pytest.raises(CmfastError, match="class-conditional; give a label from 0 to 9"):
        model.from_noise(noise, (80.0,))
    with pytest.raises(CmfastError, match="label 10 is out of range"):
        model.from_noise(noise, (80.0,), np.array([0, 10]))
    with pytest.raises(CmfastError, match="one class or 2 of them"):
        model.from_noise(noise, (80.0,), np.array([0, 1, 2]))
    unconditional = Model(TorchBackend(tiny_checkpoint(0)))
    assert unconditional.from_noise(noise, (80.0,)).shape == (2, 1, 8, 8)
    with pytest.raises(CmfastError, match="the model is unconditional"):
        unconditional.from_noise(noise, (80.0,), np.array([0, 1]))


def test_a_backend_on_the_cpu_has_no_times_of_a_device(tiny_checkpoint: Factory) -> None:
    assert not isinstance(TorchBackend(tiny_checkpoint(0)), TimedBackend)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_model_draws_the_images_of_the_eager_one(tiny_checkpoint: Factory) -> None:
    compiled = Model(TorchBackend(tiny_checkpoint(10), variant="compiled"))
    assert compiled.backend.name == "PyTorch cpu compiled"
    got, want = (m.sample_float(2, steps=2, seed=3) for m in (compiled, Model(TorchBackend(tiny_checkpoint(10)))))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # fused operations round less often


# Condition for removal: importing torch's compiler does not use what torch itself calls deprecated (torch 2.12 does).
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_on_a_cpu_weights_are_compiled_in_as_constants(
    tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    asked: list[tuple[bool, Any]] = []

    def compiling(denoiser: nn.Module, **options: Any) -> Callable[..., Any]:
        def call(**tensors: torch.Tensor) -> Any:
            asked.append((config.freezing, options))
            return denoiser(**tensors)

        return call

    monkeypatch.setattr(torch, "compile", compiling)
    Model(TorchBackend(tiny_checkpoint(10), variant="compiled")).sample_float(2, steps=1, seed=3)
    assert asked == [(True, {"dynamic": False})]
    assert not config.freezing, "nobody else's programs are frozen"


# Precisions.


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_precision_costs_its_rounding_errors_and_no_more(precision: str, tiny_checkpoint: Factory) -> None:
    exact = Model(TorchBackend(tiny_checkpoint(10)))
    model = Model(TorchBackend(tiny_checkpoint(10), precision=precision))
    label = np.arange(5) % 10
    worst = 0.0
    for sigma in (0.1, 1.0, 10.0, 80.0):
        x = np.float32(sigma) * cmfast.gaussian(3, range(5), 0, exact.spec.image)
        difference = np.abs(model.denoise(x, sigma, label) - exact.denoise(x, sigma, label)).max()
        worst = max(worst, float(difference))
    for steps, levels in LEVELS.items():
        noise = noise_of(exact, steps, 5)
        difference = np.abs(model.from_noise(noise, levels, label) - exact.from_noise(noise, levels, label)).max()
        worst = max(worst, float(difference))
    assert worst <= TOLERANCES[precision]
    if precision != "fp32":
        assert worst > TOLERANCES[precision] / 20, "less than one rounding: it was not computed in this precision"
    at_minimum = np.float32(0.002) * cmfast.gaussian(3, range(5), 0, exact.spec.image)
    np.testing.assert_array_equal(model.denoise(at_minimum, 0.002, label), at_minimum)  # outside the backbone: float32


@pytest.mark.parametrize(
    ("precision", "dtype", "backbone"),
    [
        ("", "float32", torch.float32),
        ("fp32", "float32", torch.float32),
        ("fp16", "float16", torch.float16),
        ("bf16", "bfloat16", torch.bfloat16),
    ],
)
def test_the_manifest_and_the_name_say_the_precision(
    precision: str, dtype: str, backbone: torch.dtype, tiny_checkpoint: Factory
) -> None:
    backend = TorchBackend(tiny_checkpoint(10), variant="channels_last", precision=precision)
    assert backend.manifest.dtype == dtype
    assert backend.name == " ".join(filter(None, ["PyTorch", "cpu", precision, "channels_last"]))
    types = {type(m): m.weight.dtype for m in backend.denoiser.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert types == {nn.Conv2d: backbone, nn.Linear: torch.float32}


def test_a_checkpoint_stays_float32_when_a_backend_of_it_is_not(tiny_checkpoint: Factory) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(10))
    before = {name: weight.clone() for name, weight in checkpoint.weights.items()}
    backend = TorchBackend(checkpoint, precision="fp16")
    Model(backend).sample(1)
    for name, weight in checkpoint.weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])
    assert backend.manifest.source["sha256"] == TorchBackend(checkpoint).manifest.source["sha256"]


# What is refused.


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(BackendError) as caught:
        TorchBackend(path, **options)
    return str(caught.value)


def test_what_a_cpu_cannot_do_is_refused(tiny_checkpoint: Factory) -> None:
    path = tiny_checkpoint(10)
    assert refusal(path, precision="tf32") == (
        "precision tf32 is a GPU's way to multiply float32; use --device cuda, or --precision fp32"
    )
    assert refusal(path, variant="cuda_graph") == (
        "PyTorch on cpu has the variants '', 'channels_last', 'compiled', not 'cuda_graph'; "
        "'cuda_graph' needs --device cuda"
    )
    assert refusal(path, variant="tensorrt") == (
        "PyTorch on cpu has the variants '', 'channels_last', 'compiled', not 'tensorrt'"
    )
    for word in ("fused", "reduce-overhead"):
        assert refusal(path, variant=f"channels_last {word}") == (
            "PyTorch on cpu has the variants '', 'channels_last', 'compiled', "
            f"not '{word}'; '{word}' needs --device cuda"
        )
    assert refusal(path, precision="int8") == "precision must be one of fp32, tf32, fp16, bf16, got 'int8'"


def test_a_precision_that_the_card_lacks_is_refused(tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test 1")
    for precision in ("tf32", "bf16"):
        assert refusal(tiny_checkpoint(10), device="cuda", precision=precision) == (
            f"the Test 1 has no {precision} (that begins with compute capability 8.0); use --precision fp16 or fp32"
        )


# Variants.


def test_words_of_a_variant_come_in_any_order_with_spaces_or_commas() -> None:
    assert variant_words("") == variant_words(" ") == ()
    for text in ("channels_last cuda_graph", "cuda_graph,channels_last", " cuda_graph, channels_last cuda_graph "):
        assert variant_words(text) == ("channels_last", "cuda_graph")
    for word in filter(None, VARIANTS):
        assert variant_words(word) == (word,)
    for wrong in ("eager", "channels_last eager", "channels-last", 3, None, ["fused"]):
        with pytest.raises(CmfastError, match=r"variant must be one of channels_last, fused, .*, or several as in"):
            variant_words(wrong)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Open backends for CUDA with their weights on the CPU; give what else was done to the model, in order."""
    done: list[str] = []
    to = nn.Module.to

    def elsewhere(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if isinstance(module, Denoiser):
            done.extend(str(value).removeprefix("torch.") for value in (*args, *kwargs.values()))
        return to(module, *("cpu" if each == "cuda" else each for each in args), **kwargs)

    def compiled(denoiser: nn.Module, mode: str) -> nn.Module:
        done.append(mode)
        return denoiser

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "to", elsewhere)
    monkeypatch.setattr(backend_module, "compiled", compiled)
    monkeypatch.setattr(backend_module, "fuse", lambda denoiser: (done.append("fused"), fuse(denoiser)))
    return done


@pytest.mark.skipif(not torch_noise.has_triton(), reason="fused needs Triton")
@pytest.mark.parametrize(
    ("variant", "name", "want"),
    [
        ("", "", ""),
        ("channels_last", "channels_last", "channels_last"),
        ("cuda_graph", "cuda_graph", "captures"),
        ("cuda_graph,channels_last", "channels_last cuda_graph", "channels_last captures"),
        ("fused", "fused", "channels_last fused"),
        ("channels_last fused cuda_graph", "fused cuda_graph", "channels_last fused captures"),
        ("compiled", "compiled", "max-autotune"),
        ("reduce-overhead channels_last", "channels_last reduce-overhead", "channels_last reduce-overhead"),
    ],
)
def test_a_variant_on_cuda_does_what_each_of_its_words_says(
    variant: str, name: str, want: str, tiny_checkpoint: Factory, no_card: list[str]
) -> None:
    backend = open_backend(tiny_checkpoint(10), "cuda", variant=variant, precision="fp16")
    assert backend.name == f"PyTorch cuda fp16 {name}".rstrip()
    assert isinstance(backend, TorchBackend)
    assert isinstance(backend, DrawBackend)
    assert isinstance(backend, TimedBackend)
    assert isinstance(backend._execute, OnCuda)
    assert no_card == ["cuda", *(word for word in want.split() if word != "captures")]
    assert backend._execute._captures is ("captures" in want)


@pytest.mark.usefixtures("no_card")
def test_a_fused_backend_draws_the_images_of_the_plain_one(tiny_checkpoint: Factory, recorded: list[str]) -> None:
    pytest.importorskip("triton")
    backend = TorchBackend(tiny_checkpoint(10), "cuda", variant="fused cuda_graph")
    backend._run_on(OnCuda(captures=True, tf32=False, device="cpu"))
    got, want = (Model(e).sample_float(3, steps=2, seed=3) for e in (backend, TorchBackend(tiny_checkpoint(10))))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # sums in another order
    assert recorded[0] == "captured"


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize(
    ("variant", "one", "other"),
    [
        ("cuda_graph compiled", "compiled", "cuda_graph"),
        ("compiled,fused", "compiled", "fused"),
        ("compiled reduce-overhead", "compiled", "reduce-overhead"),
        ("reduce-overhead cuda_graph", "reduce-overhead", "cuda_graph"),
        ("channels_last fused reduce-overhead", "reduce-overhead", "fused"),
    ],
)
def test_words_that_exclude_each_other_are_named(variant: str, one: str, other: str, tiny_checkpoint: Factory) -> None:
    assert refusal(tiny_checkpoint(10), device="cuda", variant=variant) == (
        f"{one!r} does not combine with {other!r}: torch.compile has its own way to fuse and to record; "
        "use one of them, or either with 'channels_last'"
    )


def test_the_variant_diffusers_combines_with_no_other(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="combines with no other, got 'diffusers channels_last'"):
        open_folder(tmp_path, "cpu", None, "diffusers channels_last", "")


def test_diffusers_pipeline_is_run_in_float32_only(tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        open_folder(tmp_path, "cpu", None, "diffusers", "fp16")
    assert str(caught.value) == (
        f"{tmp_path}: diffusers' pipeline is run in fp32 only, not in fp16; without the variant diffusers "
        "our U-Net runs the folder in any"
    )


def test_too_large_a_batch_is_an_error_that_says_so(tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend(tiny_checkpoint(0))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    monkeypatch.setattr(backend, "_execute", full)
    with pytest.raises(BackendError) as caught:
        Model(backend).sample(1)
    assert str(caught.value) == (
        "PyTorch cpu is short of memory; try a smaller batch: CUDA out of memory. Tried to allocate 20.00 MiB."
    )


# Flags, which are the whole process's.


def flags() -> list[object]:
    backends = torch.backends
    return [
        backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision, backends.cuda.matmul.fp32_precision,
        backends.cudnn.benchmark,
    ]  # fmt: skip


@pytest.fixture
def defaults() -> Iterator[None]:
    """Begin and end with PyTorch's defaults, as its old interface sets them."""

    def reset() -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
        torch.backends.cudnn.benchmark = False

    reset()
    yield
    reset()


@pytest.mark.usefixtures("defaults")
def test_tensorfloat_is_on_or_off_inside_only() -> None:
    outside = flags()
    assert outside[0] == "tf32"
    for tf32 in (False, True, False):
        with arithmetic(tf32=tf32):
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")  # torch.compile asks this
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is tf32
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is tf32
            assert torch.backends.cudnn.benchmark
            with arithmetic(tf32=not tf32):
                assert torch.backends.cudnn.allow_tf32 is not tf32
            assert torch.backends.cudnn.allow_tf32 is tf32
        assert flags()[0] == "tf32"
        assert torch.backends.cudnn.allow_tf32  # can still be read
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("precision", ["ieee", "tf32", "none"])
def test_flags_that_were_set_by_the_new_interface_are_as_they_were(precision: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision
    before = flags()
    with arithmetic(tf32=True):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    with arithmetic(tf32=False):
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    with pytest.raises(ZeroDivisionError), arithmetic(tf32=True):
        raise ZeroDivisionError
    assert flags() == before


@pytest.mark.usefixtures("defaults")
def test_two_backends_in_one_process_do_not_change_each_others_flags() -> None:
    before = flags()
    seen: dict[str, list[object]] = {"on": [], "off": []}

    def compute(name: str) -> torch_cuda.Compute:
        def run(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            seen[name].append(torch.backends.cudnn.allow_tf32)
            return tensors["x"] + 1

        return run

    backends = {name: OnCuda(captures=False, tf32=name == "on", device="cpu") for name in seen}
    for name in ("on", "off", "on", "off", "off", "on"):
        backends[name]("run", compute(name), {"x": np.ones(2, np.float32)})
        assert flags() == before
    assert set(seen["on"]) == {True}
    assert set(seen["off"]) == {False}


# The way of the arrays on a GPU, with the CPU as the device.


def double(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return 2 * tensors["x"] + tensors["label"][:, None]


def inputs_of(batch: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((batch, 4), dtype=np.float32), "label": rng.integers(0, 9, batch)}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the recording of CUDA graphs by one that repeats the computation; give what happened, in order."""
    happened: list[str] = []

    def capture(compute: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], tuple[torch.Tensor, ...]]:
        happened.append("captured")
        outputs = compute()

        def replay() -> tuple[torch.Tensor, ...]:
            happened.append("replayed")
            return tuple(output.copy_(new) for output, new in zip(outputs, compute(), strict=True))

        return replay

    monkeypatch.setattr(torch_cuda, "capture", capture)
    return happened


def test_released_programs_are_freed_and_made_again(recorded: list[str]) -> None:
    device, inputs = OnCuda(captures=True, tf32=False, device="cpu"), inputs_of(3, 0)
    first = device("double", double, inputs)
    (program,) = map(weakref.ref, device._programs.values())
    device.release()
    assert program() is None, "something else holds the graph and its memory"
    np.testing.assert_array_equal(device("double", double, inputs), first)
    assert recorded.count("captured") == 2


@pytest.mark.parametrize("captures", [False, True])
def test_fixed_buffers_give_the_right_results_whatever_the_order_of_batch_sizes(
    captures: bool, recorded: list[str]
) -> None:
    device = OnCuda(captures=captures, tf32=False, device="cpu")
    results = []
    for seed, batch in enumerate([3, 1, 3, 5, 1, 5, 3]):
        inputs = inputs_of(batch, seed)
        want = 2 * inputs["x"] + inputs["label"][:, None].astype(np.float32)
        results.append((device("double", double, inputs), want))
    for got, want in results:  # a result is the caller's: later calls do not write into it
        np.testing.assert_array_equal(got, want)
    assert recorded.count("captured") == (3 if captures else 0)
    assert recorded.count("replayed") == (3 + 7 if captures else 0)  # each once when it is made


def test_computations_of_other_names_are_others_and_the_oldest_is_dropped(recorded: list[str]) -> None:
    device = OnCuda(captures=True, tf32=False, device="cpu")
    inputs = inputs_of(2)
    for name in range(torch_cuda.KEPT):
        device(name, double, inputs)
    device(0, double, inputs)  # the last used is the last to go
    device("new", double, inputs)
    assert recorded.count("captured") == torch_cuda.KEPT + 1
    assert len(device._programs) == torch_cuda.KEPT
    device(0, double, inputs)
    assert recorded.count("captured") == torch_cuda.KEPT + 1
    device(1, double, inputs)
    assert recorded.count("captured") == torch_cuda.KEPT + 2


def test_an_array_of_another_type_is_not_converted_behind_the_caller() -> None:
    device = OnCuda(captures=False, tf32=False, device="cpu")
    device("double", double, inputs_of(2))
    with pytest.raises(TypeError, match="float64"):
        device("double", double, {**inputs_of(2), "x": np.ones((2, 4))})


class HostEvent:
    """`torch.cuda.Event` on a clock that ticks with every event."""

    ticks = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        HostEvent.ticks += 1
        self.at = HostEvent.ticks**2

    def elapsed_time(self, end: HostEvent) -> float:
        return float(end.at - self.at)


def test_every_call_inside_timed_is_timed_and_none_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(HostEvent, "ticks", 0)
    device = OnCuda(captures=False, tf32=False, device="cpu")
    device("double", double, inputs_of(2))
    assert HostEvent.ticks == 0
    with device.timed() as times:
        device("double", double, inputs_of(2))
        device("double", double, inputs_of(3))
    device("double", double, inputs_of(2))
    assert HostEvent.ticks == 8
    assert [(t.copy_in_ms, t.compute_ms, t.copy_out_ms) for t in times] == [(3, 5, 7), (11, 13, 15)]
    for each in times:
        assert 0 < each.enqueue_ms <= each.host_ms


def test_every_batch_of_a_draw_is_timed(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Factory) -> None:
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    backend = drawing_backend(tiny_checkpoint(0))
    assert isinstance(backend, TimedBackend)
    with backend.timed() as times:
        Model(backend).sample(5, batch=2, steps=1)
    assert len(times) == 3
    for each in times:
        assert min(each.copy_in_ms, each.compute_ms, each.copy_out_ms) > 0
        assert 0 < each.enqueue_ms <= each.host_ms


@pytest.mark.parametrize("variant", ["", "cuda_graph"])
@pytest.mark.parametrize("precision", ["", "bf16"])
def test_a_backend_through_fixed_buffers_draws_what_it_draws_without(
    variant: str, precision: str, tiny_checkpoint: Factory, recorded: list[str]
) -> None:
    backend = TorchBackend(tiny_checkpoint(10), precision=precision)
    plain = Model(TorchBackend(tiny_checkpoint(10), precision=precision))
    backend._execute = OnCuda(captures=variant == "cuda_graph", tf32=False, device="cpu")
    model = Model(backend)
    for seed, (steps, batch) in enumerate([(2, 3), (1, 3), (2, 1), (4, 3), (2, 3)]):
        noise, label = noise_of(model, steps, batch, seed), np.arange(batch)
        got, want = (m.from_noise(noise, LEVELS[steps], label) for m in (model, plain))
        np.testing.assert_array_equal(got, want)
        x = np.float32(10) * noise[0]
        np.testing.assert_array_equal(model.denoise(x, 10.0, label), plain.denoise(x, 10.0, label))
    assert recorded.count("captured") == (6 if variant else 0)  # four loops, two batch sizes of the denoiser


# Whole draws on the device.


def drawing_backend(path: Path, precision: str = "", *, captures: bool = False) -> TorchBackend:
    """Return a backend that draws as it does on CUDA, with the CPU as the device."""
    backend = TorchBackend(path, precision=precision)
    backend._run_on(OnCuda(captures=captures, tf32=False, device="cpu"))
    assert isinstance(backend, DrawBackend)
    return backend


REQUESTS: list[dict[str, Any]] = [
    {"n": 7, "batch": 3, "steps": 2},
    {"n": 5, "batch": 8, "steps": 1, "seed": U64},
    {"n": 4, "batch": 2, "sigmas": LEVELS[4], "first": 2**63 - 2, "seed": 2**63 + 5},
    {"n": 3, "batch": 2, "steps": 2, "first": U64 - 2},
    {"n": 3, "batch": 1, "label": [7, 0, 9]},
]


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("precision", ["", "bf16"])
@pytest.mark.parametrize("classes", [0, 10])
def test_what_is_drawn_on_the_device_is_what_the_loop_makes_of_noise_from_numpy(
    classes: int, precision: str, captures: bool, tiny_checkpoint: Factory, recorded: list[str]
) -> None:
    path = tiny_checkpoint(classes)
    model = Model(drawing_backend(path, precision, captures=captures))
    plain = Model(TorchBackend(path, precision=precision))
    assert not isinstance(plain.backend, DrawBackend)
    for request in REQUESTS:
        if "label" in request and not classes:
            continue
        want = drawn_by_hand(plain, **request)
        assert np.ptp(want) > 0.1
        np.testing.assert_array_equal(model.sample_float(**request), want)
        np.testing.assert_array_equal(model.sample(**request), sampling.to_uint8(want))
    assert (recorded != []) is captures


def drawn_by_hand(
    model: Model, n: int, *, batch: int, seed: int = 0, first: int = 0, label: Any = None, **levels: Any
) -> npt.NDArray[np.float32]:
    """Return images from noise of numpy through the loop; the last batch is as large as the others."""
    sigmas, batch = model.sigmas_for(levels.get("steps"), levels.get("sigmas")), min(batch, n)
    labels = model.labels(n, seed=seed, label=label, first=first)
    images = []
    for start in range(0, n, batch):
        indices = np.minimum(np.arange(start, start + batch), n - 1)
        samples = [first + int(index) for index in indices]
        noise = np.stack([cmfast.gaussian(seed, samples, k, model.spec.image) for k in range(len(sigmas))])
        images.append(model.from_noise(noise, sigmas, None if labels is None else labels[indices]))
    return np.concatenate(images)[:n]


def test_a_last_smaller_batch_is_no_new_size_to_capture(tiny_checkpoint: Factory, recorded: list[str]) -> None:
    model = Model(drawing_backend(tiny_checkpoint(10), captures=True))
    for n in (3, 4, 7, 8):
        assert model.sample(n, batch=3, steps=2).shape == (n, 8, 8, 1)
    assert recorded.count("captured") == 1
    # The images of a seed are the same however they are cut, but for the order of sums in batches of other sizes.
    np.testing.assert_allclose(
        model.sample_float(5, batch=2, steps=2), model.sample_float(5, batch=4, steps=2), rtol=0, atol=1e-5
    )


def test_the_next_batch_is_on_its_way_before_the_host_waits_for_one() -> None:
    device = OnCuda(captures=False, tf32=False, device="cpu")
    happened: list[str] = []

    def batches() -> Iterator[dict[str, npt.NDArray[Any]]]:
        for seed in range(4):
            happened.append(f"in {seed}")
            yield inputs_of(2, seed)

    for seed, (got,) in enumerate(device.each("double", lambda tensors: (double(tensors),), batches())):
        happened.append(f"out {seed}")
        inputs = inputs_of(2, seed)
        np.testing.assert_array_equal(got, 2 * inputs["x"] + inputs["label"][:, None].astype(np.float32))
    assert happened == ["in 0", "in 1", "out 0", "in 2", "out 1", "in 3", "out 2", "out 3"]


def test_draws_that_take_turns_or_are_left_do_not_mix_their_images(tiny_checkpoint: Factory) -> None:
    backend = drawing_backend(tiny_checkpoint(0))
    model = Model(backend)
    batches: list[tuple[range, Inputs]] = [(range(start, start + 2), {}) for start in range(0, 8, 2)]

    def draw(seed: int) -> Iterator[Drawn]:
        return backend.draw(seed, batches, LEVELS[2], pixels=False)

    want = {seed: drawn_by_hand(model, 8, batch=2, seed=seed, sigmas=LEVELS[2]) for seed in (1, 2)}
    left = draw(3)
    next(left)
    one, two = draw(1), draw(2)
    for part, _ in batches:
        for seed, drawing in ((1, one), (2, two)):
            np.testing.assert_array_equal(next(drawing).images, want[seed][part.start : part.stop])
            model.denoise(noise_of(model, 1, 2)[0], 1.0)
        if part.start == 2:
            left.close()
    assert next(one, None) is None


def test_a_draw_that_is_not_finite_is_an_error_and_never_a_white_image(tiny_checkpoint: Factory) -> None:
    backend = drawing_backend(tiny_checkpoint(0))
    with torch.no_grad():
        next(backend.denoiser.parameters()).fill_(float("inf"))
    for draw in (Model(backend).sample, Model(backend).sample_float):
        with pytest.raises(CmfastError) as caught:
            draw(3, steps=2, batch=2)
        assert "PyTorch cpu returned values that are not finite (NaN or infinity) at noise level 80, " in str(
            caught.value
        )


def test_a_draw_short_of_memory_is_an_error_that_says_so(
    tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = drawing_backend(tiny_checkpoint(0))

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    monkeypatch.setattr(torch_noise, "gaussian", full)
    with pytest.raises(BackendError) as caught:
        Model(backend).sample(1)
    assert str(caught.value) == (
        "PyTorch cpu is short of memory; try a smaller batch: CUDA out of memory. Tried to allocate 20.00 MiB."
    )


def test_a_backend_that_draws_something_else_than_was_requested_is_named(tiny_checkpoint: Factory) -> None:
    backend = drawing_backend(tiny_checkpoint(0))
    backend.draw = lambda *_, **__: iter([Drawn(np.zeros((2, 1, 8, 8), np.float32), True)])
    with pytest.raises(BackendError, match=r"promises uint8 \[2, 8, 8, 1\]; export the model again"):
        Model(backend).sample(2)


def test_a_backend_goes_with_its_last_reference_and_with_it_what_it_keeps(tiny_checkpoint: Factory) -> None:
    backend = TorchBackend(tiny_checkpoint(10))
    backend._run_on(kept := OnCuda(captures=False, tf32=False, device="cpu"))
    model = Model(backend)
    model.from_noise(noise_of(model, 1, 2), (80.0,), np.array([0, 1]))
    model.denoise(noise_of(model, 1, 2)[0], 1.0, np.array([0, 1]))
    model.sample(3, batch=2)
    assert len(kept._programs) == 3
    gone, memory = weakref.ref(backend), weakref.ref(kept)
    gc.disable()  # a cycle would wait for it, and GPU memory with it
    try:
        del model, backend, kept
        assert gone() is None
        assert memory() is None
    finally:
        gc.enable()


def test_a_capture_that_cannot_be_is_an_error_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("here it can")
    with pytest.raises(
        BackendError, match=r"^PyTorch could not capture this model as a CUDA graph; use another [^\n]+$"
    ):
        torch_cuda.capture(lambda: torch.zeros(1))
