# SPDX-License-Identifier: MIT
"""The folder of a run: others' files stay, one run writes at a time, and what cannot be read or written is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmfast import files
from cmfast.errors import CmfastError, CmfastWarning
from cmfast.files.locks import exclusive
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.cli.train import main
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.training.folder import LOCK, read_config
from cmfast_train.training.log import TrainLog
from cmfast_train.training.trainer import train
from helpers.full_disk import files_of_at_most
from helpers.runs import QUICK, TINY, arguments, log_of, losses_of, run_here, save_images

SHORT = "phases=edm:16"
Call = Callable[..., Any]


def content(folder: Path) -> dict[str, bytes | None]:
    """Return all that is in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Return a finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# Others' files.

NOTES = {".draft.tmp.md": "x", "notes/.plan.tmp": "x"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({**NOTES, "config.json": "{}", "model.pt": "w"}, "config.json is not the configuration of a run"),
        ({"config.json": '{"architectures": ["UNet2DModel"]}'}, "config.json is not the configuration of a run"),
        ({"config.json": ""}, "config.json is not the configuration of a run"),
        ({"model.pt": "w"}, "holds model.pt, but no config.json of a run, so nothing there is replaced; name another"),
        ({"log.jsonl": '{"images": 9}\n', "state.pt": "s"}, "holds state.pt, log.jsonl, but no config.json of a run"),
        ({"samples/000000000064.png": "x"}, "holds samples, but no config.json of a run"),
        ({"ema/0.5.pt": "x", "tensorboard/events": "x"}, "holds ema, tensorboard, but no config.json of a run"),
        ({"model.pt/data.pkl": "x"}, "model.pt is not a regular file; name another --out"),
        ({"samples": "x"}, "samples is not a folder; name another --out"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_folder_with_others_files_is_refused_and_stays_as_it_is(
    files: dict[str, str], words: str, tmp_path: Path, call: Call, refused: Callable[..., None]
) -> None:
    out = fill(tmp_path / "d", files)
    before, changed = content(out), out.stat().st_mtime_ns
    refused(call(main, *arguments(out, [*TINY, "phases=edm:64"])), str(out), words)
    assert content(out) == before
    assert out.stat().st_mtime_ns == changed


def test_hidden_files_of_others_stay_and_own_ones_of_killed_processes_go(copy: Path) -> None:
    own = [f".model.pt.{files._HOST}-0123abcd.cmfast-tmp.pt", f".a.png.{files._HOST}-0123abcd.cmfast-tmp.png"]
    left = [f"{folder}/{name}" for name in own for folder in (".", "samples", "ema", "phases")]
    others = [*NOTES, "samples/.swp.tmp", f"notes/{own[0]}", ".model.pt.tmp.pt", ".env"]
    fill(copy, dict.fromkeys([*left, *others], "x"))
    for name in left:
        os.utime(copy / name, (0, 0))
    run_here(copy, SHORT)
    assert not any((copy / name).exists() for name in left)
    assert all((copy / name).read_text() == "x" for name in others)


def test_a_folder_with_nothing_of_a_runs_names_in_it_is_used(tmp_path: Path) -> None:
    out = fill(tmp_path / "d", NOTES | {"readme.txt": "x"})
    run_here(out, "phases=edm:8")
    assert {name: (out / name).read_text() for name in (*NOTES, "readme.txt")} == NOTES | {"readme.txt": "x"}


def test_models_are_not_replaced_by_another_run_whose_state_is_not_there(copy: Path) -> None:
    (copy / "state.pt").unlink()
    before = content(copy)
    with pytest.raises(CmfastError, match="holds a run with another seed; repeat"):
        run_here(copy, SHORT, "seed=1")
    with pytest.raises(CmfastError, match=r"holds a run without its state\.pt, .* --init .*/copy/model\.pt --out NEW"):
        run_here(copy, SHORT)
    assert content(copy) == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda out: out.write_text("x"), "is a file"),
        (lambda out: out.symlink_to("nowhere"), "is a link to nothing; name another"),
        (lambda out: out.symlink_to("/proc"), "no permission to write in /proc"),
    ],
)
def test_what_cannot_be_the_folder_of_a_run_is_one_line(
    make: Callable[[Path], None], words: str, tmp_path: Path, call: Call, refused: Callable[..., None]
) -> None:
    make(tmp_path / "out")
    refused(call(main, *arguments(tmp_path / "out", [*TINY, SHORT])), words)
    with pytest.raises(CmfastError, match=str(tmp_path)):
        run_here(tmp_path / "out" / "inside", SHORT)


