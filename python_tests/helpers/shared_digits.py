"""The digits, read once in a process: reading their file takes longer than most of what is done with them."""

from functools import cache

from unlearn_ext.data.digits import load_digits

digits = cache(load_digits)
