# SPDX-License-Identifier: MIT
"""Write what test_frozen.py reads: files of version 0.1.0, and what that version computes from them.

    git worktree add old 37f29fa && cp -r tests/frozen old/tests/ && cd old && OMP_NUM_THREADS=1 \\
        PYTHONPATH=.:train:export python tests/frozen/make.py

Only 0.1.0 can run this: it imports that version's modules, and files of a later version would prove nothing about old
ones. It was run once. Do not run it to make a failing test pass; a later format gets a folder of its own.

v0_1/files.zip      checkpoints of every network and convention, exported graphs, engines, runs stopped in a phase and
                    the models that they ended with
v0_1/images.npz     float32 samples of each model
v0_1/expected.json  manifests, names, noise, exit codes

Of the weights most are zero, so that they pack: `sparse` says which, and why a zero stays one in training.
"""

# ruff: noqa: I001  sorted as long as these modules existed
from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cmfast
from cmfast.artifact import Manifest
from cmfast.plan import NOT_RUN, UNSEALED, seal
from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.networks.adm import AdmConfig
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from cmfast_train.networks.seed import SeedConfig

HERE = Path(__file__).parent / "v0_1"
ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SEED = 5

TINY: dict[str, Any] = {"model_channels": 32, "res_blocks": 1}
CLASSES = ("cat", "dog, small", "élan")


def models() -> dict[str, tuple[NetworkConfig, ModelSpec, dict[str, Any]]]:
    """Return {name: (network, conventions, source)}: every type of network and every word of a spec at least once."""
    adm = {**TINY, "channels": 1, "channel_mult": (1, 1), "head_channels": 16}
    song = {**TINY, "channels": 1, "channel_mult": (1, 1), "emb_mult": 1, "attention": (4,)}
    small, edm = {"image": (1, 8, 8)}, {"scaling": "edm", "c_noise": "ln/4"}
    own: dict[str, Any] = {}
    return {
        "adm_names": (
            AdmConfig(image_size=8, classes=3, attention=(4,), **adm),
            ModelSpec(**small, classes=3, class_names=CLASSES, grid=40),
            own,
        ),
        "adm_trigflow": (
            AdmConfig(image_size=8, attention=(), scale_shift=False, resblock_updown=False, **adm),
            ModelSpec(**small, scaling="trigflow", c_noise="trig", clip=False),
            own,
        ),
        "adm_flow": (
            AdmConfig(image_size=8, attention=(), two_times=True, **adm),
            ModelSpec(**small, scaling="flow", c_noise="flow", sigma_data=0.6),
            own,
        ),
        "seed": (
            SeedConfig(image_size=8, channels=1, width=32),
            ModelSpec(**small, scaling="seed", c_noise="raw", sigma_max=60.0, sigmas={1: (60.0,), 2: (60.0, 2.5)}),
            {"format": "seed"},
        ),
        "song": (SongConfig(image_size=8, **song), ModelSpec(**small, **edm, renoise="ddim"), own),
        "song_ncsnpp": (
            SongConfig(
                image_size=8, classes=4, noise_mult=2, embedding="fourier", encoder="residual", resample=(1, 3, 3, 1),
                augment=9, **song,
            ),
            ModelSpec(**small, classes=4, **edm),
            {"format": "edm"},
        ),
        "dhariwal": (
            DhariwalConfig(
                image_size=(8, 16), channels=3, classes=3, channel_mult=(1, 2), emb_mult=1, attention=(4,), **TINY
            ),
            ModelSpec(image=(3, 8, 16), classes=3, **edm, renoise="plain"),
            own,
        ),
    }  # fmt: skip