def test_a_link_to_a_folder_and_a_name_that_is_not_utf_8_are_folders(tmp_path: Path) -> None:
    real = tmp_path / os.fsdecode(b"r\xffn")
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    run_here(tmp_path / "link", "phases=edm:8", "tensorboard=true", "emas=0.5")
    model = run_here(real, "phases=edm:8", "emas=0.5")
    assert load_checkpoint(model).spec.image == (1, 8, 8)
    assert (tmp_path / "link").is_symlink()


def test_a_run_does_not_write_among_its_images_or_into_the_model_that_it_starts_from(
    tmp_path: Path, call: Call, refused: Callable[..., None]
) -> None:
    save_images(tmp_path / "photos", torch.zeros(8, 8, 8, 3, dtype=torch.uint8).numpy())
    settings = [*TINY, SHORT, "image_size=8"]
    for out in ("photos", "photos/run"):
        words = arguments(tmp_path / out, settings)[1:]
        refused(call(main, "folder", "--data", tmp_path / "photos", *words), "would become images to train on")
    for out in ("model", "model/run"):
        (tmp_path / "model").mkdir(exist_ok=True)
        words = [*arguments(tmp_path / out, [*QUICK, SHORT]), "--init", tmp_path / "model"]
        refused(call(main, *words), "is, or is in, the model of --init")
    assert sorted(os.listdir(tmp_path)) == ["model", "photos"]


def test_images_that_are_not_square_are_trained_and_drawn(tmp_path: Path) -> None:
    save_images(tmp_path / "photos", torch.zeros(8, 8, 16, 3, dtype=torch.uint8).numpy())
    settings = [*TINY, "phases=edm:8,ect:8", "image_size=8x16", "conditional=false", "model_channels=32", "attention="]
    model = train(override(PRESETS["folder"], [*settings, "flip=true"]), tmp_path / "run", tmp_path / "photos")
    assert load_checkpoint(model).spec.image == (3, 8, 16)
    with Image.open(tmp_path / "run" / "samples" / "000000000016.png") as grid:
        assert grid.size == (2 + 2 * (3 * 16 + 2), 2 + 2 * (3 * 8 + 2))


# One writer.


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended_even_killed(copy: Path) -> None:
    hold = (
        "import sys, time\nfrom cmfast.files.locks import exclusive\n"
        "with exclusive(sys.argv[1], 'x'):\n print(flush=True)\n time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", hold, copy / LOCK], stdout=subprocess.PIPE)
    assert first.stdout is not None
    with first, first.stdout:
        first.stdout.readline()
        before = content(copy)
        with pytest.raises(CmfastError, match=rf"^a run is going on in {copy} \(pid {first.pid}\)$"):
            run_here(copy, SHORT)
        assert content(copy) == before
        first.send_signal(signal.SIGKILL)
    assert (copy / LOCK).exists()
    run_here(copy, SHORT)
    assert not (copy / LOCK).exists()


