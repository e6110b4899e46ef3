# SPDX-License-Identifier: MIT
"""The exporter: files that compute what PyTorch computes, every weight random, and no file when they do not."""

from __future__ import annotations

import functools
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import cmfast
from cmfast.backends import open_backend
from cmfast.errors import CmfastError
from cmfast.model import Model
from cmfast.noise import gaussian
from cmfast_export import cli, pipeline
from cmfast_export.graphs import translations
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.graphs.emulate import emulated
from cmfast_export.graphs.garbage import uncollected
from cmfast_export.graphs.sampler import sampler_graph
from cmfast_export.graphs.server import server_graph
from cmfast_export.pipeline import export_onnx
from cmfast_export.verify import Parity, Row, verify_denoiser
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.config.presets import PRESETS
from cmfast_train.importers import load_model
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.training.initial_model import network_config
from cmfast_train.wrapping import wrap
from helpers import traced_once
from helpers.specs import image_spec

Factory = Callable[..., Path]


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Return a factory of exported tiny models: exported(classes, kind)."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def make(classes: int = 10, kind: str = "denoiser") -> Path:
        path = folder / f"{kind}{classes}.onnx"
        export_onnx(tiny_checkpoint(classes), path, kind=kind, steps=2 if kind == "sampler" else None)
        return path

    return make


@pytest.mark.parametrize("classes", [0, 10])
def test_a_file_computes_what_pytorch_computes_at_every_noise_level_and_batch(
    classes: int, exported: Factory, tiny_checkpoint: Factory
) -> None:
    parity = verify_denoiser(
        open_backend(exported(classes)), open_backend(tiny_checkpoint(classes)), batches=(1, 2, 3, 64, 256)
    )
    assert parity.worst.max_abs <= 1e-4  # the promise of the README; float32 rounding is two orders below
    assert parity.boundary is not None
    assert parity.boundary <= 1e-6


def test_random_weights_make_a_difference_that_parity_can_see(exported: Factory) -> None:
    model = cmfast.load(exported(0))
    x = gaussian(0, range(2), 0, (1, 8, 8))
    c_skip_part = 0.25 / (0.998**2 + 0.25) * x
    assert np.abs(model.denoise(x, 1.0) - c_skip_part).max() > 0.01  # a zero network would give c_skip x exactly


@pytest.mark.parametrize("classes", [0, 10])
def test_the_sampler_graph_draws_what_the_python_loop_draws(classes: int, exported: Factory) -> None:
    sampler, denoiser = cmfast.load(exported(classes, "sampler")), cmfast.load(exported(classes))
    noise = np.stack([gaussian(5, range(9), k, (1, 8, 8)) for k in range(2)])
    label = denoiser.labels(9, seed=5)
    looped = denoiser.from_noise(noise, (80.0, 0.8), label)
    np.testing.assert_allclose(sampler.from_noise(noise, (80.0, 0.8), label), looped, rtol=0, atol=1e-5)
    assert np.abs(looped).max() <= 1.0  # it clips
    assert looped.std() > 0.1


def flow_model() -> Checkpoint:
    """A flow whose sampler takes no fresh noise: the conventions of MeanFlow and of progressive distillation."""
    config = AdmConfig(
        image_size=8, channels=1, model_channels=32, res_blocks=1, channel_mult=(1,), attention=(), head_channels=32
    )
    network = AdmUnet(config)
    randomise(network)
    spec = image_spec(image=(1, 8, 8), scaling="flow", c_noise="flow", renoise="ddim")
    return Checkpoint(spec=spec, network=config, weights=network.state_dict())


def test_a_sampler_without_fresh_noise_keeps_its_inputs_and_draws_what_the_python_loop_draws(tmp_path: Path) -> None:
    sigmas = (80.0, 5.0, 0.8)
    for kind in ("denoiser", "sampler", "server"):
        levels = None if kind == "denoiser" else sigmas
        export_onnx(flow_model(), tmp_path / f"{kind}.onnx", kind=kind, sigmas=levels)  # verifies
        onnx.checker.check_model(onnx.load(tmp_path / f"{kind}.onnx"), full_check=True)
    denoiser, sampler, server = (cmfast.load(tmp_path / f"{kind}.onnx") for kind in ("denoiser", "sampler", "server"))
    noise = np.stack([gaussian(5, range(4), k, (1, 8, 8)) for k in range(3)])
    looped = denoiser.from_noise(noise, sigmas)
    assert looped.std() > 0.1
    np.testing.assert_allclose(sampler.from_noise(noise, sigmas), looped, rtol=0, atol=1e-5)
    np.testing.assert_allclose(server.from_noise(noise, sigmas), looped, rtol=0, atol=1e-5)
    other = np.concatenate([noise[:1], -noise[1:]])
    np.testing.assert_array_equal(sampler.from_noise(other, sigmas), sampler.from_noise(noise, sigmas))
    assert not np.array_equal(sampler.from_noise(-noise, sigmas), looped)
    (entered,) = onnx.load(tmp_path / "sampler.onnx").graph.input
    assert [size.dim_value for size in entered.type.tensor_type.shape.dim] == [3, 0, 1, 8, 8]


