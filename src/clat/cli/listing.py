"""The command that lists what comes with clat: clat list."""

from rich.table import Table

from clat.cli.shared import console, write_json
from clat.files import parse_yaml, read_text, shipped
from clat.models import MODELS, known_names
from clat.training.recipe_files import summary


def list_(json: str | None = None) -> None:
    """Lists the models, recipes and comparisons that can be named.

    Args:
        json: write the list to this file, or to standard output if it is -
    """
    found = {"models": list(MODELS), "recipes": recipes(), "comparisons": comparisons()}
    if json is not None:
        write_json(json, found)
    if json != "-":
        console.print("Models (--model), with options after commas, e.g. rn18,width=16", style="bold")
        console.print(f"  {known_names()}", highlight=False)
        console.print(_described("Recipes (clat train RECIPE, clat finetune RECIPE)", recipes()))
        console.print(_described("Comparisons (clat compare NAME)", comparisons()))


def recipes() -> dict[str, str]:
    """What each recipe is, by name, without those that are laid over others."""
    return {name: summary(read_text(path)) for name, path in sorted(shipped("recipes").items()) if "/" not in name}


def comparisons() -> dict[str, str]:
    """The question of each comparison, by name."""
    return {
        name: parse_yaml(read_text(path), path)["question"] for name, path in sorted(shipped("comparisons").items())
    }


def _described(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    for name, words in rows.items():
        table.add_row(name, words)
    return table
