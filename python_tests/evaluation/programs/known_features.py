"""The distances of known pictures by a stand-in network in argv[1], and what is said of unfit weights."""

import json
import sys

from safetensors.torch import load_file

from unlearn_ext import InputError
from unlearn_ext.evaluation.inception import InceptionFID, inception_fid

home = sys.argv[1]
weights, pictures = f"{home}/weights.pth", load_file(f"{home}/pictures.safetensors")
fid = InceptionFID(weights)
for part in pictures["real"].split(25):
    fid.add_real(part)
found = {name: fid.distance(pictures[name]) for name in ("new", "grey", "real")}
found["again"] = fid.distance(pictures["new"])
found["function"] = inception_fid(pictures["grey"], pictures["new"], weights)
for name in ("other", "zeros", "nan"):
    try:
        InceptionFID(f"{home}/{name}.pth")
    except InputError as error:
        found[name] = str(error)
print(json.dumps({**found, "published": fid.published, "count": fid.real}))
