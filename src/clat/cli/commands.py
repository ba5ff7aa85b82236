"""The commands, one typed function each; a signature is a command's flags, a docstring their help."""

from clat.cli.arguments import Command
from clat.cli.compare import compare
from clat.cli.evaluate import evaluate
from clat.cli.listing import list_
from clat.cli.networks import import_, layers
from clat.cli.report import report
from clat.cli.sharing import adapter_apply, adapter_save, export
from clat.cli.sweep import sweep
from clat.cli.training import demo, finetune, status, train
from clat.cli.transfer import transfer
from clat.cli.trust import trust

COMMANDS: dict[str, Command] = {
    "demo": demo,
    "layers": layers,
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "transfer": transfer,
    "sweep": sweep,
    "trust": trust,
    "compare": compare,
    "report": report,
    "list": list_,
    "status": status,
    "import": import_,
    "adapter save": adapter_save,
    "adapter apply": adapter_apply,
    "export": export,
}
