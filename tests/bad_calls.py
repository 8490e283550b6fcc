"""The test of calls that are refused in words, for the tables of several files."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

# For each case what is called, the error that it raises, and a pattern of what that says.
Cases = Mapping[str, tuple[Callable[[], Any], type[Exception], str]]


def refused(cases: Cases) -> Callable[[str], None]:
    """The test, of one case at a time."""

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("case", cases)
    def test_the_error_says_what_is_wrong(case: str) -> None:
        run, kind, words = cases[case]
        with pytest.raises(kind, match=words):
            run()

    return test_the_error_says_what_is_wrong
