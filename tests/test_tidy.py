"""House rules that no linter knows. Each finding says where, and what to do instead."""

import ast
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from api.http1 import PROBLEMS
from api.problems import CODE_OF_OUTCOME, CODES
from engine.core.outcomes import Outcome

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGES: Final = ("engine", "readmodel", "api")
PRODUCT: Final = tuple(sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")))
PYTHON: Final = tuple(sorted([*PRODUCT, *(ROOT / "tests").rglob("*.py"), *(ROOT / "perf").rglob("*.py")]))
TEXT_SUFFIXES: Final = {
    ".py",
    ".md",
    ".toml",
    ".js",
    ".html",
    ".c",
    ".sh",
    ".service",
    ".socket",
    ".timer",
    ".conf",
}

SUCCESSES: Final = {
    Outcome.HELD,
    Outcome.CONFIRMED,
    Outcome.RELEASED,
    Outcome.EXTENDED,
    Outcome.MOVED,
    Outcome.FULFILLED,
    Outcome.FOUND,
    Outcome.REPEATED,
    Outcome.PLANNED,
}
"""Outcomes that are no problem: they have a body of their own."""

READS_TIME: Final = {
    ("time", "sleep"),
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "monotonic"),
    ("time", "monotonic_ns"),
    ("time", "clock_gettime"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
    ("dt", "now"),
    ("random", "random"),
    ("os", "urandom"),
}


class Finding(NamedTuple):
    """A rule that was broken."""

    path: Path
    line: int
    instead: str

    def __str__(self) -> str:
        """As editors jump to it."""
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.instead}"


