"""A network small enough to run in no time, its weights as a file, and a short clip in every form."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tarvis.data.synthetic import synthetic_clip
from tarvis.demo.synthetic_benchmarks import class_map, make_benchmark
from tarvis.files.atomic import write_json
from tarvis.model import build_model
from tarvis.model.weights import save_weights
from tarvis.training.config import load_config

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SIZE = (64, 96)
FRAMES = 6


@pytest.fixture(scope="session")
def tiny_config():
    """The network of `configs/tiny.yaml` with as few layers as there can be."""
    tiny = load_config(TINY).model
    return dataclasses.replace(tiny, neck_layers=1, decoder_layers=3, object_encoder_layers=1)


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Makes that network, in part of another configuration if wanted; its weights are the same every time."""

    def make(**changes):
        torch.manual_seed(0)
        return build_model(dataclasses.replace(tiny_config, **changes)).eval().requires_grad_(False)

    return make


# Of a module, not of the session, so that a test file can have weights of another `config`.


@pytest.fixture(scope="module")
def config(tiny_config):
    return dataclasses.replace(tiny_config, num_instance_queries=6)


@pytest.fixture(scope="module")
def state(config):
    """Weights of a random network that is sure of its classes, so that it finds tracks."""
    torch.manual_seed(10)
    model = build_model(config)
    with torch.no_grad():
        for group in ("instance", "semantic"):
            for parameter in model.decoder.proj_layers[group].parameters():
                parameter.mul_(4)
    return model.state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory, state, config):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, state, config)
    return path


@pytest.fixture(scope="session")
def clip():
    return synthetic_clip(3, FRAMES, SIZE, come_and_go=False)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Makes a benchmark of three videos, once, which no test may change; gives the folder."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_benchmark(name, made[name], num_videos=3, size=(64, 96), num_objects=2)
            if names := class_map(name):
                write_json(made[name] / "classes.json", {"class_set": "synthetic", "names": names})
        return made[name]

    return make


# Of a test: it may damage its files.


@pytest.fixture
def folder(tmp_path, clip, write_images):
    """The clip as images."""
    return write_images(tmp_path / "frames", clip.frames)


@pytest.fixture
def video(tmp_path, clip, write_video):
    """The clip as a video file."""
    return write_video(tmp_path / "clip.mp4", clip.frames)


@pytest.fixture(scope="session")
def write_images():
    """Writes frames as images img_00.png, img_01.png, .. into a new folder; gives the folder."""

    def write(folder, frames):
        folder.mkdir()
        for i, frame in enumerate(frames):
            cv2.imwrite(str(folder / f"img_{i:02d}.png"), frame[..., ::-1])
        return folder

    return write


@pytest.fixture(scope="session")
def write_video():
    """Writes frames of the clip's size, or none, as a video file; gives the file."""

    def write(path, frames, fourcc="mp4v"):
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 12, SIZE[::-1])
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()
        return path

    return write
