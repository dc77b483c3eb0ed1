"""The engine `graphs` replays whole batches. Recorded here by a fake that runs the work again at each replay, into the
same memory, as a CUDA graph does.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch import Tensor

from service.devices import device_named
from service.devices.cpu import CpuDevice
from service.devices.device import Recording
from service.errors import ModelStoreError, ServiceError
from service.inference.engines import choosing
from service.inference.engines.choosing import Placed, put_engine
from service.inference.engines.graphs import MOST_CHANGED, GraphedDetector
from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.inference.verification import SIZE
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import Detections, DetectOptions, Query, VerifiedValue
from service.training.loop import evaluation_info
from tests.unit.inference.engines.networks import FAMILIES, SMALL, picture, weights_of
from tests.unit.inference.engines.test_parity import answers, assert_same
from tests.unit.modeling.test_waiting import as_on_cuda, counted_waits

FAMILY = "fpn with masks"
CONFIG = ModelConfig.model_validate(SMALL | FAMILIES[FAMILY] | {"transform": {"min_size": 128, "max_size": 192}})
INFO = evaluation_info(CONFIG)
WIDE, HIGH = (120, 180), (180, 120)
PICTURES = [torch.from_numpy(picture(*WIDE, seed=0).pixels)]


class FakeRecording:
    def __init__(self, work: Callable[[], Tensor]) -> None:
        self._work = work
        self.output = work()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self._work())


class RecordingDevice(CpuDevice):
    """A CPU that can record."""

    can_record = True

    def __init__(self, label: str = "cpu") -> None:
        super().__init__(label)
        self.recordings: list[FakeRecording] = []
        self.releases = 0
        self.fails = False

    def recorder(self) -> RecordingDevice:
        return self

    def record(self, work: Callable[[], Tensor]) -> Recording:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recordings.append(FakeRecording(work))
        return self.recordings[-1]

    def release(self) -> None:
        self.releases += 1

    @property
    def sizes(self) -> list[int]:
        """The number of images of each recording."""
        return [len(one.output) for one in self.recordings]


@pytest.fixture
def device() -> Iterator[RecordingDevice]:
    with as_on_cuda():
        yield RecordingDevice()


def predictor_on(
    device: RecordingDevice, *, capacity: int = 4096, take_check: Callable[[], Tensor] | None = None
) -> Predictor:
    model = build_model(CONFIG)
    model.load_state_dict(weights_of(FAMILY))
    graphs = GraphedDetector(
        model.eval(),
        device=device,
        capacity=capacity,
        take_check=take_check,
    )
    placed = Placed("graphs", graphs=graphs)
    predictor = Predictor(model, info=INFO, device=torch.device("cpu"), placed=placed)
    predictor._may_compile = False  # as after the warm-up
    return predictor


def plain() -> Predictor:
    model = build_model(CONFIG)
    model.load_state_dict(weights_of(FAMILY))
    return Predictor(model, info=INFO, device=torch.device("cpu"))


def queries(count: int, size: tuple[int, int] = WIDE, **options: object) -> list[Query]:
    wanted = replace(DetectOptions(score_thresh=0.0), **options)  # type: ignore[arg-type]  # any of its fields
    return [Query(picture(*size, seed=seed), wanted) for seed in range(count)]


def assert_all_same(found: Sequence[Detections], expected: Sequence[Detections]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) > 0
        assert_same(ours, theirs, scale=2)


def test_the_second_batch_of_a_kind_is_recorded_and_later_ones_are_replayed(device: RecordingDevice) -> None:
    predictor, reference = predictor_on(device), plain()
    answers(predictor, queries(2))
    assert device.sizes == []
    for size in (WIDE, HIGH):  # pictures of another size share the memory of the input
        for count in (2, 2):
            found = answers(predictor, queries(count, size))
            assert_all_same(found, answers(reference, queries(count, size)))
    assert device.sizes == [2, 2]
    assert_all_same(answers(predictor, queries(2)), answers(reference, queries(2)))
    # One more each: a recording is replayed once when it is made.
    assert [one.replays for one in device.recordings] == [4, 2]


def test_a_batch_is_filled_up_with_blank_pictures(device: RecordingDevice) -> None:
    predictor, reference = predictor_on(device), plain()
    for count in (4, 4, 3):  # then three, where the fourth picture was
        found = answers(predictor, queries(count))
    assert device.sizes == [4]
    assert device.recordings[0].replays == 3
    assert_all_same(found, answers(reference, queries(3)))


def test_a_replayed_batch_of_mixed_options_waits_once(device: RecordingDevice) -> None:
    predictor, reference = predictor_on(device), plain()
    mixed = [
        *queries(1, with_masks=False, max_detections=2),
        *queries(1, score_thresh=0.3, nms_thresh=0.2),
        *queries(1, label_ids=frozenset({1}), class_agnostic_nms=True),
    ]
    for _ in range(2):
        answers(predictor, mixed)
    with counted_waits() as waits:
        found = answers(predictor, mixed)
    assert waits.count == 1  # for the answer
    assert [one.masks is None for one in found] == [True, False, False]
    assert_all_same(found, answers(reference, mixed))


def test_what_no_recording_holds_for_takes_the_usual_path(device: RecordingDevice) -> None:
    predictor, reference = predictor_on(device), plain()
    for others in (
        queries(9),
        queries(1, max_detections=INFO.max_detections + 1),
        queries(1, proposals=((0.0, 0.0, 100.0, 100.0),)),
        queries(1, roi_op="roi_pool"),
    ):
        for _ in range(2):
            found = answers(predictor, others)
        assert_all_same(found, answers(reference, others))
    assert device.recordings == []


def test_more_candidates_than_fit_take_the_usual_path(device: RecordingDevice) -> None:
    predictor, reference = predictor_on(device, capacity=5), plain()
    for _ in range(3):
        found = answers(predictor, queries(1))
    assert device.recordings[0].replays == 3
    assert_all_same(found, answers(reference, queries(1)))


def test_what_cannot_be_recorded_is_tried_once(device: RecordingDevice, caplog: pytest.LogCaptureFixture) -> None:
    predictor, reference = predictor_on(device), plain()
    device.fails = True
    for _ in range(4):
        found = answers(predictor, queries(1))
    device.fails = False
    for _ in range(3):  # nor is anything else: the capture that failed may have left the allocator in disorder
        answers(predictor, queries(2))
    assert device.recordings == []
    assert_all_same(found, answers(reference, queries(1)))
    assert caplog.text.count("cannot be recorded") == 1


def test_infinities_in_a_replayed_batch_are_noticed(device: RecordingDevice) -> None:
    finite = torch.ones(())
    predictor = predictor_on(device, take_check=lambda: finite.clone())
    assert predictor._placed.graphs is not None
    images = [torch.from_numpy(query.image.pixels) for query in queries(1)]
    selections = [predictor._selection(query.options) for query in queries(1)]
    for value in (1, 1, 0):
        finite.fill_(value)
        replayed = predictor._placed.graphs.detect(images, selections, with_masks=[False])
    assert replayed is not None
    assert replayed[1] is False


def test_the_largest_are_recorded_first_and_all_read_one_input(device: RecordingDevice) -> None:
    graphs = predictor_on(device)._placed.graphs
    assert graphs is not None
    graphs.record([(64, 64), (128, 192)], with_masks=[False], pictures=PICTURES)
    batches = [one.inputs.batch for one in graphs._recorded.values()]
    keys = [(len(one), *one.shape[2:]) for one in batches]
    areas = [int(np.prod(key)) for key in keys]
    assert len(keys) == 8
    assert areas == sorted(areas, reverse=True)
    assert len({one.data_ptr() for one in batches}) == 1
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in batches)
    graphs.record([(4096, 4096)], with_masks=[False], pictures=PICTURES)  # larger than any picture becomes
    assert len(graphs._recorded) == 8


def test_the_warm_up_records_the_buckets_in_every_number_with_masks_and_without(device: RecordingDevice) -> None:
    predictor, reference = predictor_on(device), plain()
    for one in (predictor, reference):
        # No picture of this network needs the last.
        one._model.transform.buckets = ((128, 192), (4000, 4000))
    predictor.info, predictor._may_compile = replace(INFO, engine="graphs"), True
    predictor.warm_up()
    assert predictor._placed.graphs is not None
    keys = list(predictor._placed.graphs._recorded)
    assert keys == [((128, 192), count, with_masks) for count in (8, 4, 2, 1) for with_masks in (True, False)]
    replays = [one.replays for one in device.recordings]
    found = answers(predictor, queries(3))  # the first batch of its kind
    assert sum(one.replays for one in device.recordings) == sum(replays) + 1
    assert len(device.recordings) == len(keys)
    assert_all_same(found, answers(reference, queries(3)))


def test_without_buckets_the_warm_up_records_the_pictures_of_the_verification(device: RecordingDevice) -> None:
    predictor = predictor_on(device)
    predictor.warm_up()
    assert predictor._placed.graphs is not None
    size = predictor.group_key(SIZE)
    assert list(predictor._placed.graphs._recorded) == [
        (size, count, with_masks) for count in (2, 1) for with_masks in (True, False)
    ]
    # Blank pictures would show nothing.
    assert all((one.output[:, 0] > 0).all() for one in device.recordings)


def test_a_recording_that_finds_something_else_is_not_used(
    device: RecordingDevice, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, reference = predictor_on(device), plain()

    def replay(recording: FakeRecording) -> None:
        """As if a box of each object was left from other pictures."""
        recording.output.copy_(recording._work())
        recording.output[:, 3::4] += 5

    monkeypatch.setattr(FakeRecording, "replay", replay)
    for _ in range(3):
        found = answers(predictor, queries(1))
    assert_all_same(found, answers(reference, queries(1)))
    assert predictor._placed.graphs is not None
    assert predictor._placed.graphs.largest_change == 1
    assert caplog.text.count("cannot be recorded") == 1


def test_an_engine_that_cannot_replay_is_refused_by_name(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = RecordingDevice()

    def load(fails: bool) -> Predictor:
        device.fails = fails
        predictor = load_predictor(store(FAMILY), device="cpu", engine="graphs", precision="float32")
        predictor._placed.graphs._device = device  # type: ignore[union-attr]  # it has some
        predictor.warm_up()
        return predictor

    def uncompiled(model: GeneralizedRCNN) -> Mock:
        return Mock(parts=model.own_parts, take_uncompiled=list, uncompiled=[])

    with (
        as_on_cuda(),
        patch.object(choosing, "CompiledNetwork", uncompiled),
        patch.multiple(CpuDevice, can_record=True, compiler_problem=None),
    ):
        verification = load(fails=False).info.verification
        assert verification is not None
        assert verification.values["recordings"] == VerifiedValue(0.0, MOST_CHANGED)
        with pytest.raises(ModelStoreError, match="engine 'graphs' cannot record a batch: operation not permitted"):
            load(fails=True)


def test_what_a_recording_reads_stays_while_it_may_be_replayed(
    device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anchors of other sizes push those of a recorded one out of their cache, but not out of memory."""
    predictor = predictor_on(device)
    for _ in range(2):
        answers(predictor, queries(1))
    anchors = weakref.ref(next(iter(predictor._model.rpn._anchors.values())))
    monkeypatch.setattr("service.modeling.rpn._MOST_ANCHOR_BYTES", 1)
    answers(predictor, queries(1, HIGH))
    assert len(predictor._model.rpn._anchors) == 1
    gc.collect()
    assert anchors() is not None
    predictor.release_memory()
    device.recordings.clear()  # the fakes run the work again, so they hold what it reads too
    assert anchors() is None


