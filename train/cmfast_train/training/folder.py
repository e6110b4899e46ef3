# SPDX-License-Identifier: MIT
"""The folder of a run: which run it belongs to, and which process writes in it. Its files: `trainer`.

A run replaces only its own files. So a folder is refused, before anything in it changes, if its config.json is not of a
run, if it holds models or logs without one, or if it holds models of a run with another configuration.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmfast.errors import ArtifactError, CmfastError
from cmfast.files import remove_leftovers, write_text
from cmfast.files.locks import exclusive
from cmfast_train.config.train_config import ARRAYS, FREE_FIELDS, TrainConfig, from_dict, to_dict
from cmfast_train.training.log import noted_a_checkpoint

FILES = ("config.json", "model.pt", "state.pt", "log.jsonl")
FOLDERS = ("samples", "phases", "ema", "tensorboard")
LOCK = ".cmfast-train.lock"
LARGEST_CONFIG = 1 << 25  # bytes; there can be many names of classes
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the folder `out` and keep other runs out of it while the block runs; remove it if it stays empty.

    Raises:
        CmfastError: another process or thread trains there, or the folder is not writable.
    """
    made: list[Path] = []
    try:
        try:
            for folder in reversed([out, *out.parents]):
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    made.append(folder)
            lock = contextlib.ExitStack()
            lock.enter_context(exclusive(out / LOCK, f"a run is going on in {out}"))
        except OSError as err:
            if err.errno in NO_SPACE:
                raise
            raise CmfastError(f"--out {out}: cannot write there: {err.strerror}; name another folder") from None
        with lock:
            yield
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # it holds the run
                folder.rmdir()


def check_folder(config: TrainConfig, out: Path, data_root: Path | None = None) -> None:
    """Check that a run may begin, or continue, in a folder.

    Args:
        config: of the run.
        out: the folder, which need not exist.
        data_root: folder or archive of the data.

    Raises:
        CmfastError: the folder holds something else, or another run.
    """
    _check_inputs(config, out, data_root)
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        what = "a link to nothing" if out.is_symlink() and not out.exists() else "not a folder"
        raise CmfastError(f"--out {out} is {what}; name another")
    for name in (*FILES, *FOLDERS):
        path = out / name
        if os.path.lexists(path) and not (path.is_file() if name in FILES else path.is_dir()):
            raise CmfastError(f"{path} is not a {'regular file' if name in FILES else 'folder'}; name another --out")
    found = [name for name in FILES[1:] if (out / name).exists()]
    found += [name for name in FOLDERS if (out / name).is_dir() and any((out / name).iterdir())]
    if (out / "config.json").exists():
        _check_same_run(config, out, found)
    elif found:
        raise CmfastError(
            f"{out} holds {', '.join(found)}, but no config.json of a run, so nothing there is replaced; "
            f"name another --out folder{_lost_config(config, out) if 'state.pt' in found else ''}"
        )


def begin_folder(config: TrainConfig, out: Path) -> None:
    """Write config.json and remove files that a killed run left unfinished. The folder is checked and claimed."""
    write_text(out / "config.json", json.dumps(to_dict(config), indent=1) + "\n")
    (out / "samples").mkdir(exist_ok=True)
    for folder in (out, *(out / name for name in FOLDERS)):
        remove_leftovers(folder)


def read_config(file: Path) -> TrainConfig:
    """Return the configuration of a run. A field that is newer than the run gets its default, which the run had.

    Raises:
        ArtifactError: the file holds no configuration.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_CONFIG + 1)
        if len(content) > LARGEST_CONFIG:
            raise ValueError("too large")
        return from_dict(json.loads(content))
    except Exception:  # any damage
        raise ArtifactError(f"{file} is damaged or of another version; begin in another --out folder") from None


@contextmanager
def disk_errors_in_one_line(out: Path) -> Iterator[None]:
    """Turn the system's errors about files in `out` into one line."""
    try:
        yield
    except OSError as err:
        if err.errno in NO_SPACE:
            raise CmfastError(
                f"no space left in {out} ({err.strerror}); the last checkpoint is untouched: free some space; the "
                "same command continues"
            ) from None
        if not isinstance(err.filename, (str, bytes)) or not Path(os.fsdecode(err.filename)).is_relative_to(out):
            raise
        raise CmfastError(f"{os.fsdecode(err.filename)}: {err.strerror}") from None


