# SPDX-License-Identifier: MIT
"""The readers that `fuzz` feeds, and small valid files for each, made by our own writers."""

from __future__ import annotations

import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper

from cmfast.cli.info import lines_of
from cmfast.conditions import Condition, class_label
from cmfast.editing.files import read_input
from cmfast.formats.manifest import Manifest, read_onnx, read_onnx_file
from cmfast.formats.openvino_ir import parse_ir, with_manifest
from cmfast.formats.ort_format import parse_ort
from cmfast.formats.protobuf import read_onnx_model
from cmfast.formats.tensorrt_plan import UNSEALED, check_engine, parse_plan, seal
from cmfast.spec import ModelSpec
from cmfast_export.targets.ort_format import in_ort_format
from cmfast_train.checkpoint import Checkpoint, save_checkpoint
from cmfast_train.importers import identify
from cmfast_train.importers.pickles import read_pickle
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise

DIFFUSERS = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader of files: what it reads, and how."""

    name: str
    read: Callable[[bytes, Path], object]  # the bytes of a file, and a folder for it
    corpus: Callable[[Path], list[bytes]]
    share: float = 1.0  # of the inputs that all readers get together: the fast ones get more


def _file(suffix: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """Return a reader of bytes: they are written to a file with this suffix, which `read` opens."""

    def of_bytes(data: bytes, folder: Path) -> object:
        file = folder / f"input{suffix}"
        file.write_bytes(data)
        return read(file)

    return of_bytes


def _manifests() -> list[Manifest]:
    spec = ModelSpec(shape=(1, 8, 8), conditions=(class_label(3, ("cat", "dog", "7")),))
    facts = {"sha256": "ab" * 32, "format": "cmfast"}
    engine = {
        "library": "tensorrt_rtx", "version": "1.7.1", "cuda": "13", "compute_capability": ["8.9", "12.0"],
        "platform": "linux_x86_64", "batch": [1, 8, 64], "workspace_mib": 0, "level": -1, "version_compatible": False,
        "hardware_compatible": "", "onnx_sha256": "cd" * 32, "max_abs": "not run ", "plan_sha256": UNSEALED,
    }  # fmt: skip
    parity = {"max_abs": 1e-6, "psnr_db": 120.0, "boundary": 0.0}
    cost = {"flops": 1e6, "weight_bytes": 1e3, "activation_bytes": 1e4}
    made_by = {"cmfast": "0.1.0", "torch": "2.13.0", "verified": "onnxruntime cpu"}
    one = ModelSpec(shape=(1, 8, 8), sigmas={2: (80.0, 0.8)})
    views = Condition(name="views", shape=(3, None), null=-0.5)
    choices = (views, Condition(name="label", kind="class", classes=3, null=3))
    sequence = ModelSpec(shape=(16, 7), data="array", conditions=choices, second_time=True, renoise="ddim", clip=False)
    given = {"views": [[0.5]] * 3, "label": 3}
    selftest = {"seed": 1, "conditions": given, "at": [0, 3], "values": [0.5, -0.25], "atol": 1e-4}
    return [
        Manifest(kind="denoiser", spec=spec, source=facts, made_by=made_by, parity=parity, cost=cost),
        Manifest(kind="sampler", spec=one, dtype="float16", source=facts, parity=parity),
        Manifest(kind="server", spec=one, source=facts, made_by=made_by, parity=parity, engine=engine),
        Manifest(kind="denoiser", spec=sequence, source=facts, selftest=selftest),
    ]


def _manifest_texts(folder: Path) -> list[bytes]:
    return [manifest.to_json().encode() for manifest in _manifests()]


def _read_manifest(data: bytes, folder: Path) -> object:
    """Read a manifest and print it as cmfast-info does: what the reader accepts, it must be able to show."""
    file = folder / "model.onnx"
    if not file.exists():
        file.write_bytes(_onnx_files(folder)[0])
    manifest = Manifest.from_json(data.decode("utf-8", "replace"), "input")
    manifest.to_json()
    if manifest.engine:  # of a plan, whose reader checks more
        check_engine(manifest, "input")
    return lines_of(file, manifest, {"ir": 8, "opset": 18})


def _onnx_files(folder: Path) -> list[bytes]:
    """Return a denoiser with its weights inside, one with weights outside, one with a graph in an attribute."""
    floats = onnx.TensorProto.FLOAT
    image = ["B", 1, 8, 8]
    found = []
    for kind in ("inside", "outside", "nested"):
        weight = helper.make_tensor("weight", floats, [4], [0.1, 0.2, 0.3, 0.4])
        if kind == "outside":
            weight.ClearField("float_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
            weight.external_data.append(onnx.StringStringEntryProto(key="location", value="weights.data"))
        nodes = [helper.make_node("Mul", ["x", "sigma"], ["denoised"])]
        if kind == "nested":
            inner = helper.make_graph(nodes, "inner", [], [helper.make_tensor_value_info("denoised", floats, image)])
            nodes = [helper.make_node("If", ["sigma"], ["denoised"], then_branch=inner, else_branch=inner)]
        inputs = [
            helper.make_tensor_value_info("x", floats, image),
            helper.make_tensor_value_info("sigma", floats, ["B"]),
        ]
        outputs = [helper.make_tensor_value_info("denoised", floats, image)]
        graph = helper.make_graph(nodes, "denoiser", inputs, outputs, [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        helper.set_model_props(model, {"cmfast": _manifests()[0].to_json()})
        found.append(model.SerializeToString())
    return found


def _read_graph(file: Path) -> object:
    read_onnx_file(file)
    read_onnx_model(file)
    return read_onnx(file)


def _irs(folder: Path) -> list[bytes]:
    """Return graphs of OpenVINO, as XML, with and without the body of a loop."""
    layer = b'<layer id="0" name="x" type="Parameter"><data shape="?,1,8,8" /><rt_info /></layer>'
    loop = b'<layer id="1" name="loop" type="Loop"><body><layers>' + layer + b"</layers></body></layer>"
    graphs = [
        b'<?xml version="1.0"?>\n<net version="11"><layers>' + each + b"</layers></net>" for each in (layer, loop)
    ]
    manifests = [replace(manifest, graph_sha256="ef" * 32) for manifest in _manifests()[:2]]
    return [with_manifest(graph, manifest, Path("x.xml")) for graph in graphs for manifest in manifests]


def _orts(folder: Path) -> list[bytes]:
    """Return a graph in ONNX Runtime's own format, with either manifest."""
    source = folder / "corpus.onnx"
    source.write_bytes(_onnx_files(folder)[0])
    return [in_ort_format(source, manifest, folder) for manifest in _manifests()[:2]]


