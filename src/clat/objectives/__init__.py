"""Objectives: how a batch is attacked and what it costs. One file each, one line each in ``OBJECTIVES``."""

from clat.objectives.base import Objective
from clat.objectives.clat import Clat
from clat.objectives.clean import Clean
from clat.objectives.fast_at import FastAt
from clat.objectives.free_at import FreeAt
from clat.objectives.grad_align import GradAlign
from clat.objectives.mart import Mart
from clat.objectives.pgd_at import PgdAt
from clat.objectives.score import Score
from clat.objectives.trades import Trades

OBJECTIVES: dict[str, type[Objective]] = {
    "clean": Clean,
    "pgd-at": PgdAt,
    "trades": Trades,
    "mart": Mart,
    "score": Score,
    "fast-at": FastAt,
    "free-at": FreeAt,
    "grad-align": GradAlign,
    "clat": Clat,
}
