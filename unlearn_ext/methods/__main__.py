"""``python -m unlearn_ext.methods`` prints the table of methods."""

import sys

from ..utils.streams import escape_unprintable
from .registry import available
from .table import markdown

methods, problems = available()
with escape_unprintable():
    sys.stdout.write(markdown(methods.values()))
    for problem in problems:
        print(problem, file=sys.stderr)
