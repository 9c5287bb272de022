"""What the docs of the package show is what it does."""

from __future__ import annotations

import ast
import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import scls_router
from scls_router import _native, _router

STUB = Path(_router.__file__).with_name("_native.pyi")


def stub_docs() -> Iterator[tuple[str, str]]:
    """Name and docstring of all that the stub documents."""
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                    yield f"{node.name}.{method.name}", ast.get_docstring(method) or ""


def stub_arguments() -> Iterator[tuple[str, str]]:
    """What the stub says of a class's arguments: `help` has no other place for it than the class."""
    for node in ast.parse(STUB.read_text()).body:
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef) and method.name == "__new__":
                _, _, rest = (ast.get_docstring(method) or "").partition("\n\n")
                if rest.startswith("Args:"):
                    yield node.name, f"\n\n{rest}"


DOCS = dict(stub_docs())
ARGUMENTS = dict(stub_arguments())


@pytest.mark.parametrize("name", [name for name, text in DOCS.items() if ">>>" in text])
def test_examples_of_the_stub_run(name: str) -> None:
    example = doctest.DocTestParser().get_doctest(DOCS[name], dict(vars(scls_router)), name, str(STUB), 0)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_examples_of_the_package_run() -> None:
    failed, attempted = doctest.testmod(scls_router)
    assert attempted > 0 and failed == 0


@pytest.mark.parametrize("name", DOCS)
def test_help_says_what_the_stub_does(name: str) -> None:
    found: object = _native
    for part in name.split("."):
        found = getattr(found, part)
    assert DOCS[name], "documented"
    assert inspect.cleandoc(found.__doc__ or "") == DOCS[name] + ARGUMENTS.get(name, "")
