"""patch: models that others wrote give the same results over our kernels."""

import copy
import functools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.dispatch import HAS_TRITON, using
from kernels.patch import patch, unpatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(6, 9), (3, 5)]
README = Path(__file__).parents[2] / "kernels/README.md"


class MSDeformAttnFunction:
    """The compiled operator that is missing here."""

    @staticmethod
    def apply(*_):
        raise RuntimeError("not compiled")


def ms_deform_attn_core_pytorch(value, shapes, locations, weights):
    B, _, A, D = value.shape
    out = 0
    for level, part in enumerate(value.split([h * w for h, w in shapes], 1)):
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        maps = part.permute(0, 2, 3, 1).reshape(B * A, D, *shapes[level])
        by_level = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        out = out + (F.grid_sample(maps, grid, align_corners=False) * by_level).sum(-1)
    return out.view(B, A * D, -1).transpose(1, 2)


class MSDeformAttn(nn.Module):
    """A module as the original repositories have it: the compiled operator, or else PyTorch."""

    def __init__(self, dim=32, heads=2, points=2):
        super().__init__()
        levels = len(SHAPES)
        self.sizes = heads, levels, points
        self.value_proj = nn.Linear(dim, dim)
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, query, ref, value, shapes, starts, padding=None):
        B, Q, C = query.shape
        A, L, P = self.sizes
        value = self.value_proj(value)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.view(B, -1, A, C // A)
        offset = self.sampling_offsets(query).view(B, Q, A, L, P, 2)
        weights = self.attention_weights(query).view(B, Q, A, L * P).softmax(-1).view(B, Q, A, L, P)
        sizes = torch.as_tensor(shapes, device=query.device).flip(-1)
        locations = ref[:, :, None, :, None] + offset / sizes[:, None]
        try:
            output = MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 128)
        except RuntimeError:
            output = ms_deform_attn_core_pytorch(value, shapes, locations, weights)
        return self.output_proj(output)


def twice(function):
    """A decorator as some repositories put around forward; its effect must survive."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return wrapper


class Decorated(MSDeformAttn):
    @twice
    def forward(self, _, ref, value, shapes, *_starts):
        A, L, P = self.sizes
        locations = ref[:, :, None, :, None].expand(-1, -1, A, -1, P, -1)
        weights = torch.ones_like(locations[..., 0])
        value = value.unflatten(-1, (A, -1))
        return ms_deform_attn_core_pytorch(value, shapes, locations, weights)


def original(kind=MSDeformAttn):
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind()).to(DEVICE)


def arguments(tensors=False):
    """Query, reference points, values, shapes and starts."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in SHAPES)
    query, ref = torch.randn(2, 7, 32, generator=generator), torch.rand(2, 7, 2, 2, generator=generator)
    value = torch.randn(2, cells, 32, generator=generator)
    shapes, starts = (torch.tensor(SHAPES), torch.tensor([0, 54])) if tensors else (SHAPES, [0, 54])
    return query.to(DEVICE), ref.to(DEVICE), value.to(DEVICE), shapes, starts


def test_modules_of_the_original_style_give_equal_results_and_gradients():
    model, args = original(), arguments(tensors=True)
    parameters = [*model[0].parameters()]
    before = model[0](*args)
    grads = torch.autograd.grad(before.square().sum(), parameters)
    assert patch(model) == (["0", "1"], [])
    after = model[0](*args)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(after.square().sum(), parameters), grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_patched_modules_no_longer_call_what_they_called(monkeypatch):
    model = original()
    patch(model)
    monkeypatch.setitem(globals(), "ms_deform_attn_core_pytorch", None)
    assert model[0](*arguments()).isfinite().all()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_patched_modules_run_on_the_kernels():
    model, args = original(), arguments()
    before = model[0](*args)
    patch(model)
    with using("triton"):
        after = model[0](*args)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_other_models_of_the_same_class_keep_their_code():
    model, other = original(), original()
    patch(model)
    assert "forward" not in other[0].__dict__
    assert MSDeformAttnFunction.apply is MSDeformAttn.forward.__globals__["MSDeformAttnFunction"].apply


