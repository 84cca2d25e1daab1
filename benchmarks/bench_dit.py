"""How much faster is unlearning a diffusion transformer, stage by stage, than the released loop?

    python benchmarks/bench_dit.py --threads 2                       # DiT-S/2 on two cores
    python benchmarks/bench_dit.py --device cuda --network dit-xl-2 --layout paper --json dit.json
    python benchmarks/bench_dit.py --depth 1 --width 48 --heads 2 --repeats 2    # a short trial

diffusers' DiTTransformer2DModel by shape, with random weights and made-up latents; squared errors and variational
bound, AdamW, as released for DiT-XL/2. Stages: a batch of the Fisher pass; the mask; a forget step (forward, backward,
mask, clip, step); a retain step; both, the whole iteration.

ours: FisherDiagonal, SaliencyMask and UnlearnOptimizer, as the Unlearner uses them. plain: the released loop, tensor by
tensor, its Fisher sums on the host. tuned: that loop done well, with lists of tensors, all on the device, and the
faster of torch's AdamWs. Beside them of ours: gradients used and freed in the backward pass; exact per-sample Fisher in
batches; forward and backward compiled, as of the tuned loop. passes: forward and backward alone, the floor of all that
is not compiled. Before anything is timed, all others must arrive where ours does; then they take turns.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the modules beside, from any directory

from benchmarks.dit import script

if __name__ == "__main__":
    sys.exit(script.main(__doc__))
