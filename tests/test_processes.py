"""Two processes: the weights of one, the same decisions, little to send, and an end when the other one dies."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from clat.batchnorm import fixed_norms, shared_norms
from clat.checkpoint import load_tensors
from clat.cli.main import main
from clat.data.dataset import Dataset
from clat.objectives import Clat
from clat.threat import Threat
from clat.training import loop, peers
from clat.training.batches import PartThreat
from clat.training.processes import Processes
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.train import train
from clat.tuners import Critical
from conftest import network

HERE = Path(__file__).parent
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Pairs of processes that fork from one, so that torch is imported once. Prints how each ended, as JSON.
PAIRS = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import test_processes
ends = []
for function, arguments, said, kill, port in {cases!r}:
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
            try:
                getattr(test_processes, function)(rank, *arguments)
            except BaseException as error:
                os.write(2, f"process {{rank}} raised {{type(error).__name__}}: {{error}}\\n".encode())
                os._exit(3)
            os._exit(0)
    first = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    if kill:
        os.kill(children[1], signal.SIGKILL)
    ends.append([first, os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1])])
print(json.dumps(ends))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[list[int], str, Path]]:
    """What each pair of processes ended with: exit codes, standard error, and the folder that it wrote to."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("trained", *ENDS)}
    said = {name: str(folder.parent / f"{folder.name}.txt") for name, folder in places.items()}
    cases = [("train_all", [str(places["trained"])], said["trained"], False, free_port())]
    cases += [("train_until", [str(places[how]), how], said[how], how == "hangs", free_port()) for how in ENDS]
    script = PAIRS.format(here=str(HERE), cases=cases)
    done = subprocess.run([sys.executable, "-c", script], env=QUIET, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    return {name: (end, Path(said[name]).read_text(), places[name]) for name, end in zip(places, ends, strict=True)}


# The weights of one process

# What two processes compute as one does: no random start or crop, which each process draws for itself. The l2 ball has
# no sign that rounding turns over.
SHARED = Recipe(
    epochs=2,
    batch_size=60,
    lr=0.05,
    holdout=60,
    augment=False,
    precision="fp32",
    health=False,
    validation_steps=2,
    threat=Threat(eps=0.5, step=0.2, steps=2, start="zero", norm="l2"),
)
CRITICAL = replace(SHARED, objective=Clat(weight=0.1), tuner=Critical(k=2, every=1))
RECIPES = {
    "whole": replace(SHARED, lr=0.02),
    "critical": CRITICAL,
    # Selected from a random start, which is that of one process, with BatchNorm's statistics in train mode.
    "statistics": replace(CRITICAL, epochs=1, tuner=replace(CRITICAL.tuner, batch=33, norm_statistics="all")),
    "loss": replace(CRITICAL, epochs=1, tuner=replace(CRITICAL.tuner, ranking="loss")),
    "alignment": replace(CRITICAL, epochs=1, tuner=replace(CRITICAL.tuner, ranking="alignment")),
}


def bars() -> Dataset:
    """As ``blobs`` in conftest.py."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(240) % 3
    pixels = torch.randint(0, 60, (240, 1, 12, 12), dtype=torch.uint8, generator=generator)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 3] += 150
    return Dataset(pixels, labels, ("top", "middle", "bottom"), "bars", "train")


def train_all(rank: int, folder: str) -> None:
    """Every recipe; notes how many numbers each step sent besides the statistics of BatchNorm."""
    sent: list[int] = []
    real = Processes.average_gradients

    def noted(self, parameters):
        sent.append(sum(parameter.grad.numel() for parameter in parameters))
        real(self, parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "average_gradients", noted)
        for name, recipe in RECIPES.items():
            model = network()
            if rank:  # the first process's weights are everybody's
                nn.init.normal_(model.network.conv1.weight)
            train(recipe, model, bars(), out=Path(folder) / name)
            Path(folder, f"{name}-{rank}.json").write_text(json.dumps(sent))
            sent.clear()


@pytest.fixture(scope="module")
def trained(pairs) -> Path:
    codes, said, folder = pairs["trained"]
    assert codes == [0, 0], said
    return folder


def test_two_processes_train_as_one_does(trained, tmp_path):
    """At the same global batch: whole with BatchNorm, through a re-selection, and by each kind of ranking.

    Slow (20 s, with what all pairs of processes do).
    """
    train_all(0, str(tmp_path))
    for name in RECIPES:
        one, other = Run(tmp_path / name), Run(trained / name)
        assert (one.environment["processes"], other.environment["processes"]) == (1, 2)
        same(one, other)


def same(one: Run, other: Run) -> None:
    """Two runs chose the same layers, lost the same and end with the same weights and statistics, to rounding."""
    for first, second in zip(one.selections, other.selections, strict=True):
        assert first.layers == second.layers
        weak, also = ([score.weakness for score in selection.scores] for selection in (first, second))
        assert weak == pytest.approx(also, rel=1e-4)
    for first, second in zip(one.metrics, other.metrics, strict=True):
        for key in ("clean", "validation_images"):  # the validation attack starts at random
            assert first[key] == second[key]
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    second = load_tensors(other.last)[0]
    for key, tensor in load_tensors(one.last)[0].items():
        assert (tensor - second[key]).float().norm() <= 1e-5 * tensor.float().norm(), key


def test_only_what_trains_is_sent(trained):
    for name in RECIPES:
        run, steps = Run(trained / name), 3
        sizes = [entry["trainable"] for entry in run.metrics for _ in range(steps)]
        for rank in (0, 1):
            assert json.loads((trained / f"{name}-{rank}.json").read_text()) == sizes
    assert max(sizes) < 0.5 * run.result["parameters"]


def test_a_part_of_a_batch_starts_as_in_the_whole(blobs):
    x = blobs.pixels[:7].float() / 255
    for threat in (Threat(), Threat(norm="l2", eps=0.5), Threat(start="gaussian")):
        torch.manual_seed(0)
        whole = threat.first(x)
        keys = {key: getattr(threat, key) for key in ("eps", "step", "steps", "norm", "start", "mode")}
        for rank in range(3):
            part = PartThreat(**keys, images=7, rank=rank, ranks=3)
            torch.manual_seed(0)
            assert torch.equal(part.first(part.own(x)), part.own(whole))


# BatchNorm


def derivatives(norm: nn.Module, x: torch.Tensor, processes: int) -> tuple[torch.Tensor, ...]:
    """Output, gradient and second derivative of a process whose loss is averaged over processes with the same images.

    One process alone has all of the images, and the mean of the losses.
    """
    x = x.clone().requires_grad_()
    with shared_norms(norm, lambda own: own.clone(), processes):
        y = norm(x)
        (first,) = torch.autograd.grad(y.sin().sum() * processes / 2, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
    return y, first, second


@pytest.mark.parametrize("keys", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_shared_norms_are_those_of_the_whole_batch(keys):
    """torch's own BatchNorm on the images of two processes, which have the same, and ours on those of one."""
    whole, part = nn.BatchNorm2d(3, dtype=torch.float64, **keys), nn.BatchNorm2d(3, dtype=torch.float64, **keys)
    for _ in range(2):
        x = 5 + torch.randn(4, 3, 2, 2, dtype=torch.float64)
        y, first, second = (found[:4] for found in derivatives(whole, torch.cat([x, x]), 1))
        own, own_first, own_second = derivatives(part, x, 2)
        torch.testing.assert_close(own, y)
        torch.testing.assert_close(own_first, 2 * first)  # averaging halves it
        torch.testing.assert_close(own_second, 4 * second)
    for mine, theirs in zip(part.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_shared_norms_leave_the_attack_its_fast_path(images):
    """In eval mode BatchNorm still runs as one multiplication and one addition, and afterwards as it did."""
    norm, kept = nn.BatchNorm2d(1).eval(), []
    with shared_norms(norm, torch.clone, 2):
        shared = norm.forward
        with fixed_norms(norm), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
            norm(images[0].clone().requires_grad_())
        assert images[0].shape not in kept
        assert norm.forward is shared
    assert "forward" not in vars(norm)


# A process that dies


def train_until(rank: int, folder: str, how: str) -> None:
    """Trains; in the second epoch the second process is killed, stops, or raises an error."""
    peers.PATIENCE, peers.GRACE = 4.0, 1.0
    real = loop._epoch

    def ends(job, epoch, *rest):
        if rank == 1 and epoch == 2:
            if how == "fails":
                raise RuntimeError("out of memory")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        return real(job, epoch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_epoch", ends)
        train(CRITICAL, network(), bars(), out=Path(folder))


ENDS = {
    "killed": "stops, as another process has ended or cannot be reached",
    "hangs": "stops, as another process has ended or cannot be reached",  # after the limit, here 4 s
    "fails": "stops, as another process has failed; what that one says is the cause",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_dies_stops_the_other_with_one_sentence(how, pairs):
    """With nobody watching them."""
    codes, said, folder = pairs[how]
    assert codes == [1, 3 if how == "fails" else -signal.SIGKILL], said
    lines = [line for line in said.splitlines() if line.startswith(("clat", "process"))]
    own = f"clat: Process 0 {ENDS[how]}; --resume continues the run after its last finished epoch."
    assert lines == ["process 1 raised RuntimeError: out of memory"] * (how == "fails") + [own]
    assert "Traceback" not in said
    assert Run(folder).epoch == 1
    assert peers.PATIENCE + peers.PAUSE < 60


def command(folder: Path) -> list[str]:
    """Of the command line, without a launcher: selections before epochs 1, 3 and 5."""
    values = {
        "--model": "rn18,width=4", "--data": "fashion-mnist-mini", "--out": str(folder), "--images": 120,
        "--holdout": 60, "--batch-size": 60, "--epochs": 6, "--lr": 0.02, "--critical.k": 2, "--critical.every": 2,
        "--augment": "false", "--precision": "fp32", "--health": "false", "--validation-steps": 1,
        "--threat.start": "zero", "--threat.norm": "l2", "--threat.eps": 0.5, "--threat.step": 0.2, "--threat.steps": 2,
    }  # fmt: skip
    return ["train", "clat", *(str(each) for pair in values.items() for each in pair)]


def test_a_killed_run_of_two_processes_resumes_and_ends_as_one_of_one_process(tmp_path):
    """Begun by torchrun, which stops the other process, and resumed by accelerate launch. Slow (25 s)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "clat"]
    folder = tmp_path / "two"
    with subprocess.Popen([*torchrun, *command(folder)], env=QUIET, stderr=subprocess.PIPE, text=True) as launcher:
        while not (folder / "last.safetensors").exists():
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.05)
        began = time.monotonic()
        os.kill(child_of(launcher.pid, rank=1), signal.SIGKILL)
        said = launcher.stderr.read()
    assert time.monotonic() - began < 60
    assert launcher.returncode != 0
    assert len([line for line in said.splitlines() if line.startswith("clat: Process 0")]) == 1, said
    assert 1 <= Run(folder).epoch < 6
    accelerate = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *accelerate, "--dynamo_backend", "no", "-m", "clat"]
    done = subprocess.run([*launch, *command(folder), "--resume"], env=QUIET, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on cpu:0, 2 processes") == 1  # one of them speaks
    assert main(command(tmp_path / "one")) == 0
    one, other = Run(tmp_path / "one"), Run(folder)
    assert [selection.epoch for selection in other.selections] == [1, 3, 5]
    same(one, other)


def child_of(launcher: int, rank: int) -> int:
    """The process that torchrun started with that rank."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in "\0" + (place / "environ").read_text():
                return int(place.name)
        except OSError:
            continue
    raise AssertionError("torchrun has no such child")


def test_the_commands_of_the_page_are_understood():
    """Each launcher takes its flags, and clat takes the rest."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    from clat.cli.arguments import parse
    from clat.cli.commands import COMMANDS

    launchers = {"accelerate launch": launch_command_parser(), "torchrun": get_args_parser()}
    lines = re.findall(
        r"^((?:accelerate launch|torchrun) .*)$", (HERE.parent / "docs/scale.md").read_text(), re.MULTILINE
    )
    assert len(lines) == 3
    for line in lines:
        launcher = next(name for name in launchers if line.startswith(name))
        given = launchers[launcher].parse_args(shlex.split(line.removeprefix(launcher)))
        assert given.module
        assert given.training_script == "clat"
        name, values = parse(given.training_script_args, COMMANDS)
        assert name == "finetune"
        assert values["recipe"].tuner == replace(Critical(), k=3)
        assert values["recipe"].batch_size % 8 == 0
