"""One picture with the same object in every tool's layout comes out the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from service.cli import app
from service.errors import DatasetError
from service.training.conversion.sources import layout_of
from service.training.conversion.xml_reader import read_xml
from service.training.dataset import CocoDataset, load_coco

BOX = (10.0, 20.0, 30.0, 50.0)  # x1, y1, x2, y2 in a picture of 80 x 60
POLYGON = [10, 20, 30, 20, 30, 50, 10, 50]


def picture(path: Path, grey: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60), (grey, grey, grey)).save(path)


def write_yolo(root: Path) -> None:
    for split, name, grey in (("train", "a", 90), ("valid", "b", 95)):
        picture(root / split / "images" / f"{name}.png", grey)
        labels = root / split / "labels"
        labels.mkdir()
        (labels / f"{name}.txt").write_text("1 0.25 0.583333333 0.25 0.5\n\n")
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['dog', 'cat']\n")


def write_yolo_polygons(root: Path) -> None:
    write_yolo(root)
    numbers = " ".join(str(value / (60 if place % 2 else 80)) for place, value in enumerate(POLYGON))
    for path in root.rglob("*.txt"):
        path.write_text(f"1 {numbers}\n")
    (root / "data.yaml").write_text(
        f"path: {root}\ntrain: train/images\nval: valid/images\nnames:\n  0: dog\n  1: cat\n"
    )


VOC = """<annotation><filename>{name}.png</filename><object><name>cat</name>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>50</ymax></bndbox></object></annotation>"""


def write_voc(root: Path) -> None:
    for split, name, grey in (("train", "a", 90), ("val", "b", 95)):
        picture(root / "JPEGImages" / f"{name}.png", grey)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(VOC.format(name=name))
        main = root / "ImageSets" / "Main"
        main.mkdir(parents=True, exist_ok=True)
        (main / f"{split}.txt").write_text(f"{name}\n")


def write_labelme(root: Path) -> None:
    for name in ("a", "c"):
        picture(root / f"{name}.png")
        points = np.array(POLYGON).reshape(-1, 2).tolist()
        shape = {"label": "cat", "shape_type": "polygon", "points": points, "group_id": None}
        (root / f"{name}.json").write_text(json.dumps({"imagePath": f"..\\x\\{name}.png", "shapes": [shape]}))


CVAT = """<?xml version="1.0"?><annotations><meta><job><labels><label><name>cat</name></label></labels></job></meta>
<image id="0" name="a.png" subset="train" width="80" height="60">{shape}</image>
<image id="1" name="b.png" subset="Validation" width="80" height="60">{shape}</image></annotations>"""
CVAT_SHAPES = {
    "box": '<box label="cat" xtl="10" ytl="20" xbr="30" ybr="50"/>',
    "polygon": '<polygon label="cat" points="10,20;30,20;30,50;10,50"/>',
    "mask": '<mask label="cat" rle="0,600" left="10" top="20" width="20" height="30"/>',
}


def write_cvat(root: Path, shape: str) -> None:
    for name, grey in (("a", 90), ("b", 95)):
        picture(root / "images" / f"{name}.png", grey)
    (root / "annotations.xml").write_text(CVAT.format(shape=CVAT_SHAPES[shape]))


def coco(name: str, **more: Any) -> str:
    document = {
        "images": [{"id": 0, "file_name": name, "width": 80, "height": 60}],
        "categories": [
            {"id": 0, "name": "animals", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "animals"},
        ],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 1, "bbox": [10, 20, 20, 30], "segmentation": [POLYGON]}
        ],
    }
    return json.dumps(document | more)


def write_roboflow(root: Path) -> None:
    for split, name, grey in (("train", "a", 90), ("valid", "b", 95)):
        picture(root / split / f"{name}.png", grey)
        (root / split / "_annotations.coco.json").write_text(coco(f"{name}.png"))


def write_coco(root: Path) -> None:
    for split, name, grey in (("train2017", "a", 90), ("val2017", "b", 95)):
        picture(root / split / f"{name}.png", grey)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(coco(f"{name}.png"))


SOURCES: dict[str, tuple[Any, str, bool]] = {
    "yolo": (write_yolo, "yolo", False),
    "yolo polygons": (write_yolo_polygons, "yolo", True),
    "voc": (write_voc, "voc", False),
    "labelme": (write_labelme, "labelme", True),
    "cvat boxes": (lambda root: write_cvat(root, "box"), "cvat", False),
    "cvat polygons": (lambda root: write_cvat(root, "polygon"), "cvat", True),
    "cvat masks": (lambda root: write_cvat(root, "mask"), "cvat", True),
    "roboflow": (write_roboflow, "coco", True),
    "coco": (write_coco, "coco", True),
}


def roiserve(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(one) for one in arguments])


def converted(source: Path, *options: str) -> dict[str, CocoDataset]:
    target = source.parent / "ours"
    result = roiserve("data", "convert", source, target, *options)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return {path.stem: load_coco(path, labels=("cat",)) for path in target.glob("*.json")}


@pytest.mark.parametrize("name", SOURCES)
def test_every_layout_is_known_and_means_the_same(tmp_path: Path, name: str) -> None:
    write, layout, has_masks = SOURCES[name]
    source = tmp_path / "source"
    write(source)
    assert layout_of(source) == layout
    sets = converted(source)
    assert sum(map(len, sets.values())) == 2
    if layout != "labelme":  # which has no splits
        assert {split: len(one) for split, one in sets.items()} == {"train": 1, "val": 1}
    for dataset in sets.values():
        assert dataset.has_masks == has_masks
        for sample in dataset.samples:
            np.testing.assert_allclose(sample.boxes, [BOX], atol=1e-4)
            for mask in sample.read_masks():
                assert (mask.x, mask.y, mask.bitmap.shape, int(mask.bitmap.sum())) == (10, 20, (30, 20), 600)
    for path in (tmp_path / "ours").glob("*.json"):
        areas = [row["area"] for row in json.loads(path.read_text())["annotations"]]
        assert areas == pytest.approx([600] * len(areas), abs=0.01)  # pycocotools reads it of every object


def test_an_area_that_the_source_gives_is_kept(tmp_path: Path) -> None:
    picture(tmp_path / "s" / "a.png")
    row = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 20, 20, 30], "area": 412.5}
    (tmp_path / "s" / "train.json").write_text(coco("a.png", annotations=[row]))
    assert converted(tmp_path / "s")["train"].samples[0].areas.tolist() == [412.5]


def test_parts_of_a_group_are_one_object_and_a_circle_is_round(tmp_path: Path) -> None:
    picture(tmp_path / "s" / "a.png")
    shapes = [
        {"label": "cat", "shape_type": "polygon", "points": [[0, 0], [9, 0], [9, 9]], "group_id": 1},
        {"label": "cat", "shape_type": "polygon", "points": [[20, 20], [29, 20], [29, 29]], "group_id": 1},
        {"label": "cat", "shape_type": "circle", "points": [[50, 30], [60, 30]]},
        {"label": "cat", "shape_type": "rectangle", "points": [[79, 59], [70, 50]]},
    ]
    (tmp_path / "s" / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": shapes[:3]}))
    [dataset] = converted(tmp_path / "s", "--val-share", "0").values()
    np.testing.assert_allclose(dataset.samples[0].boxes, [[0, 0, 29, 29], [40, 20, 60, 40]], atol=1e-3)
    assert dataset.samples[0].areas[1] == pytest.approx(np.pi * 100, rel=0.03)


def test_crowds_and_holes_survive(tmp_path: Path) -> None:
    picture(tmp_path / "s" / "a.png")
    ring = [0] * 4800
    for x in range(10, 30):
        for y in range(10, 30):
            ring[x * 60 + y] = int(not (15 <= x < 20 and 15 <= y < 20))
    counts = np.diff(np.r_[0, np.flatnonzero(np.diff(ring)) + 1, 4800]).tolist()
    rows = [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 10, 20, 20], "iscrowd": crowd}
        | {"segmentation": {"size": [60, 80], "counts": counts}}
        for crowd in (0, 1)
    ]
    rows[1]["id"] = 2
    (tmp_path / "s" / "train.json").write_text(coco("a.png", annotations=rows))
    sample = converted(tmp_path / "s")["train"].samples[0]
    assert sample.read_masks()[0].bitmap.sum() == 400 - 25
    assert len(sample.crowds) == 1


@pytest.mark.parametrize(
    ("write", "file", "content", "words"),
    [
        (write_yolo, "train/labels/a.txt", "7 0.5 0.5 0.1 0.1", "a.txt:1: expected a class from 0 to 1, got 7"),
        (write_yolo, "train/labels/a.txt", "0 50 50 10 10", "a.txt:1: expected fractions of the picture"),
        (write_yolo, "train/labels/a.txt", "cat 0 0", "a.txt:1: expected a class and numbers"),
        (write_voc, "Annotations/a.xml", VOC.format(name="a")[:-20], "expected XML"),
        (write_voc, "Annotations/a.xml", VOC.format(name="gone").replace("a</", "z</"), "no picture"),
        (
            write_voc,
            "Annotations/a.xml",
            VOC.format(name="a").replace("11", "x"),
            "a number in <bndbox>'s xmin",
        ),
        (write_labelme, "a.json", '{"imagePath": "a.png", "shapes": [{"label": "x"}]}', "shape 1: expected label and"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, write: Any, file: str, content: str, words: str) -> None:
    write(tmp_path / "s")
    if words == "no picture":
        (tmp_path / "s" / "JPEGImages" / "a.png").unlink()
    (tmp_path / "s" / file).write_text(content)
    result = roiserve("data", "convert", tmp_path / "s", tmp_path / "ours")
    assert isinstance(result.exception, DatasetError)
    assert words in str(result.exception)


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    bomb = '<!DOCTYPE a [<!ENTITY x "aaaa"><!ENTITY y "&x;&x;">]><annotation><object>&y;</object></annotation>'
    (tmp_path / "a.xml").write_text(bomb)
    with pytest.raises(DatasetError, match="declares a document type"):
        read_xml(tmp_path / "a.xml")
    (tmp_path / "b.xml").write_text("<a>" * 1000 + "</a>" * 1000)
    with pytest.raises(DatasetError, match="at most 100 deep"):
        read_xml(tmp_path / "b.xml")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_voc(tmp_path / "s")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("x")
    result = roiserve("data", "convert", tmp_path / "s", tmp_path / "ours")
    assert "is not empty" in str(result.exception)


def test_check_reports_and_draws_without_training(tmp_path: Path) -> None:
    write_roboflow(tmp_path / "s")
    sheet = tmp_path / "sheet.jpg"
    result = roiserve("data", "check", tmp_path / "s", "--sheet", sheet)
    assert result.exit_code == 0, result.output
    assert "category 'animals' (id 0) is used by no annotation, and ignored" in result.output
    assert "1 pictures, 1 objects (cat 1) with masks" in result.output
    with Image.open(sheet) as drawn:
        assert np.ptp(np.asarray(drawn).astype(int), axis=2).max() > 60  # coloured lines on grey pictures


def test_check_ends_with_the_problems_of_every_split(tmp_path: Path) -> None:
    write_roboflow(tmp_path / "s")
    for split in ("train", "valid"):
        (tmp_path / "s" / split / "_annotations.coco.json").write_text(coco("gone.png"))
    result = roiserve("data", "check", tmp_path / "s")
    assert result.exit_code == 1
    assert str(result.exception).count("no file gone.png") == 2


def test_check_refuses_a_file_that_training_would_read_and_is_not_cocos(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "val.png")
    (tmp_path / "val.json").write_text(coco("val.png"))
    (tmp_path / "train.json").write_text("[]")
    result = roiserve("data", "check", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path}/train.json: expected COCO's keys images, annotations, categories" in str(result.exception)


def test_pictures_in_two_splits_are_noted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / "images" / f"{split}.png")
        (tmp_path / f"{split}.json").write_text(coco(f"{split}.png"))
    result = roiserve("data", "check", tmp_path)
    assert "1 pictures are in both train.json and val.json" in result.output
