"""Every operator refuses arguments of other dtypes, ranks, sizes, devices and layouts than its contract's."""

import pytest
import torch

import kernels
from kernels.dispatch import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rand(*size):
    return torch.rand(size, device=DEVICE)


# each argument with the dimensions whose size is its own, and does not follow from the others
CALLS = {
    "label_upsample": ({"logits": rand(3, 2, 4, 6)}, {"network": (16, 24), "size": (20, 30)}),
    "mask_upsample": ({"logits": rand(3, 2, 4, 6)}, {"network": (16, 24), "size": (20, 30)}),
    "mask_bits": ({"query": rand(2, 5, 16), "features": rand(2, 16, 40)}, {}),
    "mask_cost": ({"embedding": rand(5, 16), "features": rand(11, 16), "targets": rand(3, 11)}, {}),
    "mask_logits": ({"query": rand(2, 5, 16), "features": rand(2, 3, 16, 4, 6)}, {}),
    "masked_attention": (
        {
            "q": rand(2, 2, 5, 16),
            "k": rand(2, 2, 40, 16),
            "v": rand(2, 2, 40, 16),
            "bits": torch.ones(2, 5, 8, dtype=torch.uint8, device=DEVICE),
            "seen": torch.ones(2, 5, dtype=torch.bool, device=DEVICE),
        },
        {},
    ),
    "ms_deform_attn": (
        {
            "value": rand(2, 10, 2, 16),
            "offset": rand(2, 7, 2, 2, 3, 2),
            "logit": rand(2, 7, 2, 2, 3),
            "ref": rand(2, 7, 2, 2),
        },
        {"shapes": [(2, 3), (2, 2)]},
    ),
    "ms_deform_attn_classic": (
        {
            "value": rand(2, 10, 2, 16),
            "spatial_shapes": torch.tensor([(2, 3), (2, 2)]),
            "level_start_index": torch.tensor([0, 6]),
            "sampling_locations": rand(2, 7, 2, 2, 3, 2),
            "attention_weights": rand(2, 7, 2, 2, 3),
        },
        {},
    ),
    "nearest_sample": ({"maps": rand(2, 4, 6), "points": rand(2, 7, 2)}, {}),
    "point_sample": ({"maps": rand(2, 3, 4, 6), "points": rand(2, 7, 2)}, {}),
}
# sizes that are free: nothing else has to agree with them
FREE = {
    ("label_upsample", "logits"): {0, 1, 2, 3},
    ("mask_upsample", "logits"): {0, 1, 2, 3},
    ("mask_bits", "query"): {1},
    ("mask_bits", "features"): {2},
    ("mask_cost", "embedding"): {0},
    ("mask_cost", "targets"): {0},
    ("mask_logits", "query"): {1},
    ("mask_logits", "features"): {1, 3, 4},
    ("ms_deform_attn", "value"): {3},
    ("ms_deform_attn_classic", "value"): {3},
    ("nearest_sample", "maps"): {1, 2},
    ("nearest_sample", "points"): {1},
    ("point_sample", "maps"): {1, 2, 3},
    ("point_sample", "points"): {1},
}
ARGUMENTS = [(name, argument) for name, (tensors, _) in CALLS.items() for argument in tensors]
every_argument = pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
every_way = pytest.mark.parametrize("impl", ["auto", *(["triton"] if HAS_TRITON else [])])


def call(name, impl="auto", **changed):
    tensors, others = CALLS[name]
    if name not in ("mask_logits", "nearest_sample"):
        others = {**others, "impl": impl}
    return getattr(kernels, name)(**tensors | changed, **others)


def test_the_table_has_every_operator():
    assert set(CALLS) == {*kernels.__all__} - {"explain"}
    for name in CALLS:
        call(name)


@every_argument
@every_way
def test_dtypes(name, argument, impl):
    x = CALLS[name][0][argument]
    for dtype in (torch.int16, torch.complex64, torch.float8_e4m3fn):
        if (name, argument) != ("nearest_sample", "maps"):  # any dtype
            with pytest.raises(ValueError, match="expected"):
                call(name, impl, **{argument: x.to(dtype)})


@every_argument
@every_way
def test_what_is_no_dense_tensor(name, argument, impl):
    x = CALLS[name][0][argument]
    may_be_numbers = argument in ("spatial_shapes", "level_start_index")
    for bad in (x.to_sparse(), *([] if may_be_numbers else [x.tolist(), x.cpu().numpy()])):
        with pytest.raises(ValueError, match="expected"):
            call(name, impl, **{argument: bad})


@every_argument
@every_way
def test_ranks(name, argument, impl):
    x = CALLS[name][0][argument]
    if (name, argument) != ("mask_cost", "embedding"):  # any number of leading dimensions
        with pytest.raises(ValueError, match="expected"):
            call(name, impl, **{argument: x[None, None]})
    with pytest.raises(ValueError, match="expected"):
        call(name, impl, **{argument: x.flatten()[0]})


@every_argument
@every_way
def test_sizes(name, argument, impl):
    x = CALLS[name][0][argument]
    for dim in set(range(x.ndim)) - FREE.get((name, argument), set()):
        with pytest.raises(ValueError, match=r"expected|levels|cells|sizes"):
            call(name, impl, **{argument: torch.cat([x, x, x], dim)})


@every_argument
@every_way
def test_devices(name, argument, impl):
    x = CALLS[name][0][argument]
    if len(CALLS[name][0]) > 1 and argument not in ("spatial_shapes", "level_start_index"):
        with pytest.raises(ValueError, match="tensors on"):
            call(name, impl, **{argument: x.to("meta")})
