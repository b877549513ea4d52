"""How a run's batches are split: counted on a CPU, measured on a GPU, alike for all that a study compares."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from diffvit.compute import Chosen, Compute
from diffvit.loop import placement as placed
from diffvit.loop.placement import Placed, place_model
from diffvit.machine.device import set_matmul_precision
from diffvit.memory import FILLED, Peak, evaluation_bytes, even_split, micro_batch_within, parameter_bytes
from diffvit.protocol import ARMS, PROTOCOLS, Protocol
from diffvit.vit import VisionTransformer, build_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DIGITS = PROTOCOLS["digits"]
MB = 1e6


@pytest.fixture(autouse=True)
def _settings_as_before() -> Iterator[None]:
    yield
    set_matmul_precision("fp32")


# ----------------------------------------------------------------------------------------------------------------- on a CPU


@pytest.mark.parametrize("memory", [int(2e6), int(2e7), 2**40])
def test_on_a_cpu_it_is_counted(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(placed, "device_memory", lambda device: memory)
    monkeypatch.setattr(placed, "measure_peak", lambda *args: pytest.fail("measured"))
    for name in ARMS:
        model = build_model(name, "0.1M", DIGITS)
        model.initialise(3)
        for share in (1.0, 0.5):
            found = place_model(name, "0.1M", DIGITS, 3, CPU, "fp32", Compute(memory_share=share))
            images = micro_batch_within(model, 32, share * memory, "fp32", "cpu")
            assert found.fit_arguments == {"micro_batch": images, "evaluation_batch": images, "graphs": False}
            assert not found.model.recompute and found.chosen == Chosen("maps" if name == "vit_differential" else "sdpa")
            for a, b in zip(found.model.parameters(), model.parameters(), strict=True):
                assert torch.equal(a, b)
    assert images in ({int(2e6): (1, 2, 4), int(2e7): (8, 16, 32), 2**40: (32,)}[memory])


def test_on_a_cpu_what_is_asked_for_is_done_and_shared_by_workers() -> None:
    assert place_model("vit_classic", "0.1M", DIGITS, 0, CPU, "fp32", Compute(micro_batch=5)).micro_batch == 5
    assert place_model("vit_classic", "0.1M", DIGITS, 0, CPU, "fp32", Compute(micro_batch=99)).micro_batch == 32
    assert place_model("vit_classic", "0.1M", DIGITS, 0, CPU, "fp32", Compute(), workers=3).micro_batch == 11
    assert place_model("vit_classic", "0.1M", DIGITS, 0, CPU, "fp32", Compute(recompute=True)).model.recompute


# ----------------------------------------------------------------------------------------------------------------- on a GPU


class FakeGPU:
    """A GPU with room for so many bytes beside the parameters, on which a pass takes what `peaks` says.

    Attributes:
        peaks: of each architecture, without and with recomputation.
        measured: (architecture, fused, recompute, micro-batch asked of choose), in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path):
        self.name, self.room, self.fused = "Some GPU", 1000 * MB, True
        self.peaks = {name: (Peak(0.0, 50 * MB), Peak(0.0, 5 * MB)) for name in ("vit_differential", "vit_classic_wide_heads")}
        self.peaks["vit_classic"] = (Peak(100 * MB, 30 * MB), Peak(100 * MB, 3 * MB))
        self.measured: list[tuple[str, bool, bool]] = []
        self.tried: list[int] = []
        monkeypatch.setenv("DIFFVIT_CACHE", str(cache))
        monkeypatch.setattr(placed, "device_memory", lambda device: (self.room + self._others()) / FILLED)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(placed, "measure_peak", self._measure)
        monkeypatch.setattr(placed, "choose", self._choose)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: self.name)
        monkeypatch.setattr(VisionTransformer, "to", lambda model, device: self._move(model, device))
        self.model: VisionTransformer | None = None

    def place(self, name: str = "vit_differential", protocol: Protocol = DIGITS, workers: int = 1, **asked) -> Placed:
        return place_model(name, "0.1M", protocol, 0, GPU, "bf16", Compute(**asked), workers)

    def _move(self, model: VisionTransformer, device: torch.device) -> VisionTransformer:
        assert device == GPU
        self.model = model
        return model

    def _others(self) -> float:
        assert self.model is not None
        return placed._BESIDE + parameter_bytes(self.model, "bf16")

    def _choose(self, model: VisionTransformer, images: int, precision: str, compute: Compute) -> Chosen:
        self.tried.append(images)
        model.fused = self.fused if compute.fused is None else compute.fused
        model.recompute = bool(compute.recompute)
        return Chosen("triton", fused=model.fused, graphs=model.fused)

    def _measure(self, model: VisionTransformer, protocol: Protocol, precision: str) -> Peak:
        kinds = {"Attention": "vit_classic", "WideHeadsAttention": "vit_classic_wide_heads", "DifferentialAttention": "vit_differential"}
        name = kinds[model.attention_class.__name__]
        assert model.pos_embed.device.type != "meta" and precision == "bf16"
        self.measured.append((name, model.fused, model.recompute))
        return self.peaks[name][model.recompute]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGPU:
    return FakeGPU(monkeypatch, tmp_path / "cache")


