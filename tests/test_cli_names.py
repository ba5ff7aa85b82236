"""What can be named: clat list, and what Tab offers in a shell."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clat.cli.arguments import RECIPE_COMMANDS, table
from clat.cli.completion import offered
from clat.cli.main import main
from clat.models import MODELS

ROOT = Path(__file__).parents[1]


def test_list_names_what_comes_with_clat(capsys):
    assert main(["list", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == list(MODELS)
    assert list(found["recipes"]) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert len(found["comparisons"]) == len(list((ROOT / "comparisons").rglob("*.yaml")))
    assert all(words and "\n" not in words for kind in ("recipes", "comparisons") for words in found[kind].values())
    assert main(["list"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for kind in found.values() for name in kind)
    assert f"clean {found['recipes']['clean']}" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train", "transfer", "trust"]),
        (["train", "clat-"], ["clat-fast", "clat-paper"]),
        (["compare", "paper/figure"], ["paper/figure-2", "paper/figure-3", "paper/figure-4"]),
        (["train", "clat", "--critical.op"], ["--critical.optimizer-state"]),
        (["train", "clat", "--label_s"], ["--label-smoothing"]),
        (["train", "clat", "--schedule", "c"], ["cosine", "constant", "cyclic"]),
        (["train", "clat", "--decay", ""], ["all", "no_norm", "kernels"]),
        (["train", "clat", "--resume", "--re"], ["--recompute"]),  # resume is given already
        (["evaluate", "run", "--tier", "s"], ["standard"]),
        (["evaluate", ""], []),  # a file
        (["train", "clat", "--out", "c"], []),
        (["nothing", "--o"], []),
    ],
)
def test_tab_offers_what_fits(words, expected):
    assert offered(words, table(), RECIPE_COMMANDS) == expected


def test_tab_offers_every_command_first():
    assert offered([""], table(), RECIPE_COMMANDS)[: len(table()["commands"])] == list(table()["commands"])


@pytest.fixture
def named(tmp_path):
    """The environment of a shell in which clat can be called by its name."""
    command = tmp_path / "clat"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m clat "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "DIR": str(tmp_path),
    }


def printed(shell, script, environment):
    done = subprocess.run([shell, "-fc", script], env=environment, capture_output=True, text=True, timeout=90)
    return done.stdout, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_printed_script(named):
    """The script as a user loads it, and Tab as bash calls it: after the command's name, the word, the one before."""
    script = """
eval "$(clat --completion bash)"
complete -p clat
COMP_WORDS=(clat train pgd-at --schedule c); COMP_CWORD=4
_clat clat c --schedule
printf '%s\\n' "${COMPREPLY[@]}"
COMP_WORDS=("$DIR/clat" fin); COMP_CWORD=1
_clat "$DIR/clat" fin "$DIR/clat"
printf '%s\\n' "${COMPREPLY[@]}"
"""
    out, error = printed("bash", script, named)
    assert out.splitlines() == [
        "complete -o default -F _clat clat",
        *("cosine", "constant", "cyclic"),
        "finetune",
    ], error


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_with_the_printed_script(named):
    """In a terminal of its own, with the key itself."""
    script = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'eval "$(clat --completion zsh)"; echo loaded$((1))'
zpty -r -m shell seen '*loaded1*'
zpty -w -n shell 'clat train clat-f'$'\\t'
zpty -r -m shell seen '*clat-fast*'
print -r -- $seen
zpty -d shell
"""
    out, error = printed("zsh", script, named)
    assert "clat train clat-fast" in out, error


@pytest.mark.parametrize(("load", "policy"), [(0.1, None), (99.0, "passive")])
def test_threads_sleep_where_the_machine_is_busy(load, policy, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is as before afterwards
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["list", "--json", os.devnull]) == 0
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_an_unknown_shell_is_named(capsys):
    assert main(["--completion", "fish"]) == 2
    assert capsys.readouterr().err == "clat: --completion is 'fish'; choose one of bash, zsh.\n"
