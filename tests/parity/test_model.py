"""Replays what the original model computed: every case of the folder given by `--goldens`.

A case is a JSON file with the recipe of its inputs and weights, and the original's tensors beside it. Numbers
are read out of the recipes, so that another folder of the same format replays as well.

Masked attention makes the network discontinuous: a key is visible where a logit is positive, and one bit
that rounding flips changes every later layer, in the original too. So every decoder layer gets the recorded
bits, and the bits that it would have used itself may differ only where their logit is near 0. Likewise the
object encoder gets the recorded masks, and clips after the first one start from the recorded logits of the
clip before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import dispatch, ms_deform_attn_classic

KINDS = {  # by the field "function" of a case
    "positions": "positional embeddings",
    "sampling": "sampling core",
    "neck": "temporal neck",
    "decoder": "transformer decoder",
    "object_encoder": "object encoder",
    "clip": "forward",
}
FEATURE, LOGIT, BACKBONE = 1e-4, 5e-4, 5e-5  # largest absolute differences
LOGIT_SOFT = 2e-3  # soft attention follows masks by a factor of up to 32, and rounding errors with them
MOST_FLIPS = 8  # pixels of the masks that recorded logits become
LOST = -1000.0  # logit of frames before an object was given


class Case:
    """One recorded run: its facts (JSON) and arrays (npz)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = json.loads(path.read_text())
        self.inputs: dict[str, Any] = self.facts["inputs"]
        self.arrays = np.load(path.with_suffix(".npz"))

    def bits(self, key: str) -> Tensor:
        """A stored array of booleans."""
        shape = self.facts["arrays"][key]["full_shape"]
        flat = np.unpackbits(self.arrays[key], count=int(np.prod(shape)))
        return torch.from_numpy(flat.astype(bool)).view(shape)

    def visible(self) -> list[Tensor]:
        """The keys each layer's queries saw, [B, Q, T, h, w] a layer; empty for soft attention."""
        keys = [f"attn_visible_{i}" for i in range(len(self.facts["arrays"]))]
        return [self.bits(key) for key in keys if key in self.arrays]

    @property
    def weight_seed(self) -> int:
        return int(found(r"seed\s*=?\s*(\d+)", self.inputs["weights"])[0])

    def check(self, got: dict[str, Tensor], tolerance: Callable[[str], float]) -> None:
        """Every stored array must be near the one of the same name in `got`."""
        for key, about in self.facts["arrays"].items():
            if about["stored_dtype"] == "packed bits" or key == "points":
                continue
            assert key in got, f"{self.path.stem}: nothing to compare {key} with"
            value = got[key]
            assert list(value.shape) == about["full_shape"], f"{key}: {list(value.shape)}"
            steps = about.get("step_per_axis", [1] * value.ndim)
            value = value[tuple(slice(None, None, step) for step in steps)]
            expected = torch.from_numpy(self.arrays[key]).to(value.dtype)
            marked = expected == LOST
            assert torch.equal(value == LOST, marked), f"{key}: other frames are marked as before the object"
            error = (value - expected).abs().max().item()
            assert error <= tolerance(key), f"{key}: differs by {error:.2e}, more than {tolerance(key):.0e}"


class Group(NamedTuple):
    """Cases that must run in order: the clips of one video, mostly one."""

    name: str
    paths: list[Path]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.function.__name__
    kind = name.removeprefix("test_").removesuffix("_as_recorded").removesuffix("_by_kernels")
    if kind in KINDS:
        groups = read_folder(metafunc.config.getoption("goldens"))[kind]
        metafunc.parametrize("cases", groups, ids=[group.name for group in groups])


def read_folder(folder: Path) -> dict[str, list[Group]]:
    """The folder's cases by kind, clips of one video together."""
    groups: dict[str, dict[str, list[Path]]] = {kind: {} for kind in KINDS}
    for path in sorted(
        folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem)
    ):  # clip 10 after 9
        if not path.with_suffix(".npz").exists():
            continue
        function = json.loads(path.read_text())["function"]
        kind = next((kind for kind, words in KINDS.items() if words in function), None)
        if kind is None:
            raise pytest.UsageError(f"{path}: no way to replay {function!r}")
        groups[kind].setdefault(re.sub(r"_clip\d+$", "", path.stem), []).append(path)
    if not any(groups.values()):
        raise pytest.UsageError(f"--goldens {folder}: no case there (NAME.json with NAME.npz)")
    return {kind: [Group(*item) for item in named.items()] for kind, named in groups.items()}


