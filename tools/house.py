"""Checks what ruff has no rule for: how long modules and functions are, and which part of clat imports which.

python tools/house.py    prints one line for each finding and exits with 1 if there is any; ``make lint`` runs it
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST_MODULE, LONGEST_FUNCTION = 350, 60  # lines

# A part of clat imports only from the rows above its own, and from itself. ``clat`` is the package's __init__.
ROWS = (
    ("errors", "source"),
    ("text",),
    ("activations", "batchnorm", "files", "inputs", "network", "shortcuts"),
    ("compute", "data", "facts", "layers", "structure", "threat"),
    ("behind", "features", "layer_names", "models"),
    ("attacks", "checkpoint", "criticality"),
    ("objectives", "tuners"),
    ("evaluation",),
    ("training",),
    ("compare", "sharing"),
    ("report",),
    ("clat",),
    ("cli",),
    ("__main__",),
)

# What a newcomer reads, in this order, and how long that may be.
READING_PATH = (
    *("threat", "layers", "features", "criticality", "objectives/clat", "tuners/critical"),
    *("training/method", "training/loop"),
)
LONGEST_PATH = 1100  # lines

# The signature and docstring of a command are its flags and its help, so that only the lines of its body count.
COMMANDS = ("compare", "evaluate", "report", "sweep", "transfer", "trust")


def findings(root: Path = ROOT) -> list[str]:
    """What breaks a rule, one sentence each."""
    found: list[str] = []
    for path in sorted(path for folder in ("src", "tools", "bench") for path in (root / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, name = ast.parse(text), path.relative_to(root).as_posix()
        found += too_long(name, tree, len(text.splitlines()))
        if name.startswith("src/clat/"):
            found += forbidden_imports(name, tree)
    found += too_long_to_read(root)
    return found


def too_long(name: str, tree: ast.Module, lines: int) -> Iterator[str]:
    """The module and its functions that are too long. A docstring does not count."""
    if lines > LONGEST_MODULE:
        yield f"{name} has {lines} lines, more than {LONGEST_MODULE}; split it along meaning."
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = function.body[ast.get_docstring(function) is not None :]
            signature = function.body[0].lineno - function.lineno
            if name.startswith("src/clat/cli/") and function.name in COMMANDS:
                signature = 0
            length = signature + ((function.end_lineno or 0) - body[0].lineno + 1 if body else 0)
            if length > LONGEST_FUNCTION:
                most = f"more than {LONGEST_FUNCTION}"
                yield f"{name}:{function.name} has {length} lines, {most}; split it along meaning."


def too_long_to_read(root: Path) -> Iterator[str]:
    """The reading path, if it has grown beyond its length."""
    files = [path for path in (root / f"src/clat/{name}.py" for name in READING_PATH) if path.is_file()]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    if lines > LONGEST_PATH:
        yield f"The reading path ({', '.join(READING_PATH)}) has {lines} lines, more than {LONGEST_PATH}."


def forbidden_imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Imports of one file of clat, wherever they stand in it, from its own row or from below."""
    own = Path(name).relative_to("src/clat").parts[0].removesuffix(".py").replace("__init__", "clat")
    height = {part: row for row, parts in enumerate(ROWS) for part in parts}
    for part in sorted({own, *imported_parts(tree)}):
        if part not in height:
            yield f"{name}: clat.{part} has no place in ROWS; give it one."
        elif own in height and part != own and height[part] >= height[own]:
            yield f"{name} imports clat.{part}, which is not in a row above clat.{own} in ROWS."


def imported_parts(tree: ast.Module) -> Iterator[str]:
    """The parts of clat that a file imports."""
    public = {part for row in ROWS for part in row}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "clat":  # a part, or a public name of the package
            paths = [f"clat.{alias.name if alias.name in public else 'clat'}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            paths = [node.module or ""]
        else:
            continue
        for path in paths:
            package, _, rest = path.partition(".")
            if package == "clat":
                yield rest.partition(".")[0] or "clat"


if __name__ == "__main__":
    said = findings()
    print(*said, sep="\n", end="\n" if said else "")
    sys.exit(bool(said))
