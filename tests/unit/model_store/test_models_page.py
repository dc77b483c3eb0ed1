"""docs/models.md keeps up with the code: every key of `model.toml` stands there with its default, and no other."""

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from service.model_store.model_toml import ProvenanceTable, WeightsTable
from service.model_store.toml_writer import write_toml
from service.model_store.torchvision_layout import BUILDERS
from service.modeling.config import Architecture, BackboneName, ModelConfig, RoIOp

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
STORE_PAGE = (Path(__file__).parents[3] / "docs" / "model-store.md").read_text()
TABLES = {
    name: field.annotation
    for name, field in ModelConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


def default(table: type[BaseModel], key: str) -> str:
    """As the page writes it."""
    field = table.model_fields[key]
    if field.is_required():
        return "required"
    if field.default is None:
        return "unset"
    if isinstance(field.default, BaseModel):
        return "the same"
    return f"`{write_toml({key: field.default}).removeprefix(f'{key} = ').strip()}`"


@pytest.mark.parametrize("name", TABLES)
def test_every_key_stands_on_the_page_with_its_default(name: str) -> None:
    table = TABLES[name]
    section = re.search(rf"^### `\[{name}\]`\n(.*?)(?=^###|^<!--)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", section[1], flags=re.MULTILINE)
    assert dict(rows) == {key: default(table, key) for key in table.model_fields}


def test_every_choice_and_every_table_of_a_stored_model_is_named() -> None:
    choices = {*get_args(Architecture), *get_args(BackboneName), *get_args(RoIOp)}
    words = {*choices, *WeightsTable.model_fields, *ProvenanceTable.model_fields}
    assert {word for word in words if f"`{word}`" not in PAGE} == set()


def test_every_builder_is_named() -> None:
    assert {builder for builder in BUILDERS if f"`{builder}`" not in STORE_PAGE} == set()