def _plans(folder: Path) -> list[bytes]:
    plans = []
    for magic, manifest in ((b"vtrt", _manifests()[2]), (b"ftrt", _manifests()[2])):
        plan = bytearray(magic + bytes(12) + b"\x00" * 64 + manifest.to_json().encode() + bytes(200))
        plan[16:24] = len(plan).to_bytes(8, "little")
        seal(plan)
        plans.append(bytes(plan))
    return plans


@functools.cache
def _checkpoint() -> Checkpoint:
    """Return a small model, all weights random."""
    config = AdmConfig(
        image_size=4, channels=1, classes=3, model_channels=32, res_blocks=1, channel_mult=(1,), attention=(),
        head_channels=32,
    )  # fmt: skip
    torch.manual_seed(0)
    network = AdmUnet(config)
    randomise(network)
    return Checkpoint(
        spec=ModelSpec(shape=(1, 4, 4), conditions=(class_label(3),)), network=config, weights=network.state_dict()
    )


def _weights() -> dict[str, torch.Tensor]:
    """Return a few of its weights: what is no model of ours is not built."""
    return {name: tensor for name, tensor in _checkpoint().weights.items() if tensor.numel() < 2000}


def _torch_files(folder: Path) -> list[bytes]:
    """Return our checkpoint, bare weights, an average beside them, an object beside them, an old format."""
    save_checkpoint(_checkpoint(), folder / "corpus.pt")
    weights = _weights()
    found = [(folder / "corpus.pt").read_bytes()]
    contents: list[object] = [
        {"net." + name: tensor for name, tensor in weights.items()},
        {"model": weights, "ema": {"shadow_params": list(weights.values()), "num_updates": 7}, "step": 3},
        {"model": weights, "args": Path("a"), "optimizer": {"lr": 0.1}},
    ]
    for content in contents:
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=new)
            found.append(buffer.getvalue())
    deflated = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(found[0])) as old, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new_zip:
        for entry in old.infolist():
            new_zip.writestr(entry.filename, old.read(entry))
    return [*found, deflated.getvalue()]