def sparse(network: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter random values of trained scale, in the first two of every 16 channels; elsewhere zero.

    Where GroupNorm has one or two channels a group, these are of one sort, so nothing flows into the others, forwards
    or backwards: their gradients are exactly zero, and training leaves them so.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            value = torch.randn(weight.shape, generator=generator)
            for axis, size in enumerate(weight.shape[:2]):
                if size >= 32:
                    shape = [size if a == axis else 1 for a in range(weight.ndim)]
                    value = value * (torch.arange(size) % 16 < 2).reshape(shape)
            if weight.ndim > 1:
                value = value / max(1, int((value[0] != 0).sum())) ** 0.5
            else:
                value = 0.1 * value + (value != 0) * (1.0 if name.endswith("weight") else 0.0)
            weight.copy_(value + 0.0)  # no -0.0, which does not pack


def write_checkpoints(folder: Path) -> None:
    folder.mkdir()
    for number, (name, (network, spec, source)) in enumerate(models().items()):
        built = build_network(network)
        sparse(built, number)
        model = Checkpoint(
            spec=spec, network=network, weights=built.state_dict(), **({"source": source} if source else {})
        )
        save_checkpoint(model, folder / f"{name}.pt")
        save_checkpoint(model, folder / f"{name}.safetensors")


def write_exports(folder: Path, checkpoints: Path) -> None:
    folder.mkdir()
    model = checkpoints / "adm_names.pt"
    command("cmfast-export", model, "-o", folder / "denoiser.onnx")
    command("cmfast-export", model, "-o", folder / "denoiser_fp16.onnx", "--precision", "fp16")
    command("cmfast-export", model, "-o", folder / "sampler.onnx", "--kind", "sampler", "--steps", 2)
    command("cmfast-export", model, "-o", folder / "server.onnx", "--kind", "server", "--sigmas", "80,3")
    command("cmfast-export", checkpoints / "song.pt", "-o", folder / "song.onnx")
    command("cmfast-export", folder / "song.onnx", "-o", folder / "rtx.engine", "--format", "engine",
            "--build", "library=tensorrt_rtx", "--build", "batch=1")  # fmt: skip
    (folder / "tensorrt.engine").write_bytes(tensorrt_plan(folder / "denoiser.onnx"))


def tensorrt_plan(onnx: Path) -> bytes:
    """Return a plan of TensorRT as our reader sees it; the engine in it, which needs a card, is made up."""
    about = {
        "library": "tensorrt", "version": "11.4.0.106", "cuda": "13", "compute_capability": ["9.0"], "gpu": "made up",
        "platform": "linux_x86_64", "batch": [1, 2, 4], "onnx_sha256": "0" * 64, "max_abs": NOT_RUN,
        "plan_sha256": UNSEALED,
    }  # fmt: skip
    manifest: Manifest = replace(cmfast.read_manifest(onnx), graph_sha256="", engine=about)
    plan = bytearray(b"ftrt" + bytes(96) + manifest.to_json().encode() + b"\x00\xff\xfe" * 500)
    seal(plan, 1.23e-4)
    return bytes(plan)


# Runs: a network in 10 classes, stopped by Ctrl-C in the middle of its second phase.

RUN = {
    "batch": "8", "log_images": "16", "checkpoint_images": "48", "grid": "4", "device": "cpu", "tensorboard": "false",
    "emas": "0.9", "ema_stds": "0.1", "edm.lr": "1e-2", "edm.ema": "0.5",
}  # fmt: skip
RUNS = {
    "ect": {"phases": "edm:48,ect:64", "ect.lr": "3e-3", "ect.ema": "0.6", "ect.stages": "0,3", "ect.lr_decay": "0.5"},
    # has a teacher and a target in its state
    "cd": {"phases": "edm:48,cd:64", "cd.lr": "3e-3", "cd.ema": "0.6", "cd.mu0": "0.8", "cd.s0": "4", "cd.s1": "4"},
    # has a teacher and the weights of noise levels in its state
    "scd": {"phases": "edm:48,scd:64", "scd.lr": "3e-3", "scd.ema": "0.6"},
}
STOP = 80  # images
STOPPED = """
import os, signal
from cmfast_train.log import TrainLog
add = TrainLog.add
def stopping(self, loss, images, where):
    add(self, loss, images, where)
    if images == %d:
        os.kill(os.getpid(), signal.SIGINT)
TrainLog.add = stopping
"""


def write_runs(folder: Path) -> None:
    network = AdmConfig(
        image_size=8, channels=1, classes=10, channel_mult=(1,), attention=(), head_channels=16, **TINY
    )  # fmt: skip
    for name, settings in RUNS.items():
        here = folder / name
        here.mkdir(parents=True)
        built = build_network(network)
        sparse(built)
        spec = ModelSpec(image=(1, 8, 8), classes=10, scaling="edm", c_noise="trig")
        save_checkpoint(Checkpoint(spec=spec, network=network, weights=built.state_dict()), here / "init.pt")
        arguments = training(settings)
        command("cmfast-train", *arguments, code=130, cwd=here, before=STOPPED % STOP)
        state = torch.load(here / "run" / "state.pt", weights_only=True)
        assert (state["phase"], 8 * state["step"]) == (1, STOP - 48)
        shutil.copytree(here / "run", here / "end" / "run")
        shutil.copy(here / "init.pt", here / "end")
        command("cmfast-train", *arguments, cwd=here / "end")


def training(settings: dict[str, str]) -> list[str]:
    every = (RUN | settings).items()
    return ["digits", "--out", "run", "--init", "init.pt", *(w for k, v in every for w in ("--set", f"{k}={v}"))]


# What is expected of them.


def expected(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is expected of the files in `folder`, for JSON, and the arrays for images.npz."""
    facts: dict[str, Any] = {
        "made_by": {"cmfast": cmfast.__version__, "commit": commit(), "python": sys.version.split()[0]}
        | {name: version(name) for name in ("torch", "numpy", "onnx", "onnxruntime", "tensorrt-rtx")},
        "seed": SEED,
        "manifests": {},
        "weights": {},
        "labels": {},
    }
    arrays = {}
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".pt", ".safetensors", ".onnx", ".engine")):
        name = file.relative_to(folder).as_posix()
        if name.startswith("runs/") and not name.endswith("/run/model.pt"):
            continue
        facts["manifests"][name] = json.loads(command("cmfast-info", file, "--json"))
        if name.startswith("checkpoints/"):
            facts["weights"][name] = {key: list(t.shape) for key, t in load_checkpoint(file).weights.items()}
        if file.suffix == ".engine":
            continue
        model = cmfast.load(file, threads=1)
        facts["labels"][name] = model.labels(4, seed=SEED).tolist() if model.spec.classes else []
        for steps in (1, 2) if model.manifest.kind == "denoiser" else (2,):
            arrays[f"{name} {steps}"] = model.sample_float(2, steps=steps, seed=SEED)
        if name.startswith("checkpoints/song."):
            arrays[f"{name} heun"] = model.sample_heun_float(2, steps=3, seed=SEED)
    arrays["noise"] = cmfast.gaussian(2**40 + 3, [0, 7, 2**33], 2, (1, 8, 8))
    facts["noise"] = {"seed": 2**40 + 3, "samples": [0, 7, 2**33], "step": 2, "shape": [1, 8, 8]}
    return facts | {"exit_codes": exit_codes(folder)}, arrays


def promises() -> dict[str, Any]:
    """Return the names that users type: of the API, of the commands, of the settings."""
    public: dict[str, Any] = {}
    for name in cmfast.__all__:
        thing = getattr(cmfast, name)
        error = isinstance(thing, type) and issubclass(thing, Exception)
        public[name] = [] if error else list(inspect.signature(thing).parameters)
    for name, method in inspect.getmembers(cmfast.Model, inspect.isfunction):
        if not name.startswith("_"):
            public[f"Model.{name}"] = list(inspect.signature(method).parameters)[1:]
    settings = [
        "data=folder", "image_size=16x8", "channels=3", "conditional=false", "flip=true", "download=true",
        "teacher=teacher.pt", "network=adm", "model_channels=64", "res_blocks=3", "channel_mult=1,2",
        "attention=8,4", "head_channels=32", "dropout=0.1", "sigma_min=0.01", "sigma_max=60", "sigma_data=0.4",
        "scaling=edm", "c_noise=ln/4", "sigmas=60:60,2", "phases=edm:64,cd:64,ct:64,ict:64,ect:64,sct:64,edm:64,scd:64",
        "batch=32", "accumulation=2", "precision=fp32", "channels_last=false", "compile=false", "graph=false",
        "fused=false", "recompute=true", "shard=true", "emas=0.9,0.99", "ema_stds=0.05,0.1", "lpips=vgg:vgg.pth",
        "device=cpu", "seed=7", "checkpoint_images=640", "log_images=64", "grid=9", "workers=2", "tensorboard=false",
        "ect.lr=0.002", "ect.lr_warmup=0.1", "ect.lr_decay=0.2", "ect.ema=0.9", "ect.clip_norm=1", "ect.p_mean=-1",
        "ect.p_std=1.5", "ect.s0=3", "ect.s1=9", "ect.q=3", "ect.k=4", "ect.b=2", "ect.stages=1,3", "ect.steps=2",
        "ect.ratio=0.5", "ect.loss=lpips", "ect.huber=0.01", "ect.mu=fixed", "ect.mu0=0.5", "ect.solver=euler",
        "ect.warmup=0.5", "ect.tangent_c=0.2", "ect.adaptive=false", "ect.derivative=finite", "ect.power=0.5",
    ]  # fmt: skip
    words = [word for text in settings for word in ("--set", text)]
    config = json.loads(command("cmfast-train", "digits", "--out", "never", "--dry-run", *words))
    assert set(config) - {text.partition("=")[0] for text in settings} == {"class_names", "init"}  # below
    phase = set(config["phases"][4]) - {"method", "images"}
    assert phase == {text[4:].partition("=")[0] for text in settings if text.startswith("ect.")}
    return {"public": public, "commands": sorted(SCRIPTS), "settings": settings, "config": config}


def exit_codes(folder: Path) -> list[dict[str, Any]]:
    """Return the exit codes of commands, most of them with wrong input, called in `folder`."""
    lines: list[tuple[str, ...]] = [
        ("cmfast-sample", "missing.onnx"),
        ("cmfast-sample", "exports/denoiser.onnx", "-n", "0"),
        ("cmfast-sample", "exports/denoiser.onnx", "--steps", "7"),
        ("cmfast-sample", "exports/denoiser.onnx", "--sigmas", "1,2"),
        ("cmfast-sample", "exports/denoiser.onnx", "--label", "bird"),
        ("cmfast-sample", "exports/denoiser.onnx", "--label", "3"),
        ("cmfast-sample", "exports/denoiser.onnx", "--sha256", "0" * 64),
        ("cmfast-sample", "exports/sampler.onnx", "--heun", "3"),
        ("cmfast-info", "expected.txt"),
        ("cmfast-info", "missing.engine"),
        ("cmfast-train", "digits"),
        ("cmfast-train", "digits", "--out", "new", "--set", "nothing=1"),
        ("cmfast-train", "digits", "--out", "new", "--set", "ect.lr=fast"),
        ("cmfast-train", "digits", "--out", "new", "--set", "phases=cd:100"),
        ("cmfast-train", "digits", "--out", "runs/ect/run"),
        ("cmfast-ema", "missing", "--std", "0.1"),
        ("cmfast-export", "missing.pt"),
        ("cmfast-export", "checkpoints/song.pt", "--opset", "5"),
        ("cmfast-export", "checkpoints/song.pt", "-o", "song.png"),
        ("cmfast-eval", "missing.onnx", "--data-set", "digits"),
        ("cmfast-bench", "missing.onnx"),
        ("cmfast-sample", "--help"),
        ("cmfast-train", "digits", "--out", "new", "--dry-run", "--init", "m.pt", "--set", "phases=pd/4:64"),
        ("cmfast-train", "digits", "--out", "new", "--dry-run", "--set", "phases=edm:64,pd:64"),
        ("cmfast-train", "digits", "--out", "new", "--dry-run", "--set", "phases=mf:64"),
        ("cmfast-train", "mnist", "--out", "new", "-n", "--set", "network=seed", "--set", "conditional=false"),
    ]
    answers = []
    for words in lines:
        result = ran(*words, cwd=folder)
        answers.append({"command": list(words), "code": result.returncode})
    return answers


def prune_ends(folder: Path) -> dict[str, Any]:
    """Return of each run the command that continues it, the files that it has at its end, the keys of its log.

    Of the run at its end only the last models stay.
    """
    found = {}
    for name, settings in RUNS.items():
        end = folder / name / "end"
        run = end / "run"
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        found[name] = {
            "arguments": training(settings),
            "files": sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()),
            "log": sorted({key for line in lines for key in line}),
            "images": sorted(line["images"] for line in lines if "loss" in line),
        }
        for file in ("model.pt", "ema/0.9.pt", "ema/std0.100-000000000112.pt"):
            (end / file).parent.mkdir(exist_ok=True)
            shutil.move(run / file, end / file)
        shutil.rmtree(run)
        (end / "init.pt").unlink()
    return found


def ran(name: str, *words: Any, cwd: Path = ROOT, before: str = "") -> subprocess.CompletedProcess[str]:
    module, function = SCRIPTS[name].split(":")
    code = f"{before}\nimport sys; from {module} import {function} as main; sys.argv[0] = {name!r}; main()"
    path = os.pathsep.join([*(str(ROOT / part) for part in ("", "train", "export")), os.environ["PYTHONPATH"]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    argv = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=environment)


def command(name: str, *words: Any, code: int = 0, cwd: Path = ROOT, before: str = "") -> str:
    """Run a command of this version; return what it printed."""
    result = ran(name, *words, cwd=cwd, before=before)
    assert result.returncode == code, (name, words, result.returncode, result.stderr)
    return result.stdout


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def pack(folder: Path, out: Path) -> None:
    """Write a .zip of a folder, the same bytes for the same files."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (2026, 1, 1, 0, 0, 0))
            archive.writestr(name, file.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    out.write_bytes(packed.getvalue())


def compact(values: dict[str, Any]) -> str:
    """Return JSON with a line for each entry of each part."""
    parts = []
    for name, part in values.items():
        if isinstance(part, dict) and part:
            inside = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in part.items())
            parts.append(f" {json.dumps(name)}: {{\n{inside}\n }}")
        elif isinstance(part, list):
            inside = ",\n".join(f"  {json.dumps(v)}" for v in part)
            parts.append(f" {json.dumps(name)}: [\n{inside}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(part)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    if cmfast.__version__ != "0.1.0" or (HERE.exists() and any(HERE.iterdir())):
        raise SystemExit(f"make.py writes files of version 0.1.0 into an empty {HERE}; this is {cmfast.__version__}")
    torch.set_num_threads(1)
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        promised = promises()
        write_checkpoints(folder / "checkpoints")
        write_exports(folder / "exports", folder / "checkpoints")
        write_runs(folder / "runs")
        ends = prune_ends(folder / "runs")
        facts, arrays = expected(folder)
        facts["runs"] = ends
        facts |= promised
        for name, array in arrays.items():
            print(f"{name}: {array.shape}, |x| up to {np.abs(array).max():.3g}, std {array.std():.3g}")
        np.savez_compressed(HERE / "images.npz", **arrays)
        (HERE / "expected.json").write_text(compact(facts))
        pack(folder, HERE / "files.zip")


if __name__ == "__main__":
    main()