def test_decorators_of_forward_are_kept():
    model, args = original(Decorated), arguments()
    before = model[0](*args)
    assert patch(model) == (["0", "1"], [])
    assert model[0].forward.__func__ is not Decorated.forward
    torch.testing.assert_close(model[0](*args), before, atol=1e-5, rtol=1e-5)


def test_patching_again_changes_nothing_and_unpatching_undoes_it():
    model, args = original(), arguments()
    before = model[0](*args)
    assert patch(model) == patch(model) == (["0", "1"], [])
    torch.testing.assert_close(model[0](*args), before, atol=1e-5, rtol=1e-5)
    unpatch(model)
    assert "forward" not in model[0].__dict__
    torch.testing.assert_close(model[0](*args), before, rtol=0, atol=0)


def test_a_copy_of_a_patched_model_uses_its_own_weights():
    model, args = original(), arguments()
    patch(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin[0].output_proj.weight)
    nn.init.zeros_(twin[0].output_proj.bias)
    assert not twin[0](*args).any()
    assert model[0](*args).any()


def test_a_patched_model_compiles_without_graph_breaks():
    model, args = original(), arguments()
    patch(model)
    calls = []

    def backend(graph, _):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    got = torch.compile(model[0], backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(got, model[0](*args))
    assert not any("grid_sample" in name for name in calls)


class MultiScaleDeformableAttnFunction(MSDeformAttnFunction):
    """mmcv's, likewise not compiled."""


def multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights):
    return ms_deform_attn_core_pytorch(value, [tuple(x) for x in spatial_shapes.tolist()], locations, weights)


def deprecated_api_warning(function):
    @functools.wraps(function)
    def new_function(*args, **kwargs):
        return function(*args, **kwargs)

    return new_function


class MultiScaleDeformableAttention(nn.Module):
    """The interface of mmcv 2: queries first, a residual inside, shapes as a tensor."""

    def __init__(self, embed_dims=32, num_heads=2, num_levels=2, num_points=2):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.im2col_step = 64
        self.sampling_offsets = nn.Linear(embed_dims, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dims, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.output_proj = nn.Linear(embed_dims, embed_dims)

    @deprecated_api_warning
    def forward(
        self,
        query,
        key=None,  # noqa: ARG002
        value=None,
        identity=None,
        reference_points=None,
        spatial_shapes=None,
        level_start_index=None,
    ):
        value = query if value is None else value
        identity = query if identity is None else identity
        query, value = query.permute(1, 0, 2), value.permute(1, 0, 2)
        B, Q, _ = query.shape
        assert (spatial_shapes[:, 0] * spatial_shapes[:, 1]).sum() == value.shape[1]
        value = self.value_proj(value).view(B, value.shape[1], self.num_heads, -1)
        sizes = (B, Q, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*sizes, 2)
        weights = self.attention_weights(query).view(*sizes[:3], -1).softmax(-1).view(sizes)
        normalizer = torch.stack([spatial_shapes[..., 1], spatial_shapes[..., 0]], -1)
        locations = (
            reference_points[:, :, None, :, None, :] + offsets / normalizer[None, None, None, :, None, :]
        )
        if value.is_cuda:
            output = MultiScaleDeformableAttnFunction.apply(
                value, spatial_shapes, level_start_index, locations, weights, self.im2col_step
            )
        else:
            output = multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)
        return self.output_proj(output).permute(1, 0, 2) + identity


@pytest.mark.parametrize("compiled", [False, True])
def test_the_module_of_mmcv_gives_equal_results(compiled):
    torch.manual_seed(0)
    model = nn.ModuleList(MultiScaleDeformableAttention() for _ in range(2)).to(DEVICE)
    query, ref, value, shapes, starts = arguments(tensors=True)

    def run(layers):
        x = query.transpose(0, 1)
        for layer in layers:
            x = layer(
                x, value=value.transpose(0, 1), reference_points=ref, spatial_shapes=shapes.to(DEVICE),
                level_start_index=starts.to(DEVICE),
            )  # fmt: skip
        return x

    before = run(model) if DEVICE == "cpu" else None  # on a GPU it would call what is not compiled
    assert patch(model).replaced == ["0", "1"]
    torch.compiler.reset()
    after = run([torch.compile(layer, backend="eager") for layer in model] if compiled else model)
    if before is not None:
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