def _check_inputs(config: TrainConfig, out: Path, data_root: Path | None) -> None:
    """Raise CmfastError if the run would write into its inputs."""
    real = Path(os.path.realpath(out))
    for option, file in (("--init", config.init), ("--teacher", config.teacher)):
        if file and Path(os.path.realpath(file)) in (real, *real.parents):
            raise CmfastError(f"--out {out} is, or is in, the model of {option}; name a folder elsewhere")
    if data_root is not None and config.data == ARRAYS and real == Path(os.path.realpath(data_root)):
        raise CmfastError(f"--out {out} is the folder of the data; name a folder elsewhere")
    if data_root is not None and config.data == "folder" and real.is_relative_to(os.path.realpath(data_root)):
        raise CmfastError(
            f"--out {out} is in the folder of the images, {data_root}, where its samples would become images to train "
            "on; name a folder elsewhere"
        )


def _check_same_run(config: TrainConfig, out: Path, found: list[str]) -> None:
    """Raise CmfastError unless what a folder with a config.json holds is of this run."""
    file = out / "config.json"
    try:
        before = to_dict(read_config(file))
    except ArtifactError as err:
        if "state.pt" in found:
            raise ArtifactError(f"{err}{_lost_config(config, out)}") from None
        raise ArtifactError(
            f"{file} is not the configuration of a run of cmfast-train, so it is not replaced; "
            "name another --out folder"
        ) from None
    now = to_dict(config)
    changed = [name for name in now if name not in FREE_FIELDS and now[name] != before[name]]
    if not {"state.pt", "model.pt", "phases", "ema"} & set(found):
        return  # killed before its first checkpoint
    again = _another_run(config, out)
    _check_order(config, before["class_names"], out)
    if names := sorted(set(changed) - _names_not_known(before, now)):
        values = f" ({names[0]}: {_difference(before[names[0]], now[names[0]])})" if len(names) == 1 else ""
        raise CmfastError(
            f"{out} holds a run with another {', '.join(names)}; repeat the command that began it to continue, or name "
            f"another --out{values}{again}"
        )
    if "state.pt" not in found and noted_a_checkpoint(out / "log.jsonl"):
        raise CmfastError(
            f"{out} holds a run without its state.pt, which continuing it needs; name another --out{again}"
        )


def _lost_config(config: TrainConfig, out: Path) -> str:
    """Return how to restore config.json, as the end of an error. For folders, it holds the names of classes."""
    if config.data == "folder":
        how = f"begin it once more with --out NEW, stop it with Ctrl-C, cp NEW/config.json {out}"
    else:
        how = f"write it with the command that began the run and, at its end, -n > {out / 'config.json'}"
    return f"; if a run lost its config.json, {how}; then repeat that command as it was, and the run continues"


def _another_run(config: TrainConfig, out: Path) -> str:
    """Return how to begin a run from another run's model, as the end of an error."""
    if not (out / "model.pt").is_file():
        return ""
    return (
        "; to train its model for longer or in another way, start a new run from it: "
        f"cmfast-train {'--network ..' if config.own else config.data} --init {out / 'model.pt'} --out NEW"
    )


def _check_order(config: TrainConfig, before: Any, out: Path) -> None:
    """Raise CmfastError if an older run without class names had its folders in the order of text."""
    names = list(config.class_names)
    if config.data == "folder" and names and not before and names != sorted(names):
        raise CmfastError(
            f"{out} holds a run of an older version, whose classes were folders in the order of text "
            f"({', '.join(sorted(names)[:4])}, ..); now numbers sort as numbers, so its labels would change their "
            "meaning; name another --out"
        )


def _names_not_known(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Return the fields that one of two configurations does not know yet: {"class_names"} or nothing."""
    names = {"class_names"} & now.keys()
    return {name for name in names if not (before[name] and now[name])}


def _difference(there: Any, here: Any) -> str:
    """Return two values of a field as text; for phases of the same methods only the differing fields."""
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(a, b) for a, b in zip(there, here, strict=True) if a != b]
        if all(isinstance(a, dict) and isinstance(b, dict) and a["method"] == b["method"] for a, b in pairs):
            return "; ".join(
                f"{b['method']}.{name} {_short(a.get(name))} there, {_short(b.get(name))} here"
                for a, b in pairs
                for name in sorted({*a, *b})
                if a.get(name) != b.get(name)
            )
    return f"{_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
