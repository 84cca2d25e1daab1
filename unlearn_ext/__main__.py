"""``python -m unlearn_ext``, the same as ``unlearn-ext``."""

import sys

from .cli import main

sys.exit(main())
