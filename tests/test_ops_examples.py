"""`help(d2it.ops)` lists every operator, and the example in an operator's docstring runs."""

import doctest
import re

import pytest
import torch

from d2it import ops

FUNCTIONS = sorted(set(ops.__all__) - {"TokenPlan", "reference"})


def test_help_lists_every_function_with_one_line() -> None:
    listed = re.findall(r"^ {4}(\w+) {2,}\S", ops.__doc__ or "", re.MULTILINE)
    assert sorted(listed) == FUNCTIONS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_runs(name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(getattr(ops, name), name, globs={"torch": torch, "ops": ops})
    assert found[0].examples, f"{name} has no example"
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(found[0], out=report.append)
    assert not results.failed, "".join(report)
