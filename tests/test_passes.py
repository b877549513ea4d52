"""The passes over a batch: however it is split, captured or done again, its losses and gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.data.batches import Prepare, StepBatches
from diffvit.dataset import load
from diffvit.errors import UserError
from diffvit.ledger.log import Step
from diffvit.loop import loss_scale, passes
from diffvit.loop.fit import fit
from diffvit.loop.passes import Passes
from diffvit.protocol import PROTOCOLS
from diffvit.vit import VisionTransformer, build_model

DIGITS = PROTOCOLS["digits"]
IMAGES = 13


class LimitedMemory(nn.Module):
    """A model with room for so many images in training and in evaluation."""

    def __init__(self, model: nn.Module, training: int, evaluation: int = 10**9):
        super().__init__()
        self.model, self.room, self.seen = model, {True: training, False: evaluation}, []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((self.training, len(images)))
        if len(images) > self.room[self.training]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model(images)


def _model() -> VisionTransformer:
    model = build_model("vit_differential", "0.1M", DIGITS)
    model.initialise(0)
    return model


def _passes(model: nn.Module, micro_batch: int, **options) -> Passes:
    data = load("digits")
    return Passes(model, Prepare(8, data.mean, data.std), precision="fp32", micro_batch=micro_batch, **options)


def _batch(images: int = IMAGES, first: int = 0) -> tuple[Tensor, Tensor]:
    train = load("digits").train
    return train.pixels[first : first + images], train.labels[first : first + images]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def _results(work: Passes, model: nn.Module, batch: tuple[Tensor, Tensor] | None = None, images: int = IMAGES) -> list[Tensor]:
    """Training loss, validation loss and accuracy, and the gradient of every parameter."""
    work.zero_gradients()
    batch = _batch() if batch is None else batch
    train_loss = work.differentiate(batch, images, seed=5)
    gradients = _gradients(model)
    return [train_loss, *work.validate(batch, images), *gradients]


def _expected(batch: tuple[Tensor, Tensor], images: int) -> list[Tensor]:
    """By torch alone, in fp64."""
    model, data = _model().double(), load("digits")
    logits = model(Prepare(8, data.mean, data.std)(batch[0]).double())
    loss = F.cross_entropy(logits, batch[1], reduction="sum") / images
    accuracy = (logits.argmax(1) == batch[1]).double().sum() / images
    return [loss.detach(), loss.detach(), accuracy, *torch.autograd.grad(loss, list(model.parameters()))]


def _assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    floor = 1e-2 * sum(y.norm().item() for y in expected[3:]) / len(expected[3:])  # some gradients are next to nothing
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.shape == y.shape and (x - y).norm() <= 2e-5 * max(y.norm().item(), floor), number


@pytest.mark.parametrize("evaluation_batch", [None, 1, 4, IMAGES, 100])
@pytest.mark.parametrize("micro_batch", [1, 3, 5, IMAGES, 100])
def test_however_a_batch_is_split_it_gives_the_same(micro_batch: int, evaluation_batch: int | None) -> None:
    model = LimitedMemory(_model(), 10**9)
    work = _passes(model, micro_batch, evaluation_batch=evaluation_batch)
    _assert_near(_results(work, model), _expected(_batch(), IMAGES))
    for training, most in ((True, micro_batch), (False, evaluation_batch or micro_batch)):
        sizes = [size for kind, size in model.seen if kind == training]
        assert sum(sizes) == IMAGES and sizes == [min(most, IMAGES - first) for first in range(0, IMAGES, most)]
    assert model.training


@pytest.mark.parametrize("micro_batch", [2, 3, 100])
def test_a_part_of_a_global_batch_counts_as_its_part(micro_batch: int) -> None:
    model, work, parts = (built := _model()), _passes(built, micro_batch), [_batch(9), _batch(4, first=9)]
    found = [_results(work, model, part) for part in parts]
    _assert_near([a + b for a, b in zip(*found, strict=True)], _expected(_batch(), IMAGES))


def test_gradients_add_up_until_they_are_forgotten() -> None:
    model, work = (built := _model()), _passes(built, 5)
    once = _results(work, model)[3:]
    work.differentiate(_batch(), IMAGES, seed=5)
    for twice, one in zip(_gradients(model), once, strict=True):
        torch.testing.assert_close(twice, 2 * one)
    work.zero_gradients()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_result_is_not_changed_by_the_next_batch() -> None:
    """They are fetched from the device long after."""
    work = _passes(_model(), 5)
    kept = [work.differentiate(_batch(), IMAGES, 1), *work.validate(_batch(), IMAGES)]
    before = [each.item() for each in kept]
    work.differentiate(_batch(5, first=50), 5, 2), work.validate(_batch(5, first=50), 5)
    assert [each.item() for each in kept] == before


def test_masks_follow_the_seed() -> None:
    model = build_model("vit_classic", "0.1M", DIGITS.with_overrides({"dropout": 0.3}))
    model.initialise(0)
    work = _passes(model, 5)
    first, again, other = (work.differentiate(_batch(), IMAGES, seed).item() for seed in (1, 1, 2))
    assert first == again != other
    assert work.validate(_batch(), IMAGES)[0] == work.validate(_batch(), IMAGES)[0]


@pytest.mark.parametrize("group", [(0, 1), (0, 3), (2, 3)])
def test_masks_are_told_where_a_micro_batch_begins(monkeypatch: pytest.MonkeyPatch, group: tuple[int, int]) -> None:
    heard: list[object] = []
    monkeypatch.setattr(passes, "seed_masks", lambda device, seed, group: heard.append((seed, group)))
    monkeypatch.setattr(passes, "at_image", lambda device, number: heard.append(number))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Alone)
    model = _model()
    _passes(model, 5, group=group).differentiate(_batch(), IMAGES * group[1], seed=7)
    rank, workers = group
    assert heard == [(7, group), rank, rank + 5 * workers, rank + 10 * workers]


class Alone(nn.Module):
    """A group's exchange of gradients without a group: how often it would take place."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.quiet, self.exchanges = module, False, 0

    def no_sync(self) -> Alone:
        return self

    def __enter__(self) -> None:
        self.quiet = True

    def __exit__(self, *_: object) -> None:
        self.quiet = False

    def forward(self, images: Tensor) -> Tensor:
        self.exchanges += not self.quiet
        return self.module(images)


