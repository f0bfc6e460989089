"""Page formats are found by their attribute; unknown names are answered with the nearest."""

import pytest

from fewbit.quant.errors import RecipeError
from fewbit.quant.page_format import find_page_format, page_formats


def test_formats_in_the_folder_are_found() -> None:
    assert {"int4_head", "dense_head"} <= page_formats().keys()
    assert all(form.name == name for name, form in page_formats().items())
    assert "int_group" not in page_formats(), "weight formats are no page formats"


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'int4_heads'.*did you mean 'int4_head'.*dense_head"):
        find_page_format("int4_heads")
