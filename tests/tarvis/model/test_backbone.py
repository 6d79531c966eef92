"""Backbones: shapes, the maths they promise, and that they trace with sizes that vary."""

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

from tarvis.config import ConfigError
from tarvis.model import build_model
from tarvis.model.backbone import BACKBONES, build_backbone
from tarvis.model.convnext import ConvNeXt
from tarvis.model.layers import Backbone, DropPath, drop_path_rates
from tarvis.model.resnet import ConvNorm, ResNet
from tarvis.model.swin import MASKED, PatchMerging, Swin, WindowAttention, shift_mask
from tarvis.model.weights import load_backbone, load_weights, save_weights
from tarvis.training.config import load_config

SMALL = {
    "resnet": lambda: ResNet((1, 1, 1, 1)),
    "swin": lambda: Swin(16, (2, 1, 1, 1), (1, 2, 2, 2), window=7),
    "convnext": lambda: ConvNeXt((8, 16, 24, 32), (1, 1, 1, 1), layer_scale=0.5),
}
SWIN_IS_SLOW = ["resnet", "convnext", pytest.param("swin", marks=pytest.mark.slow)]


def small(family):
    torch.manual_seed(0)
    model = SMALL[family]().eval().requires_grad_(False)
    if family == "resnet":  # norms that do something
        for module in model.modules():
            if isinstance(module, ConvNorm):
                module.norm.running_mean.normal_(std=0.1)
                module.norm.running_var.uniform_(0.5, 1.5)
                module.norm.weight.uniform_(0.2, 0.5)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_four_maps_at_strides_4_to_32(name):
    with torch.device("meta"):
        model = build_backbone(name)
        maps = model(torch.empty(2, 3, 64, 128))
    expected = [
        (2, width, 64 // s, 128 // s) for width, s in zip(model.channels, (4, 8, 16, 32), strict=True)
    ]
    assert [tuple(x.shape) for x in maps] == expected


def test_an_unknown_backbone_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"expected one of resnet50, .*convnext_xlarge.*, got 'vgg'"):
        build_backbone("vgg")


class Toy(Backbone):
    """A backbone from outside."""

    channels = (8, 8, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, kernel_size=4, stride=4)

    def forward(self, x):
        return tuple(F.avg_pool2d(self.stem(x), k) for k in (1, 2, 4, 8))

    @staticmethod
    def our_name(key):
        return key.removeprefix("theirs.")


def test_a_backbone_from_outside_is_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", Toy)
    small = ["model.hidden_dim=64", "model.neck_layers=1", "model.decoder_layers=3", "model.neck_ffn_dim=64"]
    config = load_config(None, ["model.backbone=toy", *small]).model
    network = build_model(config).eval()
    features = network.encode(torch.zeros(1, 2, 3, 60, 64, dtype=torch.uint8))
    assert features.mask_features.shape == (1, 2, 64, 16, 16)
    save_weights(tmp_path / "w.pth", network.state_dict(), config)
    assert load_weights(tmp_path / "w.pth")[1].backbone == "toy"
    state = Toy().state_dict()
    torch.save({f"theirs.{name}": value for name, value in state.items()}, tmp_path / "toy.pth")
    assert torch.equal(load_backbone("toy", tmp_path / "toy.pth")["stem.bias"], state["stem.bias"])


def test_frozen_norm_is_that_of_torch_and_its_gradient_reaches_the_convolution():
    torch.manual_seed(0)
    layer, x = ConvNorm(4, 6, kernel_size=3, stride=2), torch.randn(2, 4, 9, 8)
    norm = layer.norm
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2.0)
    weight = layer.weight.detach().clone().requires_grad_()
    expected = F.batch_norm(
        F.conv2d(x, weight, stride=2, padding=1), norm.running_mean, norm.running_var, norm.weight, norm.bias
    )
    expected.square().sum().backward()
    layer.train()(x).square().sum().backward()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in layer.named_parameters()} == {"weight"}