@pytest.mark.parametrize(("images", "micro_batch"), [(13, 5), (13, 100), (10, 5), (0, 5)])
def test_a_group_exchanges_gradients_once_a_batch_even_without_images(
    monkeypatch: pytest.MonkeyPatch, images: int, micro_batch: int
) -> None:
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Alone)
    model = _model()
    work = _passes(model, micro_batch, group=(1, 2))
    loss = work.differentiate(_batch(images), 26, seed=0)
    assert work._parallel.exchanges == 1 and (loss > 0) == (images > 0)
    # The group takes the mean of its gradients.
    halves = [gradient / 2 for gradient in _gradients(model)]
    if images:
        expected = _expected(_batch(images), 26)
        _assert_near([*expected[:3], *halves], expected)
    else:
        assert not any(half.any() for half in halves)


# ------------------------------------------------------------------------------------------------------- memory runs out


def test_memory_that_runs_out_is_asked_for_less() -> None:
    model = LimitedMemory(_model(), training=4, evaluation=7)
    work = _passes(model, IMAGES, evaluation_batch=2 * IMAGES)
    _assert_near(_results(work, model), _expected(_batch(), IMAGES))
    assert work.micro_batch == 4 and work.evaluation_batch <= 7 and model.training


def test_a_batch_that_fails_halfway_is_done_from_its_start() -> None:
    model = LimitedMemory(_model(), 10**9)
    calls = iter(range(100))

    def fail(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(fail)
    work = _passes(model, 4)
    _assert_near(_results(work, model), _expected(_batch(), IMAGES))
    assert work.micro_batch == work.evaluation_batch == 2


def test_validation_that_runs_out_of_memory_leaves_training_as_it_is_where_it_can() -> None:
    model = LimitedMemory(_model(), training=4, evaluation=8)
    work = _passes(model, 4, evaluation_batch=16)
    _assert_near(_results(work, model), _expected(_batch(), IMAGES))
    assert (work.micro_batch, work.evaluation_batch) == (4, 8)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    "another while it was handled",
], ids=str)  # fmt: skip
def test_what_running_out_of_memory_looks_like(error: Exception | str) -> None:
    model, failures = _model(), iter([True])

    def fail(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if not next(failures, False):
            return
        if isinstance(error, Exception):
            raise error
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    model.register_forward_pre_hook(fail)
    work = _passes(model, 8)
    _assert_near(_results(work, model), _expected(_batch(), IMAGES))
    assert work.micro_batch == 4


def test_a_single_image_too_large_and_other_errors_end_it() -> None:
    with pytest.raises(UserError, match="a single image does not fit"):
        _passes(LimitedMemory(model := _model(), 0), 8).differentiate(_batch(), IMAGES, 0)
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        _passes(model, 8).differentiate(_batch(), IMAGES, 0)


def test_a_group_cannot_do_a_batch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Alone)
    work = _passes(LimitedMemory(_model(), 2), 8, group=(0, 2))
    with pytest.raises(torch.OutOfMemoryError):
        work.differentiate(_batch(), IMAGES, 0)
    assert work.micro_batch == 8


# ---------------------------------------------------------------------------------------------------------------- graphs


