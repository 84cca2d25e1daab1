"""Prints, writes to the file that is named as results are written, and prints again."""

import sys

from unlearn_ext.utils.files import atomic_path

print("before")
with atomic_path(sys.argv[1]) as partial:
    partial.write_text("new\n")
print("after")
