"""What a model still knows: metrics on logits, and membership inference.

Every function takes logits, not models, so that one pass over the data (:func:`predict`) serves all of them.
"""

from .membership import entropy_mia
from .metrics import GAP_KEYS, accuracy, average_gap, js_divergence, kl_divergence, predict
from .verdict import RETAINED_GAP_KEYS, Parts, distance, knowledge

__all__ = ["GAP_KEYS", "Parts", "accuracy", "average_gap", "distance", "entropy_mia", "js_divergence", "kl_divergence"]
__all__ += ["RETAINED_GAP_KEYS", "knowledge", "predict"]
