"""YAML and settings from outside: bounds before anything is made of them."""

import pytest

from tarvis.config import ConfigError, InferenceConfig, ModelConfig, build, read_yaml
from tarvis.model.weights import WeightsError, read_config
from tarvis.training.config import load_config

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12))
HOSTILE = {
    "aliases": BOMB,
    "merged aliases": BOMB.replace("[x, x]", "{x: 1}").replace("a11:", "<<:"),
    "itself": "&a [*a]",
    "itself, as a key": "&a {*a : 1}",
    "depth": "[" * 10_000,
    "depth of blocks": "- " * 10_000 + "x",
    "int": "!!int abc",
    "float": "!!float abc",
    "bool": "!!bool abc",
    "timestamp": "!!timestamp abc",
    "binary": "!!binary abc",
    "object": "!!python/object/apply:os.system [true]",
    "digits": "9" * 5000,
    "hexadecimal digits": "0x" + "9" * 5000,
    "base 60": ":".join(["59"] * 5000),
    "date": "2020-99-99",
    "size": "x" * 2_000_000,
    "unhashable": "{[a]: 1}",
    "tab": "\t x: 1",
    "control": "a\x1b[31m: 1",
    "null byte": "\0",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_one_line(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    for use, kind in ((lambda: load_config(path), ConfigError), (lambda: read_config(path), WeightsError)):
        with pytest.raises(kind, match=r"c\.yaml|config|key|expected"):
            use()
    if "\0" not in text:
        with pytest.raises(ConfigError, match=r"^optim\.steps"):
            load_config(None, [f"optim.steps={text}"])


def test_plain_aliases_are_written_out(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a [1, 2]\nb: *a\nc: &c {x: 1}\nd: {<<: *c, y: 2}\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": [1, 2], "b": [1, 2], "c": {"x": 1}, "d": {"x": 1, "y": 2}}
    (tmp_path / "c.yaml").write_text("clip_length: 4\n", encoding="utf-8-sig")
    assert read_yaml(tmp_path / "c.yaml") == {"clip_length": 4}


@pytest.mark.parametrize("number", [10**30, -(10**30), 10**5000, 16**5000], ids=range(4))
@pytest.mark.parametrize("kind", [int, float, str, bool, tuple[int, ...], int | None])
def test_numbers_of_many_digits_are_refused(number, kind):
    if kind is float and abs(number) < 10**300:
        assert build(kind, number, "key") == float(number)
        return
    with pytest.raises(ConfigError, match=r"^key") as error:
        build(kind, number, "key")
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize(
    "name",
    [
        "neck_layers",
        "decoder_layers",
        "object_encoder_layers",
        "hidden_dim",
        "neck_ffn_dim",
        "decoder_ffn_dim",
        "num_instance_queries",
        "num_queries_per_object",
        "num_points",
    ],
)
def test_a_network_of_a_file_has_bounds(name):
    with pytest.raises(ConfigError, match=rf"model\.{name}: expected a number from 1 and up to"):
        ModelConfig(**{name: 3 * 64 * 10**7})
    with pytest.raises(ConfigError, match=r"model\.class_sets: expected a number"):
        ModelConfig(class_sets={"x": 10**9})
    with pytest.raises(ConfigError, match=r"model\.background_grid: expected a number"):
        ModelConfig(background_grid=(10**6, 1))


@pytest.mark.parametrize("name", ["score_threshold", "track_score_threshold", "link_iou"])
@pytest.mark.parametrize("value", [7, -0.1, float("nan")])
def test_thresholds_lie_between_0_and_1(name, value):
    with pytest.raises(ConfigError, match=f"inference.{name}: expected a number from 0 and up to 1"):
        InferenceConfig(**{name: float(value)})