def check(findings: Iterator[Finding]) -> None:
    """Fail with all findings, or not."""
    found = [str(finding) for finding in findings]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def nodes(paths: tuple[Path, ...]) -> Iterator[tuple[Path, ast.AST]]:
    """Every node of every file."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
            yield path, node


def texts() -> Iterator[Path]:
    """Files that people wrote."""
    folders = (*PACKAGES, "tests", "perf", "docs", "systemd", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in sorted([*found, *ROOT.glob("*")]):
        written = path.suffix in TEXT_SUFFIXES or path.name in ("Makefile", "run")
        if written and "vendor" not in path.parts and path.is_file():
            yield path


def comments(paths: tuple[Path, ...]) -> Iterator[tuple[Path, int, str]]:
    """Every comment of every file."""
    for path in paths:
        with path.open("rb") as source:
            for token in tokenize.tokenize(source.readline):
                if token.type == tokenize.COMMENT:
                    yield path, token.start[0], token.string


def test_product_code_has_no_assert_statement() -> None:
    instead = "`python -O` removes assert: write invariant(condition, text) of engine.core.invariant"
    check(Finding(path, node.lineno, instead) for path, node in nodes(PRODUCT) if isinstance(node, ast.Assert))


def test_the_core_takes_time_and_chance_as_arguments() -> None:
    core = tuple(path for path in PRODUCT if "core" in path.parts)

    def findings() -> Iterator[Finding]:
        for path, node in nodes(core):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if (owner, node.attr) in READS_TIME:
                    yield Finding(
                        path, node.lineno, f"{owner}.{node.attr}: the core is pure, let the caller pass it in"
                    )
            if isinstance(node, ast.AsyncFunctionDef | ast.Await):
                yield Finding(
                    path, node.lineno, "the core never waits: an await is a place where half a decision shows"
                )

    check(findings())


def test_the_read_model_imports_numpy_and_the_standard_library_only() -> None:
    allowed = sys.stdlib_module_names | {"numpy", "readmodel"}

    def findings() -> Iterator[Finding]:
        for path, node in nodes(tuple(path for path in PRODUCT if path.is_relative_to(ROOT / "readmodel"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.partition(".")[0] not in allowed:
                    yield Finding(path, getattr(node, "lineno", 1), f"{name}: readmodel knows integers and bytes only")

    check(findings())


def test_imports_point_one_way() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    found = str(program) if program.exists() else shutil.which("lint-imports")
    assert found is not None, "import-linter is missing: make the environment with `make test`"
    ended = subprocess.run([found, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.fail(ended.stdout[ended.stdout.find("Broken contracts") :] + ended.stderr, pytrace=False)


def test_nothing_is_left_for_later() -> None:
    # Split, so that this file does not find itself.
    word = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|HA" + "CK")

    def findings() -> Iterator[Finding]:
        for path in texts():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if found := re.search(rf"\b(?:{word.pattern})\b", line):
                    yield Finding(
                        path, number, f"{found[0]}: do it now, or say in CHANGELOG.md or an issue that it is missing"
                    )

    check(findings())


def test_errors_have_a_reader() -> None:
    def findings() -> Iterator[Finding]:
        for path, node in nodes(PYTHON):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                yield Finding(path, node.lineno, "bare except: name the errors that are expected here")
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else set()
            if names & {"Exception", "BaseException"} and all(
                isinstance(step, ast.Pass | ast.Continue) for step in node.body
            ):
                yield Finding(path, node.lineno, "an error is swallowed: return it, raise it, or name what is expected")

    check(findings())


def test_suppressions_say_why() -> None:
    # Examples of what is wanted: `noqa: S603 - fixed argv`, `type: ignore[misc]  # click reads it from the instance`.
    bare = re.compile(
        r"#\s*noqa(?!: [A-Z]+\d+(, ?[A-Z]+\d+)* - \S+)|#\s*type: ignore(?!\[[a-z, -]+\]\s+(#|-) ?\S+)|#\s*pragma: no cover$"
    )
    instead = "say which rule and why: `noqa: S603 - fixed argv`, `type: ignore[misc]  # the reason`"
    check(Finding(path, line, instead) for path, line, text in comments(PYTHON) if bare.match(text))


def test_no_file_names_a_machine_or_a_person_s_directory() -> None:
    private = re.compile(r"(?<![\w.])/(?:home|Users|work|root)/\w|\.\./shared")

    def findings() -> Iterator[Finding]:
        for path in texts():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if path != Path(__file__) and (found := private.search(line)):
                    yield Finding(
                        path, number, f"{found[0]}…: a path that exists on one machine only; make it relative"
                    )

    check(findings())


def test_every_module_says_what_it_is_for() -> None:
    def findings() -> Iterator[Finding]:
        for path in PYTHON:
            source = path.read_bytes()
            if source.strip() and not ast.get_docstring(ast.parse(source)):
                yield Finding(path, 1, "open the module with its purpose, its rules, and what it does not promise")

    check(findings())


def test_every_problem_code_is_documented() -> None:
    path = ROOT / "docs/api.md"
    statuses = dict(re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \|", path.read_text(encoding="utf-8"), re.MULTILINE))
    known = {code: meaning[0] for code, meaning in {**PROBLEMS, **CODES}.items()}

    def findings() -> Iterator[Finding]:
        for code, status in known.items():
            if statuses.get(code) != str(status):
                yield Finding(path, 1, f"document `{code}`: a line `| `{code}` | {status} | meaning and advice |`")
        for code in sorted(statuses.keys() - known.keys()):
            yield Finding(path, 1, f"`{code}` is no code: remove its line")

    check(findings())


def test_every_outcome_is_mapped_to_http() -> None:
    path = ROOT / "api/problems.py"

    def findings() -> Iterator[Finding]:
        for outcome in Outcome:
            if (outcome in SUCCESSES) == (outcome in CODE_OF_OUTCOME):
                yield Finding(
                    path, 1, f"{outcome.name}: give it a code in CODE_OF_OUTCOME, or list it as a success here"
                )
        for outcome, code in CODE_OF_OUTCOME.items():
            if code not in CODES:
                yield Finding(path, 1, f"{outcome.name}: its code {code} is not in CODES")

    check(findings())
