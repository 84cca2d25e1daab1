"""Unlearning with a proof: softmax regression by descent to delete (Neel, Roth and Sharifi-Malvajerdi, PMLR v132).

>>> import torch
>>> from sklearn.datasets import load_digits
>>> from unlearn_ext.certified import SoftmaxRegression, certify, unit_rows
>>> pixels, digits = load_digits(return_X_y=True)
>>> rows = unit_rows(torch.from_numpy(pixels))
>>> learner = certify(SoftmaxRegression(features=65, classes=10, l2=0.05), rows, torch.from_numpy(digits))
>>> learner.publish().save("published")  # doctest: +SKIP
>>> learner.delete([3, 1415])  # how many steps it took
54
>>> learner.publish().save("published")  # weights.safetensors and certificate.json  # doctest: +SKIP
>>> learner.save_secret("secret.safetensors")  # to go on later; never give this file away  # doctest: +SKIP

The word "certified" is for what this package returns alone: other methods here are measured against retraining, and
come with no proof.
"""

from .constants import Constants
from .descent_to_delete import DescentToDelete, certify
from .features import unit_rows
from .publication import Publication
from .regression import SoftmaxRegression

__all__ = ["Constants", "DescentToDelete", "Publication", "SoftmaxRegression", "certify", "unit_rows"]
