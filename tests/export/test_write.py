# SPDX-License-Identifier: MIT
"""Files of large models: weights written one by one, and beside the graph where one file cannot hold them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from cmfast.errors import ArtifactError, CheckFailed, CmfastError
from cmfast.formats import protobuf as pb
from cmfast.formats.table import model_bytes
from cmfast.model import load
from cmfast_export import checking
from cmfast_export.graphs import writer
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.pipeline import export_onnx
from cmfast_train.checkpoint import load_checkpoint

Make = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def one_file_is_too_small() -> Iterator[None]:
    """Let 10,000 bytes be what two gigabytes are: the code behind is the same, the test takes no 2 GB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "MAX_BYTES", 10_000)
        yield


@pytest.fixture(scope="module")
def two_files(tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an exported denoiser and its weights."""
    exported = export_onnx(tiny_checkpoint(), tmp_path_factory.mktemp("two") / "model.onnx")
    assert exported.data is not None
    return exported.path, exported.data


def test_a_file_written_weight_by_weight_is_the_graph_that_onnx_would_have_written(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    graph = denoiser_graph(load_checkpoint(tiny_checkpoint()).denoiser())
    size = writer.write_model(graph, tmp_path / "ours.onnx")
    assert size == (tmp_path / "ours.onnx").stat().st_size
    ours, theirs = onnx.load(tmp_path / "ours.onnx"), ir.to_proto(graph)
    assert [node.SerializeToString() for node in ours.graph.node] == [n.SerializeToString() for n in theirs.graph.node]
    assert list(ours.graph.input) == list(theirs.graph.input)
    assert list(ours.opset_import) == list(theirs.opset_import)
    want = {tensor.name: numpy_helper.to_array(tensor) for tensor in theirs.graph.initializer}
    assert [tensor.name for tensor in ours.graph.initializer] == [tensor.name for tensor in theirs.graph.initializer]
    for tensor in ours.graph.initializer:
        got = numpy_helper.to_array(tensor)
        assert got.dtype == want[tensor.name].dtype
        np.testing.assert_array_equal(got, want[tensor.name])
    onnx.checker.check_model(ours, full_check=True)


def test_weights_that_are_too_many_for_one_file_are_in_one_beside_it(
    two_files: tuple[Path, Path], tiny_checkpoint: Make
) -> None:
    model, data = two_files
    assert {file.name for file in model.parent.iterdir()} == {model.name, data.name}
    assert model.stat().st_size < data.stat().st_size
    assert model_bytes(model) == model.stat().st_size + data.stat().st_size
    onnx.checker.check_model(str(model), full_check=True)
    ours, pytorch = load(model), load(tiny_checkpoint())
    np.testing.assert_allclose(ours.sample_float(3, steps=2), pytorch.sample_float(3, steps=2), rtol=0, atol=1e-5)


def test_a_sampler_shares_the_weights_between_its_steps_there_too(tiny_checkpoint: Make, tmp_path: Path) -> None:
    exported = export_onnx(tiny_checkpoint(), tmp_path / "two.onnx", kind="sampler", steps=2)
    assert exported.data is not None
    inside = onnx.load(exported.path, load_external_data=False).graph.initializer
    assert max(len(tensor.raw_data) for tensor in inside) <= 1024  # the weights are outside, once
    assert exported.data.stat().st_size < 1.1 * tiny_checkpoint().stat().st_size
    want = load(tiny_checkpoint()).sample_float(3, steps=2)
    np.testing.assert_allclose(load(exported.path).sample_float(3), want, rtol=0, atol=1e-5)


def test_the_two_files_move_together_and_one_alone_is_refused(two_files: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = two_files
    shutil.copy(model, tmp_path)
    with pytest.raises(ArtifactError, match="which is not beside it"):
        load(tmp_path / model.name)
    shutil.copy(data, tmp_path)
    assert load(tmp_path / model.name).sample(1).shape == (1, 8, 8, 1)


def test_a_new_export_takes_the_old_weights_away_only_when_it_stands(
    two_files: tuple[Path, Path], tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, old = (Path(shutil.copy(file, tmp_path)) for file in two_files)
    bystander = tmp_path / f"model.{'0' * 16}.data"
    bystander.write_text("nobody's")
    before = load(target).sample(2)

    def fails(*_: object, **__: object) -> None:
        raise CheckFailed("no")

    with monkeypatch.context() as failing:
        failing.setattr(checking, "verify", fails)
        with pytest.raises(CheckFailed):
            export_onnx(tiny_checkpoint(classes=0), target)
    assert set(tmp_path.iterdir()) == {target, old, bystander}
    np.testing.assert_array_equal(load(target).sample(2), before)

    new = export_onnx(tiny_checkpoint(classes=0), target).data
    assert set(tmp_path.iterdir()) == {target, new, bystander}
    assert new != old


KILLED = """
import os, signal, sys
from cmfast_export import checking, pipeline
from cmfast_export.graphs import writer
writer.MAX_BYTES = 10_000
checking.verify = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # its weights are written, its file is not
pipeline.export_onnx(sys.argv[1], sys.argv[2])
"""


def killed(checkpoint: Path, target: Path) -> Path:
    """Let an export be killed between its weights and its file; return the weights that it leaves."""
    before = set(target.parent.iterdir())
    done = subprocess.run([sys.executable, "-c", KILLED, str(checkpoint), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    (data,) = (path for path in set(target.parent.iterdir()) - before if path.suffix == ".data")
    return data


def test_weights_of_an_export_that_was_killed_are_removed_by_the_next(
    two_files: tuple[Path, Path], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    target, old = (Path(shutil.copy(file, tmp_path)) for file in two_files)
    bystander = tmp_path / f"model.{'0' * 16}.data"
    bystander.write_text("nobody's")
    left = killed(tiny_checkpoint(classes=0), target)
    assert left != old
    np.testing.assert_array_equal(load(target).sample(1), load(two_files[0]).sample(1))  # what stood there stands
    for path in tmp_path.glob(".*"):
        os.utime(path, (1, 1))  # temporaries of the last seconds are left alone
    new = export_onnx(tiny_checkpoint(), target).data
    assert new == old
    assert set(tmp_path.iterdir()) == {target, old, bystander}


def test_weights_of_a_killed_export_that_a_file_uses_meanwhile_stay(
    two_files: tuple[Path, Path], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    target, data = (Path(shutil.copy(file, tmp_path)) for file in two_files)
    (tmp_path / ".model.onnx.cmfast-data").write_text(data.name)  # of a killed export of the same model
    shutil.copy(target, tmp_path / "copy.onnx")
    export_onnx(tiny_checkpoint(classes=0), target)
    assert load(tmp_path / "copy.onnx").sample(1).shape == (1, 8, 8, 1)


@pytest.mark.parametrize("text", ["../precious.0123456789abcdef.data", "precious.data", "", ".", "other.onnx", "\xff"])
def test_a_note_cannot_name_another_kind_of_file(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    files = [tmp_path / "precious.0123456789abcdef.data", folder / "precious.data", folder / "other.onnx"]
    for file in files:
        file.write_text("precious")
    (folder / ".model.onnx.cmfast-data").write_text(text, encoding="latin-1")
    with writer.replacing_data(folder / "model.onnx"):
        pass
    assert [file.read_text() for file in files] == ["precious"] * 3
    assert not list(folder.glob(".*"))


def test_weights_that_another_file_uses_stay(
    two_files: tuple[Path, Path], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    target, old = (Path(shutil.copy(file, tmp_path)) for file in two_files)
    shutil.copy(target, tmp_path / "backup.onnx")
    export_onnx(tiny_checkpoint(classes=0), target)
    assert old.exists()
    assert load(tmp_path / "backup.onnx").sample(1).shape == (1, 8, 8, 1)


@pytest.mark.parametrize("location", ["../precious.0123456789abcdef.data", "precious.data", "/etc/hostname"])
def test_a_file_that_was_replaced_cannot_name_what_is_deleted(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for precious in (tmp_path / "precious.0123456789abcdef.data", folder / "precious.data"):
        precious.write_text("precious")
    weight = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    graph = onnx.GraphProto(name="g", initializer=[weight])
    (folder / "model.onnx").write_bytes(onnx.ModelProto(ir_version=8, graph=graph).SerializeToString())
    assert pb.read_onnx_model(folder / "model.onnx").external == [location]  # that is what the file says
    assert writer.data_files(folder / "model.onnx") == set()


def test_a_sha256_of_the_graph_holds_for_the_weights_beside_it_by_the_digest_in_it(
    two_files: tuple[Path, Path], tmp_path: Path
) -> None:
    from cmfast.formats.manifest import file_sha256

    file = Path(shutil.copy(two_files[0], tmp_path))
    data = Path(shutil.copy(two_files[1], tmp_path))
    assert load(file, sha256=file_sha256(file)).spec == load(file).spec
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    for sha256 in (file_sha256(file), None):
        with pytest.raises(CmfastError, match="its graph or its weights were changed since they were verified"):
            load(file, sha256=sha256)