def test_another_name_of_the_folder_or_another_thread_is_no_way_around_the_lock(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    with exclusive(copy / LOCK, "a thread"):
        with pytest.raises(CmfastError, match=rf"a run is going on in {tmp_path / 'link'} \(pid {os.getpid()}\)"):
            run_here(tmp_path / "link", SHORT)
        raised: list[str] = []

        def second() -> None:
            with pytest.raises(CmfastError) as error:
                run_here(copy, SHORT)
            raised.append(str(error.value))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert raised == [f"a run is going on in {copy} (pid {os.getpid()})"]


def test_a_folder_is_locked_while_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, tried = TrainLog.checkpoint, []

    def try_too(*arguments: Any) -> None:
        with pytest.raises(CmfastError) as error:
            run_here(tmp_path / "run", "phases=edm:8")
        tried.append(str(error.value))
        checkpoint(*arguments)

    monkeypatch.setattr(TrainLog, "checkpoint", try_too)
    run_here(tmp_path / "run", "phases=edm:8")
    assert tried == [f"a run is going on in {tmp_path / 'run'} (pid {os.getpid()})"]


# Full disks.


@pytest.mark.parametrize(
    ("settings", "size", "file"),
    [
        ([], 100_000, "model.pt"),
        ([], 1_000_000, "state.pt"),
        (["phases=edm:8,ect:8", "checkpoint_images=8000"], 100_000, "phases/1_edm.pt"),
    ],
)
def test_a_checkpoint_without_space_is_one_line_and_the_one_before_stays(
    settings: list[str], size: int, file: str, tmp_path: Path, call: Call
) -> None:
    out = tmp_path / "run"
    settings = [*TINY, "phases=edm:16", "checkpoint_images=8", "grid=1", *settings]
    if file == "model.pt":
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("cmfast_train.training.trainer._any", lambda *_: True)  # stopped after its first step
            assert call(main, *arguments(out, settings)).returncode == 130
    before = content(out) if out.exists() else {}
    with files_of_at_most(size):
        result = call(main, *arguments(out, settings))
    assert (result.returncode, result.stdout) == (2, "")
    *continued, line = result.stderr.splitlines()
    assert continued == (["training: continuing at 8 images"] if file == "model.pt" else [])
    assert line.startswith(f"cmfast-train: cannot write {out / file}: ")
    assert f"in {(out / file).parent}" in line
    kept = [name for name in ("model.pt", "state.pt") if name in before]
    assert {name: content(out)[name] for name in kept} == {name: before[name] for name in kept}
    assert not any(".cmfast-tmp" in name for name in content(out))
    assert call(main, *arguments(out, settings)).returncode == 0  # there is space again


def test_a_log_without_space_is_one_line(tmp_path: Path, call: Call, refused: Callable[..., None]) -> None:
    settings = [*TINY, "phases=edm:800", "checkpoint_images=8000"]
    with files_of_at_most(2000):
        result = call(main, *arguments(tmp_path / "run", settings))
    refused(result, f"no space left in {tmp_path / 'run'}", "the last checkpoint is untouched", "the same command")


def test_curves_for_tensorboard_without_space_are_an_error_of_the_run_and_of_no_thread(tmp_path: Path) -> None:
    settings = override(PRESETS["digits"], [*TINY, SHORT, "tensorboard=true"])
    threads = threading.active_count()
    with TrainLog(tmp_path, 0, settings, Accelerator(cpu=True)) as log:
        assert threading.active_count() == threads
        log.add(torch.tensor(1.5), 8, {"phase": "edm", "lr": 0.25})
        size = next((tmp_path / "tensorboard").iterdir()).stat().st_size
        with files_of_at_most(size + 20), pytest.raises(OSError, match="File too large"):
            log._board.add({"edm/loss": 2.5}, 16)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert (board.Scalars("edm/loss")[0].step, board.Scalars("edm/loss")[0].value) == (8, 1.5)
    assert board.Scalars("edm/lr")[0].value == 0.25


def test_curves_of_a_run_that_goes_on_replace_those_after_its_checkpoint(tmp_path: Path) -> None:
    config = override(PRESETS["digits"], [*TINY, SHORT, "tensorboard=true"])
    for images, losses in ((0, [1, 2, 3]), (16, [4, 5])):
        with TrainLog(tmp_path, images, config, Accelerator(cpu=True)) as log:
            for i, loss in enumerate(losses, 1):
                log.add(torch.tensor(float(loss)), images + 8 * i, {"phase": "edm", "lr": 0.25})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(p.step, p.value) for p in board.Scalars("edm/loss")] == [(8, 1), (16, 2), (24, 4), (32, 5)]