class FakeGraphs:
    """As graphs are used: what is replayed is what was captured, in the memory that it was captured with.

    Attributes:
        all: the ones that were made, newest last.
        room: images that a capture has memory for, in training and in evaluation.
        warmed, captured, replayed, missed: (pass, images), in order.
        forgotten: how often all were dropped.
    """

    all: list[FakeGraphs]
    room: dict[str, int]

    def __init__(self) -> None:
        self.warmed: list[tuple[str, int]] = []
        self.captured: list[tuple[str, int]] = []
        self.replayed: list[tuple[str, int]] = []
        self.missed: list[tuple[str, int]] = []
        self.forgotten = 0
        self.graphs: dict[object, tuple[tuple[Tensor, ...], list[int]]] = {}
        self.work: Callable[..., None] | None = None
        FakeGraphs.all.append(self)

    def forget(self) -> None:
        self.forgotten += 1
        self.graphs.clear()

    def warm_up(self, work: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        self.warmed.append(_name(work, inputs))
        work(*inputs)

    def capture(self, work: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        name = _name(work, inputs)
        assert name in self.warmed, "it must have run before"
        if len(inputs[0]) > FakeGraphs.room[name[0]]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.captured.append(name)
        self.graphs[name] = (inputs, self._places(work))

    def replay(self, work: Callable[..., None], inputs: tuple[Tensor, ...]) -> bool:
        name = _name(work, inputs)
        if name not in self.graphs:
            self.missed.append(name)
            return False
        own, places = self.graphs[name]
        for mine, given in zip(own, inputs, strict=True):
            assert mine.shape == given.shape and mine.dtype == given.dtype
            mine.copy_(given)
        assert self._places(work) == places, "a graph reads and writes where it did when it was captured"
        work(*own)
        assert self._places(work) == places
        self.replayed.append(name)
        return True

    @staticmethod
    def _places(work: Callable[..., None]) -> list[int]:
        """Of sums, parameters and gradients."""
        of = work.__self__
        gradients = [parameter.grad for parameter in of._model.parameters()]
        assert all(gradient is not None for gradient in gradients)
        return [x.data_ptr() for x in (of._train_sums, of._val_sums, *of._model.parameters(), *gradients)]


def _name(work: Callable[..., None], inputs: tuple[Tensor, ...]) -> tuple[str, int]:
    return work.__name__.strip("_").partition("_")[0], len(inputs[0])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraphs]:
    FakeGraphs.all, FakeGraphs.room = [], {"training": 10**9, "validation": 10**9}
    monkeypatch.setattr(passes, "_Graphs", FakeGraphs)
    return FakeGraphs


def _capture(work: Passes, train_lengths: set[int], val_lengths: set[int]) -> None:
    data = load("digits")
    work.capture(data.train, train_lengths, data.val, val_lengths)
    for each in FakeGraphs.all[-1:]:
        each.replayed.clear()  # each graph was tried


def test_what_is_captured_is_every_length_that_occurs_and_no_other(graphs: type[FakeGraphs]) -> None:
    work = _passes(_model(), 5, evaluation_batch=16, graphs=True)
    _capture(work, {32, 10}, {32, 20, 3})
    (found,) = graphs.all
    expected = [("training", 5), ("training", 2), ("validation", 16), ("validation", 4), ("validation", 3)]
    assert found.captured == found.warmed == expected


@pytest.mark.parametrize("micro_batch", [5, 8, IMAGES, 100])
def test_graphs_give_what_is_computed_without(graphs: type[FakeGraphs], micro_batch: int) -> None:
    plain, model = _model(), _model()
    eager, work = _passes(plain, micro_batch, evaluation_batch=6), _passes(model, micro_batch, evaluation_batch=6, graphs=True)
    _capture(work, {IMAGES}, {IMAGES})
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters()) and model.training
    for first in (0, 40, 80):
        found, expected = (_results(each, of, _batch(first=first)) for each, of in ((work, model), (eager, plain)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not graphs.all[0].missed and len(graphs.all[0].replayed) == 3 * (-(-IMAGES // micro_batch) + 3)


def test_a_graph_that_gives_something_else_is_refused(graphs: type[FakeGraphs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "has_kernels", lambda *about: True)
    _capture(_passes(_model(), 8, graphs=True), {IMAGES}, {IMAGES})
    for lost in ("training", "validation"):
        with monkeypatch.context() as patch:
            real = FakeGraphs.replay
            patch.setattr(FakeGraphs, "replay", lambda self, work, inputs: _name(work, inputs)[0] == lost or real(self, work, inputs))  # noqa: B023
            with pytest.raises(UserError, match="do not give what they were captured from"):
                _capture(_passes(_model(), 8, graphs=True), {IMAGES}, {IMAGES})


def test_what_was_not_captured_is_computed_all_the_same(graphs: type[FakeGraphs]) -> None:
    plain, model = _model(), _model()
    eager, work = _passes(plain, 8), _passes(model, 8, graphs=True)
    _capture(work, {8}, {8})
    found, expected = (_results(each, of) for each, of in ((work, model), (eager, plain)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert graphs.all[0].missed == [("training", 5), ("validation", 5)]
    assert graphs.all[0].replayed == [("training", 8), ("validation", 8)]


def _losses(**options) -> tuple[list[Step], list[Tensor]]:
    steps: list[Step] = []
    model = _model()
    protocol = DIGITS.with_overrides({"max_steps": 42, "clip_norm": 5.0})
    fit(model, load("digits"), protocol, seed=3, on_steps=lambda some, total: steps.extend(some), **options)
    return [step._replace(seconds=0.0) for step in steps], [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "how", [{"micro_batch": 5}, {"micro_batch": 32, "precision": "fp16"}, {"micro_batch": 12, "evaluation_batch": 32}], ids=str
)
def test_a_training_replays_all_its_steps(graphs: type[FakeGraphs], how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch and two steps: last batches of 10 training and 20 validation images too. In fp16 the loss scale changes meanwhile."""
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**24)
    steps, weights = _losses(graphs=True, **how)
    (found,) = graphs.all
    assert not found.missed and set(found.replayed) == set(found.captured)
    lengths = StepBatches(1258, 32, 3, (1, 42), salt="train").lengths()
    assert lengths == {32, 10}
    expected, right = _losses(**how)
    assert len(graphs.all) == 1
    # As text, in which a norm that is no number equals itself.
    assert str(steps) == str(expected) and all(torch.equal(a, b) for a, b in zip(weights, right, strict=True))
    assert any(step.overflowed_at for step in steps) == ("precision" in how)


def test_a_resumed_training_replays_too(graphs: type[FakeGraphs]) -> None:
    states: list[dict] = []
    asked = iter(range(1, 100))
    with pytest.raises(Exception, match="stopped after step 3"):
        _losses(graphs=True, micro_batch=8, on_save=states.append, should_stop=lambda: next(asked) >= 3)
    steps, weights = _losses(graphs=True, micro_batch=8, resume=states[-1])
    expected, right = _losses(micro_batch=8)
    assert steps == expected[3:] and all(torch.equal(a, b) for a, b in zip(weights, right, strict=True))
    assert not graphs.all[-1].missed


def test_memory_that_runs_out_in_a_capture_halves_and_captures_again(graphs: type[FakeGraphs]) -> None:
    graphs.room.update(training=4, validation=7)
    plain, model = _model(), _model()
    work = _passes(model, 16, graphs=True)
    _capture(work, {IMAGES}, {IMAGES})
    assert (work.micro_batch, work.evaluation_batch) == (4, 4)
    (found,) = graphs.all
    assert set(found.graphs) == {("training", 4), ("training", 1), ("validation", 4), ("validation", 1)}
    assert found.forgotten >= 3 and model.training
    results, expected = (_results(each, of) for each, of in ((work, model), (_passes(plain, 4), plain)))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)) and not found.missed


@pytest.mark.parametrize("training", [True, False])
def test_memory_that_runs_out_later_captures_what_is_left(graphs: type[FakeGraphs], training: bool) -> None:
    inner, plain = _model(), _model()
    model = LimitedMemory(inner, 10**9)
    work = _passes(model, 8, graphs=True)
    _capture(work, {IMAGES}, {IMAGES})
    model.room[training] = 4
    results, expected = (_results(each, of) for each, of in ((work, model), (_passes(plain, 4), plain)))
    _assert_near(results, expected)
    (found,) = graphs.all
    assert (work.micro_batch, work.evaluation_batch) == (4, 4) and not found.missed and model.training
    assert set(found.graphs) == {("training", 4), ("training", 1), ("validation", 4), ("validation", 1)}


def test_memory_too_small_for_a_capture_of_one_image_is_said(graphs: type[FakeGraphs]) -> None:
    graphs.room["training"] = 0
    with pytest.raises(UserError, match="a single image does not fit"):
        _capture(_passes(_model(), 8, graphs=True), {IMAGES}, {IMAGES})


def test_a_group_has_no_graphs(graphs: type[FakeGraphs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Alone)
    work = _passes(_model(), 8, graphs=True, group=(0, 2))
    _capture(work, {IMAGES}, {IMAGES})
    assert not graphs.all


def test_capturing_changes_nothing_of_what_follows(graphs: type[FakeGraphs]) -> None:
    """Neither weights nor masks: a step begins with its seed."""
    model = build_model("vit_classic", "0.1M", DIGITS.with_overrides({"dropout": 0.3}))
    model.initialise(0)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    work = _passes(model, 5, graphs=True)
    _capture(work, {IMAGES}, {IMAGES})
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    found = _results(work, model)
    expected = _results(_passes(model, 5), model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
