"""Class names in every form in which people keep them become the same names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.errors import ModelStoreError
from service.model_store.labels import Labels, read_labels

NAMES = ("cat", "dog", "bird")
CATEGORIES = [{"id": 3, "name": "bird"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
FORMS = {
    "lines": ("l.txt", "cat\ndog\nbird\n"),
    "lines with the background": ("l.txt", "__background__\r\ncat\r\ndog\r\nbird\r\n"),
    "lines with the background's other name": ("l.txt", "background\ncat\ndog\nbird"),
    "the background last": ("l.txt", "cat\ndog\nbird\nBG\n"),
    "a JSON list": ("l.json", '["cat", "dog", "bird"]'),
    "a JSON list in a text file": ("l.txt", '["cat", "dog", "bird"]'),
    "ids to names": ("index_to_name.json", '{"2": "bird", "0": "cat", "1": "dog"}'),
    "ids to names, from 1, with the background": ("l.json", '{"0": "background", "1": "cat", "2": "dog", "3": "bird"}'),
    "TorchServe's": ("index_to_name.json", '{"0": ["n01", "cat"], "1": ["n02", "dog"], "2": ["n03", "bird"]}'),
    "names to ids": ("l.json", '{"bird": 3, "cat": 1, "dog": 2}'),
    "a model card's": ("config.json", '{"id2label": {"0": "cat", "1": "dog", "2": "bird"}, "hidden_size": 3}'),
    "COCO's file": ("train.json", json.dumps({"images": [], "annotations": [], "categories": CATEGORIES})),
    "COCO's categories": ("categories.json", json.dumps(CATEGORIES)),
    "Roboflow's, with a group": (
        "train.json",
        json.dumps(
            {
                "categories": [
                    {"id": 0, "name": "animals", "supercategory": "none"},
                    *({"id": id_, "name": name, "supercategory": "animals"} for id_, name in enumerate(NAMES, start=1)),
                ]
            }
        ),
    ),
    "a YAML list": ("data.yaml", "path: data\nnc: 3\nnames: [cat, dog, bird]\n"),
    "a YAML block": ("data.yml", "names:\n- cat\n- dog\n- bird\n"),
    "a YAML mapping": ("data.yaml", "names:\n  0: cat\n  1: dog\n  2: bird\n"),
    "YAML by another name": ("data.txt", "names:\n  0: cat\n  1: dog\n  2: bird\n"),
}


def read(tmp_path: Path, name: str, text: str) -> Labels:
    path = tmp_path / name
    path.write_text(text)
    return read_labels(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_names(form: str, tmp_path: Path) -> None:
    assert read(tmp_path, *FORMS[form]).fitted(3) == NAMES


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.json", '["nucleus"]'),
        ("one.yaml", "names: [nucleus]\n"),
        ("one.coco", '{"categories": [{"id": 1, "name": "nucleus"}]}'),
        ("one.txt", "nucleus\n"),
    ],
)
def test_one_class_is_a_list_too(name: str, text: str, tmp_path: Path) -> None:
    assert read(tmp_path, name, text).fitted(1) == ("nucleus",)


def test_ids_with_gaps_are_filled_where_the_weights_have_a_class_for_each_id(tmp_path: Path) -> None:
    labels = read(tmp_path, "l.json", '{"1": "cat", "3": "dog"}')
    assert labels.fitted(3) == ("cat", "unused 2", "dog")
    assert labels.fitted(2) == ("cat", "dog")
    assert labels.fitted(4) == ("cat", "unused 2", "dog", "unused 4")


def test_a_class_that_is_called_background_stays_one_where_the_count_says_so(tmp_path: Path) -> None:
    assert read(tmp_path, "l.txt", "background\ncat\n").fitted(2) == ("background", "cat")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a\nb\n", r"the weights know 3 classes, got 2 labels$"),
        ("a\nb\nc\nd\n", r"the weights know 3 classes, got 4 labels; leave the background out$"),
    ],
)
def test_a_wrong_number_is_told_with_the_right_one(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match=problem):
        read(tmp_path, "l.txt", text).fitted(3)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("l.json", '["a", 1, {}]', "got list"),
        ("l.json", "{", "text that cannot be read"),
        ("l.json", "{}", "got no names"),
        ("l.json", '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "got an id twice"),
        ("l.json", '{"a": "b", "c": "d"}', "got 'a' where a class's number was expected"),
        ("l.json", '{"0": {"x": 1}}', "where a name was expected"),
        ("l.yaml", "names: [a\n", "no YAML"),
        ("l.json", "[" * 100_000, "text that cannot be read"),
    ],
)
def test_other_documents_are_refused_with_what_was_expected(name: str, text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match=rf"{name}: expected a name on each line, .*{problem}"):
        read(tmp_path, name, text)
