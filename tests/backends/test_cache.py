# SPDX-License-Identifier: MIT
"""The cache of engines and kernels: what others may write to is refused, what cannot be kept is a warning."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cmfast.backends.cache import check_cache, read_entry, write_entry
from cmfast.errors import CmfastError, CmfastWarning

Make = Callable[..., Path]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o722])
def test_a_folder_that_others_may_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(CmfastError, match=f"others may write to the cache .* {mode:o}.*chmod go-w {tmp_path}"):
        check_cache(tmp_path)
    tmp_path.chmod(mode & ~0o022)
    assert check_cache(tmp_path) == tmp_path


def test_a_folder_with_the_sticky_bit_may_be_shared_but_not_the_entries(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    write_entry(tmp_path, "a.engine", b"plan")
    assert read_entry(check_cache(tmp_path), "a.engine") == b"plan"
    (tmp_path / "a.engine").chmod(0o666)
    with pytest.raises(CmfastError, match=r"others may write to .*a\.engine .*chmod go-w"):
        check_cache(tmp_path)
    with pytest.raises(CmfastError, match=r"others may write to .*a\.engine"):
        read_entry(tmp_path, "a.engine")


def test_what_belongs_to_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entry(tmp_path, "a.engine", b"plan")
    real, me = os.geteuid, os.geteuid()
    if me == 0:  # what is root's everybody trusts
        os.chown(tmp_path / "a.engine", 12345, 12345)
        with pytest.raises(CmfastError, match=r"entry .*a\.engine belongs to another user \(uid 12345, you are 0\)"):
            check_cache(tmp_path)
        os.chown(tmp_path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: real() + 1)
    with pytest.raises(CmfastError, match=r"cache .* belongs to another user"):
        check_cache(tmp_path)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_an_entry_that_is_no_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    entry = tmp_path / "cache" / "a.kernels"
    entry.parent.mkdir()
    if kind == "link":
        (tmp_path / "other").write_bytes(b"plan")
        entry.symlink_to(tmp_path / "other")
    else:
        (os.mkfifo if kind == "fifo" else os.mkdir)(entry)
    for look in (lambda: check_cache(entry.parent), lambda: read_entry(entry.parent, entry.name)):
        with pytest.raises(CmfastError, match=rf"a\.kernels in the cache is {'a link' if kind == 'link' else 'not a'}"):
            look()


def test_entries_and_folders_are_writable_by_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_entry(tmp_path / "a" / "b", "c.engine", b"plan")
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c.engine"):
        assert not path.stat().st_mode & 0o022, path
    assert read_entry(check_cache(tmp_path / "a" / "b"), "c.engine") == b"plan"


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_what_cannot_be_a_folder_is_refused(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.write_text("a file") if kind == "file" else place.symlink_to(tmp_path / "nothing")
    for cache in (place, place / "inside"):
        with pytest.raises(CmfastError, match=r"cannot be a folder: .*place is a"):
            check_cache(cache)


def test_a_missing_folder_is_not_made_before_there_is_something_to_keep(tmp_path: Path) -> None:
    assert read_entry(check_cache(tmp_path / "cache"), "a.engine") is None
    assert not (tmp_path / "cache").exists()


# Engines.


@pytest.fixture
def build(handmade_onnx: Make, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that builds an engine of 8x8 images, its cache tmp_path/cache."""
    pytest.importorskip("tensorrt_rtx")
    from cmfast_export.targets.tensorrt_engine import build_engine
    from cmfast_export.targets.tensorrt_options import BuildOptions

    def build(name: str = "model.engine", onnx: Path | None = None) -> Any:
        return build_engine(onnx or handmade_onnx(8), tmp_path / name, BuildOptions(), cache=tmp_path / "cache")

    return build


@pytest.mark.parametrize("what", ["kind", "spec", "source", "parity", "made_by"])
def test_an_engine_whose_manifest_is_another_is_built_again(
    what: str, build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmfast_export.targets import tensorrt_engine

    first = build()
    real = tensorrt_engine.parse_plan
    others: dict[str, Any] = {
        "kind": {"kind": "sampler", "spec": replace(first.manifest.spec, sigmas={1: (80.0,)})},
        "spec": {"spec": replace(first.manifest.spec, sigma_data=0.25)},
        "source": {"source": {"sha256": "0" * 64}},
        "parity": {"parity": {"max_abs": 1e-9}},
        "made_by": {"made_by": {}},
    }
    assert build("again.engine").cached
    monkeypatch.setattr(tensorrt_engine, "parse_plan", lambda *arguments: replace(real(*arguments), **others[what]))
    assert not build("other.engine").cached


def test_a_plan_of_another_network_resealed_in_the_cache_is_not_copied(
    build: Callable[..., Any], handmade_onnx: Make, tmp_path: Path
) -> None:
    from cmfast.formats.tensorrt_plan import read_plan, seal

    first = build()
    other = build("other.engine", handmade_onnx(16))
    entry = next(file for file in (tmp_path / "cache").iterdir() if read_plan(file).spec.image == (1, 8, 8))
    forged = bytearray(other.path.read_bytes())
    digests = [each.manifest.engine["onnx_sha256"].encode() for each in (other, first)]
    assert forged.count(digests[0]) == 1
    forged = forged.replace(*digests)  # all that the name of an entry is made of is now right
    seal(forged)
    entry.write_bytes(forged)
    again = build("again.engine")
    assert not again.cached
    assert read_plan(again.path).spec.image == (1, 8, 8)


@pytest.mark.parametrize("why", ["full", "link to nothing", "open to others"])
def test_a_cache_that_cannot_take_an_engine_is_a_warning_and_the_engine_stands(
    why: str, build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmfast.backends import cache
    from cmfast_export.targets import tensorrt_engine

    real = tensorrt_engine._build

    def then(*arguments: Any) -> Any:
        plan = real(*arguments)
        if why == "full":

            def no_space(path: Path) -> None:
                raise OSError(28, "No space left on device", str(path))

            monkeypatch.setattr(cache, "atomic_file", no_space)
        elif why == "open to others":
            (tmp_path / "cache").mkdir()
            (tmp_path / "cache").chmod(0o777)
        else:
            (tmp_path / "cache").symlink_to("nothing")
        return plan

    monkeypatch.setattr(tensorrt_engine, "_build", then)
    with pytest.warns(CmfastWarning, match="not kept in the cache"):
        built = build()
    assert built.path.stat().st_size > 0
    assert len(built.sha256) == 64


def test_an_open_cache_is_refused_before_the_work(
    tiny_checkpoint: Make, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx")
    from cmfast_export import cli, conversion

    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setattr(conversion, "convert", None)
    out = tmp_path / "model.engine"
    refused(call(cli.main, tiny_checkpoint(0), "--format", "engine", "-o", out, "--cache", cache), "chmod go-w")
    assert not out.exists()


def test_two_builders_of_one_entry_both_have_their_engine(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmfast_export.targets import tensorrt_engine

    real, inner = tensorrt_engine._build, []

    def while_another_builds(*arguments: Any) -> Any:
        if not inner:
            inner.append(True)
            build("second.engine")
        return real(*arguments)

    monkeypatch.setattr(tensorrt_engine, "_build", while_another_builds)
    first = build("first.engine")
    assert first.path.exists()
    assert (tmp_path / "second.engine").exists()
    assert len(os.listdir(tmp_path / "cache")) == 1
    shutil.rmtree(tmp_path / "cache")  # and the engines need it no more
    assert build("third.engine").manifest.spec == first.manifest.spec
