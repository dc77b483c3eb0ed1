"""One scene, written in every form that people and tools write: its own objects as answers must reach an AP of 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from service.modeling.config import ModelConfig
from service.structures import Detections, ModelInfo, Prediction, Query
from service.training.dataset import load_coco
from service.training.evaluation import evaluate
from service.training.loop import evaluation_info

HEIGHT, WIDTH = 60, 80
LABELS = ("disc", "box", "rod")
# By picture: label and box (x1, y1, x2, y2) in the upright picture. No object covers another; their sizes are such
# that a full mask of 28 x 28, spread over the box, has just its pixels.
SCENE = (
    ((0, (2, 3, 20, 29)), (1, (30, 5, 50, 20)), (0, (55, 30, 75, 54))),
    ((2, (1, 2, 17, 26)), (1, (20, 20, 46, 44))),
    (),
)
INFO = evaluation_info(
    ModelConfig.model_validate(
        {
            "architecture": "mask_rcnn",
            "labels": list(LABELS),
            "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16},
        }
    )
)
# EXIF orientation: how Pillow makes the stored picture from the upright one, which is the turn undone.
UNTURNED = {1: None, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 5: Image.Transpose.TRANSPOSE}


class Oracle:
    """Knows the scene by a picture's grey level, whatever the annotation file says; `spoilt` boxes are halved."""

    def __init__(self, spoilt: int | None = None) -> None:
        self.info: ModelInfo = INFO
        self._spoilt = spoilt

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        [query] = queries
        assert query.image.size == (HEIGHT, WIDTH)
        objects = SCENE[round(float(query.image.pixels.mean()) / 50)]
        boxes = np.array([box for _, box in objects], np.float32).reshape(-1, 4)
        labels = np.array([label + 1 for label, _ in objects], np.int64)
        spoilt = labels == self._spoilt
        boxes[spoilt, 2] = (boxes[spoilt, 0] + boxes[spoilt, 2]) / 2
        if query.options.label_ids is not None:
            chosen = np.isin(labels, sorted(query.options.label_ids))
            boxes, labels = boxes[chosen], labels[chosen]
        masks = np.ones((len(boxes), 28, 28), np.float32)
        return [Prediction(Detections(boxes, labels, np.linspace(1, 0.5, len(boxes), dtype=np.float32), masks), {}, 1)]


def stored(box: Sequence[float], orientation: int) -> tuple[float, float, float, float]:
    """An upright box in the stored picture, by hand: what each orientation does to a corner, undone."""
    x1, y1, x2, y2 = box
    return {
        1: (x1, y1, x2, y2),
        5: (y1, x1, y2, x2),
        6: (y1, WIDTH - x2, y2, WIDTH - x1),
        8: (HEIGHT - y2, x1, HEIGHT - y1, x2),
    }[orientation]


