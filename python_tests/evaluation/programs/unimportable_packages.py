"""What is said of packages, the folders argv[2:], that cannot be imported; argv[1] are the weights."""

import sys

from unlearn_ext import InputError
from unlearn_ext.evaluation.inception import InceptionFID

for package in sys.argv[2:]:
    sys.path.insert(0, package)
    try:
        InceptionFID(sys.argv[1])
    except InputError as error:
        print(error)
    assert not any(name.startswith("torch_fidelity") for name in sys.modules)