def test_a_sampler_of_the_mnist_network_is_hardly_larger_than_its_denoiser() -> None:
    config = PRESETS["mnist-large"]
    network = AdmUnet(network_config(config, 10))
    randomise(network)
    checkpoint = Checkpoint(spec=config.spec(10), network=network.config, weights=network.state_dict())
    denoiser = denoiser_graph(checkpoint.denoiser())
    sampler = sampler_graph(denoiser, (80.0, 0.8), checkpoint.spec)
    sizes = [onnx_bytes(model) for model in (denoiser, sampler)]
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(7.66e6, rel=0.01)
    assert sizes[1] <= 1.05 * sizes[0]


def test_the_embedding_of_the_noise_levels_is_folded_away(exported: Factory) -> None:
    def operators(path: Path) -> set[str]:
        return {node.op_type for node in onnx.load(path).graph.node}

    assert {"Log", "Cos", "Sin"} <= operators(exported(0))
    assert not {"Log", "Cos", "Sin", "Gemm"} & operators(exported(0, "sampler"))


def test_steps_of_a_sampler_share_their_weights(exported: Factory) -> None:
    graph = onnx.load(exported(0, "sampler")).graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len({node.input[1] for node in convolutions}) == len(convolutions) / 2


@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_a_file_is_valid_onnx_in_one_piece_and_describes_itself(kind: str, exported: Factory) -> None:
    path = exported(10, kind)
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    (entry,) = [entry.value for entry in model.metadata_props if entry.key == "cmfast"]
    assert len(entry) <= 4000
    manifest = cmfast.read_manifest(path)
    assert manifest.to_json() == entry
    assert manifest.kind == kind
    assert set(manifest.parity) == {"max_abs", "psnr_db", "boundary"}
    assert manifest.parity["max_abs"] <= 1e-4
    assert re.fullmatch("[0-9a-f]{64}", manifest.source["sha256"])
    assert model.opset_import[0].version == 18
    names = {"denoiser": (["x", "sigma", "label"], "denoised"), "sampler": (["noise", "label"], "images")}[kind]
    assert ([node.name for node in model.graph.input], model.graph.output[0].name) == names