def segmentation(shape: str, box: Sequence[float], size: tuple[int, int]) -> Any:
    x1, y1, x2, y2 = box
    polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
    bitmap = np.zeros(size, np.uint8, order="F")
    bitmap[round(y1) : round(y2), round(x1) : round(x2)] = 1
    rle = coco_mask.encode(bitmap)
    compressed = {"size": list(size), "counts": rle["counts"].decode()}
    runs = np.flatnonzero(np.diff(np.r_[0, bitmap.ravel(order="F"), 1 - bitmap[-1, -1]]))
    plain = {"size": [float(side) for side in size], "counts": np.diff(np.r_[0, runs, bitmap.size]).tolist()}
    points = [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    halves = [[x1, y1, x1 + 1, y1, x1 + 1, y2, x1, y2], [x1 + 1, y1, x2, y1, x2, y2, x1 + 1, y2]]
    return {
        "polygons": [polygon],
        "flat": polygon,
        "points": points,
        "points in a list": [points],
        "points by name": [{"x": x, "y": y} for x, y in points],
        "nested once more": [[polygon]],
        "texts": [[str(one) for one in polygon]],
        "parts": halves,
        "a bad part": [polygon, [x1, y1, x2, y2], []],
        "compressed": compressed,
        "plain": plain,
        "list of RLEs": [compressed],
        "mixed": [halves[0], compressed],
        "as JSON": json.dumps([polygon]),
    }[shape]


SHAPES = [
    "polygons",
    "flat",
    "points",
    "points in a list",
    "points by name",
    "nested once more",
    "texts",
    "parts",
    "a bad part",
    "compressed",
    "plain",
    "list of RLEs",
    "mixed",
    "as JSON",
]


@st.composite
def ids(draw: st.DrawFn, count: int) -> list[tuple[Any, Any]]:
    """Ids of a table's rows as they are written in it and as other tables refer to them."""
    numbers = draw(st.lists(st.integers(-3, 2**60), min_size=count, max_size=count, unique=True))
    write = draw(st.sampled_from(["rising", "any", "text", "word", "padded", "float"]))
    if write in ("rising", "float"):
        numbers = list(range(count))
    rows: list[tuple[Any, Any]] = []
    for number in numbers:
        as_text, refers_by_text = str(number), draw(st.booleans())
        reference: Any = as_text if refers_by_text else number
        row: Any = {"text": as_text, "word": f"id-{number}", "float": float(number)}.get(write, number)
        if write == "padded" and number >= 0:
            row = as_text.zfill(22)
        rows.append((row, row if write == "word" else reference))
    return rows


@st.composite
def forms(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "images": draw(ids(len(SCENE))),
        "categories": draw(ids(len(LABELS) + 1)),
        "annotations": draw(st.one_of(st.just(None), ids(5))),
        "category_order": draw(st.permutations(range(len(LABELS)))),
        "annotation_order": draw(st.permutations(range(5))),
        "groups": draw(st.booleans()),
        "iscrowd": draw(st.sampled_from(["missing", 0, False, "0", None, 0.0])),
        "area": draw(st.sampled_from(["missing", "right", None, 0, -5, 1e12, "text"])),
        "size": draw(st.sampled_from(["whole", "float", "text", "missing"])),
        "name": draw(st.sampled_from(["plain", "folder", "backslash", "absolute", "upper", "quoted"])),
        "bbox": draw(st.sampled_from(["whole", "float", "text", "missing", "null", "zeros"])),
        "shape": draw(st.sampled_from(SHAPES)),
        "orientation": draw(st.sampled_from(sorted(UNTURNED))),
        "is_stored": draw(st.booleans()),
        "mark": draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])),
    }


def write(folder: Path, form: dict[str, Any]) -> Path:
    (folder / "images").mkdir()
    turns = form["orientation"] if form["is_stored"] and form["size"] != "missing" else 1
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for place in form["category_order"]:
        row = {"id": form["categories"][place][0], "name": LABELS[place], "supercategory": "things"}
        document["categories"].append(row)
    if form["groups"]:
        group = {"id": form["categories"][-1][0], "name": "things", "supercategory": "none"}
        document["categories"].insert(0, group)
    annotations = []
    for number, (objects, (image_id, reference)) in enumerate(zip(SCENE, form["images"], strict=True)):
        name = f"picture {number}.png"
        write_picture(folder / "images" / name, number, form["orientation"])
        document["images"].append({"id": image_id, "file_name": named(form["name"], name), **sizes(form, turns)})
        annotations += [annotation(form, label, stored(box, turns), reference, turns) for label, box in objects]
    annotations = [annotations[place] for place in form["annotation_order"]]
    if form["annotations"] is not None:
        annotations = [{**one, "id": key} for one, (key, _) in zip(annotations, form["annotations"], strict=True)]
    document["annotations"] = annotations
    path = folder / "val.json"
    path.write_text(json.dumps(document), encoding=form["mark"])
    return path


def write_picture(path: Path, number: int, orientation: int) -> None:
    picture = Image.fromarray(np.full((HEIGHT, WIDTH, 3), 50 * number, np.uint8))
    undo = UNTURNED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (picture if undo is None else picture.transpose(undo)).save(path, exif=exif)


