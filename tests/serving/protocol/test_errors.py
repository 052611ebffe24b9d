"""The table of errors: each is raised somewhere, with the values that its words need."""

import re

import pytest

from model.tables import read_table
from serving.protocol import errors
from tests.repository import REPOSITORY


def test_each_name_that_is_raised_stands_in_the_table_and_no_other() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "serving").rglob("*.py"))
    raised = set(re.findall(r"error_of\(\s*\"(\w+)\"", code))
    assert raised == read_table(errors.__file__, "errors").keys()


def test_values_stand_in_the_words() -> None:
    error = errors.error_of("model_not_found", param="model", name="gpt-4\n", served="mine")
    assert error.message == "The model 'gpt-4\\n' does not exist; this endpoint serves 'mine'."
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    with pytest.raises(KeyError):
        errors.error_of("model_not_found")


def test_a_planned_drain_is_recognized_by_its_header() -> None:
    error = errors.error_of("draining")
    assert error.headers == {"Retry-After": "30", errors.DRAINING_HEADER: "1"}
    assert 'POST /admin/drain with {"drain": false}.' in error.message