def test_a_file_carries_the_digest_of_what_was_verified_and_keeps_it_when_it_is_saved_again(
    exported: Factory, tmp_path: Path
) -> None:
    from cmfast.formats.manifest import check_unchanged, graph_sha256

    manifest = cmfast.read_manifest(exported(10))
    assert manifest.graph_sha256 == graph_sha256(exported(10))
    onnx.save(onnx.load(exported(10)), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() != exported(10).read_bytes()  # the fields are in another order
    check_unchanged(tmp_path / "again.onnx", manifest)


@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_a_file_has_the_lowest_ir_version_of_its_opset(kind: str, exported: Factory) -> None:
    assert onnx.load(exported(10, kind)).ir_version == 8  # of opset 18: ONNX Runtime 1.17 reads it


@pytest.mark.parametrize(
    ("opset", "least"),
    [
        (19, 9), (21, 10), (23, 11),
        *(pytest.param(opset, least, marks=pytest.mark.slow) for opset, least in ((20, 9), (22, 10))),
    ],
)  # fmt: skip
def test_a_later_opset_has_the_lowest_ir_version_that_onnx_published_it_with(opset: int, least: int) -> None:
    denoiser = flow_model().denoiser()
    graph = denoiser_graph(denoiser, opset=opset)
    assert (graph.opset_imports[""], graph.ir_version) == (opset, least)
    looped = sampler_graph(graph, (80.0, 0.8), denoiser.spec)
    assert {looped.ir_version, server_graph(looped).ir_version, emulated(graph, "tf32").ir_version} == {least}


def test_other_graphs_of_ours_have_that_version_too() -> None:
    from cmfast.formats.small_onnx import cast_model, chain_model

    for made in (chain_model("Add", 2, 1), cast_model(10)):
        assert onnx.ModelProto.FromString(made).ir_version == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 200}, "a sampler graph has at most 64 steps, got 200"),
        ({"sigmas": [80 - i / 10 for i in range(200)]}, "a sampler graph has at most 64 steps, got 200"),
    ],
)
@pytest.mark.parametrize("kind", ["sampler", "server"])
def test_too_many_steps_are_refused_before_the_work(
    kind: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(cmfast.CmfastError, match=words):
        export_onnx(tmp_path / "never read.pt", tmp_path / "m.onnx", kind=kind, **options)


def test_a_manifest_that_would_be_too_long_is_refused_before_the_work(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "denoiser_graph", None)
    checkpoint = load_checkpoint(tiny_checkpoint(10))
    long = replace(checkpoint, source={"format": "cmfast", "note": "x" * 3500})
    with pytest.raises(cmfast.CmfastError, match=r"manifest would have about .* characters, and at most 4000"):
        export_onnx(long, tmp_path / "m.onnx")


def test_an_export_works_where_torch_makes_float64(exported: Factory, tiny_checkpoint: Factory, tmp_path: Path) -> None:
    want, checkpoint = cmfast.read_manifest(exported(0)).graph_sha256, tiny_checkpoint(0)
    torch.set_default_dtype(torch.float64)
    try:
        export_onnx(checkpoint, tmp_path / "m.onnx")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert cmfast.read_manifest(tmp_path / "m.onnx").graph_sha256 == want


def test_conversions_work_where_torch_makes_float64(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """A diffusers folder, the same read again, and a cmfast checkpoint: the files of float32."""
    from cmfast_export.targets.diffusers_folder import export_diffusers

    def converted(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        export_diffusers(load_checkpoint(tiny_checkpoint(0)), folder / "diffusers")
        save_checkpoint(load_model(folder / "diffusers"), folder / "model.safetensors")
        return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

    want = converted(tmp_path / "want")
    torch.set_default_dtype(torch.float64)
    try:
        assert converted(tmp_path / "got") == want
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(want) > 3


def test_a_file_does_not_name_the_machine_that_made_it(exported: Factory) -> None:
    content = exported(10).read_bytes()
    assert not re.search(rb"site-packages|\.py\b|" + re.escape(str(Path.home()).encode()) + rb"/", content)


def test_a_safetensors_checkpoint_gives_the_same_weights_and_file(
    exported: Factory, tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    export_onnx(tiny_checkpoint(0, ".safetensors"), tmp_path / "model.onnx")
    assert cmfast.read_manifest(tmp_path / "model.onnx").source == cmfast.read_manifest(exported(0)).source
    x = gaussian(0, range(2), 0, (1, 8, 8))
    want = cmfast.load(exported(0)).denoise(x, 3.0)
    np.testing.assert_array_equal(cmfast.load(tmp_path / "model.onnx").denoise(x, 3.0), want)


def test_a_fixed_batch_draws_the_same_images_and_fills_the_last_one_up(
    exported: Factory, tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    export_onnx(tiny_checkpoint(10), tmp_path / "three.onnx", kind="sampler", steps=2, batch=3)
    fixed = cmfast.load(tmp_path / "three.onnx")
    assert fixed.backend.batch == 3
    want = cmfast.load(exported(10)).sample_float(5, steps=2, seed=1)
    np.testing.assert_allclose(fixed.sample_float(5, seed=1), want, rtol=0, atol=1e-5)


def test_dropout_is_not_in_the_file(tmp_path: Path) -> None:
    config = AdmConfig(
        image_size=8, channels=1, model_channels=32, res_blocks=1, channel_mult=(1,), attention=(), dropout=0.5,
        head_channels=32,
    )  # fmt: skip
    network = AdmUnet(config)
    randomise(network)
    spec = image_spec(image=(1, 8, 8))
    save_checkpoint(Checkpoint(spec=spec, network=config, weights=network.state_dict()), tmp_path / "model.pt")
    export_onnx(tmp_path / "model.pt", tmp_path / "model.onnx")  # verifies
    assert "Dropout" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}


def test_images_do_not_depend_on_the_batch_split(exported: Factory) -> None:
    model = cmfast.load(exported(10))
    whole = model.sample_float(7, steps=2, seed=3, batch=7)
    np.testing.assert_allclose(model.sample_float(7, steps=2, seed=3, batch=2), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.sample_float(3, steps=2, seed=3, first=4), whole[4:], rtol=0, atol=1e-5)


def test_a_difference_beyond_the_tolerance_is_an_error_that_says_where_and_leaves_the_old_file(
    call: Callable[..., subprocess.CompletedProcess[str]], refused: Callable[..., None], tiny_checkpoint: Factory,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "model.onnx"
    out.write_bytes(b"the old file")
    result = call(cli.main, tiny_checkpoint(0), "-o", out, "--tolerance", "1e-30")
    refused(result, "differs from PyTorch by", "sigma", "no file was written", code=1)
    assert out.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [out]


def test_verification_sees_one_changed_weight(exported: Factory, tiny_checkpoint: Factory, tmp_path: Path) -> None:
    model = onnx.load(exported(0))
    name = "middle_block.0.in_layers.2.weight"
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[3, 2, 1, 1] += 0.1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "changed.onnx")
    parity = verify_denoiser(open_backend(tmp_path / "changed.onnx"), open_backend(tiny_checkpoint(0)))
    assert "differs from PyTorch" in (parity.failure(1e-4) or "")


def test_a_result_that_is_not_a_number_is_a_failure() -> None:
    parity = Parity(rows=(Row(where="sigma 80", batch=1, max_abs=float("nan"), largest=0.0, mse=0.0),), boundary=0.0)
    assert "sigma 80" in (parity.failure(1e-4) or "")


def test_a_broken_boundary_condition_is_a_failure() -> None:
    parity = Parity(rows=(Row(where="sigma 80", batch=1, max_abs=0.0, largest=0.0, mse=0.0),), boundary=2e-6)
    assert "sigma_min" in (parity.failure(1e-4) or "")


def test_the_command_ends_with_the_parity_table_and_the_next_commands(
    call: Callable[..., subprocess.CompletedProcess[str]], tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    result = call(cli.main, tiny_checkpoint(10), "-o", tmp_path / "m.onnx", "--kind", "sampler", "--sigmas", "80,2,0.5")
    assert result.returncode == 0, result.stderr
    for words in ("sigma 0.002", "boundary", "3 step(s) at 80, 2, 0.5", "cmfast-sample", "cmfast-bench"):
        assert words in result.stdout
    assert cmfast.read_manifest(tmp_path / "m.onnx").spec.sigmas == {3: (80.0, 2.0, 0.5)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sigmas", "80,0.8"], "pass kind sampler"),
        (["--kind", "sampler", "--sigmas", "0.8,80"], "0.8"),
        (["--kind", "sampler", "--sigmas", "80,0.8,5"], "strictly decrease"),
        (["--kind", "sampler", "--sigmas", "90"], "90"),
        (["--kind", "sampler", "--steps", "7"], "for example sigmas 80"),
        (["--kind", "sampler", "--steps", "0"], "at least 1"),
        (["--batch", "0"], "--batch 0"),
        (["--batch", "some"], "--batch some"),
        (["--opset", "11"], "opset must be from 18"),
        (["--tolerance", "-1"], "the tolerance must be"),
        (["-o", "model.engine"], ".onnx"),
        (["-o", "nowhere/model.onnx"], "nowhere"),
    ],
)
def test_a_request_that_cannot_be_fulfilled_is_one_line(
    arguments: list[str], words: str, call: Callable[..., subprocess.CompletedProcess[str]],
    refused: Callable[..., None], tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    target = [] if "-o" in arguments else ["-o", "m.onnx"]
    refused(call(cli.main, tiny_checkpoint(0), *target, *arguments), words)
    assert not list(tmp_path.iterdir())


def test_an_export_killed_at_any_moment_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    save_checkpoint(flow_model(), tmp_path / "model.pt")
    command = [sys.executable, "-m", "cmfast_export.cli", str(tmp_path / "model.pt"), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not any(
        ".cmfast-tmp" in path.name for path in tmp_path.iterdir()
    ):  # until it writes
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()


def test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing(
    call: Callable[..., subprocess.CompletedProcess[str]], refused: Callable[..., None], tiny_checkpoint: Factory,
    tmp_path: Path,
) -> None:  # fmt: skip
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))  # writing past 64 KiB fails, as on a full disk
    try:
        result = call(cli.main, tiny_checkpoint(0), "-o", tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    refused(result, "model.onnx: ", "(ulimit -f)", "nothing was written")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_43m_network_is_exported_and_verified_in_twelve_seconds(tmp_path: Path) -> None:
    config = PRESETS["cifar10"]
    network = AdmUnet(network_config(config, 10))
    randomise(network)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(42.86e6, rel=0.01)
    checkpoint = Checkpoint(spec=config.spec(10), network=network.config, weights=network.state_dict())
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cmfast_export.cli", str(tmp_path / "model.pt")], check=True)
    assert time.perf_counter() - start < 12  # on two cores that have nothing else to do


@pytest.mark.slow
@pytest.mark.parametrize("opset", [19, 20, 21, 22, 23])
def test_every_offered_opset_exports_and_verifies(opset: int, tiny_checkpoint: Factory, tmp_path: Path) -> None:
    export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx", opset=opset, kind="sampler", steps=2)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset


def onnx_bytes(model: object) -> int:
    import onnx_ir

    return onnx_ir.to_proto(model).ByteSize()  # type: ignore[arg-type, attr-defined]


def test_the_checkpoint_is_not_changed_by_an_export(tiny_checkpoint: Factory, exported: Factory) -> None:
    before = cmfast.read_manifest(exported(0)).source["sha256"]
    assert load_checkpoint(tiny_checkpoint(0)).sha256() == before
    assert Model(open_backend(tiny_checkpoint(0))).manifest.source["sha256"] == before


def small_checkpoint() -> Checkpoint:
    config = AdmConfig(
        image_size=8, channels=1, classes=3, model_channels=32, res_blocks=1, channel_mult=(1,), attention=(8,),
        head_channels=32,
    )  # fmt: skip
    network = AdmUnet(config)
    randomise(network)
    return Checkpoint(spec=image_spec(image=(1, 8, 8), classes=3), network=config, weights=network.state_dict())


def test_a_program_that_torch_traces_once_gives_the_numbers_of_one_that_it_traces_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denoiser = small_checkpoint().denoiser().to_precision("bf16")  # with all casts
    plain, decided = translations.is_plain, list[bool]()
    graphs = [denoiser_graph(denoiser)]
    monkeypatch.setattr(translations, "is_plain", lambda program: bool(decided.append(plain(program))))
    graphs.append(traced_once.trace(denoiser))
    assert decided == [True]
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((3, 1, 8, 8), dtype=np.float32), "label": np.arange(3)}
    inputs["sigma"] = np.array([0.002, 1, 80], np.float32)
    sessions = [
        onnxruntime.InferenceSession(ir.to_proto(emulated(graph, "bfloat16")).SerializeToString()) for graph in graphs
    ]
    once, again = (session.run(None, inputs)[0] for session in sessions)
    assert len(graphs[0].graph) < len(graphs[1].graph)  # of another way to the same
    np.testing.assert_array_equal(once, again)


def test_an_operator_that_a_version_of_torch_cannot_write_is_left_to_its_second_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(translations, "PLAIN", translations.PLAIN | {torch.ops.aten.mish.default})
    own = wrap(nn.Sequential(), shape=(2,), scaling="edm", c_noise="ln/4")
    own.network.forward = lambda x, c_noise: torch.nn.functional.mish(x)  # type: ignore[assignment]
    graph = traced_once.trace(own).graph
    assert {"Softplus", "Tanh"} <= {node.op_type for node in graph} or "Mish" in {node.op_type for node in graph}


def test_garbage_is_collected_after_an_export_and_after_one_that_failed() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(CmfastError, match="one node"), uncollected():
        raise CmfastError("one node")
    assert gc.isenabled()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_that_was_traced_once_is_what_another_trace_gives(precision: str) -> None:
    def bytes_of(graph: Any) -> bytes:
        return ir.to_proto(graph).SerializeToString(deterministic=True)

    checkpoint = small_checkpoint()
    # The same structure with other weights, many of them zero and equal, which the passes after the trace merge.
    other = replace(checkpoint, weights=AdmUnet(checkpoint.network).state_dict())
    first, again, third = (
        denoiser_graph(each.denoiser().to_precision(precision)) for each in (checkpoint, checkpoint, other)
    )
    first.graph.name = "changed"
    fresh = traced_once.trace(checkpoint.denoiser().to_precision(precision))
    assert bytes_of(again) == bytes_of(fresh)
    assert bytes_of(first) != bytes_of(fresh)
    assert bytes_of(third) == bytes_of(traced_once.trace(other.denoiser().to_precision(precision)))


def test_what_a_trace_depends_on_is_traced_again(tiny_checkpoint: Factory) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(10))
    denoiser = checkpoint.denoiser()
    key = traced_once.structure(denoiser)
    assert traced_once.structure(checkpoint.denoiser()) == key
    others = [
        replace(checkpoint, spec=replace(checkpoint.spec, sigma_data=0.6)).denoiser(),
        checkpoint.denoiser().to_precision("fp16"),
        checkpoint.denoiser().to_precision("tf32"),
        checkpoint.denoiser().train(),
        load_checkpoint(tiny_checkpoint(0)).denoiser(),
    ]
    assert key not in [traced_once.structure(each) for each in others[:2] + others[3:]]
    assert traced_once.structure(others[2]) == key, "tf32 is float32 in a graph"
