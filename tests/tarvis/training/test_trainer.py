"""Steps of training: what is accumulated, averaged, skipped, computed again, compiled."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch

from tarvis.config import build
from tarvis.data.loader import TrainingLoader, collate
from tarvis.data.sets import open_sets
from tarvis.datasets.classes import class_table
from tarvis.model import build_model
from tarvis.structures import InputError
from tarvis.training import trainer as training
from tarvis.training.config import Config
from tarvis.training.logs import contact_sheet_of
from tarvis.training.trainer import Trainer


@pytest.fixture
def make(settings):
    """A trainer whose network is the same every time, of settings that differ by section."""

    def trainer(network=None, **changes):
        tree = {key: value | changes.get(key, {}) for key, value in settings.items()}
        config = build(Config, tree)
        torch.manual_seed(0)
        return Trainer(network or build_model(config.model), config)

    return trainer


@pytest.fixture(scope="session")
def batches(settings):
    """Micro-batches of steps, the same every time."""
    config = build(Config, settings)
    sets = open_sets(config.data)

    def of(steps, batch_size=2, micro_batch=1):
        loader = TrainingLoader(
            [each.clips for each in sets],
            config.data,
            seed=1,
            batch_size=batch_size,
            micro_batch=micro_batch,
        )
        return list(loader.steps(0, steps))

    return of


@pytest.fixture(scope="session")
def of_task(batches):
    """A step of each task."""
    found = {}
    for step in batches(24):
        found.setdefault(step[0].task, step)
    return found


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None}


def weights(trainer):
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def train(trainer, *steps):
    return list(trainer.run(iter(steps)))


def assert_same(one, other, rtol=0.0, atol=0.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=rtol, atol=atol, msg=name)


def test_gradients_of_micro_batches_add_up(make, of_task):
    """Their mean, each divided by the mean number of targets of the whole step."""
    step = of_task["vis"]
    trainer = make(optim={"clip_norm": 0, "lr": 0})
    told = train(trainer, step)[0]
    together = gradients(trainer)
    mean = sum(batch.num_targets for batch in step) / len(step)
    losses = []
    parts = []
    for k, batch in enumerate(step):
        trainer._optimizer.zero_grad()
        loss, _, _ = trainer._loss(batch, torch.tensor(mean), trainer._seed(0, k))
        loss.backward()
        losses.append(loss.item())
        parts.append(gradients(trainer))
    assert told.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    for name, gradient in together.items():
        torch.testing.assert_close(
            gradient, sum(part[name] for part in parts) / len(parts), rtol=1e-4, atol=1e-5
        )


def test_a_gradient_is_clipped_to_its_norm(make, of_task):
    free, clipped = make(optim={"clip_norm": 0}), make(optim={"clip_norm": 0.01})
    (whole,), (short,) = train(free, of_task["vis"]), train(clipped, of_task["vis"])
    assert short.gradient == whole.gradient > 1
    for name, gradient in gradients(clipped).items():
        torch.testing.assert_close(gradient, gradients(free)[name] * 0.01 / whole.gradient)


def test_the_average_follows_the_weights(make, of_task):
    trainer = make(run={"ema": 0.75}, optim={"lr": 1e-3})
    assert_same(trainer.averaged(), weights(trainer))
    expected = None
    for _ in range(3):
        train(trainer, of_task["vos"])
        now = weights(trainer)
        expected = now if expected is None else {k: 0.75 * v + 0.25 * now[k] for k, v in expected.items()}
    assert_same(expected, trainer.averaged(), rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(value, now[name]) for name, value in trainer.averaged().items())


@pytest.mark.parametrize("task", ["vis", "vps", "vos"])
def test_layers_that_are_computed_again_change_neither_loss_nor_gradients(make, of_task, task):
    # stochastic depth draws the same numbers the second time
    plain, again = make(), make(run={"checkpoint_activations": True})
    (one,), (other,) = train(plain, of_task[task]), train(again, of_task[task])
    assert one.loss == other.loss
    assert_same(gradients(plain), gradients(again), rtol=1e-6, atol=1e-9)


def test_layers_that_are_computed_again_are_not_kept(make, of_task):
    kept = {}
    for name in (False, True):
        trainer, sizes = make(run={"checkpoint_activations": name}), []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.network.encode(of_task["vis"][0].frames)
        kept[name] = sum(sizes)
    assert kept[True] < 0.6 * kept[False]


@pytest.mark.parametrize("task", ["vis", "vps", "vos"])
def test_half_precision_has_about_the_same_loss(make, of_task, task):
    plain, half = make(), make(optim={"amp": "bf16"})
    (one,), (other,) = train(plain, of_task[task]), train(half, of_task[task])
    assert other.loss == pytest.approx(one.loss, rel=0.05)
    assert not other.is_bad
    assert all(p.dtype == torch.float32 for p in half.network.parameters())
    names = gradients(plain).keys()
    assert gradients(half).keys() == names


def test_terms_make_up_the_loss(make, of_task):
    (step,) = train(make(), of_task["vos"])
    total = 5 * step.terms["mask"].sum() + 5 * step.terms["dice"].sum()
    assert step.loss == pytest.approx(total.item(), rel=1e-5)
    assert len(step.terms["mask"]) == 4  # before the layers, and after each of three


# Values that are not finite


def hit(trainer, *, backward):
    """Make a value of the network, or of its gradients, NaN; returns what ends that."""
    if backward:
        parameter = trainer.network.neck.level_embed
        return parameter.register_hook(lambda gradient: gradient * float("nan"))
    return trainer.network.decoder.proj_layers["instance"].register_forward_hook(
        lambda *called: called[-1] * float("nan")
    )


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_with_a_bad_value_changes_nothing_and_training_goes_on(make, of_task, backward):
    trainer = make(run={"ema": 0.9})
    train(trainer, of_task["vps"])
    before = copy.deepcopy(trainer.state())
    hook = hit(trainer, backward=backward)
    (bad,) = train(trainer, of_task["vps"])
    hook.remove()
    assert bad.is_bad
    assert math.isnan(bad.gradient)
    after = trainer.state()
    assert after["step"] == before["step"] + 1
    for part in ("model", "ema"):
        assert_same(before[part], after[part])
    for index, state in before["optimizer"]["state"].items():
        assert_same(state, after["optimizer"]["state"][index])
    (good,) = train(trainer, of_task["vps"])
    assert not good.is_bad
    assert math.isfinite(good.loss)


def test_an_update_that_fails_half_way_leaves_weights_that_are_of_no_step(make, of_task, monkeypatch):
    trainer = make(run={"ema": 0.9})
    train(trainer, of_task["vos"][:1])
    assert trainer.is_whole
    monkeypatch.setattr(trainer._average, "update_parameters", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(trainer, of_task["vos"][:1])
    assert not trainer.is_whole
    assert trainer.step == 1


def test_too_many_bad_steps_in_a_row_end_the_run(make, of_task):
    trainer = make(optim={"max_bad_steps": 3})
    step = of_task["vis"]
    hook = hit(trainer, backward=False)
    train(trainer, step, step)
    hook.remove()
    train(trainer, step)
    hit(trainer, backward=False)
    with pytest.raises(
        InputError, match="steps 4 to 6 all had a loss or gradient that is not finite"
    ) as error:
        train(trainer, step, step, step, step)
    assert "lower optim.lr" in str(error.value)
    assert step[0].names[0] in str(error.value)


def test_the_scale_of_fp16_falls_when_gradients_overflow_but_not_for_ever(make, of_task):
    trainer = make(optim={"amp": "fp16", "max_bad_steps": 3}, run={"ema": 0.9})
    before, scale = weights(trainer), trainer._scaler.get_scale()
    hook = trainer.network.neck.level_embed.register_hook(lambda gradient: gradient * float("inf"))
    (step,) = train(trainer, of_task["vos"][:1])
    assert step.is_bad
    assert not step.suspects
    assert trainer._scaler.get_scale() == scale / 2
    assert_same(before, weights(trainer))
    with pytest.raises(InputError, match="steps 1 to 3"):
        train(trainer, *[of_task["vos"][:1]] * 2)
    hook.remove()
    state = trainer.state()
    again = make(optim={"amp": "fp16"}, run={"ema": 0.9})
    again.restore(state)
    assert again._scaler.get_scale() == scale / 8


# Compiling


@pytest.mark.parametrize(
    ("backend", "again"),
    [
        pytest.param("aot_eager", False, marks=pytest.mark.slow),
        pytest.param("aot_eager", True, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),  # three minutes: C++ for every fused loop
    ],
)
def test_compiled_parts_have_the_same_loss_no_graph_breaks_and_few_graphs(
    make, of_task, monkeypatch, backend, again
):
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(training, "MOST_GRAPHS", 2)
    monkeypatch.setattr(training, "compile_parts", partial(training.compile_parts, backend=backend))
    plain, fast = make(), make(run={"compile": True, "checkpoint_activations": again})
    vis, vps, vos = (of_task[task][:1] for task in ("vis", "vps", "vos"))
    fewer = [dataclasses.replace(vos[0], counts=(vos[0].counts[0] - 1,), points=vos[0].points[:, :0])]
    steps = [vis, vps, vos, fewer]
    others = train(fast, vis)
    assert others[0].compiles == 3  # extract, fuse, decode
    with pytest.warns(UserWarning, match=r"decode has been compiled 2 times; .* data.pad_to"):
        others += train(fast, *steps[1:])
    assert [step.compiles for step in others] == [3, 3, 4, 4]  # decode, for another number of queries
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(train(plain, *steps), others, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.gradient == pytest.approx(one.gradient, rel=1e-3)
    contact_sheet_of(fast.network, vis[0], class_table("synthetic"))  # is made without
    assert sum(each.count for each in fast._compilers) == 4
    assert fast.network.training


# Pictures


def test_contact_sheets_of_odd_clips(make, samples):
    network = make().network
    for task, counts, points, pad_to in (
        ("vis", 0, 0, 64),
        ("vps", 0, 0, 128),
        ("vos", 2, 1, 64),
        ("vos", 2, 2, 128),
        ("vis", 3, 0, 128),
    ):
        batch = collate(
            "synthetic",
            task,
            [samples(5, counts, (40, 56))],
            num_points=partial(min, points),
            pad_to=pad_to,
        )
        sheet = contact_sheet_of(network, batch, class_table("synthetic") if task != "vos" else None)
        assert sheet.shape[0] >= 3 * 40
        assert sheet.shape[1] >= 2 * 56
        assert sheet.shape[1] < 128  # the padding is not shown