@pytest.mark.parametrize(("height", "width"), [(14, 21), (9, 16), (3, 5)])
@pytest.mark.parametrize("shift", [0, 3])
def test_window_attention_equals_attention_over_all_pairs_of_tokens(height, width, shift):
    """Also on maps smaller than the window, where zero padding takes part and the shift stays."""
    torch.manual_seed(0)
    N, C, A, w = 2, 8, 2, 7
    layer = WindowAttention(C, A, w, shift)
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(N, height, width, C)
    got = layer(x, shift_mask(height, width, w, x))

    H, W = -(-height // w) * w, -(-width // w) * w
    q, k, v = layer.qkv(F.pad(x, (0, 0, 0, W - width, 0, H - height))).view(N, H * W, 3, A, C // A).unbind(2)
    row, column = torch.arange(H * W) // W, torch.arange(H * W) % W
    # where a token lies once the map is rolled; what is rolled over the edge is another region
    rolled_row, rolled_column = (row - shift) % H, (column - shift) % W
    window = rolled_row // w * W + rolled_column // w
    region = (row < shift).long() + 2 * (column < shift)
    same = (window[:, None] == window) & (region[:, None] == region)
    other = (window[:, None] == window) & ~(region[:, None] == region)
    dy, dx = rolled_row[:, None] - rolled_row, rolled_column[:, None] - rolled_column
    index = ((dy + w - 1) * (2 * w - 1) + dx + w - 1).clamp(0, (2 * w - 1) ** 2 - 1)
    bias = layer.relative_position_bias_table[index]  # [H*W, H*W, A]
    logits = torch.einsum("nqac,nkac->nqka", q, k) * (C // A) ** -0.5 + bias
    logits = torch.where(same[..., None], logits, torch.where(other[..., None], logits + MASKED, -torch.inf))
    y = torch.einsum("nqka,nkac->nqac", logits.softmax(2), v).reshape(N, H, W, C)
    torch.testing.assert_close(got, layer.proj(y[:, :height, :width]), rtol=1e-4, atol=1e-5)


def test_patch_merging_joins_rows_before_columns():
    merge = PatchMerging(1)
    merge.norm = torch.nn.Identity()
    torch.nn.init.eye_(merge.reduction.weight)  # passes the first two of the four joined
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert merge(x)[0, 0, 0].tolist() == [0.0, 4.0]
    torch.nn.init.zeros_(merge.reduction.weight)
    merge.reduction.weight.data[0, 2] = merge.reduction.weight.data[1, 3] = 1.0
    assert merge(x)[0, 1, 0].tolist() == [9.0, 13.0]


def test_drop_path_rises_linearly_and_keeps_the_mean_of_whole_frames():
    assert drop_path_rates(0.3, (1, 2, 1)) == [[0.0], pytest.approx([0.1, 0.2]), pytest.approx([0.3])]
    torch.manual_seed(0)
    drop, x = DropPath(0.3), torch.ones(4000, 2, 2)
    y = drop(x)
    assert sorted(set(y.flatten(1).mean(1).tolist())) == pytest.approx([0.0, 1 / 0.7])
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("family", SMALL)
def test_frames_do_not_see_one_another(family):
    model, x = small(family), torch.randn(3, 3, 64, 64)
    for together, alone in zip(model(x), model(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SMALL)
def test_gradients_reach_every_parameter_in_training(family):
    model = SMALL[family]().train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    sum(x.square().mean() for x in model(torch.randn(1, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", SMALL)
def test_bfloat16_autocast_stays_near_float32(family):
    model, x = small(family), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    for a, b in zip(low, model(x), strict=True):
        assert (a.float() - b).abs().mean() < 0.05 * b.abs().mean() + 1e-3


@pytest.mark.parametrize("family", SWIN_IS_SLOW)
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_without_graph_breaks(family, dynamic):
    torch._dynamo.reset()
    model, x = small(family), torch.randn(2, 3, 128, 192)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
    for got, expected in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("family", SMALL)
def test_exports_with_static_size(family):
    model, x = small(family), torch.randn(2, 3, 64, 128)
    exported = torch.export.export(model, (x,)).module()
    for got, expected in zip(exported(x), model(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("family", SWIN_IS_SLOW)
def test_one_export_serves_every_multiple_of_64(family):
    """Also where a map is one window, or exactly whole windows (448), unlike the map it was traced with."""
    model = small(family)
    sizes = {0: Dim("n", max=64), 2: 64 * Dim("h", max=32), 3: 64 * Dim("w", max=32)}
    # for Swin: else the tracer takes the number of windows of its example, if one, for a fixed property
    with torch.fx.experimental._config.patch(backed_size_oblivious=family == "swin"):
        exported = torch.export.export(
            model, (torch.randn(2, 3, 128, 192),), dynamic_shapes=(sizes,)
        ).module()
    for size in ((1, 3, 64, 64), (1, 3, 64, 448), (3, 3, 256, 64)):
        x = torch.randn(size)
        for got, expected in zip(exported(x), model(x), strict=True):
            torch.testing.assert_close(got, expected)