class Stack(nn.Sequential):
    def forward(self, query, *args):
        for layer in self:
            query = layer(query, *args)
        return query


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
@pytest.mark.parametrize("patched_before", [False, True])
def test_layers_of_one_class_compile(whole, patched_before):
    args = arguments()
    torch.compiler.reset()
    if patched_before:  # another model of the class, compiled first
        other = original()
        patch(other)
        torch.compile(other[0], backend="eager")(*args)
    model = Stack(*original())
    expected = model(*args)
    assert patch(model).replaced == ["0", "1"]
    if whole:
        got = torch.compile(model, backend="eager", fullgraph=True)(*args)
    else:
        got = Stack(*(torch.compile(layer, backend="eager", fullgraph=True) for layer in model))(*args)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_deformable_attention_is_refused():
    with pytest.raises(ValueError, match="Sequential has no deformable attention"):
        patch(nn.Sequential(nn.Linear(2, 2)))


class DeformableAttention(nn.Module):
    """Of a kind that is not known."""


class Unnamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.sampling_offsets = nn.Linear(2, 2)


@pytest.mark.parametrize("unknown", [DeformableAttention, Unnamed])
def test_a_model_that_is_known_in_part_is_refused_unless_told(unknown):
    model = nn.ModuleDict({"known": original(), "other": unknown()})
    with pytest.raises(ValueError, match=r"attention that is not known here: other .*partly=True"):
        patch(model)
    assert "forward" not in model["known"][0].__dict__
    assert patch(model, partly=True) == (["known.0", "known.1"], ["other"])


