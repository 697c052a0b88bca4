"""Text without a download: the standard library of the running interpreter, and small tasks."""

import ast
import functools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_pipeline import tasks
from data_pipeline.config import DataError

# Tests, other people's packages, near-duplicates of other modules (lib2to3) and tables (encodings).
_EXCLUDED = {*("test", "tests", "idle_test"), *("site-packages", "dist-packages")}
_EXCLUDED |= {"lib2to3", "encodings", "pydoc_data"}
_SHORTEST_PROSE = 200  # characters; modules with less docstring text are left out


@functools.cache
def documents(collection: str) -> tuple[str, ...]:
    """The documents of a collection: in a fixed order, no two equal. Raises DataError for an unknown name.

    `stdlib_code`: one module's source is one document. `stdlib_prose`: the language reference of pydoc, and
    one module's docstrings as one document. `stdlib_chat`: conversations as JSON: the user asks what a
    function does, and the answer is its docstring; every second answer has reasoning about the arguments.
    `task_chat`, `task_prompts`: the conversations and the prompts of tasks.py.
    """
    if collection not in COLLECTIONS:
        raise DataError(f"embedded collection {collection!r} is unknown; use {', '.join(COLLECTIONS)}")
    return tuple(dict.fromkeys(COLLECTIONS[collection]()))


@functools.cache
def _modules() -> dict[str, str]:
    """Dotted name -> source of the modules of the standard library, in the order of their paths."""
    root, modules = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        source = "" if _EXCLUDED & set(parts[:-1]) else path.read_text(encoding="utf-8")
        if source.strip():
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = source
    return modules


def _prose() -> Iterator[str]:
    from pydoc_data.topics import topics  # a third of a megabyte that only this function needs

    for _, text in sorted(topics.items()):
        yield text.strip() + "\n"
    for name, source in _modules().items():
        text = "\n\n".join(dict.fromkeys(_docstrings(name, ast.parse(source))))
        if len(text) >= _SHORTEST_PROSE:
            yield text + "\n"


def _docstrings(name: str, node: ast.AST) -> Iterator[str]:
    """The docstrings below a node, in source order, each under its qualified name."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and docstring.strip():
            yield f"{name}\n{docstring.strip()}"
    for child in ast.iter_child_nodes(node):
        child_name = getattr(child, "name", None)
        is_definition = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _docstrings(f"{name}.{child_name}" if is_definition else name, child)


def _chat() -> Iterator[str]:
    functions = [
        (f"{module}.{node.name}", node, docstring.strip())
        for module, source in _modules().items()
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)) and docstring.strip()
    ]
    for number, (name, node, docstring) in enumerate(functions):
        answer = {"role": "assistant", "content": docstring}
        if number % 2:
            arguments = [argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
            answer["reasoning_content"] = f"{name} takes {', '.join(arguments) or 'no arguments'}."
        question = {"role": "user", "content": f"What does {name}({ast.unparse(node.args)}) do?"}
        yield json.dumps({"messages": [question, answer]}, ensure_ascii=False)


def _code() -> Iterator[str]:
    yield from _modules().values()


COLLECTIONS = {
    "stdlib_code": _code,
    "stdlib_prose": _prose,
    "stdlib_chat": _chat,
    "task_chat": tasks.conversations,
    "task_prompts": tasks.prompts,
}