# Another run in the same folder.


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("phases=edm:32", "another phases; repeat .* name another --out (phases: edm.images 16 there, 32 here)"),
        ("phases=ect:16", 'name another --out (phases: [{"method": "edm", "images": 16,'),
        ("batch=16", "another batch; repeat .* or name another --out (batch: 8 there, 16 here)"),
        ("channels=3", "another channels; repeat"),
    ],
)  # fmt: skip
def test_a_run_that_is_to_be_longer_or_another_is_shown_how_to_start_from_its_model(
    setting: str, words: str, copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(CmfastError, match=re.escape(words).replace(r"\.\*", ".*")) as raised:
        run_here(copy, SHORT, setting)
    end = f"start a new run from it: cmfast-train digits --init {copy / 'model.pt'} --out NEW"
    assert str(raised.value).endswith(end)
    if setting == "phases=edm:32":
        run_here(tmp_path / "new", "phases=edm:8", f"init={copy / 'model.pt'}")


def test_another_preset_names_what_differs_and_how_to_start_from_the_model(
    copy: Path, tmp_path: Path, call: Call, refused: Callable[..., None]
) -> None:
    result = call(main, "mnist-large", *arguments(copy, [*TINY, SHORT])[1:], "--data", tmp_path)
    refused(result, "data, ", f"--init {copy / 'model.pt'}")


# Damaged files.


DAMAGE = [
        b"\xff\xfe\x00binary\n\xff\n",
        b"[" * 100_000 + b"\n",
        b'{"images": 1' + b"0" * 400 + b"}\n",
        b'{"images": 1e999}\n{"images": "8"}\n{"images": null}\n[8]\n8\n{"images": 1' + b"0" * 5000 + b"}\n",
        b"x" * 200_000 + b"\n",
]  # fmt: skip


@pytest.mark.parametrize(
    "damage", [*DAMAGE, b"".join(DAMAGE)], ids=["binary", "deep", "large", "values", "long", "all"]
)
def test_lines_of_a_log_that_are_none_are_left_out_and_said(damage: bytes, finished: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(damage + (finished / "log.jsonl").read_bytes())
    config = override(PRESETS["digits"], [*TINY, SHORT])
    with pytest.warns(CmfastWarning, match=r"log\.jsonl: \d+ lines are not lines of a log; they are removed"):
        TrainLog(tmp_path, 16, config, Accelerator(cpu=True))
    assert log_of(tmp_path) == log_of(finished)


def test_the_last_line_of_a_killed_runs_log_may_be_cut(finished: Path, copy: Path) -> None:
    with (copy / "log.jsonl").open("a") as log:
        log.write('{"images": 8, "lo')
    TrainLog(copy, 16, override(PRESETS["digits"], TINY), Accelerator(cpu=True))  # a warning would be an error
    assert log_of(copy) == log_of(finished)


@pytest.mark.parametrize("left", [None, b"", b"\xff"])
def test_a_run_that_lost_its_configuration_is_told_how_to_write_it_again(
    left: bytes | None, copy: Path, call: Call, refused: Callable[..., None]
) -> None:
    command = arguments(copy, [*TINY, "phases=edm:16"])
    (copy / "config.json").unlink()
    if left is not None:
        (copy / "config.json").write_bytes(left)
    refused(
        call(main, *command),
        "if a run lost its config.json, write it with the command that began the run and, at its end, -n > "
        f"{copy / 'config.json'}; then repeat that command as it was, and the run continues",
    )
    (copy / "config.json").write_text(call(main, *command, "-n").stdout)
    before = (copy / "state.pt").read_bytes()
    assert call(main, *command).returncode == 0
    assert torch.load(copy / "state.pt", weights_only=True)["step"] == 2
    assert len(before) == (copy / "state.pt").stat().st_size
    assert [line["images"] for line in log_of(copy)] == sorted(line["images"] for line in log_of(copy))


def test_a_run_on_a_folder_of_classes_gets_its_configuration_from_another_of_the_same_command(
    tmp_path: Path, call: Call, refused: Callable[..., None]
) -> None:
    for name in ("9", "10"):  # the older order was another
        (tmp_path / "images" / name).mkdir(parents=True)
        for shade in range(4):
            Image.new("L", (8, 8), shade).save(tmp_path / "images" / name / f"{shade}.png")
    settings = [*TINY, "image_size=8", "channels=1", "phases=edm:16"]

    def command(out: Path) -> list[str]:
        return ["folder", *arguments(out, settings)[1:], "--data", str(tmp_path / "images")]

    run, new = tmp_path / "run", tmp_path / "new"
    assert call(main, *command(run)).returncode == 0
    (run / "config.json").unlink()
    refused(
        call(main, *command(run)), f"begin it once more with --out NEW, stop it with Ctrl-C, cp NEW/config.json {run}"
    )
    assert call(main, *command(new)).returncode == 0
    shutil.copy(new / "config.json", run)
    assert call(main, *command(run)).returncode == 0


@pytest.mark.parametrize(
    "text",
    [b"\xff\x00", b"[" * 100_000, b'{"phases": ' + b"9" * 5000, b'{"batch": 1e999, "phases": [{"images": 1e999}]}'],
    ids=["binary", "nested", "long number", "infinite"],
)
def test_a_configuration_that_cannot_be_read_is_one_line(text: bytes, copy: Path) -> None:
    (copy / "config.json").write_bytes(text)
    before = content(copy)
    with pytest.raises(CmfastError, match=r"config\.json is damaged or of another version; begin in another --out"):
        run_here(copy, SHORT)
    assert content(copy) == before


def test_a_configuration_of_a_wrong_type_or_size_is_not_read(finished: Path, tmp_path: Path) -> None:
    values = json.loads((finished / "config.json").read_text())
    file = tmp_path / "config.json"
    for change in ({"batch": None}, {"phases": 3}, {"sigmas": 5}, {"batch": 0}, {"what": 1}, {"seed": "x" * 2**20}):
        file.write_text(json.dumps(values | change))
        with pytest.raises(CmfastError, match="damaged"):
            read_config(file)
    file.write_text(json.dumps(values))
    assert read_config(file).batch == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"step": -1}, "step is -1, expected 0 to 2"),
        (lambda s: {"step": 10**9}, "step is 1000000000, expected 0 to 2"),
        (lambda s: {"phase": -1}, "phase is -1, expected 0 to 0"),
        (lambda s: {"averages": {"0.999": dict.fromkeys(s["weights"], torch.zeros(()))}}, r"has the shape \[\]"),
        (lambda s: {"optimizer": {"state": [], "param_groups": []}}, "not the training state of this run"),
        (lambda s: {"made_for": 3}, "not the training state of this run"),
    ],
)  # fmt: skip
def test_a_state_with_wrong_values_is_one_line_and_stays(change: Any, words: str, finished: Path, copy: Path) -> None:
    state = torch.load(finished / "state.pt", weights_only=True)
    torch.save(state | change(state), copy / "state.pt")
    before = content(copy)
    with pytest.raises(CmfastError, match=words) as raised:
        run_here(copy, SHORT, "log_images=1")
    assert str(raised.value).startswith(str(copy))
    assert "\n" not in str(raised.value)
    assert content(copy) == before


@pytest.mark.parametrize("damage", ["truncated", "bigger", "a folder"])
def test_a_state_file_that_is_cut_or_more_than_itself_is_one_line(damage: str, copy: Path) -> None:
    file = copy / "state.pt"
    state = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    else:
        file.write_bytes(state[:-1000] if damage == "truncated" else state + bytes(100_000))
    with pytest.raises(CmfastError, match=re.escape(str(file))):
        run_here(copy, SHORT)
    assert losses_of(copy)