def hugging_face(name):
    """A tiny model with random weights, larger than those it would start from."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "num_labels": 3}
    last = ["stage2", "stage3", "stage4"]
    if name == "DeformableDetr":
        config = hf.DeformableDetrConfig(
            **own,
            backbone_config=hf.ResNetConfig(**resnet, out_features=last),
            num_feature_levels=4,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=10,
        )
        model = hf.DeformableDetrForObjectDetection(config)
    elif name == "RTDetr":
        config = hf.RTDetrConfig(
            **own,
            backbone_config=hf.RTDetrResNetConfig(**resnet, out_features=last, layer_type="basic"),
            encoder_in_channels=[8, 16, 16],
            encoder_hidden_dim=32,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            d_model=32,
            decoder_in_channels=[32, 32, 32],
            decoder_ffn_dim=32,
            decoder_attention_heads=2,
            decoder_layers=2,
            num_queries=10,
            num_denoising=0,
        )
        model = hf.RTDetrForObjectDetection(config)
    elif name in ("RTDetrV2", "DFine"):
        sizes = {"encoder_in_channels": [8, 16, 16], "feat_strides": [8, 16, 32]}
        points = {"decoder_n_points": [3, 6, 3] if name == "DFine" else 4}
        config = getattr(hf, f"{name}Config")(
            **own,
            **sizes,
            **points,
            backbone_config=hf.RTDetrResNetConfig(**resnet, out_features=last, layer_type="basic"),
            encoder_hidden_dim=32,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            d_model=32,
            decoder_in_channels=[32, 32, 32],
            decoder_ffn_dim=32,
            decoder_attention_heads=2,
            decoder_layers=2,
            num_queries=10,
            num_denoising=0,
        )
        model = getattr(hf, f"{name}ForObjectDetection")(config)
    elif name == "GroundingDino":
        config = hf.GroundingDinoConfig(
            **{key: value for key, value in own.items() if key != "num_labels"},
            backbone_config=hf.ResNetConfig(**resnet, out_features=last),
            text_config=hf.BertConfig(
                vocab_size=20,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
            ),
            num_feature_levels=4,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=10,
        )
        model = hf.GroundingDinoForObjectDetection(config)
    elif name == "OneFormer":
        config = hf.OneFormerConfig(
            **own,
            backbone_config=hf.ResNetConfig(**resnet, out_features=["stage1", *last]),
            conv_dim=32,
            mask_dim=32,
            hidden_dim=32,
            encoder_layers=2,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=32,
            encoder_feedforward_dim=32,
            num_queries=5,
            text_encoder_width=32,
            text_encoder_num_layers=1,
            text_encoder_vocab_size=20,
            text_encoder_context_length=8,
            task_seq_len=8,
            is_training=False,
        )
        model = hf.OneFormerForUniversalSegmentation(config)
    else:
        config = hf.Mask2FormerConfig(
            **own,
            backbone_config=hf.ResNetConfig(**resnet, out_features=["stage1", *last]),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_layers=2,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=32,
            encoder_feedforward_dim=32,
            num_queries=5,
        )
        model = hf.Mask2FormerForUniversalSegmentation(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()))
    return model.eval().to(DEVICE)


OUTPUTS = {
    "DeformableDetr": ("logits", "pred_boxes"),
    "RTDetr": ("logits", "pred_boxes"),
    "Mask2Former": ("masks_queries_logits", "class_queries_logits"),
    "OneFormer": ("masks_queries_logits", "class_queries_logits"),
    "RTDetrV2": ("logits", "pred_boxes"),
    "DFine": ("logits", "pred_boxes"),
    "GroundingDino": ("logits", "pred_boxes"),
}


def arguments_of(name):
    found = {"pixel_values": pixels()}
    if name == "GroundingDino":
        found["input_ids"] = torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3]]).to(DEVICE)
    if name == "OneFormer":
        found["task_inputs"] = torch.tensor([[1, 5, 6, 2, 0, 0, 0, 0]] * 2).to(DEVICE)
    return found


def pixels():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)


MODULES = {
    "DeformableDetr": 4,
    "RTDetr": 2,
    "RTDetrV2": 2,
    "DFine": 2,
    "Mask2Former": 2,
    "OneFormer": 2,
    "GroundingDino": 4,
}


@pytest.mark.parametrize(("name", "modules"), MODULES.items())
def test_models_of_transformers_give_equal_outputs_and_gradients(name, modules):
    model = hugging_face(name)

    def run():
        output = model(**arguments_of(name))
        tensors = [output[key] for key in OUTPUTS[name]]
        tensors = [x.nan_to_num(neginf=0) for x in tensors]  # logits of words that are not there
        model.zero_grad()
        sum(x.square().mean() for x in tensors).backward()
        grads = {
            key: parameter.grad.clone()
            for key, parameter in model.named_parameters()
            if ("sampling_offsets" in key or "value_proj" in key) and parameter.grad is not None
        }
        return tensors, grads

    tensors, grads = run()
    found = patch(model)
    assert (len(found.replaced), found.unknown) == (modules, [])
    patched, patched_grads = run()
    for got, expected in zip(patched, tensors, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert grads
    assert grads.keys() == patched_grads.keys()
    for key, expected in grads.items():
        assert expected.any(), key
        torch.testing.assert_close(patched_grads[key], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", MODULES)
def test_patched_models_of_transformers_compile(name):
    model = hugging_face(name)
    with torch.no_grad():
        before = model(**arguments_of(name))
        patch(model)
        torch.compiler.reset()
        for module in model.modules():  # a layer at a time: backbones take minutes and are not ours
            if "_replaced_attributes" in module.__dict__:
                module.compile(backend="eager")
        after = model(**arguments_of(name))
    for key in OUTPUTS[name]:
        torch.testing.assert_close(after[key], before[key], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_attention_of_a_patched_deformable_detr_compiles_without_graph_breaks():
    model = hugging_face("DeformableDetr")
    patch(model)
    attention = model.model.encoder.layers[0].self_attn
    shapes = [(6, 9), (3, 5), (2, 3), (1, 2)]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 77, 32, generator=generator).to(DEVICE)
    fixed = {
        "reference_points": torch.rand(2, 77, 4, 2, generator=generator).to(DEVICE),
        "spatial_shapes": torch.tensor(shapes).to(DEVICE),
        "spatial_shapes_list": shapes,
        "level_start_index": torch.tensor([0, 54, 69, 75]).to(DEVICE),
    }

    def run(x):
        return attention(x, encoder_hidden_states=x, **fixed)[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), run(hidden), atol=1e-5, rtol=1e-5)


def test_the_example_in_the_readme_runs(capsys):
    pytest.importorskip("transformers")
    text = README.read_text() if README.exists() else ""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "DeformableDetr" in block]
    if not blocks:
        pytest.skip("kernels/README.md has no example with DeformableDetr")
    exec(compile(blocks[0], str(README), "exec"), {"__name__": "example"})
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5
