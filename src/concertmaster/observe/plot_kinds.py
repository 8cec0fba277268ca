"""What can be drawn of a study, as plain data; ``draw_plots`` draws it.

Axis labels carry their units. Panels stand side by side and share their axes' labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points of one arm, in the order in which they are joined.

    Attributes:
        half: Half of the 95 % interval at each point; empty where there is none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float | None] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinePlot:
    """A figure over load, say: one line an arm with error bars, one panel a setting.

    Attributes:
        panels: Title to lines.
    """

    title: str
    x_label: str
    y_label: str
    panels: Mapping[str, Sequence[Line]]
    log_y: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One arm as a point, with half of its intervals if they are known."""

    label: str
    x: float
    y: float
    x_half: float | None = None
    y_half: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """What one arm can trade, by a parameter, and where the others stand.

    Attributes:
        label: Of the curve.
        curve: Labelled with the value of the parameter, in its order.
        others: Arms that are one point each.
    """

    label: str
    curve: Sequence[Mark]
    others: Sequence[Mark] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPlot:
    """Success over seconds, say: a curve by parameter and points beside it, a panel a setting."""

    title: str
    x_label: str
    y_label: str
    panels: Mapping[str, Frontier]
    log_x: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CdfPlot:
    """Shares of values up to each value, one line an arm, one panel a setting.

    Attributes:
        panels: Title to arm to values, in any order.
    """

    title: str
    x_label: str
    panels: Mapping[str, Mapping[str, Sequence[float]]]
    log_x: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelinePlot:
    """Several series over one run, stacked above one axis of time.

    Attributes:
        bands: Label of the band's axis to its lines, from top to bottom.
        events: Instants in seconds to what happened then, drawn through all bands.
    """

    title: str
    bands: Mapping[str, Sequence[Line]]
    events: Mapping[float, str] | None = None
    x_label: str = "seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A state from one instant to another, in seconds."""

    start_s: float
    end_s: float
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlot:
    """In which state each row was when: replicas and readiness, say.

    Attributes:
        rows: Label to spans.
        states: Order of the legend; it also fixes colours across plots.
    """

    title: str
    rows: Mapping[str, Sequence[Span]]
    states: Sequence[str]
    x_label: str = "seconds"


Plot = LinePlot | FrontierPlot | CdfPlot | TimelinePlot | StatePlot
