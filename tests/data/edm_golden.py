# SPDX-License-Identifier: MIT
"""How edm_golden.npz was made: python tests/data/edm_golden.py CHECKOUT_OF_NVLABS_EDM CHECKOUT_OF_LOCUSLAB_ECT

Their code runs, with the weights and inputs of tests/helpers/edm.py; none of it is in this repository.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from helpers.foreign.edm import CASES, golden_inputs, golden_weights


def networks_of(checkout: str) -> Any:
    for name in [name for name in sys.modules if name.split(".")[0] in ("training", "torch_utils", "dnnlib")]:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    module = importlib.import_module("training.networks")
    sys.path.remove(checkout)
    return module


def arguments(config: SongConfig | DhariwalConfig) -> dict[str, Any]:
    """Return a configuration in EDM's words."""
    common = {
        "label_dim": config.classes, "augment_dim": config.augment, "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult), "channel_mult_emb": config.emb_mult,
        "num_blocks": config.res_blocks, "attn_resolutions": list(config.attention),
    }  # fmt: skip
    if isinstance(config, DhariwalConfig):
        return common
    return common | {
        "embedding_type": config.embedding, "channel_mult_noise": config.noise_mult, "encoder_type": config.encoder,
        "decoder_type": config.decoder, "resample_filter": list(config.resample),
    }  # fmt: skip


@torch.no_grad()
def main(edm: str, ect: str) -> None:
    theirs, golden = networks_of(edm), {}
    for name, config in CASES.items():
        kind = theirs.SongUNet if isinstance(config, SongConfig) else theirs.DhariwalUNet
        network = kind(config.image_size, config.channels, config.channels, **arguments(config)).eval()
        network.load_state_dict(golden_weights(network.state_dict()))
        x, sigma, label = golden_inputs(config)
        one_hot = torch.eye(config.classes)[label] if config.classes else None
        golden[name] = network(x, sigma.log() / 4, one_hot).numpy()
    for checkout, kind, name in ((edm, "EDMPrecond", "ddpmpp-cond"), (ect, "ECMPrecond", "ncsnpp")):
        config = CASES[name]
        model = getattr(networks_of(checkout), kind)(
            config.image_size, config.channels, model_type="SongUNet", **arguments(config)
        ).eval()
        model.model.load_state_dict(golden_weights(model.model.state_dict()))
        x, sigma, label = golden_inputs(config)
        one_hot = torch.eye(config.classes)[label] if config.classes else None
        golden[kind] = model(x * sigma[:, None, None, None], sigma, one_hot).numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **golden)


if __name__ == "__main__":
    main(*sys.argv[1:])
