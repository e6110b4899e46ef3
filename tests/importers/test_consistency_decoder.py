# SPDX-License-Identifier: MIT
"""OpenAI's consistency decoder, from diffusers' folder: the images that diffusers and OpenAI's code decode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cmfast
from cmfast.cli import info, sample
from cmfast.errors import ArtifactError, CmfastError
from cmfast.sampling import to_uint8
from cmfast_export import cli as export
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.importers import load_model
from cmfast_train.importers.facts import Given
from cmfast_train.networks.adm import randomise
from cmfast_train.networks.build import check_weights, network_from_dict, network_to_dict

Call = Callable[..., Any]
SIZE = 16  # pixels of an image; a latent has 8, because this encoder has two levels
SMALL: dict[str, Any] = {
    "encoder_block_out_channels": [32, 32],
    "encoder_down_block_types": ["DownEncoderBlock2D"] * 2,
    "encoder_layers_per_block": 1,
    "decoder_block_out_channels": [32, 64],
    "decoder_down_block_types": ["ResnetDownsampleBlock2D"] * 2,
    "decoder_up_block_types": ["ResnetUpsampleBlock2D"] * 2,
    "decoder_layers_per_block": 1,
}


@pytest.fixture(scope="module")
def vae(diffusers: ModuleType) -> Any:
    """Return diffusers' autoencoder, small, with random weights everywhere."""
    torch.manual_seed(0)
    made = diffusers.ConsistencyDecoderVAE(**SMALL).eval().requires_grad_(False)
    randomise(made)
    return made