def named(how: str, name: str) -> str:
    return {
        "folder": f"images/{name}",
        "backslash": f"images\\{name}",
        "absolute": f"C:\\data set\\train\\{name}",
        "upper": name.upper(),
        "quoted": name.replace(" ", "%20"),
    }.get(how, name)


def sizes(form: dict[str, Any], turns: int) -> dict[str, Any]:
    height, width = (HEIGHT, WIDTH) if turns == 1 else (WIDTH, HEIGHT)
    make: Any = {"whole": int, "float": float, "text": str, "missing": None}[form["size"]]
    return {} if make is None else {"height": make(height), "width": make(width)}


def annotation(form: dict[str, Any], label: int, box: Sequence[float], image: Any, turns: int) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    sides = [x1, y1, x2 - x1, y2 - y1]
    size = (HEIGHT, WIDTH) if turns == 1 else (WIDTH, HEIGHT)
    boxes: dict[str, Any] = {
        "float": [float(one) for one in sides],
        "text": [str(one) for one in sides],
        "null": None,
        "zeros": [0, 0, 0, 0],
    }
    row = {
        "image_id": image,
        "category_id": form["categories"][label][1],
        "segmentation": segmentation(form["shape"], box, size),
        "bbox": boxes.get(form["bbox"], sides),
        "iscrowd": form["iscrowd"],
        "area": sides[2] * sides[3] if form["area"] == "right" else form["area"],
    }
    missing = [key for key in ("bbox", "iscrowd", "area") if form[key] == "missing"]
    return {key: value for key, value in row.items() if key not in missing}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms())
