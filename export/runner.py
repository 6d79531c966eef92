"""A folder of graphs in the place of the network.

    runner = open_runner(Path("graphs"), device="cpu")
    segmenter = VideoSegmenter(runner, ["vis"], classes=class_table(runner.manifest.class_set), ...)

The folder's runtime opens its graphs, each a function from tensors by name to tensors by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from tarvis.api import pick_device
from tarvis.model.object_encoder import ObjectEncoder
from tarvis.model.tarvis import PAD_VALUE
from tarvis.structures import Features, Geometry, InputError, PointFeatures, Prediction, Queries
from tarvis.tasks import TASKS

from .folder import QUERIES
from .graphs import ENCODED
from .manifest import Manifest, read_manifest
from .runtimes import RUNTIMES, RunnableGraph


def open_runner(folder: str | Path, *, device: str | torch.device = "auto", trust: bool = False) -> Runner:
    """The runner of a folder of graphs.

    Packages of AOTInductor and engines of TensorRT are machine code, which can do anything: `trust` also runs
    those that this user has not built on this machine.

    Raises:
        InputError: a folder that is damaged or of another version, machine code from elsewhere, a runtime
            that is not installed or cannot run it on that device.
    """
    folder, device = Path(folder), pick_device(device)
    manifest = read_manifest(folder, trust=trust)
    try:
        constants = load((folder / QUERIES).read_bytes())  # `load_file` wants a name in UTF-8
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / QUERIES}: {error}") from None
    graphs = import_module(RUNTIMES[manifest.backend]).open(folder, manifest, device)
    return Runner(manifest, graphs, {name: x.to(device) for name, x in constants.items()}, device)


class Runner(nn.Module):
    """What `VideoSegmenter` asks of a `TarVis`, over graphs. Its precision is that of the graphs.

    The encoder is one graph, so frames that clips share are encoded twice: `extract` only pads.
    """

    pixel_mean: Tensor

    def __init__(
        self,
        manifest: Manifest,
        graphs: Mapping[str, RunnableGraph],
        constants: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.manifest, self.config = manifest, manifest.model
        self.graphs, self.constants = graphs, constants
        self.queries = GraphQueries(manifest, constants)
        self.object_encoder = GraphObjectEncoder(manifest, graphs.get("object_encoder"))
        self.register_buffer("pixel_mean", torch.zeros(3, device=device))  # says where tensors belong
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def encode(self, frames: Tensor) -> Features:
        """Frames [1, T, 3, H, W], uint8 RGB -> features of the padded clip."""
        return self.fuse(self.extract(frames))

    def extract(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Frames [1, n, 3, H, W] padded right and bottom to multiples of 64; uint8."""
        H, W = frames.shape[-2:]
        height, width = Geometry((H, W), (H, W)).padded
        # of the manifest's size or refused, whatever the number of frames: a clip is complete only in `fuse`
        self.manifest.require_clip(self.manifest.frames, (H, W))
        if frames.dtype != torch.uint8:
            raise InputError(f"expected frames in uint8, got {frames.dtype}")
        return (F.pad(frames, (0, width - W, 0, height - H), value=PAD_VALUE),)

    def fuse(self, pyramid: tuple[Tensor, ...]) -> Features:
        """The padded frames of a clip -> its features."""
        (frames,) = pyramid
        self.manifest.require_clip(frames.shape[1], (frames.shape[3], frames.shape[4]))
        encoded = self.graphs["encoder"]({"frames": frames})
        coarse, middle, fine, mask_features = (encoded[name] for name in ENCODED)
        return Features((coarse, middle, fine), mask_features)

    def decode(self, features: Features, queries: Queries) -> Prediction:
        """Ask the clip."""
        answer = self.graphs["decoder"](decoder_inputs(features, queries))
        return Prediction(
            answer["queries"],
            answer["mask_embedding"],
            features.mask_features,
            answer.get("class_logits"),
            queries.groups,
        )


def decoder_inputs(features: Features, queries: Queries) -> dict[str, Tensor]:
    """What the decoder's graph takes, by name."""
    encoded = zip(ENCODED, (*features.memory, features.mask_features), strict=True)
    return {"content": queries.content, "position": queries.position, **dict(encoded)}


class GraphQueries(nn.Module):
    """The queries a folder was made for."""

    content: Tensor
    position: Tensor
    background_vos: Tensor
    vos: Tensor

    def __init__(self, manifest: Manifest, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.manifest = manifest
        class_set = manifest.class_set
        self.class_sets = {} if class_set is None else {class_set: manifest.groups["semantic"]}
        for name in ("background_vos", "vos") if class_set is None else ("content", "position"):
            if name not in constants:
                raise InputError(f"{QUERIES} has no {name!r}: export again")
            self.register_buffer(name, constants[name])

    def classes(self, class_set: str, batch_size: int = 1) -> Queries:
        """Queries of the class set that is in the graphs."""
        assert batch_size == 1, "graphs are made for one clip at a time"
        if class_set != self.manifest.class_set:
            made_for = self.manifest.class_set or "given objects"
            raise InputError(
                f"these graphs are made for {self.manifest.task} of {made_for}, not for the classes of "
                f"{class_set!r}: export with --task vis or vps and --dataset {class_set}"
            )
        return Queries(self.content, self.position, dict(self.manifest.groups))

    def objects(self, background: Tensor, objects: Tensor) -> Queries:
        """Queries of given objects from the object encoder's contents: [1, G, C] and [1, N, C]."""
        position = torch.cat((self.background_vos.expand_as(background), self.vos.expand_as(objects)), 1)
        groups = {"background_vos": background.shape[1], "vos": objects.shape[1]}
        return Queries(torch.cat((background, objects), 1), position, groups)


class GraphObjectEncoder(nn.Module):
    """The object encoder as a graph; absent kinds of objects are filled up with a row that does not exist."""

    look_up = staticmethod(ObjectEncoder.look_up)

    def __init__(self, manifest: Manifest, graph: RunnableGraph | None) -> None:
        super().__init__()
        self.manifest, self.graph = manifest, graph
        self.takes_points = TASKS[manifest.task].takes_points

    def forward(
        self, mask_features: Tensor, masks: Tensor, points: PointFeatures | None = None
    ) -> tuple[Tensor, Tensor]:
        """Contents of background [G, C] and objects [N * parts + N_points, C], as `ObjectEncoder`."""
        if self.graph is None or (points is not None and not self.takes_points):
            kind = "masks" if points is None else "points"
            of_kind = (task for task in TASKS.values() if task.takes_points == (points is not None))
            task = next(task.name for task in of_kind if not task.finds_classes)
            raise InputError(
                f"these graphs are made for {self.manifest.task}, not for objects given by {kind}: "
                f"export with --task {task}"
            )
        if not self.takes_points:
            found = self.graph({"mask_features": mask_features, "masks": masks})
            return found["background"], found["objects"]
        N, M = len(masks), 0 if points is None else len(points.position)
        if points is None:
            C = mask_features.shape[1]
            points = PointFeatures(mask_features.new_zeros(1, 4, C), mask_features.new_zeros(1, C))
        found = self.graph(
            {
                "mask_features": mask_features,
                "masks": masks if N else masks.new_zeros(1, *masks.shape[1:]),
                "masks_exist": masks.new_full((max(N, 1),), N > 0),
                "point_features": points.features,
                "point_positions": points.position,
                "points_exist": masks.new_full((max(M, 1),), M > 0),
            }
        )
        from_masks, from_points = found["objects"].tensor_split([-max(M, 1)])
        return found["background"], torch.cat((from_masks[: len(from_masks) if N else 0], from_points[:M]))
