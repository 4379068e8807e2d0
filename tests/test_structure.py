"""The shape of the project, measured: which room imports which, how long things are, what git holds."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moe_ref", "moe_cupy")

# Who may import whom (docs/architecture.md). A room is a folder or a file right under moe_cupy/, or all of
# moe_ref. A room may always import itself. "moe_ref.gguf" allows that module alone, "*" allows everything.
# An arrow that is not here is a decision: discuss it, then write it here.
ARROWS: dict[str, set[str]] = {
    "moe_ref": set(),
    "cache": set(),
    "prefetch": {"cache"},
    "compiled": {"cache", "numba_cache"},
    "store": {"moe_ref.gguf", "moe_ref.tensors", "moe_ref.quants"},
    "kernels": {"moe_ref", "numba_cache"},
    "numba_cache": {"moe_ref.interrupts"},
    "device": {"kernels"},
    "plan": {"moe_ref.gguf", "moe_ref.config", "moe_ref.quants", "moe_ref.tensors"},
    "engine": {"prefetch", "cache", "compiled", "store", "device", "plan", "kernels", "moe_ref"},
    "lab": {"cache", "prefetch", "plan", "moe_ref"},
    # lab: gpu-check decodes a route-replay model; __init__: it uses the Engine as anybody does
    "tools": {
        "engine",
        "kernels",
        "device",
        "store",
        "cache",
        "compiled",
        "prefetch",
        "plan",
        "moe_ref",
        "lab",
        "__init__",
    },
    "cli": {"*"},
    "lab_commands": {"*"},
    "plan_commands": {"*"},
    "plan_flags": {"*"},
    "engine_flags": {"*"},
    "engine_parser": {"plan", "moe_ref.parser"},
    "profile_command": {"*"},
    "opening": {"*"},
    "this_machine": {"*"},
    "run_command": {"*"},
    "bench_command": {"*"},
    "demo": {"*"},
    "__main__": {"cli", "moe_ref.interrupts"},
    "__init__": {"engine", "moe_ref.__version__", "moe_ref.sampling"},
}

# What a room must not import from outside, not even inside a function: decisions are replayable without a device.
FOREIGN_FORBIDDEN: dict[str, set[str]] = {
    "cache": {"cupy", "numba", "numpy"},
    "prefetch": {"cupy", "numba", "numpy"},
    "plan": {"cupy", "numba"},
    "lab": {"cupy", "numba"},
}

# moe_ref needs NumPy alone; these it may import where it uses them, inside a function.
REF_ANYWHERE = {"numpy"}
REF_INSIDE_FUNCTIONS = {"tokenizers", "jinja2", "gguf", "argcomplete"}

MAX_FUNCTION_LINES = 45
MAX_FILE_LINES = 350
MAX_MEDIAN_FUNCTION_LINES = 10
MAX_POSITIONAL = 7

# "path" (for its length) or "path::function" -> why it may break a limit above.
EXCEPTIONS: dict[str, str] = {}

# Modules that may import cupy at their top, because they are themselves imported at the first use of a GPU.
NEED_CUPY = ("moe_cupy.device.cuda",)


# ---------------------------------------------------------------------------------------------------------
# (a) the import graph


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is its full dotted path; ``lazy`` if it runs only when something is called."""

    file: str
    line: int
    target: str
    lazy: bool


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_names(node: ast.AST, package: list[str]) -> list[str]:
    """Full names that this statement or call imports; ``package`` is where relative imports start."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        base = base + (node.module.split(".") if node.module else [])
        return [".".join([*base, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def imports_below(node: ast.AST, package: list[str], file: str, lazy: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for target in imported_names(child, package):
            yield Import(file, child.lineno, target, lazy)
        within = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(child)
        yield from imports_below(child, package, file, lazy or within)


def sources(root: Path, packages: tuple[str, ...] = PACKAGES, pattern: str = "*.py") -> Iterator[Path]:
    for package in packages:
        yield from sorted((root / package).rglob(pattern))


def imports_of(path: Path, root: Path) -> list[Import]:
    relative = path.relative_to(root)
    return list(imports_below(ast.parse(path.read_text("utf-8")), list(relative.parent.parts), relative.as_posix()))


def room_of(file: str) -> str:
    """The room of a source file: moe_ref, or the folder or file name right under moe_cupy/."""
    package, _, rest = file.partition("/")
    return "moe_ref" if package == "moe_ref" else rest.partition("/")[0].removesuffix(".py")


def named_room(target: str, root: Path) -> str:
    """``target`` in the terms of ARROWS: 'cache.slots' for moe_cupy.cache.slots, '__init__' for moe_cupy.Engine."""
    package, _, rest = target.partition(".")
    if package == "moe_ref":
        return target
    first = root / "moe_cupy" / rest.partition(".")[0]
    return rest if rest and (first.is_dir() or first.with_suffix(".py").is_file()) else "__init__"


def is_within(name: str, allowed: set[str]) -> bool:
    return any(entry == "*" or name == entry or name.startswith(entry + ".") for entry in allowed)


def wrong_arrows(root: Path) -> list[str]:
    """Every import against ARROWS, as 'file:line: room -> what it imports'."""
    wrong = []
    for path in sources(root):
        for found in imports_of(path, root):
            if found.target.partition(".")[0] not in PACKAGES:
                continue
            room = room_of(found.file)
            name = named_room(found.target, root)
            if room not in ARROWS:
                wrong.append(f"{found.file}:{found.line}: room {room!r} has no row in ARROWS")
            elif not is_within(name, ARROWS[room] | {room}):
                wrong.append(f"{found.file}:{found.line}: {room} -> {name}")
    return wrong


def foreign_complaint(found: Import, room: str) -> str | None:
    """Why this import of something that is not ours breaks a rule, or None."""
    top = found.target.partition(".")[0]
    if top in PACKAGES or top in sys.stdlib_module_names:
        return None
    if top in FOREIGN_FORBIDDEN.get(room, ()):
        return f"{room} must not know {top}"
    if room != "moe_ref" or top in REF_ANYWHERE:
        return None
    if top not in REF_INSIDE_FUNCTIONS:
        return "moe_ref imports numpy and the standard library alone"
    return None if found.lazy else f"{top} only inside a function"


def wrong_foreign(root: Path) -> list[str]:
    """Every import from outside the project against the rules above, as 'file:line: room -> package (why)'."""
    wrong = []
    for path in sources(root):
        for found in imports_of(path, root):
            room = room_of(found.file)
            if complaint := foreign_complaint(found, room):
                wrong.append(f"{found.file}:{found.line}: {room} -> {found.target} ({complaint})")
    return wrong


def listed(title: str, rows: list[str]) -> str:
    return f"{title}:\n  " + "\n  ".join(rows)


def test_every_arrow_between_rooms_is_in_the_table():
    wrong = wrong_arrows(ROOT)
    assert not wrong, listed("imports against the table ARROWS", wrong)


def test_rooms_import_from_outside_only_what_they_may():
    wrong = wrong_foreign(ROOT)
    assert not wrong, listed("imports from outside the project", wrong)


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("moe_ref/a.py", "import moe_cupy", "moe_ref/a.py:1: moe_ref -> __init__"),
        ("moe_ref/a.py", "def f():\n    from moe_cupy.cache import x", "moe_ref/a.py:2: moe_ref -> cache.x"),
        ("moe_ref/a.py", "import tokenizers", "moe_ref/a.py:1: moe_ref -> tokenizers (tokenizers only inside a"),
        ("moe_ref/a.py", "def f():\n    import tqdm", "moe_ref/a.py:2: moe_ref -> tqdm (moe_ref imports numpy"),
        ("moe_cupy/cache/a.py", "import numpy as np", "moe_cupy/cache/a.py:1: cache -> numpy (cache must not"),
        ("moe_cupy/cache/a.py", "from ..engine import b", "moe_cupy/cache/a.py:1: cache -> engine.b"),
        ("moe_cupy/lab/a.py", "def f():\n    import cupy.cuda", "moe_cupy/lab/a.py:2: lab -> cupy.cuda (lab must"),
        ("moe_cupy/plan/a.py", "import_module('numba')", "moe_cupy/plan/a.py:1: plan -> numba (plan must not"),
        ("moe_cupy/store/a.py", "from moe_ref import model", "moe_cupy/store/a.py:1: store -> moe_ref.model"),
        ("moe_cupy/engine/a.py", "from .. import Engine", "moe_cupy/engine/a.py:1: engine -> __init__"),
        ("moe_cupy/device/a.py", "from moe_cupy import engine", "moe_cupy/device/a.py:1: device -> engine"),
        ("moe_cupy/attic/a.py", "import moe_ref", "moe_cupy/attic/a.py:1: room 'attic' has no row in ARROWS"),
        ("moe_ref/a.py", "def f():\n    import jinja2", None),
        ("moe_cupy/prefetch/a.py", "from ..cache.slots import Slots\nimport collections", None),
        ("moe_cupy/engine/a.py", "from moe_cupy.engine import b\nfrom . import c\nimport moe_ref.model", None),
    ],
)
def test_the_import_check_sees_a_wrong_arrow(tmp_path, file, source, expected):
    for room in ("cache", "engine"):
        (tmp_path / "moe_cupy" / room).mkdir(parents=True)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    wrong = wrong_arrows(tmp_path) + wrong_foreign(tmp_path)
    assert [row[: len(expected)] for row in wrong] == [expected] if expected else wrong == []


# ---------------------------------------------------------------------------------------------------------
# (b) sizes and style


@dataclass(frozen=True)
class Function:
    file: str
    name: str
    line: int
    length: int
    positional: int


def functions_of(path: Path) -> list[Function]:
    file = path.relative_to(ROOT).as_posix()
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            found.append(Function(file, node.name, node.lineno, node.end_lineno - node.lineno + 1, count))
    return found


def limit_breakers() -> dict[str, str]:
    """What is over a limit: the key of EXCEPTIONS it would need -> what was measured."""
    over = {}
    for path in [*sources(ROOT), *sources(ROOT, pattern="*.cu"), *sources(ROOT, ("scripts", "benchmarks"))]:
        file = path.relative_to(ROOT).as_posix()
        lines = len(path.read_text("utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            over[file] = f"{file}: {lines} lines, at most {MAX_FILE_LINES}"
        for f in functions_of(path) if path.suffix == ".py" else ():
            where = f"{file}:{f.line}: {f.name}"
            if f.length > MAX_FUNCTION_LINES:
                over[f"{file}::{f.name}"] = f"{where} has {f.length} lines, at most {MAX_FUNCTION_LINES}"
            if f.positional > MAX_POSITIONAL:
                over[f"{file}::{f.name}"] = f"{where} takes {f.positional} by position, at most {MAX_POSITIONAL}"
    return over


def test_functions_and_files_are_short_or_excused():
    over = limit_breakers()
    offenders = [message for key, message in over.items() if key not in EXCEPTIONS]
    assert not offenders, listed("over the limits of the house style (split, or excuse in EXCEPTIONS)", offenders)
    stale = [key for key in EXCEPTIONS if key not in over]
    assert not stale, listed("excused in EXCEPTIONS without need", stale)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_typical_function_is_short(package):
    lengths = [f.length for path in sources(ROOT, (package,)) for f in functions_of(path)]
    if not lengths:
        pytest.skip(f"{package} has no function yet")
    median = statistics.median(lengths)
    assert median <= MAX_MEDIAN_FUNCTION_LINES, f"{package}: the median of {len(lengths)} functions is {median} lines"


MAX_REFERENCE_LINES = 3250
MAX_COMMAND_LINE_LINES = 700
TABLE_FILES = ("pretokenizers.py",)  # rows and the patterns they are made of
COMMAND_LINE = (  # how both programs talk to a person; nothing of a model
    "__main__.py", "command.py", "common_flags.py", "console.py", "generation.py", "interrupts.py", "parser.py",
    "script.py",
)  # fmt: skip


def lines_to_read(path: Path) -> int:
    """Lines of code: no blanks, comments, docstrings, imports, or module-level tables (CAPITALS over several lines)."""
    text = path.read_text("utf-8")
    tree, skipped = ast.parse(text), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            skipped.update(range(first.lineno, first.end_lineno + 1))
    for node in tree.body:
        names = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        in_capitals = all(isinstance(name, ast.Name) and name.id.isupper() for name in names)
        if (in_capitals and node.end_lineno > node.lineno) or isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in skipped for n, line in lines)


def test_the_reference_can_be_read_in_a_sitting():
    lines = {path: lines_to_read(path) for path in sources(ROOT, ("moe_ref",)) if path.name not in TABLE_FILES}
    talking = sum(count for path, count in lines.items() if path.name in COMMAND_LINE)
    count = sum(lines.values()) - talking
    assert 2000 < count <= MAX_REFERENCE_LINES, f"moe_ref: {count} lines of code without tables"
    assert talking <= MAX_COMMAND_LINE_LINES, f"moe_ref's command line: {talking} lines of code"


def test_no_except_catches_everything_unnamed():
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(ROOT, (*PACKAGES, "tests", "scripts", "benchmarks"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bare, listed("bare `except:`", bare)


# ---------------------------------------------------------------------------------------------------------
# (c), (e) what imports without what

IMPORT_ALL_BUT = """
import importlib, pkgutil, re, sys

