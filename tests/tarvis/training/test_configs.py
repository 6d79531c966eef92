"""The files of configs/ against the published runs' resolved configurations; which setting wins."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tarvis.config import ConfigError, ModelConfig, OwnClasses
from tarvis.data.settings import SetSettings
from tarvis.datasets.classes import class_table
from tarvis.datasets.image_sets import IMAGE_SETS
from tarvis.datasets.registry import BENCHMARKS
from tarvis.model import build_model
from tarvis.model.published import config_from_published, to_published
from tarvis.model.weights import save_weights
from tarvis.structures import InputError
from tarvis.tasks import TRAINED
from tarvis.train import changes, half_precision, parser
from tarvis.training.checkpoint import plain, write_config
from tarvis.training.config import Config, load_config
from tarvis.training.start import configure, read_start, run_folder

PUBLISHED = {name: SetSettings(**of.training) for name, of in (BENCHMARKS | IMAGE_SETS).items()}
CONFIGS = Path(__file__).parents[3] / "configs"
STAGES = {
    "pretrain": "pre R50/Swin-T",
    "pretrain_swin_large": "pre Swin-L",
    "finetune": "ft R50/Swin-T",
    "finetune_swin_large": "ft Swin-L",
    "ablations/pretrain_vis": "pre vis only",
    "ablations/pretrain_vps": "pre vps only",
    "ablations/pretrain_vos_pet": "pre vos_pet only",
    "ablations/finetune_vis": "ft vis only",
    "ablations/finetune_vps": "ft vps only",
    "ablations/finetune_vos_pet": "ft vos_pet only",
}
FILES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
BACKBONE = {"resnet50": "ResNet50", "swin_tiny": "SwinTiny", "swin_large": "SwinLarge"}
TYPE = {("vis",): "instance_seg", ("vps",): "panoptic_seg", ("vos",): "vos", TRAINED: "panoptic_seg"}


@pytest.fixture(scope="module")
def resolved():
    """Settings of the published runs by stage and name: base values, then what a stage has of its own.

    Only those that something of ours stands for; values for inference and those without effect are left out.
    """
    path = Path(__file__).parents[2] / "goldens" / "resolved_configs.json"
    stages = json.loads(path.read_text())
    return {name: {**stages["base"], **stage} for name, stage in stages.items()}


def read(name):
    return load_config(CONFIGS / f"{name}.yaml")


def published(config):
    """What the original calls our settings: those that the sets of the run make use of."""
    model, data, loss, optim = config.model, config.data, config.loss, config.optim
    sets = {name: data.of_set(name, PUBLISHED[name]) for name in data.train}
    is_images = all(name in IMAGE_SETS for name in sets)
    values = {
        "MODEL.BACKBONE": BACKBONE[model.backbone],
        "MODEL.CROSS_ATTENTION_TYPE": f"{model.attention}_masked",
        "MODEL.NUM_OBJECT_QUERIES": model.num_instance_queries,
        "MODEL.NUM_VOS_QUERIES_PER_OBJECT": model.num_queries_per_object,
        "TRAINING.BASE_LR": optim.lr,
        "TRAINING.BATCH_SIZE": optim.batch_size,
        "TRAINING.CHECKPOINT_SAVE_INTERVAL": config.run.checkpoint_every,
        "TRAINING.CLIP_LENGTH": data.clip_length,
        "TRAINING.DATASET_LIST": [original(name) for name in sets],
        "TRAINING.DATASET_WEIGHTS": list(data.weights),
        "TRAINING.LOSSES.INSTANCE_SEMANTIC_WEIGHT_CROSS_ENTROPY": loss.vis_semantic,
        "TRAINING.LOSSES.PANOPTIC_INSTANCE_NUM_POINTS": loss.points,
        "TRAINING.LOSSES.PANOPTIC_SEMANTIC_NUM_POINTS": loss.semantic_points,
        "TRAINING.LOSSES.PANOPTIC_SEMANTIC_WEIGHT_CROSS_ENTROPY": loss.vps_semantic,
        "TRAINING.LOSSES.PANOPTIC_SEMANTIC_WEIGHT_DICE": loss.vps_dice,
        "TRAINING.LOSSES.SEMANTIC_IGNORE_NULL_CLASSES": loss.drop_absent,
        "TRAINING.LOSSES.SEMANTIC_REGULARIZATION_LOSS": loss.regularize,
        "TRAINING.LR_DECAY_RATES": list(optim.decay_rates),
        "TRAINING.LR_DECAY_STEPS": list(optim.decay_steps),
        "TRAINING.LR_WARMUP_ITERATIONS": optim.warmup_steps,
        "TRAINING.NUM_ITERATIONS": optim.steps,
        "TRAINING.NUM_SAMPLED_POINTS_FOR_MASK_LOSS": loss.points,
        "TRAINING.POINT_VOS_TASK_SAMPLE_LIKELIHOOD": data.point_share,
        "TRAINING.PRETRAINING": is_images,
        "TRAINING.SAMPLE_CHUNKING_FACTOR": data.chunk,
    }
    for name, settings in sets.items():
        key = f"DATASETS.{original(name)}"
        values[f"{key}.TYPE"] = TYPE[settings.tasks]
        if settings.tasks != ("vos",):
            values[f"{key}.NUM_CLASSES"] = model.class_sets[name]
        if is_images:
            values["TRAINING.PRETRAIN_IMAGE_SIZE"] = list(settings.image_size)
        else:
            # the original takes a factor for the set that it cuts into consecutive frames, and ignores it
            window = 1.0 if settings.consecutive else settings.window
            values[f"{key}.TRAINING.FRAME_SAMPLING_MULTIPLICATIVE_FACTOR"] = window
            values[f"{key}.TRAINING.IMAGE_RESIZE.MODE"] = "min_dim" if settings.min_sizes else "none"
            values[f"{key}.TRAINING.IMAGE_RESIZE.MIN_DIMS"] = list(settings.min_sizes or ())
            values[f"{key}.TRAINING.IMAGE_RESIZE.MAX_DIM"] = settings.max_size
    if is_images:  # of a set with one task they change nothing
        for ours, theirs in {"vis": "INSTANCE_SEG", "vps": "PANOPTIC_SEG", "vos": "VOS"}.items():
            values[f"TRAINING.PRETRAIN_TASK_WEIGHTS.{theirs}"] = data.task_weights.get(ours, 0.0)
    return values


def original(name):
    return {"youtube_vis_2021": "YOUTUBE_VIS"}.get(name, name.upper())


@pytest.mark.parametrize("name", STAGES)
def test_a_file_has_the_effect_of_the_published_configuration(name, resolved):
    ours, theirs = published(read(name)), resolved[STAGES[name]]
    assert ours == {key: theirs[key] for key in ours}


def test_every_published_setting_is_compared_in_some_stage(resolved):
    compared = {key for name in STAGES for key in published(read(name))}
    assert compared == set(resolved["base"])
    assert set(STAGES.values()) == set(resolved) - {"base"}


@pytest.mark.parametrize("name", STAGES)
def test_networks_have_class_queries_for_the_sets_of_the_run_in_the_published_order(name):
    config = read(name)
    assert all(each in BENCHMARKS or each in IMAGE_SETS for each in config.data.train)
    expected = sorted(each for each in config.data.train if PUBLISHED[each].tasks != ("vos",))
    assert list(config.model.class_sets) == expected
    for each, count in config.model.class_sets.items():
        assert class_table(each).num_classes == count


def test_a_fine_tuning_network_is_the_one_of_its_pre_training():
    for name in STAGES:
        if "finetune" in name:
            ours, start = read(name).model, read(name.replace("finetune", "pretrain")).model
            assert {**vars(ours), "class_sets": None} == {**vars(start), "class_sets": None}


def test_images_are_cut_out_of_larger_ones_by_up_to_64_pixels():
    for name in read("pretrain").data.train:
        settings = PUBLISHED[name]
        assert settings.min_sizes == tuple(settings.image_size[0] + more for more in (0, 32, 64))
        assert settings.max_size == 1333
        assert settings.same_crop == (name in ("cityscapes", "mapillary"))


def test_there_are_no_files_but_those_of_the_published_runs_and_of_ours():
    assert set(FILES) == {*STAGES, "tiny", "own", "small"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_fits_on_a_screen_and_names_no_default(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 40
    assert text.startswith("# ")
    defaults = plain(Config())
    for group, values in yaml.safe_load(text).items():
        for key, value in values.items():
            same = value == defaults[group][key]
            assert not same or (name == "tiny" and key == "num_heads"), f"{group}.{key} is the default"


# Which setting wins


@pytest.fixture
def configured():
    """The settings of a command line, which may continue a session or start from a network."""

    def of(*given, session=None, start=None):
        args = parser().parse_args([str(each) for each in given])
        return configure(args.cfg, changes(args), session, start)

    return of


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 5e-4, steps: 7}\nrun: {show_every: 3}\n")
    return path


@pytest.fixture
def started(tmp_path):
    """The checkpoint of a run with settings of its own."""
    config = load_config(None, ["optim.steps=9", "run.seed=5", "data.train=[davis]", "model.hidden_dim=64"])
    write_config(tmp_path / "old", config)
    return tmp_path / "old" / "000004.pth"


def test_the_command_line_counts_more_than_the_file_and_the_file_more_than_defaults(configured, cfg):
    config = configured("--cfg", cfg, "--set", "optim.steps=8", "data.chunk=2")
    assert (config.optim.lr, config.optim.steps, config.data.chunk) == (5e-4, 8, 2)
    assert (config.run.show_every, config.run.summary_every) == (3, 20)


def test_options_are_short_for_settings(configured, cfg):
    options = ("--max_samples_per_gpu", 4, "--display_interval", 7, "--summary_interval", 9, "--amp")
    config = configured("--cfg", cfg, *options)
    assert (config.optim.micro_batch, config.run.show_every, config.run.summary_every) == (4, 7, 9)
    assert config.optim.amp == half_precision()


def test_set_counts_more_than_options(configured, cfg):
    config = configured("--cfg", cfg, "--amp", "--set", "optim.amp=fp16")
    assert config.optim.amp == "fp16"


def test_a_run_that_goes_on_keeps_its_settings(configured, cfg, started):
    config = configured("--cfg", cfg, "--set", "run.show_every=1", "--amp", session=started)
    assert (config.optim.steps, config.run.seed, config.data.train) == (9, 5, ("davis",))
    assert config.optim.lr == Config().optim.lr
    assert config.run.show_every == 1
    assert config.optim.amp == half_precision()  # the original ignored it here


PRETRAINED = ModelConfig("resnet50", hidden_dim=64, class_sets={"cityscapes": 34, "coco": 133})
OWN = {"toys": OwnClasses(("ball", "box"), (True, True))}


def test_fine_tuning_takes_the_network_it_starts_from_and_leaves_the_classes_of_pre_training(configured):
    config = configured("--cfg", CONFIGS / "finetune.yaml", start=PRETRAINED)
    assert (config.model.backbone, config.model.hidden_dim) == ("resnet50", 64)
    assert config.model.class_sets == read("finetune").model.class_sets
    assert list(config.model.class_sets) == list(read("finetune").model.class_sets)
    assert config.optim == read("finetune").optim


@pytest.mark.parametrize(
    ("train", "given", "kept"),
    [
        ("[my.json]", {"synthetic": 8}, {"synthetic": 8}),
        ("[my.json, ovis]", {"coco": 133, "toys": 2}, {"coco": 133, "toys": 2}),  # ovis comes with its set
        ("[ovis]", {"coco": 133, "toys": 2}, dict(ModelConfig().class_sets, toys=2)),
        ("[my.json]", None, {}),
        ("[my.json, ovis]", None, {}),
        ("[ovis]", None, ModelConfig().class_sets),
    ],
)
def test_a_run_keeps_the_classes_of_its_start_own_ones_even_where_known_sets_replace_the_others(
    configured, cfg, train, given, kept
):
    own = OWN if "toys" in kept else {}
    start = None if given is None else ModelConfig(class_sets=given, own_classes=own)
    model = configured("--cfg", cfg, "--set", f"data.train={train}", start=start).model
    assert list(model.class_sets.items()) == list(kept.items())
    assert model.own_classes == own


def test_classes_that_are_named_are_those_of_the_run(configured, cfg):
    start = ModelConfig(class_sets={"toys": 2, "ovis": 25}, own_classes=OWN)
    for named, own in (("{ovis: 25}", {}), ("{toys: 2}", OWN)):
        given = ("--cfg", cfg, "--set", "data.train=[my.json]", f"model.class_sets={named}")
        model = configured(*given, start=start).model
        assert model.class_sets == yaml.safe_load(named)
        assert model.own_classes == own


def test_a_run_starts_from_a_published_one(tmp_path):
    published_run = {
        "MODEL": {
            "BACKBONE": "ResNet50",
            "CROSS_ATTENTION_TYPE": "hard_masked",
            "NUM_BACKGROUND_QUERIES": 1,
            "NUM_OBJECT_QUERIES": 128,
            "NUM_VOS_QUERIES_PER_OBJECT": 4,
        },
        "TRAINING": {"DATASET_LIST": ["COCO", "CITYSCAPES"]},
        "DATASETS": {
            "COCO": {"TYPE": "panoptic_seg", "NUM_CLASSES": 133},
            "CITYSCAPES": {"TYPE": "panoptic_seg", "NUM_CLASSES": 34},
        },
    }
    model = config_from_published(published_run)
    with torch.device("meta"):
        network = build_model(model)
    state = {name: torch.zeros((), dtype=x.dtype).expand(x.shape) for name, x in network.state_dict().items()}
    torch.save({"model": to_published(state, model)}, tmp_path / "500000.pth")
    with pytest.raises(InputError, match=r"500000.pth: no configuration in it and no config.yaml beside it"):
        read_start(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(published_run))
    for path in (tmp_path, tmp_path / "500000.pth"):
        start = read_start(path)
        assert start.path == tmp_path / "500000.pth"
        assert start.model == model
        assert start.state.keys() == state.keys()


def test_options_that_lack_something_are_errors(configured, cfg, tmp_path):
    with pytest.raises(InputError, match="give --cfg"):
        configured()
    with pytest.raises(InputError, match="no such file"):
        configured(session=tmp_path / "elsewhere" / "000001.pth")
    with pytest.raises(ConfigError, match=r"unknown key optim\.learning_rate"):
        configured("--cfg", cfg, "--set", "optim.learning_rate=1")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("optim.decay_steps=[5]", "a rate in decay_rates for each"),
        ("optim.batch_size=0", r"optim\.batch_size: expected a number from 1, got 0"),
        ("optim.amp=fp8", r"optim\.amp: expected one of off, bf16, fp16"),
        ("optim.lr=-1", r"optim\.lr: expected a number from 0"),
        ("optim.lr=.nan", r"optim\.lr: expected a number from 0"),
        ("run.ema=1", r"run\.ema: expected a number from 0 and below 1"),
        ("run.checkpoint_every=0", r"run\.checkpoint_every: expected a number from 1"),
        ("run.compile=3", r"run\.compile: expected bool"),
        ("data.weights=[1]", r"data\.weights"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(wrong, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [wrong])


def test_the_folder_of_a_run_is_below_the_workspace_unless_it_is_absolute(monkeypatch, tmp_path):
    monkeypatch.delenv("TARVIS_WORKSPACE_DIR", raising=False)
    assert run_folder(Path("runs/a"), None) == Path("runs/a")
    monkeypatch.setenv("TARVIS_WORKSPACE_DIR", "/workspace")
    assert run_folder(Path("a"), None) == Path("/workspace/checkpoints/a")
    assert run_folder(tmp_path, None) == tmp_path
    assert run_folder(None, tmp_path / "000004.pth") == tmp_path
    with pytest.raises(InputError, match="--model_dir"):
        run_folder(None, None)


def test_a_run_is_found_by_the_name_that_it_was_given_first_in_the_workspace(
    monkeypatch, tmp_path, tiny_model, tiny_config
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TARVIS_WORKSPACE_DIR", str(tmp_path / "workspace"))
    for folder in (Path("a"), run_folder(Path("a"), None)):
        folder.mkdir(parents=True)
        save_weights(folder / "000001.pth", tiny_model().state_dict(), tiny_config)
        assert read_start(Path("a")).path == folder / "000001.pth"