def _safetensors(folder: Path) -> list[bytes]:
    from safetensors.torch import save

    save_checkpoint(_checkpoint(), folder / "corpus.safetensors")
    return [(folder / "corpus.safetensors").read_bytes(), save(_weights())]


class _Module:
    """Something that pickles as an object with attributes."""

    def __init__(self, **parts: object) -> None:
        self.__dict__.update(parts)


def _pickles(folder: Path) -> list[bytes]:
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in list(_weights().items())[:3]}
    inner = _Module(_parameters=weights, _buffers={"b": torch.arange(3.0)}, _modules={})
    outer = _Module(_parameters={}, _buffers={}, _modules={"model": inner})
    tree = {"ema": outer, "augment_pipe": None, "training_set_kwargs": {"n": 1, "s": {1, 2}, "t": (1, 2.5, b"x")}}
    return [pickle.dumps(tree, protocol=protocol) for protocol in (0, 2, 4, 5)]


def _read_json_of_diffusers(data: bytes, folder: Path) -> object:
    """Read a folder whose three JSON files are in one, so that one mutation reaches any of them."""
    model = folder / "diffusers"
    parts = data.split(b"\x1e")
    for name, text in zip(
        ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"), parts, strict=False
    ):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(text)
    return identify(model)


def _diffusers(folder: Path) -> list[bytes]:
    from cmfast_export.targets.diffusers_folder import export_diffusers

    config = AdmConfig(
        image_size=8, channels=3, classes=0, model_channels=32, res_blocks=1, channel_mult=(1, 1), attention=(4,),
        head_channels=32,
    )  # fmt: skip
    network = AdmUnet(config)
    randomise(network)
    checkpoint = Checkpoint(spec=ModelSpec(shape=(3, 8, 8)), network=config, weights=network.state_dict())
    model = folder / "diffusers"
    export_diffusers(checkpoint, model)
    return [b"\x1e".join((model / name).read_bytes() for name in DIFFUSERS)]


def _arrays(folder: Path) -> list[bytes]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4, 8, 8, 1), np.uint8), np.arange(4)
    found = []
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, arr_0=images, arr_1=labels)
        found.append(buffer.getvalue())
    return found


def _read_arrays(file: Path) -> object:
    from cmfast_train.evaluation.evaluate import read_samples

    return read_samples(file, None)


def _lines_of_log(folder: Path) -> list[bytes]:
    lines = [
        {"images": n, "phase": "edm", "step": n, "lr": 1e-3, "loss": 0.5, "images_per_s": 100.0} for n in (64, 128)
    ]
    log = "".join(
        json.dumps(line) + "\n" for line in [*lines, {"images": 128, "phase": "edm", "checkpoint": "model.pt"}]
    )
    from cmfast_train.config.presets import PRESETS
    from cmfast_train.config.train_config import to_dict

    return [json.dumps(to_dict(PRESETS["digits"])).encode() + b"\x1e" + log.encode()]


def _read_run(data: bytes, folder: Path) -> object:
    """Read a run's config.json and log.jsonl."""
    from cmfast_train.evaluation.evaluate import training_of

    config, _, log = data.partition(b"\x1e")
    (folder / "config.json").write_bytes(config)
    (folder / "log.jsonl").write_bytes(log)
    return training_of(folder, "digits")