package, blocked, skipped = sys.argv[1], re.compile(sys.argv[2]), sys.argv[3].split()

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if blocked.fullmatch(top) and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is blocked by the test", name=name)

sys.meta_path.insert(0, Blocker())
for name in [m for m in sys.modules if blocked.fullmatch(m.partition(".")[0])]:
    if name.partition(".")[0] not in sys.stdlib_module_names:
        del sys.modules[name]  # something at start-up (a .pth file) was quicker
parent = importlib.import_module(package)
count = 1
for info in pkgutil.walk_packages(parent.__path__, package + "."):
    if info.name not in skipped:
        importlib.import_module(info.name)
        count += 1
print(count)
"""


def import_all(package: str, blocked: str, skipped: tuple[str, ...] = ()) -> int:
    """Import ``package`` and all below it in a fresh process; top-level names matching ``blocked`` do not exist."""
    argv = [sys.executable, "-c", IMPORT_ALL_BUT, package, blocked, " ".join(skipped)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise AssertionError(f"importing {package} without {blocked}:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def test_moe_ref_imports_with_nothing_but_numpy():
    # All that is not numpy, not ours and not of the standard library; _x are platform helpers (_sysconfigdata...).
    assert import_all("moe_ref", r"(?!(numpy|moe_ref|_\w*|__editable__\w*)$).*") >= 1


def test_moe_cupy_imports_without_cupy():
    assert import_all("moe_cupy", "cupy|cupyx|cupy_backends", NEED_CUPY) >= 1


@pytest.mark.parametrize("room", sorted(FOREIGN_FORBIDDEN))
def test_rooms_that_decide_load_without_what_they_must_not_know(room):
    """The whole chain of imports, not only the room's own lines: moe_cupy/__init__.py runs first."""
    if not (ROOT / "moe_cupy" / room / "__init__.py").exists():
        pytest.skip(f"moe_cupy/{room} is not there yet")
    assert import_all(f"moe_cupy.{room}", "|".join(sorted(FOREIGN_FORBIDDEN[room]))) >= 1


