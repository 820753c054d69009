"""The house rules of size (style guide): small folders, modules and functions, and a word on what each folder is for."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("weights_store", "train", "pipeline", "flows")
FILES = [
    *REPO.glob("tokenweights*.py"),
    *(path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))),
]
FOLDERS = sorted({path.parent for path in FILES} - {REPO})
MAX_MODULES, MAX_MODULE_LINES, MAX_FUNCTION_LINES = 15, 400, 60
REASON = re.compile(r"\b\d{3,} lines\b")
"""The docstring of a longer module says so and gives the reason, for example "Over 400 lines because ..."."""


def name(path):
    return str(path.relative_to(REPO))


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_folder_has_few_modules_and_says_what_lives_there(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MAX_MODULES
    init = folder / "__init__.py"
    assert init.exists(), f"{name(folder)} has no __init__.py; say there what lives in this folder"
    assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), f"{name(init)} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_module_is_short_or_says_why_not(path):
    text = path.read_text(encoding="utf-8")
    num_lines = text.count("\n")
    says_why = REASON.search(" ".join((ast.get_docstring(ast.parse(text)) or "").split()))
    assert num_lines <= MAX_MODULE_LINES or says_why, (
        f"{name(path)} has {num_lines} lines: split it, or write 'Over {MAX_MODULE_LINES} lines because ...' in its docstring"
    )


def test_no_function_is_long():
    """Lines of a docstring do not count."""
    long = [f"{name(path)}:{function.lineno}: {function.name} has {size} lines" for path, function, size in functions()]
    assert not long, f"split these functions, which have more than {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


def functions():
    """Yield every function that is too long, with its file and its size."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                size = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                if size > MAX_FUNCTION_LINES:
                    yield path, node, size