def found(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a pattern that a recipe must contain."""
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in the recipe {text!r}"
    return match.groups()


@pytest.fixture
def case(cases: Group) -> Case:
    return Case(cases.paths[0])


def test_positions_as_recorded(case: Case, subject: Any) -> None:
    B, T, H, W = case.inputs["B,T,H,W"]
    got = subject.positions(T, H, W)
    # windows hold the same tokens; their order inside a window has no meaning
    table = torch.from_numpy(case.arrays["patch_table"]).long()
    assert torch.equal(got.pop("patch_table").sort(1).values, table.sort(1).values)
    case.facts["arrays"].pop("patch_table")
    case.check(got, lambda _: 1e-5)


def test_sampling_as_recorded(case: Case, subject: Any, recipes: SimpleNamespace) -> None:
    case.check(sampled(case, recipes, subject.sample), lambda _: 1e-10)


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.slow), "cuda"])
def test_sampling_by_kernels_as_recorded(
    case: Case, recipes: SimpleNamespace, impl: Any, deterministic: bool
) -> None:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"  # where Triton is interpreted
    missing = dispatch.why_not(impl, device)
    if missing:
        pytest.skip(missing)

    def sample(impl: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        def run(value: Tensor, shapes: Any, *where: Tensor) -> Tensor:
            value, locations, weights = (x.to(device, dtype) for x in (value, *where))
            return ms_deform_attn_classic(value, shapes, None, locations, weights, impl=impl).cpu().double()

        return sampled(case, recipes, run)

    exact, plain = sample("reference", torch.float64), sample("reference", torch.float32)

    def twice_as_far_as_plain(key: str) -> float:
        floor = 4 * torch.finfo(torch.float32).eps * exact[key].abs().max().item()
        return 2 * (plain[key] - exact[key]).abs().max().item() + floor

    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    case.check(sample(impl, torch.float32), twice_as_far_as_plain)


def sampled(case: Case, recipes: SimpleNamespace, sample: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Output and gradients of deformable attention for the inputs of a case."""
    inputs = case.inputs
    names = ("shapes", "batch", "queries", "heads", "head_dim", "n_points", "seed", "spread")
    arrays = recipes.make_inputs.deform_attn_inputs(*(inputs[name] for name in names))
    value, locations, weights, grad_output = (torch.from_numpy(a) for a in arrays)
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    output = sample(value, [tuple(shape) for shape in inputs["shapes"]], locations, weights)
    output.backward(grad_output)
    return {
        "output": output.detach(),
        "grad_value": value.grad,
        "grad_locations": locations.grad,
        "grad_weights": weights.grad,
    }


@torch.no_grad()
def test_neck_as_recorded(
    case: Case, subject: Any, recipes: SimpleNamespace, manifests: dict[str, Any]
) -> None:
    B, T, H, W = case.inputs["B,T,H,W"]
    maps = [
        feature(recipes, f"res{i + 2}", (B, T, channels, H // stride, W // stride), case.inputs["seed"])
        for i, (channels, stride) in enumerate(
            zip(case.inputs["channels"], case.inputs["strides"], strict=True)
        )
    ]
    variant = backbone_with(case.inputs["channels"], manifests)
    case.check(subject.neck(variant, case.weight_seed, maps), lambda _: FEATURE)


@torch.no_grad()
def test_decoder_as_recorded(case: Case, subject: Any, recipes: SimpleNamespace) -> None:
    B, T, h, w = case.inputs["B,T,H/4,W/4"]
    seed, noise = case.inputs["seed"], recipes.fill_weights.unit_noise
    scale, spread = map(float, found(r"scale ([\d.]+) for s=4.*\+= ([\d.]+) \*", case.inputs["fmaps"]))
    maps = [
        feature(recipes, f"fmap{s}", (B, 256, T, 4 * h // s, 4 * w // s), seed, scale if s == 4 else 1.0)
        for s in (32, 16, 8, 4)
    ]
    offset = np.float32(spread) * noise(f"{seed}|fmap4_offset", (256,))
    maps[3] += torch.from_numpy(offset)[:, None, None, None]
    groups = {name: case.inputs["groups"][name] for name in case.inputs["group_order"]}
    shape = (B, sum(groups.values()), 256)
    queries = torch.from_numpy(noise(f"{seed}|dec_queries", shape))
    embeds = torch.from_numpy(noise(f"{seed}|dec_embeds", shape))
    kind = found(r"'(\w+)_masked'", case.facts["function"])[0]

    got, flips = subject.decoder(case.weight_seed, kind, maps, queries, embeds, groups, case.visible())
    check_flips(flips)
    tolerance = LOGIT_SOFT if kind == "soft" else LOGIT
    case.check(got, lambda _: tolerance)


@torch.no_grad()
def test_object_encoder_as_recorded(case: Case, subject: Any, recipes: SimpleNamespace) -> None:
    C, T, h, w = case.inputs["C,T,h,w"]
    seed = case.inputs["seed"]
    scale = float(found(r"seed, ([\d.]+)\)", case.inputs["fmap4"])[0])
    mask_features = feature(recipes, "fmap4", (C, T, h, w), seed, scale)
    H, W = case.inputs["image (padded)"]
    masks = (
        case.bits("masks_bits") if "masks_bits" in case.arrays else torch.zeros(0, T, H, W, dtype=torch.bool)
    )
    yx = torch.from_numpy(case.arrays["points"]) if "points" in case.arrays else torch.zeros(0, 2)
    if len(yx):
        assert np.array_equal(yx, recipes.make_inputs.points(len(yx), seed))
    right, bottom = case.inputs["pad_right, pad_bottom"]
    yx = yx * torch.tensor([(H - bottom) / H, (W - right) / W])
    point_maps = [feature(recipes, f"pfmap{s}", (len(yx), C, H // s, W // s), seed) for s in (32, 16, 8, 4)]
    objects, background = subject.object_encoder(case.weight_seed, mask_features, masks, point_maps, yx)
    counts = [subject.queries_per_object] * len(masks) + [1] * len(yx)
    assert case.facts["object_query_counts"] == counts
    case.check({"object_queries": objects, "bg_queries": background}, lambda _: FEATURE)


@torch.no_grad()
def test_clip_as_recorded(
    cases: Group, subject: Any, recipes: SimpleNamespace, published_weights: Any
) -> None:
    state = earlier = None
    for number, path in enumerate(cases.paths, 1):
        case = Case(path)
        assert case.inputs["clip"] == number, f"{cases.name}: clip {number} of the video is not there"
        variant = found(r"state_dict/(\w+)\.json", case.inputs["weights"])[0]
        weights = published_weights(variant, case.weight_seed)
        assert recipes.fill_weights.digest(weights) == case.facts["weights_sha256"]
        frames, numbers = clip_frames(case, recipes)
        features, got = subject.encode(variant, case.weight_seed, frames)
        if case.facts["task"] == "vos":
            state = replay_objects(case, subject, features, got, numbers, frames, state, earlier)
        else:
            replay_detection(case, subject, features, got)
        earlier = case


def replay_detection(case: Case, subject: Any, features: Any, encoded: dict[str, Tensor]) -> None:
    """Instance and panoptic segmentation of an encoded clip."""
    panoptic = case.facts["task"] == "panoptic_seg"
    got, flips = subject.detect(features, case.facts["dataset"], panoptic, case.visible())
    check_flips(flips)
    case.check(encoded | got, clip_tolerance)


def replay_objects(
    case: Case,
    subject: Any,
    features: Any,
    encoded: dict[str, Tensor],
    numbers: list[int],
    frames: Tensor,
    state: Any,
    earlier: Case | None,
) -> Any:
    """Masks or points through one clip; returns the state for the next."""
    reference = case.inputs.get("reference") or {"instance_ids": [], "frame_indices": []}
    given = list(zip(reference["instance_ids"], reference["frame_indices"], strict=True))
    masks = list(case.bits("ref_masks_bits")) if "ref_masks_bits" in case.arrays else [None] * len(given)
    points = reference.get("point_coords", [None] * len(given))
    given = [(*who, mask, point) for who, mask, point in zip(given, masks, points, strict=True)]
    if state is not None and earlier is not None:
        state = subject.state_with(state, torch.from_numpy(earlier.arrays["out_pred_vos_logits"]))
    shown = case.bits("encoder_masks_bits") if "encoder_masks_bits" in case.arrays else None
    got, flips, after = subject.follow(
        features, numbers, tuple(frames.shape[-2:]), given, state, case.visible(), shown
    )
    if shown is not None:
        differ = int((got["encoder_masks"] != shown).sum())
        assert differ <= MOST_FLIPS, f"{differ} pixels of the masks given to the object encoder differ"
    check_flips(flips)
    assert got.pop("ids") == case.facts["instance_ids_in_order"]
    assert got.pop("lost") == case.facts["lost_instance_ids"]
    case.check(encoded | got, clip_tolerance)
    return after


def clip_frames(case: Case, recipes: SimpleNamespace) -> tuple[Tensor, list[int]]:
    """The clip's frames [T, 3, H, W] and their numbers in the video."""
    recipe = found(r"clip_images\((\d+), (\d+), (\d+), seed=(\d+)\)", case.inputs["images"])
    video = torch.from_numpy(recipes.make_inputs.clip_images(*map(int, recipe)))
    numbers = case.inputs["frame_indices"] or list(range(len(video)))
    return video[numbers], numbers


def check_flips(flips: list[Tensor]) -> None:
    """Each layer's bits are the recorded ones, given those before, except where the logit is near 0.

    flips: for each layer the logits, on whatever side of 0, of the bits that differ.
    """
    for layer, logits in enumerate(flips):
        far = logits[logits.abs() > LOGIT]
        assert not len(far), f"layer {layer}: {len(far)} bits differ at logits up to {far.abs().max():.1e}"


def clip_tolerance(key: str) -> float:
    if key.startswith("backbone_"):
        return BACKBONE
    return FEATURE if key.startswith("neck_") or key in ("object_queries", "bg_queries") else LOGIT


def feature(
    recipes: SimpleNamespace, name: str, shape: tuple[int, ...], seed: int, scale: float = 1.0
) -> Tensor:
    return torch.from_numpy(recipes.make_inputs.feature(name, shape, seed, scale))


def backbone_with(channels: list[int], manifests: dict[str, Any]) -> str:
    """A backbone whose maps have these channels."""
    for variant, rows in manifests.items():
        shapes = {name: shape for name, shape, _ in rows}
        inputs = [shapes["backbone.fpn.adapter_1.weight"][1]]
        inputs += [shapes[f"backbone.fpn.input_proj.{i}.0.weight"][1] for i in (2, 1, 0)]
        if inputs == list(channels):
            return variant
    raise AssertionError(f"no manifest for a backbone with channels {channels}")