def test_the_blocked_import_check_can_fail():
    with pytest.raises(AssertionError, match="numpy is blocked by the test"):
        import_all("numpy", "numpy")


# ---------------------------------------------------------------------------------------------------------
# (d) what git holds

MAX_FILE_BYTES = 30_000_000
MAX_TREE_BYTES = 55_000_000

# Folders of the machines this is written on, and registries' addresses: neither means anything to a reader.
# Written so that this file does not match itself.
MACHINE_TRACES = "|".join(["/(work|farm|root)/", r"files[.]pythonhosted", r"pypi[.]org/simple", r"registry[.]npmjs"])


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, errors="replace")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    try:
        done = git("ls-files", "-z")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def test_tracked_files_stay_small(tracked):
    sizes = {name: (ROOT / name).stat().st_size for name in tracked}
    large = [f"{name}: {size:,} bytes" for name, size in sizes.items() if size > MAX_FILE_BYTES]
    assert not large, listed(f"tracked files over {MAX_FILE_BYTES:,} bytes", large)
    total = sum(sizes.values())
    assert total < MAX_TREE_BYTES, f"all tracked files: {total:,} bytes, must stay under {MAX_TREE_BYTES:,}"


def test_tracked_files_name_no_machine_and_no_registry(tracked):
    done = git("grep", "-nIE", MACHINE_TRACES, "--", ":!*.gguf")
    assert done.returncode in (0, 1), done.stderr
    rows = [row[:160] for row in done.stdout.splitlines()]
    assert not rows, listed("machine paths or registry addresses", rows)


def test_the_machine_trace_pattern_matches_what_it_is_for():
    folder = "/".join(["", "root", "model.gguf"])
    assert re.search(MACHINE_TRACES, folder)
    assert re.search(MACHINE_TRACES, "https://" + "/".join(["pypi.org", "simple"]))
    assert not re.search(MACHINE_TRACES, Path(__file__).read_text("utf-8"))
