# SPDX-License-Identifier: MIT
"""config.pbtxt of a Triton model: what may be chosen, and the text.

The file format is ModelConfig of Triton's model_config.proto, in protobuf's text format. Where its comments and the
backends' sources say more than the manual, a comment here says so. What is served: `triton_files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cmfast.errors import CmfastError
from cmfast.formats.manifest import may_use_tf32
from cmfast_export._options import check_range, shorten
from cmfast_export.targets.triton_files import Served

MAX_BATCH = 8  # of a file whose batch is dynamic, unless requested otherwise
MOST_BATCH = 4096  # images; on a GPU each size up to the largest is run once before the first request
MOST_DELAY_US = 60_000_000  # a minute
MOST_INSTANCES = 1000
MOST_CHARACTERS = 200  # of a name, which is a folder's
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_KINDS = {"gpu": "KIND_GPU", "cpu": "KIND_CPU", "auto": "KIND_AUTO"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")  # a folder and a part of URLs; after a dot Triton reads a backend


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a model is served; `cmfast-export --format triton --serve NAME=VALUE` sets a field."""

    name: str = ""  # of the model in requests; empty: after the first file
    max_batch: int = 0  # images in one batch, at most; 0: what a plan was built for, else MAX_BATCH
    queue_delay_us: int = 0  # how long a request may wait for others, microseconds; 0: only while the model is busy
    instances: int = 1  # copies of the model on each GPU, or on the CPU
    device: str = "gpu"  # gpu, cpu or auto (cpu where there is no GPU); plans run on gpu only

    def __post_init__(self) -> None:
        if self.name:
            check_name(self.name)
        if self.max_batch != 0:
            check_range("max_batch", self.max_batch, 1, MOST_BATCH, "images")
        check_range("queue_delay_us", self.queue_delay_us, 0, MOST_DELAY_US, "microseconds")
        check_range("instances", self.instances, 1, MOST_INSTANCES)
        if self.device not in _KINDS:
            raise CmfastError(f"device must be one of {', '.join(_KINDS)}, got {self.device!r}")


DEFAULTS = ServeOptions()
DYNAMIC = -1  # of a size that differs from request to request
EXAMPLE = 64  # of such a size, in the requests that warm a server up


@dataclass(frozen=True)
class Tensor:
    """An input or output as config.pbtxt declares it: `dims` without the batch where Triton batches."""

    name: str
    kind: str
    dims: Sequence[int]

    @property
    def declared(self) -> str:
        """Its dims; those of one number a sample, which has none, are [1] for clients."""
        return f"dims: {self.dims}" if self.dims else "dims: [1] reshape { shape: [] }"

    @property
    def example(self) -> list[int]:
        """Its dims with a number for every size."""
        return [EXAMPLE if size == DYNAMIC else size for size in self.dims] or [1]


def config_text(name: str, served: Served, max_batch: int, options: ServeOptions) -> str:
    """Return config.pbtxt; `max_batch` is what `largest_batch` returned."""
    spec = served.manifest.spec
    (sigmas,) = spec.sigmas.values()
    # Of a model that Triton batches, shapes are without the batch. One whose batch is fixed it cannot batch: ONNX
    # Runtime's backend refuses max_batch_size > 0 unless the first axis is dynamic, TensorRT's would send other sizes.
    first = [] if served.batch is None else [served.batch]
    inputs = [Tensor("noise", "TYPE_FP32", [*first, len(sigmas), *spec.shape])]
    for each in spec.conditions:
        sides = [DYNAMIC if isinstance(side, str) else side for side in each.shape]
        kind, dims = ("TYPE_INT64", [1]) if each.kind == "class" else ("TYPE_FP32", sides)
        inputs.append(Tensor(each.name, kind, [*first, *dims]))
    drawn = "images" if spec.data == "image" else "samples"
    outputs = [Tensor(drawn, "TYPE_FP32", [*first, *spec.shape])]
    sizes = _sizes(served, max_batch, options.device)
    sections = [
        f"# cmfast, noise levels {', '.join(f'{s:g}' for s in sigmas)}; noise: unit Gaussian"
        + ("; images: in [-1, 1]" if spec.data == "image" else ""),
        f'name: "{name}"',
        f'platform: "{_PLATFORMS[served.backend]}"',
        f"max_batch_size: {0 if served.batch else max_batch}",
        *(
            _list(which, (f'name: "{t.name}" data_type: {t.kind} {t.declared}' for t in tensors))
            for which, tensors in (("input", inputs), ("output", outputs))
        ),
        _list("instance_group", [f"kind: {_KINDS[options.device]} count: {options.instances}"]),
        *_optimization(served, inputs, sizes, options.device),
    ]
    if served.batch is None and max_batch > 1:
        # No preferred_batch_size: the manual keeps it for plans with several optimisation profiles; ours have one.
        sections.append(f"dynamic_batching {{ max_queue_delay_microseconds: {options.queue_delay_us} }}")
    own = {capability: place for capability, place in served.plans.items() if place != "model.plan"}
    if own:
        sections.append(_list("cc_model_filenames", (f'key: "{c}" value: "{at}"' for c, at in own.items())))
    # Zeros: Triton's random_data are random bytes, of which one float in 256 is infinite or not a number.
    zeros = " ".join(
        f'inputs {{ key: "{t.name}" value {{ data_type: {t.kind} dims: {t.example} zero_data: true }} }}'
        for t in inputs
    )
    sections.append(
        _list(
            "model_warmup",  # its batch_size counts requests; one of them has all images of a fixed batch
            (f'name: "{n} at once" batch_size: {1 if served.batch else n} {zeros}' for n in sizes),
        )
    )
    return "\n".join(sections) + "\n"