def test_both_arms_are_split_alike_by_the_larger_need(gpu: FakeGPU) -> None:
    found = [gpu.place(name) for name in ARMS]
    assert [each.micro_batch for each in found] == [even_split(32, 20)] * 2 == [16, 16]  # 30 of the classic model would fit
    assert [each.model.attention_class.__name__ for each in found] == ["Attention", "DifferentialAttention"]
    assert all(each.fit_arguments == {"micro_batch": 16, "evaluation_batch": each.evaluation_batch, "graphs": True} for each in found)
    gpu.peaks["vit_classic"] = (Peak(0.0, 90 * MB), Peak(0.0, 9 * MB))
    gpu.name = "Another GPU"
    assert [gpu.place(name).micro_batch for name in ARMS] == [even_split(32, 11)] * 2 == [11, 11]


def test_an_architecture_that_is_no_arm_is_measured_alone(gpu: FakeGPU) -> None:
    assert gpu.place("vit_classic_wide_heads").micro_batch == 16
    assert gpu.measured == [("vit_classic_wide_heads", True, False)]


def test_peaks_are_measured_once_for_each_cell_and_way_of_computing(gpu: FakeGPU, tmp_path: Path) -> None:
    for name in (*ARMS, *ARMS):
        gpu.place(name)
    once = [("vit_classic", True, False), ("vit_differential", True, False)]
    assert sorted(gpu.measured) == once
    kept = json.loads((tmp_path / "cache/memory_peaks.json").read_text())
    assert sorted(kept.values(), key=lambda peak: peak["per_image"]) == [
        {"fixed": 100 * MB, "per_image": 30 * MB},
        {"fixed": 0.0, "per_image": 50 * MB},
    ]
    others: list[Callable[[], object]] = [
        lambda: gpu.place(recompute=True),
        lambda: gpu.place(fused=False),
        lambda: gpu.place(protocol=dataclasses.replace(DIGITS, dropout=0.1)),
        lambda: gpu.place(protocol=dataclasses.replace(DIGITS, depths={"0.1M": 3})),
        lambda: gpu.place(protocol=dataclasses.replace(DIGITS, image_size=16)),
        lambda: setattr(gpu, "name", "Another GPU") or gpu.place(),
    ]
    for number, other in enumerate(others, start=2):
        other()
        assert len(gpu.measured) == 2 * number
        other()
        assert len(gpu.measured) == 2 * number, "once"


def test_the_other_arm_is_measured_as_this_one_is_computed(gpu: FakeGPU) -> None:
    gpu.place(fused=False, recompute=True)
    assert sorted(gpu.measured) == [("vit_classic", False, True), ("vit_differential", False, True)]


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "7", '{"KEY": null}', '{"KEY": {}}', '{"KEY": {"fixed": 1}}', '{"KEY": [1, 2]}'])
def test_a_damaged_cache_is_measured_again(gpu: FakeGPU, tmp_path: Path, damage: str) -> None:
    gpu.place("vit_classic_wide_heads")
    path = tmp_path / "cache/memory_peaks.json"
    (key,) = json.loads(path.read_text())
    path.write_text(damage.replace("KEY", key))
    assert gpu.place("vit_classic_wide_heads").micro_batch == 16
    assert len(gpu.measured) == 2 and json.loads(path.read_text())[key] == {"fixed": 0.0, "per_image": 50 * MB}


