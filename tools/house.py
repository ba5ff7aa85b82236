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
    ("activations", "batchnorm", "files", "inputs", "network"),
    ("compute", "data", "facts", "layers", "structure", "threat"),
    ("features", "models"),
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

# The signature and docstring of a command are its flags and its help, so that only the lines of its body count.
COMMANDS = ("compare", "evaluate", "sweep", "transfer", "trust")

# Findings that are known. This list may only get shorter: an entry that is mended has to go.
KNOWN = (
    "src/clat/cli/evaluation.py",
    "src/clat/evaluation/evaluate.py:evaluate",
    "src/clat/evaluation/sweep.py:sweep",
    "src/clat/evaluation/transfer.py:transfer",
    "src/clat/evaluation/trust/__init__.py:trust",
    "src/clat/evaluation/trust/checks.py",
    "src/clat/evaluation/trust/checks.py: clat.training",
    "src/clat/training/loop.py",
    "src/clat/training/loop.py:train",
    "src/clat/training/runs.py",
    "bench/run.py",
)


def findings(root: Path = ROOT, known: tuple[str, ...] = KNOWN) -> list[str]:
    """What breaks a rule and is not known, and what is known but breaks none any more; one sentence each."""
    found: dict[str, str] = {}
    for path in sorted(path for folder in ("src", "tools", "bench") for path in (root / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, name = ast.parse(text), path.relative_to(root).as_posix()
        found |= too_long(name, tree, len(text.splitlines()))
        if name.startswith("src/clat/"):
            found |= forbidden_imports(name, tree)
    new = [sentence for key, sentence in found.items() if key not in known]
    return new + [f"{key} breaks no rule any more; take it out of KNOWN." for key in known if key not in found]


def too_long(name: str, tree: ast.Module, lines: int) -> dict[str, str]:
    """Module and functions of one file that are too long: key -> sentence."""
    found = {}
    if lines > LONGEST_MODULE:
        found[name] = f"{name} has {lines} lines, more than {LONGEST_MODULE}; split it along meaning."
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = function.lineno
            if name.startswith("src/clat/cli/") and function.name in COMMANDS:
                first = function.body[ast.get_docstring(function) is not None].lineno
            length = (function.end_lineno or first) - first + 1
            if length > LONGEST_FUNCTION:
                key = f"{name}:{function.name}"
                found[key] = f"{key} has {length} lines, more than {LONGEST_FUNCTION}; split it along meaning."
    return found


def forbidden_imports(name: str, tree: ast.Module) -> dict[str, str]:
    """Imports of one file of clat, wherever they stand in it, from its own row or from below: key -> sentence."""
    own = Path(name).relative_to("src/clat").parts[0].removesuffix(".py").replace("__init__", "clat")
    height = {part: row for row, parts in enumerate(ROWS) for part in parts}
    found = {}
    for part in sorted({own, *imported_parts(tree)}):
        key = f"{name}: clat.{part}"
        if part not in height:
            found[key] = f"{key} has no place in ROWS; give it one."
        elif own in height and part != own and height[part] >= height[own]:
            found[key] = f"{name} imports clat.{part}, which is not in a row above clat.{own} in ROWS."
    return found


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
