"""Which weights matter for the forget set: Fisher diagonals and the masks made from them."""

from .fisher import FisherDiagonal
from .mask import SaliencyMask

__all__ = ["FisherDiagonal", "SaliencyMask"]