@pytest.fixture(scope="module")
def folder(vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path


def latents(n: int = 2) -> Tensor:
    return torch.from_numpy(cmfast.gaussian(7, range(n), 0, (4, 8, 8)))


def noise(seed: int, n: int = 2) -> tuple[np.ndarray, torch.Generator]:
    """Return what diffusers draws from a generator, [2, n, 3, SIZE, SIZE], and a new generator of the seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n, 3, SIZE, SIZE, generator=generator).numpy() for _ in range(2)]
    return np.stack(drawn), torch.Generator().manual_seed(seed)


def decoded(checkpoint: Checkpoint, z: np.ndarray, latent: Tensor) -> np.ndarray:
    denoiser, spec = checkpoint.denoiser(), checkpoint.spec

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        return denoiser(torch.from_numpy(x), torch.full((len(x),), sigma), latent=latent).numpy()

    return np.asarray(cmfast.sample(denoise, z, spec.sigmas_for(), spec))


def test_it_decodes_what_diffusers_decodes(vae: Any, folder: Path) -> None:
    checkpoint = load_model(folder, given=Given(image_size=SIZE, clip=False))
    z, generator = noise(1)
    want = vae.decode(latents(), generator=generator).sample.numpy()
    assert want.std() > 0.3
    # Values of about 1; noise levels of 44 in float32, and a table that was summed up in float32 by diffusers.
    np.testing.assert_allclose(decoded(checkpoint, z, latents()), want, rtol=0, atol=1e-5)


def test_it_decodes_what_openais_loop_decodes(vae: Any, folder: Path) -> None:
    """consistencydecoder/__init__.py, __call__: variance-preserving coordinates, clamped after each call."""
    checkpoint, (z, _), scheduler = load_model(folder, given=Given(image_size=SIZE)), noise(2), vae.decoder_scheduler
    features = (latents() * 0.18215 - vae.means) / vae.stds
    features = torch.nn.functional.interpolate(features, scale_factor=2.0)
    x0 = torch.zeros(2, 3, SIZE, SIZE)
    for time, part in zip((1008, 512), torch.from_numpy(z), strict=True):
        x = scheduler.sqrt_alphas_cumprod[time] * x0 + scheduler.sqrt_one_minus_alphas_cumprod[time] * part
        output = vae.decoder_unet(
            torch.cat([scheduler.c_in[time] * x, features], dim=1), torch.tensor([time] * 2)
        ).sample
        x0 = (scheduler.c_out[time] * output[:, :3] + scheduler.c_skip[time] * x).clamp(-1, 1)
    np.testing.assert_allclose(decoded(checkpoint, z, latents()), x0.numpy(), rtol=0, atol=1e-5)  # as above


def test_between_two_times_the_embedding_is_between_theirs(folder: Path) -> None:
    network: Any = load_model(folder, given=Given(image_size=SIZE)).denoiser().network
    table = network.unet.time_proj.weight
    times = torch.tensor([0.0, 512.0, 511.99998, 511.5, 1023.0])
    halfway = (table[511] + table[512]) / 2
    want = torch.stack([table[0], table[512], table[512], halfway, table[1023]])
    torch.testing.assert_close(network.unet.time_proj(times), want)


def test_it_is_exported_as_one_file_and_sampled_with_the_latent(
    diffusers: ModuleType, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "vae"
    one = {name: value[:1] for name, value in SMALL.items() if name.startswith("decoder_") and isinstance(value, list)}
    small = diffusers.ConsistencyDecoderVAE(**SMALL | one)  # of one level, which is traced in a third of the time
    randomise(small)
    small.save_pretrained(folder)
    said = call(info.main, folder)
    assert said.returncode == 0, said.stderr
    for words in ("a ConsistencyDecoderVAE of diffusers", "latents to images", "image_size"):
        assert words in said.stdout
    made = call(
        export.main, folder, "--set", f"image_size={SIZE}", "--kind", "sampler", "--steps", 2, "-o", "decoder.onnx"
    )
    assert made.returncode == 0, made.stderr
    np.save("latent.npy", latents().numpy())
    drawn = call(sample.main, "decoder.onnx", "-n", 2, "--condition", "latent=latent.npy", "--seed", 3, "-o", "a.npz")
    assert (drawn.returncode, drawn.stderr) == (0, "")
    checkpoint = load_model(folder, given=Given(image_size=SIZE))
    z = cmfast.noise.slices(3, range(2), 2, (3, SIZE, SIZE))
    with np.load("a.npz") as arrays:
        want = to_uint8(decoded(checkpoint, z, latents())).astype(int)
        assert np.abs(arrays["arr_0"] - want).max() <= 1  # a value between two levels may round to either


def test_a_checkpoint_says_which_network_it_holds(folder: Path) -> None:
    checkpoint = load_model(folder, given=Given(image_size=(SIZE, 2 * SIZE)))
    assert checkpoint.spec.conditions[0].shape == (4, 8, 16)
    assert network_from_dict(network_to_dict(checkpoint.network)) == checkpoint.network
    check_weights(checkpoint.network, checkpoint.weights)
    with pytest.raises(CmfastError, match="the weights do not fit the network"):
        check_weights(checkpoint.network, dict(list(checkpoint.weights.items())[1:]))


def test_the_size_of_the_images_is_required(folder: Path) -> None:
    with pytest.raises(CmfastError, match=r"image_size cannot be inferred from the file.*--set image_size=512"):
        load_model(folder)
    with pytest.raises(CmfastError, match="image_size=15 is not a multiple of 2"):
        load_model(folder, given=Given(image_size=15))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 16}, "latent_channels is 16; supported: 4"),
        ({"decoder_time_embedding_type": "positional"}, 'is "positional"; supported: "learned"'),
        ({"decoder_num_train_timesteps": 1000}, "decoder_num_train_timesteps is 1000; supported: 1024"),
        ({"decoder_layers_per_block": 2}, "weights and config.json do not fit"),
        ({"decoder_layers_per_block": 100}, "are too few for its configuration"),
        ({"decoder_block_out_channels": [32, 48]}, "not a multiple of 32 norm groups"),
        ({"scaling_factor": 0}, "scaling_factor must be a positive number"),
        ({"new_option": 3}, "new_option is 3; an option that this version of cmfast does not know"),
        ({"_class_name": "AutoencoderKL"}, "and only ConsistencyDecoderVAE is read"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_refused_by_the_name_of_the_field(
    folder: Path, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ArtifactError) as refused:
        load_model(other, given=Given(image_size=SIZE))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_tensors_of_neither_half_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    file = next(other.glob("*.safetensors"))
    save_file(load_file(file) | {"post_quant_conv.weight": torch.zeros(1)}, file)
    with pytest.raises(
        ArtifactError, match=r"'post_quant_conv.weight' belongs neither to an encoder nor to the decoder"
    ):
        load_model(other, given=Given(image_size=SIZE))
