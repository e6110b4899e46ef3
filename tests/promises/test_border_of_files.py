# SPDX-License-Identifier: MIT
"""Foreign files are one line whatever is wrong with them; a bug of ours beside their parsing keeps its traceback."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast.errors import ArtifactError
from cmfast_train import checkpoint, importers
from cmfast_train.border import naming, reading
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.data import image_arrays, image_folders, image_reader
from cmfast_train.data.image_reader import read_image
from cmfast_train.data.images import image_data
from cmfast_train.evaluation import evaluate
from cmfast_train.importers import finish, identify, openai
from cmfast_train.importers.facts import Given
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise

Make = Callable[..., Any]
TOLD = ("image_size=8", "head_channels=32", "qkv=3hd", "scaling=boundary")


def bug(*_: Any, **__: Any) -> Any:
    raise KeyError("a bug")


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def files(tmp_path: Path, tiny_checkpoint: Make) -> Path:
    """Return a folder with a file of every kind that is read."""
    shutil.copyfile(tiny_checkpoint(), tmp_path / "own.pt")
    network = AdmUnet(
        AdmConfig(
            image_size=8, classes=3, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,),
            head_channels=32,
        )
    )  # fmt: skip
    randomise(network)
    torch.save(network.state_dict(), tmp_path / "foreign.pt")
    content = png(np.zeros((8, 8), np.uint16))
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/1.png", content)
    np.save(tmp_path / "images.npy", np.zeros((2, 8, 8), np.uint8))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8), np.uint8))
    return tmp_path


def draft(folder: Path) -> Any:
    return identify(folder / "foreign.pt", "openai", Given.parse(TOLD))


# what of ours has the bug, and what reads a file through it
OURS: dict[str, tuple[Any, str, Callable[[Path], Any]]] = {
    "identify": (importers, "one_set", draft),
    "draft": (openai, "spec_of", draft),
    "own": (checkpoint, "check_weights", lambda folder: identify(folder / "own.pt")),
    "load_checkpoint": (checkpoint, "check_count", lambda folder: load_checkpoint(folder / "own.pt")),
    "image": (image_reader, "_from_16_bits", lambda folder: read_image(folder / "images" / "a" / "1.png")),
    "folder": (image_folders, "_by_class", lambda folder: image_data(folder / "images", (8, 8), 1)),
    "zip": (image_folders, "_by_class", lambda folder: image_data(folder / "images.zip", (8, 8), 1)),
    "npy": (image_arrays, "_images", lambda folder: image_data(folder / "images.npy", (8, 8), 1)),
    "npz": (image_arrays, "_images", lambda folder: image_data(folder / "images.npz", (8, 8), 1)),
    "samples": (evaluate, "walk", lambda folder: evaluate.read_samples(folder / "images", None)),
    "pixels": (
        image_reader.Fit, "__call__", lambda folder: image_data(folder / "images.npy", (4, 4), 1).__getitems__([0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", OURS)
def test_a_bug_of_ours_beside_the_parsing_keeps_its_traceback(
    where: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, read = OURS[where]
    read(files)  # works without the bug
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(KeyError, match="a bug"):
        read(files)


def test_a_bug_while_a_draft_is_finished_keeps_its_traceback(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = draft(files)
    monkeypatch.setattr("cmfast_train.importers.facts.Checkpoint", bug)
    with pytest.raises(KeyError, match="a bug"):
        finish(found, files / "foreign.pt")


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (RuntimeError("line\nafter line"), "X: not a Y: line after line"),
        (NotImplementedError(), "X: not a Y: NotImplementedError"),
        (RecursionError("deep"), "X: not a Y: deep"),
        (OSError("no name"), "X: not a Y: no name"),  # zipfile seeks where a damaged file says
        (PermissionError(13, "Permission denied", "X"), "X: cannot be read: Permission denied"),
        (PermissionError(13, "Permission denied", "X/b\n"), r"X: cannot be read: Permission denied: X/b\n"),
        (MemoryError(), "X: there is too little memory to read it"),
        (ArtifactError("X: said already\x1b"), r"X: said already\x1b"),
    ],
)
def test_whatever_parsing_raises_is_one_line_that_can_be_printed(raised: Exception, words: str) -> None:
    with pytest.raises(ArtifactError) as caught, reading(Path("X"), "not a Y"):
        raise raised
    assert str(caught.value) == words


def test_around_our_own_code_only_the_system_is_caught() -> None:
    with pytest.raises(ArtifactError, match=r"^X: cannot be read: No space left on device$"), naming("X"):
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), naming("X"):
        raise ZeroDivisionError