def test_the_objects_themselves_reach_an_ap_of_one_in_every_form(form: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        dataset = load_coco(write(Path(folder), form), labels=LABELS, masks="required")
        evaluation = evaluate(Oracle(), dataset)
        spoilt = evaluate(Oracle(spoilt=2), dataset)
    assert evaluation.masks is not None
    for figures in (evaluation.boxes, evaluation.masks):
        assert figures.ap == pytest.approx(1.0)
        assert figures.ap_by_label == pytest.approx(dict.fromkeys(LABELS, 1.0))
    # The boxes of one label are spoilt, so its figure falls and no other.
    assert spoilt.boxes.ap_by_label == pytest.approx({"disc": 1.0, "box": 0.1, "rod": 1.0}, abs=0.01)
    assert spoilt.boxes.ap50_by_label["disc"] == pytest.approx(1.0)


PLAIN: dict[str, Any] = {
    "images": [(1, 1), (2, 2), (3, 3)],
    "categories": [(1, 1), (2, 2), (3, 3), (9, 9)],
    "annotations": [(number, number) for number in range(1, 6)],
    "category_order": [0, 1, 2],
    "annotation_order": [0, 1, 2, 3, 4],
    "groups": False,
    "iscrowd": 0,
    "area": "right",
    "size": "whole",
    "name": "plain",
    "bbox": "whole",
    "shape": "polygons",
    "orientation": 1,
    "is_stored": False,
    "mark": "utf-8",
}


def test_a_plain_file_is_taken_as_it_is(tmp_path: Path) -> None:
    dataset = load_coco(write(tmp_path, PLAIN))
    assert dataset.report.lines() == []
    assert dataset.summary() == "3 pictures, 5 objects (disc 2, box 2, rod 1) with masks; 1 pictures without objects"


@pytest.mark.parametrize("orientation", [5, 6, 8])
def test_pictures_annotated_as_they_are_stored_are_told_by_their_size(tmp_path: Path, orientation: int) -> None:
    form = {**PLAIN, "orientation": orientation, "is_stored": True}
    dataset = load_coco(write(tmp_path, form))
    assert any("3 pictures that EXIF turns, annotated as they are stored" in line for line in dataset.report.lines())
    np.testing.assert_array_equal(dataset.samples[0].boxes[0], SCENE[0][0][1])


@pytest.mark.parametrize(("frame", "x1"), [("auto", 2.0), ("upright", 2.0), ("stored", 60.0)])
def test_where_no_size_tells_the_option_does(tmp_path: Path, frame: Any, x1: float) -> None:
    path = write(tmp_path, PLAIN)
    for picture in (tmp_path / "images").iterdir():
        turned = Image.open(picture)
        exif = Image.Exif()
        exif[0x0112] = 2  # mirrored left to right: the size is the same
        turned.save(picture, exif=exif)
    dataset = load_coco(path, frame=frame)
    assert dataset.samples[0].boxes[0, 0] == x1  # 80 - 20 where it is mirrored
    assert any("--annotated" in line for line in dataset.report.lines()) is (frame == "auto")


def test_some_of_the_labels_are_evaluated_alone(tmp_path: Path) -> None:
    dataset = load_coco(write(tmp_path, PLAIN), labels=["rod", "disc"], leaves_out_others=True)
    assert dataset.report.left_out == {"annotations of categories that are no label": 2}
    assert dataset.counts() == {"rod": 1, "disc": 2}
    assert evaluate(Oracle(), dataset).boxes.ap_by_label == pytest.approx({"rod": 1.0, "disc": 1.0})


def test_figures_of_masks_by_size_go_by_the_masks_own_areas(tmp_path: Path) -> None:
    # A false mask in a corner of its large box is a small one, and lowers AP of small masks.
    dataset = load_coco(write(tmp_path, PLAIN))

    class WithFalseMask(Oracle):
        def predict(self, queries: Sequence[Query]) -> list[Prediction]:
            [prediction] = super().predict(queries)
            found = prediction.detections
            if not len(found):
                return [prediction]
            assert found.masks is not None
            masks = np.concatenate([np.zeros((1, 28, 28), np.float32), found.masks])
            masks[0, :4, :4] = 1
            boxes = np.concatenate([np.array([[20, 6, 79, 59]], np.float32), found.boxes])
            labels = np.concatenate([found.labels[:1], found.labels])
            scores = np.concatenate([np.ones(1, np.float32), found.scores * 0.9])
            return [Prediction(Detections(boxes, labels, scores, masks), {}, 1)]

    plain, false = evaluate(Oracle(), dataset).masks, evaluate(WithFalseMask(), dataset).masks
    assert plain is not None
    assert false is not None
    # By its box of 59 x 53 pixels it would be medium, and AP small would stay 1.
    assert plain.ap_small == pytest.approx(1.0)
    assert false.ap_small < 0.99


def refusal(folder: Path, change: Any, **options: Any) -> str:
    path = write(folder, PLAIN)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    try:
        load_coco(path, masks="required", **options)
    except Exception as error:
        return str(error)
    raise AssertionError("accepted")


def edit(table: str, place: int, **values: Any) -> Any:
    return lambda document: document[table][place].update(values)


RLE = {"size": [HEIGHT, WIDTH], "counts": [10, 20]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("images", 1, id=1), "image 1: the id is used 2 times"),
        (edit("images", 1, id="1"), "image 1: the id is used 2 times"),
        (edit("categories", 1, id=1.0), "category 1: the id is used 2 times"),
        (edit("categories", 1, name="disc"), "category 'disc' stands there 2 times: ids 1, 2"),
        (edit("annotations", 1, id=1), "annotation 1: the id is used more than once"),
        (edit("images", 1, file_name="picture 0.png"), "image 2: picture 0.png is image 1 already"),
        (edit("images", 0, id=None), "images[0]: expected id and file_name"),
        (edit("images", 0, id=[1]), "images[0]: expected id and file_name"),
        (edit("images", 0, id=True), "images[0]: expected id and file_name"),
        (edit("images", 0, width=60, height=80), "width and height look exchanged"),
        (edit("images", 0, width=10), "expected a picture of 10 x 60, got 80 x 60"),
        (edit("images", 0, width=80.5), "expected width and height in pixels, got 80.5"),
        (edit("annotations", 0, iscrowd=2), "annotation 1: expected iscrowd 0 or 1, got 2"),
        (edit("annotations", 0, bbox=None, segmentation=None), "annotation 1: expected"),
        (edit("annotations", 0, segmentation=RLE), "expected run lengths that add up to the 4800 pixels of 80 x 60"),
        (edit("annotations", 0, segmentation={**RLE, "counts": "1"}), "expected run lengths that add up"),
        (edit("annotations", 0, segmentation={**RLE, "counts": "o"}), "the end is missing"),
        (edit("annotations", 0, segmentation={**RLE, "counts": [-1, 4801]}), "expected whole numbers from 0"),
        (edit("annotations", 0, segmentation={**RLE, "size": [WIDTH, HEIGHT]}), "expected an RLE of size [60, 80]"),
        (edit("annotations", 0, segmentation={**RLE, "counts": [4800]}), "expected a mask with at least one pixel"),
        (edit("annotations", 0, segmentation=[[1e300, 0, 5, 5, 9, 9]]), "lies far outside its image"),
        (edit("annotations", 0, segmentation=[[True, 0, 5, 5, 9, 9]]), "expected polygons of at least 3 points"),
        (edit("annotations", 0, segmentation=7), "expected polygons of at least 3 points"),
        (lambda document: document["annotations"].append([]), "annotations[5]: expected an object, got list"),
        (lambda document: document.update(annotations={}), "expected lists under"),
        (
            lambda document: [one.update(bbox=[0.1, 0.1, 0.5, 0.5]) for one in document["annotations"]],
            "they look like fractions of the picture",
        ),
        (
            lambda document: [
                one.update(bbox=[x, y, x + w, y + h]) for one in document["annotations"] for x, y, w, h in [one["bbox"]]
            ],
            "boxes look like [x1, y1, x2, y2]",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_with_a_reason(tmp_path: Path, change: Any, words: str) -> None:
    assert words in refusal(tmp_path, change)


def test_the_report_tells_what_may_be_dropped_from_what_stops(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        edit("annotations", 0, bbox=[70, 0, 50, 10])(document)
        edit("images", 1, file_name="gone.png")(document)

    both = refusal(tmp_path, change).splitlines()
    assert "2 problem(s)" in both[0]
    assert "no file gone.png" in both[1]
    assert "--drop-bad-annotations would leave out" in both[2]
    assert "annotation 1" in both[3]
    assert "does not help against" in both[4]


def test_dropping_bad_annotations_still_names_what_stops(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        edit("annotations", 0, bbox=[70, 0, 50, 10])(document)
        edit("images", 1, file_name="gone.png")(document)

    text = refusal(tmp_path, change, drop_bad=True)
    assert "1 problem(s)" in text
    assert "annotation 1:" not in text
    assert "The 1 bad annotation(s) would be left out" in text


def test_with_bad_annotations_dropped_copies_go_and_shared_ids_are_mended(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN)
    document = json.loads(path.read_text())
    document["annotations"].append(document["annotations"][0])
    document["annotations"][2]["id"] = 2
    path.write_text(json.dumps(document))
    dataset = load_coco(path, drop_bad=True)
    assert sum(dataset.counts().values()) == 5
    assert dataset.report.left_out == {"annotations that repeat another, id and all": 1}
    assert dataset.report.repaired == {"ids of annotations that another has too, numbered anew": 1}


def test_a_picture_that_is_cut_off_is_found_before_anything_starts(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN)
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture = tmp_path / "images" / "picture 1.png"
    for suffix in ("png", "jpg"):
        Image.fromarray(noise).save(tmp_path / f"noise.{suffix}")
        data = (tmp_path / f"noise.{suffix}").read_bytes()
        picture.write_bytes(data[: len(data) // 2])
        with pytest.raises(Exception, match=r"image 2 \(picture 1\.png\): the .* data (are truncated|end)"):
            load_coco(path)


def test_another_object_or_another_pixel_is_another_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path, PLAIN)
    first = load_coco(path).fingerprint
    assert load_coco(path).fingerprint == first
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"][2] += 1
    path.write_text(json.dumps(document))
    assert load_coco(path).fingerprint != first
    write_picture(tmp_path / "images" / "picture 0.png", 1, 1)
    assert len({first, load_coco(path).fingerprint, load_coco(path, masks="none").fingerprint}) == 3
