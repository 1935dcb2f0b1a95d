"""REPrune: prune the channels of a CNN while it trains."""

from reprune_triton.errors import RepruneError
from reprune_triton.fused.fusion import fuse, unfuse
from reprune_triton.pruner import Config, Event, REPrune
from reprune_triton.training.checkpoint import load, save

__version__ = "0.1.0"
__all__ = ["Config", "Event", "REPrune", "RepruneError", "fuse", "load", "save", "unfuse"]
