"""Loads the library and says which backend that gave, and from where; in so many threads at once as argv[2] says.

Its sources are in the directory argv[1] if that is given, and else the package's.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unlearn_ext.native import loading, recipes

if len(sys.argv) > 1:
    recipes.find_csrc = lambda: Path(sys.argv[1])
with ThreadPoolExecutor(threads := int(sys.argv[2]) if len(sys.argv) > 2 else 1) as pool:
    print(*set(pool.map(lambda _: loading.load(), range(threads))))
print(loading.library_path())
