"""Both definitions of the node are the operator."""

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper

from export.functions import DOMAIN, NAME, with_body
from export.runtimes.onnx import OrtGraph
from kernels import ms_deform_attn

LEVELS = [(3, 5), (6, 10), (7, 4)]
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


def inputs(ref_levels=1, ref_batch=1, dtype=torch.float32):
    """B = 2, Q = 11, A = 4, D = 16, P = 2; many samples are outside."""
    generator = torch.Generator().manual_seed(3)
    cells = sum(h * w for h, w in LEVELS)
    return {
        "value": torch.randn(2, cells, 4, 16, generator=generator).to(dtype),
        "offset": (3 * torch.randn(2, 11, 4, 3, 2, 2, generator=generator)).to(dtype),
        "logit": (2 * torch.randn(2, 11, 4, 3, 2, generator=generator)).to(dtype),
        "ref": torch.rand(ref_batch, 11, ref_levels, 2, generator=generator),
        "shapes": torch.tensor([side for shape in LEVELS for side in shape]),
    }


def session(tmp_path, tensors, body, opset):
    """One node, defined by `body`."""
    kinds = TYPES | {torch.int64: TensorProto.INT64}
    given = [
        helper.make_tensor_value_info(name, kinds[x.dtype], list(x.shape)) for name, x in tensors.items()
    ]
    out = helper.make_tensor_value_info("out", kinds[tensors["value"].dtype], [2, 11, 64])
    node = helper.make_node(NAME, list(tensors), ["out"], domain=DOMAIN)
    graph = helper.make_graph([node], "one", given, [out])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)], ir_version=10
    )
    path = tmp_path / "one.onnx"
    onnx.save(with_body(model, body), path)
    onnx.checker.check_model(path, full_check=True)
    return OrtGraph(path, torch.device("cpu"))


@pytest.mark.parametrize("opset", [18, 22])
@pytest.mark.parametrize("body", ["grid", "gather"])
@pytest.mark.parametrize(("ref_levels", "ref_batch"), [(1, 1), (3, 2)])
def test_a_definition_is_the_operator(tmp_path, body, opset, ref_levels, ref_batch):
    tensors = inputs(ref_levels, ref_batch)
    expected = ms_deform_attn(
        tensors["value"], tensors["offset"], tensors["logit"], LEVELS, tensors["ref"], impl="reference"
    )
    found = session(tmp_path, tensors, body, opset)(tensors)
    torch.testing.assert_close(found["out"], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("body", ["grid", "gather"])
def test_half_precision_values_are_summed_in_float32(tmp_path, body):
    tensors = inputs(dtype=torch.float16)
    expected = ms_deform_attn(
        tensors["value"], tensors["offset"], tensors["logit"], LEVELS, tensors["ref"], impl="reference"
    )
    found = session(tmp_path, tensors, body, 18)(tensors)
    torch.testing.assert_close(found["out"], expected, atol=2e-3, rtol=2e-3)  # an ulp of float16