def _pictures(folder: Path) -> list[bytes]:
    """Return an 8x8 picture in each format and mode that is read."""
    from PIL import Image

    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    rgb = Image.fromarray(colours[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    wanted: list[tuple[Image.Image, str, dict[str, object]]] = [
        (Image.fromarray(grey), "PNG", {}),
        (Image.fromarray(grey.astype(np.uint16) * 1000), "PNG", {}),
        (Image.fromarray(colours), "PNG", {}),
        (rgb.quantize(8), "PNG", {"transparency": 3}),
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "BMP", {}),
        (rgb, "WEBP", {"lossless": True}),
        (rgb, "PPM", {}),
        (Image.fromarray(grey), "TIFF", {}),  # not compressed: libtiff prints what it meets
        (rgb, "GIF", {}),
    ]
    found = []
    for image, form, options in wanted:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found.append(buffer.getvalue())
    return found


def _read_picture(file: Path) -> object:
    from cmfast_train.data.image_reader import read_image

    return read_image(file)


def _npy(folder: Path) -> list[bytes]:
    found = []
    for shape in ((4, 8, 8, 1), (3, 8, 8, 3), (2, 8, 8)):
        buffer = io.BytesIO()
        np.save(buffer, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        found.append(buffer.getvalue())
    return found


def _zips(folder: Path) -> list[bytes]:
    """Return archives of images: by class, and with a dataset.json."""
    picture = _pictures(folder)[0]
    labels = {"labels": [["00000/a.png", 0], ["00000/b.png", 2], ["00001/c.png", 1]]}
    by_class = {"cat/1.png": picture, "dog/1.png": picture, "dog/2.png": picture}
    labelled = {"00000/a.png": picture, "00000/b.png": picture, "00001/c.png": picture}
    found = []
    for content in (by_class, {**labelled, "dataset.json": json.dumps(labels).encode()}):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        found.append(buffer.getvalue())
    return found


def _read_data(file: Path) -> object:
    """Open images as --data of a run, and read a batch."""
    from cmfast.errors import CmfastError
    from cmfast_train.data.images import image_data

    data = image_data(file, (8, 8), 1)
    batch = data.__getitems__(list(range(min(3, len(data)))))
    if isinstance(batch, str):
        raise CmfastError(batch)
    return batch


def _dataset_json(folder: Path) -> list[bytes]:
    (folder / "images" / "00000").mkdir(parents=True, exist_ok=True)
    for name in ("a", "b", "c"):
        (folder / "images" / "00000" / f"{name}.png").write_bytes(_pictures(folder)[0])
    labels = [[f"00000/{name}.png", label] for name, label in (("a", 0), ("b", 2), ("c", 1))]
    return [json.dumps({"labels": labels}).encode(), json.dumps({"labels": None}).encode()]


def _read_dataset_json(data: bytes, folder: Path) -> object:
    (folder / "images" / "dataset.json").write_bytes(data)
    return _read_data(folder / "images")


READERS = {
    reader.name: reader
    for reader in (
        Reader(name="manifest", read=_read_manifest, corpus=_manifest_texts, share=8),
        Reader(name="onnx", read=_file(".onnx", _read_graph), corpus=_onnx_files, share=4),
        Reader(name="plan", read=lambda data, folder: parse_plan(data, Path("input.engine")), corpus=_plans, share=8),
        Reader(name="ir", read=lambda data, folder: parse_ir(data, Path("input.xml")), corpus=_irs, share=4),
        Reader(name="ort", read=lambda data, folder: parse_ort(data, Path("input.ort")), corpus=_orts, share=4),
        Reader(name="pickle", read=_file(".pkl", read_pickle), corpus=_pickles, share=3),
        Reader(name="torch", read=_file(".pt", identify), corpus=_torch_files, share=1),
        Reader(name="safetensors", read=_file(".safetensors", identify), corpus=_safetensors, share=2),
        Reader(name="diffusers", read=_read_json_of_diffusers, corpus=_diffusers, share=1),
        Reader(name="picture", read=_file(".png", _read_picture), corpus=_pictures, share=2),
        Reader(name="edited", read=_file(".png", read_input), corpus=_pictures, share=1),
        Reader(name="npy", read=_file(".npy", _read_data), corpus=_npy, share=2),
        Reader(name="zip", read=_file(".zip", _read_data), corpus=_zips, share=1),
        Reader(name="dataset-json", read=_read_dataset_json, corpus=_dataset_json, share=1),
        Reader(name="npz", read=_file(".npz", _read_arrays), corpus=_arrays, share=2),
        Reader(name="run", read=_read_run, corpus=_lines_of_log, share=2),
    )
}