def largest_batch(served: Served, options: ServeOptions) -> int:
    """Return the largest batch, in images, after checking the request against what the files can do."""
    if served.backend == "tensorrt" and options.device != "gpu":
        raise CmfastError(
            f"a TensorRT plan runs on a GPU, not on {options.device}; leave the device out, or serve a .onnx file"
        )
    if served.batch is not None:
        if options.max_batch not in (0, served.batch) or options.queue_delay_us:
            raise CmfastError(
                f"the file takes exactly {served.batch} images, so Triton cannot batch requests; leave max_batch and "
                "queue_delay_us out, or export it with a dynamic batch"
            )
        return served.batch
    if served.max_batch and options.max_batch > served.max_batch:
        raise CmfastError(
            f"max_batch must be at most {served.max_batch}, which the plan was built for, got {options.max_batch}"
        )
    return options.max_batch or served.max_batch or MAX_BATCH


def check_name(name: str) -> None:
    """Raise CmfastError unless a model may be called this."""
    if not _NAME.fullmatch(name) or len(name) > MOST_CHARACTERS:
        raise CmfastError(
            f"a model's name for Triton is letters, digits, _ and -, at most {MOST_CHARACTERS} characters, got "
            f"{shorten(name)!r}"
        )


def _sizes(served: Served, max_batch: int, device: str) -> list[int]:
    """Return the batch sizes, in images, that are run before the first request."""
    if served.batch:
        return [served.batch]
    if served.backend == "tensorrt":  # each is a CUDA graph, which takes memory; other sizes run without one
        return sorted({2**i for i in range(max_batch.bit_length())} | {max_batch})
    if device == "cpu":
        return sorted({1, max_batch})
    return list(range(1, max_batch + 1))  # on a GPU the first batch of a size is slow: cuDNN's algorithms are timed


def _optimization(served: Served, inputs: Sequence[Tensor], sizes: Sequence[int], device: str) -> list[str]:
    if served.backend == "tensorrt":
        if any(DYNAMIC in tensor.dims for tensor in inputs):
            return []  # a CUDA graph is of one size
        # Exact sizes. A graph_lower_bound would run one graph for smaller batches too, with labels that were never set.
        shapes = " ".join(f'input {{ key: "{t.name}" value {{ dim: {t.example} }} }}' for t in inputs)
        specs = _list("graph_spec", (f"batch_size: {0 if served.batch else size} {shapes}" for size in sizes))
        return [f"optimization {{ cuda {{ graphs: true {specs} }} }}"]
    if device == "cpu":
        return []
    # The CUDA provider's default is TensorFloat-32, ten bits of mantissa, also for a float32 file. No CUDA graphs:
    # those of ONNX Runtime read and write fixed addresses, and Triton's backend gives others to every request.
    tf32 = f'parameters {{ key: "use_tf32" value: "{int(may_use_tf32(served.manifest.dtype))}" }}'
    cuda = _list("gpu_execution_accelerator", [f'name: "cuda" {tf32}'])
    return [f"optimization {{ execution_accelerators {{ {cuda} }} }}"]


def _list(name: str, messages: Iterable[str]) -> str:
    """Return a repeated field in protobuf's text format."""
    return f"{name} [\n" + ",\n".join(f"  {{ {message} }}" for message in messages) + "\n]"
