"""What to minimise, where, and on which schedule: one small file for each method."""

from .bad_teacher import BadTeacher
from .base import Method
from .domains import DOMAINS
from .esd import ESD
from .finetune import Finetune
from .forgetting import Forgetting
from .gradient_ascent import GradientAscent
from .nabla_tau import NablaTau
from .negative_gradient import NegativeGradientPlus, Projected
from .random_label import RandomLabel, SalUn
from .registry import METHODS, available, find
from .row import Row
from .scrub import Scrub
from .sfron import ABLATIONS, SFRon
from .spec import find_method, parse
from .ssd import SSD
from .ug_clu import UGCLU
from .values import ForgetLoss

__all__ = [
    "ABLATIONS",
    "DOMAINS",
    "ESD",
    "METHODS",
    "SSD",
    "UGCLU",
    "BadTeacher",
    "Finetune",
    "ForgetLoss",
    "Forgetting",
    "GradientAscent",
    "Method",
    "NablaTau",
    "NegativeGradientPlus",
    "Projected",
    "RandomLabel",
    "Row",
    "SFRon",
    "SalUn",
    "Scrub",
    "available",
    "find",
    "find_method",
    "parse",
]
