"""code: the program that the completion holds passes the tests of the row, in a process of its own."""

import ast
import json
import re
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from trainer.verifiers.verdict import Verdict, field

_SANDBOX = Path(__file__).with_name("sandbox.py")
_NOT_CONFINED = 99  # exit code of the sandbox; a program that takes it gains nothing
_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Numpy would start a thread for each core.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LC_CTYPE": "C.UTF-8"}
# Statements of tests that are no test; an expression without a call is none either, such as a docstring.
_PREPARES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def verify(fields: dict[str, Any], completion: str, options: dict[str, Any]) -> Verdict:
    """1 if the last ```python block (or, without one, the whole answer) passes all tests; see `sandbox.py`.

    tests: a text of Python with asserts, or a list of {input, output} of the whole program, or of that a
    JSON text or {inputs, outputs}. With `partial`, the share of tests that pass; each assert, loop or call at
    the top level of a text is a test. Raises ValueError if the tests of the row are neither, SyntaxError if
    they are not Python.
    """
    tests, blocks = _read(field(fields, options["tests_key"])), _BLOCK.findall(completion)
    program = blocks[-1] if blocks else completion
    if isinstance(tests, str):
        return _asserts(program, tests, options)
    if tests and isinstance(tests, list) and all(isinstance(test, dict) for test in tests):
        return _cases(program, tests, options)
    raise ValueError(f"{options['tests_key']} of the row is neither Python nor a list of {{input, output}}")


def _read(tests: Any) -> Any:
    """Tests as `verify` takes them, from the forms in which public sets keep them."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):  # it is Python
            tests = json.loads(tests)
    if isinstance(tests, dict) and all(isinstance(tests.get(key), list) for key in ("inputs", "outputs")):
        pairs = zip(tests["inputs"], tests["outputs"], strict=True)
        return [{"input": given, "output": expected} for given, expected in pairs]
    return tests


def _is_test(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return any(isinstance(node, ast.Call) for node in ast.walk(statement))
    return not isinstance(statement, _PREPARES)


def _asserts(program: str, tests: str, options: dict[str, Any]) -> Verdict:
    """The tests run in the program's process, which writes a secret when it has come to their end."""
    statements = ast.parse(tests).body
    total = sum(map(_is_test, statements))
    if not total:
        raise ValueError(f"{options['tests_key']} of the row holds no test")
    sources = [(ast.unparse(statement), _is_test(statement)) for statement in statements]
    token = secrets.token_hex(16)
    _, output = _run(program, options, tests=sources, token=token)
    if not output.startswith(token):
        return Verdict(0, "the program ended before the tests did")
    _, passed, reason = output.split(" ", 2)
    share = int(passed) / total
    return Verdict(share if options["partial"] else float(share == 1), reason or f"{total} of {total} pass")


def _cases(program: str, tests: list[dict[str, Any]], options: dict[str, Any]) -> Verdict:
    passed, first = 0, ""
    for number, test in enumerate(tests, 1):
        code, output = _run(program, options, given=str(field(test, "input")))
        if code == 0 and _lines(output) == _lines(str(field(test, "output"))):
            passed += 1
        else:
            first = first or f"test {number}: {'wrong output' if code == 0 else f'exit code {code}'}"
            if not options["partial"]:
                return Verdict(0, first)
    return Verdict(passed / len(tests), first or f"{passed} of {passed} pass")


def _lines(output: str) -> list[str]:
    """What must be equal of two outputs: not white space at the end of a line, nor empty lines at the end."""
    return [line.rstrip() for line in output.rstrip().split("\n")]


def _run(program: str, options: dict[str, Any], given: str = "", **task: Any) -> tuple[int, str]:
    """Exit code and output of a program that reads `given`. Its time is that of the worker, its parent."""
    task |= {"program": program, "memory_mb": options["memory_mb"]}
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        TemporaryFile() as job,
        TemporaryFile() as stdin,
        TemporaryFile() as stdout,
    ):
        for file, text in ((job, json.dumps(task)), (stdin, given)):
            file.write(text.encode(errors="surrogatepass"))
            file.seek(0)
        # Files, not pipes: the size of what it writes is limited, and nobody waits for it to be read.
        done = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", str(_SANDBOX), str(job.fileno())],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_ENVIRONMENT,
            pass_fds=[job.fileno()],
        )
        if done.returncode == _NOT_CONFINED:
            raise OSError(
                f"the limits of the sandbox cannot be set; is memory_mb={options['memory_mb']} right?"
            )
        stdout.seek(0)
        return done.returncode, stdout.read().decode(errors="replace")
