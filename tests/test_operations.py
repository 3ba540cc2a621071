"""docs/operations.md promises nothing that no test proves, and what it tells users to look for is what the program says."""

import ast
import re

import pytest

from tests.conftest import REPO

TEXT = (REPO / "docs" / "operations.md").read_text()
ROWS = [line for line in TEXT.split("## What is not")[0].splitlines() if line.startswith("| ")][1:]
SOURCES = "\n".join(path.read_text() for path in (REPO / "dsquant").rglob("*.py"))


def named(row):
    """Yield (file, test) of a row of the table; a test without a file is of the file before it."""
    file = None
    for word in re.findall(r"`([^`]+)`", row.split("|")[2]):
        if word.startswith("tests/"):
            file = word
        else:
            yield file, word


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:40])
def test_the_tests_that_a_guarantee_names_exist(row):
    found = list(named(row))
    assert found, row
    for file, test in found:
        assert test in functions_of(REPO / file), (file, test)


def test_there_are_guarantees():
    assert len(ROWS) >= 10


@pytest.mark.parametrize("said", re.findall(r"^\| `([^`]+)` \|", TEXT.split("## What to do")[1], re.M))
def test_the_messages_that_it_explains_are_the_programs(said):
    """Of a message the longest run of words without a number or a name of this run."""
    fixed = max(re.split(r"\.\.\. | N\b|\bN |\b40\b|KEY |\bA\b|\bB\b|: No space.*|nan", said), key=len).strip(" :")
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCES)
    assert fixed in joined, fixed


def test_results_that_it_names_are_there():
    for name in re.findall(r"`(docs/results/[^`]+)`", TEXT):
        assert (REPO / name).is_file(), name
