"""The commands, one typed function each; a signature is a command's flags, a docstring their help."""

from clat.arguments import Command
from clat.commands.evaluation import evaluate, sweep, transfer, trust
from clat.commands.networks import import_, layers
from clat.commands.training import demo, finetune, status, train

COMMANDS: dict[str, Command] = {
    "demo": demo,
    "layers": layers,
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "transfer": transfer,
    "sweep": sweep,
    "trust": trust,
    "status": status,
    "import": import_,
}
