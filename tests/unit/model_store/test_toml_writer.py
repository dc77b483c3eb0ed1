import tomllib
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.model_store.toml_writer import write_toml

SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.dates()
)
VALUES = st.recursive(SCALARS, lambda values: st.lists(values, max_size=4), max_leaves=8)
DOCUMENTS = st.recursive(
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), VALUES, max_size=4),
    lambda tables: st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), VALUES | tables, max_size=4),
    max_leaves=6,
)


@given(DOCUMENTS)
def test_a_written_document_reads_as_itself(document: dict[str, object]) -> None:
    assert tomllib.loads(write_toml(document)) == document


def test_values_come_before_tables_and_nested_lists_stay_on_one_line() -> None:
    document = {"roi": {"op": "roi_align"}, "sizes": [[32], [64]], "std": (0.5, 1e-05), "nothing": None}
    assert write_toml(document) == 'sizes = [[32], [64]]\nstd = [0.5, 1e-05]\n\n[roi]\nop = "roi_align"\n'


def test_a_long_list_has_an_item_on_each_line() -> None:
    lines = write_toml({"labels": [f"label {number}" for number in range(20)]}).splitlines()
    assert lines[0] == "labels = ["
    assert lines[1] == '    "label 0",'
    assert len(lines) == 22


def test_dates_are_dates() -> None:
    document = {"day": date(2026, 7, 1), "created": datetime(2026, 7, 1, 12, 30, tzinfo=UTC)}
    assert tomllib.loads(write_toml(document)) == document


def test_what_toml_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="got bytes"):
        write_toml({"weights": b"\x00"})