def test_recordings_of_the_most_buckets_fit_and_there_is_a_bound(
    device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is left out: recordings are counted."""
    graphs = predictor_on(device)._placed.graphs
    assert graphs is not None
    monkeypatch.setattr("service.inference.engines.graphs.detect_fixed", lambda *args, **options: Mock(was_read=()))
    monkeypatch.setattr("service.inference.engines.graphs._packed", lambda *args: torch.zeros(1))
    monkeypatch.setattr(GraphedDetector, "_check", lambda *args: None)
    graphs.record([(128, columns) for columns in range(1, 12)], with_masks=[True, False], pictures=PICTURES)
    assert len(graphs._recorded) == 11 * 4 * 2
    graphs.record([(64, columns) for columns in range(1, 12)], with_masks=[True, False], pictures=PICTURES)
    assert len(graphs._recorded) == 96


def test_recordings_are_bounded_and_released(device: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.inference.engines.graphs._MOST_RECORDINGS", 2)
    predictor = predictor_on(device)
    for count in (1, 1, 2, 2, 4, 4, 4):
        answers(predictor, queries(count))
    assert device.sizes == [1, 2]
    memory = weakref.ref(device.recordings[0])
    device.recordings.clear()
    predictor.release_memory()
    gc.collect()
    assert memory() is None
    assert device.releases == 1


def test_unloading_releases_recordings(device: RecordingDevice) -> None:
    predictor = predictor_on(device)
    for _ in range(2):
        answers(predictor, queries(1))
    recording = weakref.ref(device.recordings.pop())
    del predictor
    gc.collect()
    assert recording() is None


def test_the_engine_is_for_cuda_and_never_chosen_by_itself() -> None:
    cpu = device_named("cpu")
    with pytest.raises(ServiceError, match="runs on CUDA, not on cpu"):
        put_engine(build_model(CONFIG), engine="graphs", device=cpu, precision="float32", key="", cache_dir=None)
    assert device_named("cuda:0").fastest_engine == "compiled"
