"""REPrune: prune the channels of a CNN while it trains."""

from .checkpoint import load, save
from .errors import RepruneError
from .fusion import fuse, unfuse
from .pruner import Config, Event, REPrune

__version__ = "0.1.0"
__all__ = ["Config", "Event", "REPrune", "RepruneError", "fuse", "load", "save", "unfuse"]
