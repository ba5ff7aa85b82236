"""Tuners: which parameters train, and when that is decided again. One file each, one line each in ``TUNERS``."""

from clat.tuners.base import Tuner
from clat.tuners.convlora import ConvLora
from clat.tuners.critical import Critical
from clat.tuners.rift import Rift
from clat.tuners.selection import Selection
from clat.tuners.whole import Whole

TUNERS: dict[str, type[Tuner]] = {
    "whole": Whole,
    "critical": Critical,
    "rift": Rift,
    "convlora": ConvLora,
}

__all__ = ["TUNERS", "ConvLora", "Critical", "Rift", "Selection", "Tuner", "Whole"]
