"""Figures in words, the same in tables, pictures and pages."""

from collections.abc import Mapping

from clat.evaluation.sweep import Curve, Point
from clat.threat import Threat


def percent(figure: Mapping[str, float]) -> str:
    """An accuracy's JSON in percent with its interval, e.g. 28.3 [26.4, 30.3]."""
    return f"{100 * figure['accuracy']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def attack_name(name: str, threat: Threat) -> str:
    """An attack with its ball, e.g. PGD-20 linf eps 8/255."""
    return f"{name} {threat.norm} eps {radius(threat.radius, threat.norm)}"


def radius(eps: float, norm: str) -> str:
    """The radius of a ball as it is written: 8/255 if it is a number of grey levels and the norm linf, else 0.031."""
    grey = eps * 255
    return f"{round(grey)}/255" if abs(grey - round(grey)) < 1e-9 and norm == "linf" and eps else f"{eps:g}"


def duration(seconds: float) -> str:
    """A time for a person, e.g. 40 s, 12 min, 3.5 h or 5 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def strength(curve: Curve, point: Point) -> str:
    """The strength at a point of the curve, e.g. 8/255 or 20."""
    return radius(point.eps, curve.norm) if curve.over == "eps" else str(point.steps)
