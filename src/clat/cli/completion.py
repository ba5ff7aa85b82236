"""What Tab offers in a shell. Needs no torch, so that it takes a fraction of a second."""

from collections.abc import Mapping, Sequence
from typing import Any

from clat.files import shipped

# The shell hands over the words up to the cursor; where nothing is offered, it completes names of files itself.
BASH = """\
_clat() {
    local IFS=$'\\n'
    COMPREPLY=($("$1" --complete "${COMP_WORDS[@]:1:$COMP_CWORD}" 2> /dev/null))
}
complete -o default -F _clat clat
"""
SCRIPTS = {"bash": BASH, "zsh": "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" + BASH}


def offered(words: Sequence[str], table: Mapping[str, Any], recipe_commands: Sequence[str]) -> list[str]:
    """What the last of these words may become; the words are those after ``clat``.

    Args:
        table: the commands and settings of flags.json
        recipe_commands: those whose first word is a recipe, and which take the settings of one
    """
    *before, begun = words or [""]
    if not before:
        known = [*table["commands"], "--help", "--version", "--debug", "--completion"]
    elif before[0] not in table["commands"]:
        known = []
    else:
        command, settings = before[0], table["settings"] if before[0] in recipe_commands else []
        entries = [*table["commands"][command]["arguments"], *settings]
        flags = {_dashed(f"--{entry['name']}"): entry for entry in entries if not entry.get("positional")}
        last = flags.get(_dashed(before[-1]), {"switch": True})
        if not last.get("switch"):  # its value comes next
            known = last.get("choices", [])
        elif begun.startswith("-"):
            known = [flag for flag in flags if flag not in map(_dashed, before)]
        elif len(before) > 1:
            known = []
        elif command in recipe_commands:
            known = [name for name in sorted(shipped("recipes")) if "/" not in name]
        else:
            known = sorted(shipped("comparisons")) if command == "compare" else []
    return [word for word in known if _dashed(word).startswith(_dashed(begun))]


def _dashed(word: str) -> str:
    """Flags may be written with dashes or underscores."""
    return word.replace("_", "-")