def test_what_is_in_the_cache_counts(gpu: FakeGPU, tmp_path: Path) -> None:
    gpu.place("vit_classic_wide_heads")
    path = tmp_path / "cache/memory_peaks.json"
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: {"fixed": 0.0, "per_image": 120 * MB}}))
    assert gpu.place("vit_classic_wide_heads").micro_batch == 8


def test_a_cache_that_cannot_be_written_is_done_without(gpu: FakeGPU, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert gpu.place().micro_batch == gpu.place().micro_batch == 16
    assert len(gpu.measured) == 4


def test_where_few_images_fit_blocks_are_recomputed(gpu: FakeGPU) -> None:
    gpu.room = 199 * MB  # 3 images of 50 MB, or (199 - 100) / 3 and 39 with recomputation
    for name in ARMS:
        found = gpu.place(name)
        assert found.model.recompute and found.micro_batch == 32
    gpu.room = 201 * MB
    found = gpu.place("vit_classic_wide_heads")
    assert not found.model.recompute and found.micro_batch == 4


def test_memory_that_does_not_suffice_to_measure_is_too_little(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = gpu._measure

    def short(model: VisionTransformer, protocol: Protocol, precision: str) -> Peak:
        if not model.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(model, protocol, precision)

    monkeypatch.setattr(placed, "measure_peak", short)
    found = gpu.place()
    assert found.model.recompute and all(recomputed for _, _, recomputed in gpu.measured)
    assert gpu.place(recompute=False).micro_batch == 1, "training says what does not fit, and what to do"
    monkeypatch.setattr(placed, "measure_peak", lambda *args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        gpu.place(recompute=False)


def test_graphs_are_not_for_worker_groups(gpu: FakeGPU) -> None:
    assert gpu.place().chosen.graphs and not gpu.place(workers=2).chosen.graphs


def test_small_batches_need_no_recomputation(gpu: FakeGPU) -> None:
    gpu.room = 199 * MB
    found = gpu.place("vit_classic_wide_heads", dataclasses.replace(DIGITS, batch_size=3))
    assert not found.model.recompute and found.micro_batch == 3
    found = gpu.place("vit_classic_wide_heads", dataclasses.replace(DIGITS, batch_size=6), workers=2)
    assert not found.model.recompute and found.micro_batch == 3


@pytest.mark.parametrize(("room", "micro_batch"), [(199 * MB, 3), (40 * MB, 1), (-5 * MB, 1)])
def test_who_says_no_recomputation_gets_none(gpu: FakeGPU, room: float, micro_batch: int) -> None:
    gpu.room = room
    found = gpu.place("vit_classic_wide_heads", recompute=False)
    assert not found.model.recompute and found.micro_batch == micro_batch and found.evaluation_batch >= 1


def test_a_micro_batch_that_is_asked_for_is_taken_as_it_is(gpu: FakeGPU) -> None:
    gpu.room = 199 * MB
    found = gpu.place(micro_batch=2)
    assert found.micro_batch == 2 and not found.model.recompute and not gpu.measured and gpu.tried == [2]
    assert gpu.place(micro_batch=99).micro_batch == 32


def test_evaluation_takes_more_images_at_once(gpu: FakeGPU) -> None:
    gpu.room = 500 * MB
    found = gpu.place("vit_classic_wide_heads")
    assert found.micro_batch == even_split(32, 10) == 8
    assert found.evaluation_batch == 32 and 500 * MB / evaluation_bytes(found.model, "bf16") > 32
    large = dataclasses.replace(DIGITS, batch_size=10**6)
    each = evaluation_bytes(found.model, "bf16")
    assert gpu.place("vit_classic_wide_heads", large).evaluation_batch == even_split(10**6, int(500 * MB // each))


def test_workers_share_a_batch(gpu: FakeGPU) -> None:
    found = gpu.place(workers=3)
    assert found.micro_batch == found.evaluation_batch == 11 and gpu.tried[0] == 11


def test_a_share_of_the_memory_is_a_share(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gpu.place("vit_classic_wide_heads", recompute=False).micro_batch
    total = placed.device_memory(GPU)
    monkeypatch.setattr(placed, "device_memory", lambda device: 2 * total)
    assert gpu.place("vit_classic_wide_heads", recompute=False, memory_share=0.5).micro_batch == whole
