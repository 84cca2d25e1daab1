"""What a diffusion preset needs beside the method's own settings, and what was published with it.

``DOMAINS[preset]`` has three parts: ``task``, keyword arguments of the task; ``run``, of the run around it (batch
size, EMA decay, which weights are trained, whether a DiT's embedder copies are tied, guidance of its pictures); and
``published``, the paper's figures.

Guidance s is that of e_u + s (e_c - e_u), as diffusers counts it. The released code computes (1 + w) e_c - w e_u, with
w = 2 for DDPM and 7.5 for Stable Diffusion: s = 1 + w.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DOMAINS"]

_SOURCE = "arXiv 2409.19732 and K1nght/Unified-Unlearning-w-Remain-Geometry at 36bb7f6"

DOMAINS: dict[str, dict[str, dict[str, Any]]] = {
    # 38.6 M weights, Adam with betas .9 and .999, network dropout .1. The paper's abstract says 50 iterations. The
    # released moving average has decay 1e-4, which is the last weights.
    "ddpm-cifar10": {
        "task": {
            "label_dropout": 0.1,
            "reduction": "sum",
            "antithetic": True,
            "guidance": 3.0,
        },
        "run": {"train_batch_size": 128, "ema_decay": None, "trained_weights": "all"},
        # Means over five classes: accuracy of an external classifier on the forgotten class, and FID of the others.
        "published": {
            "source": _SOURCE,
            "forget_accuracy": 0.0152,
            "fid": 19.71,
            "others": {
                "Selective Amnesia": {"forget_accuracy": 0.0456, "fid": 23.25},
                "SalUn": {"forget_accuracy": 0.0060, "fid": 20.57},
                "SFR-on with dual state": {"forget_accuracy": 0.0024, "fid": 18.77},  # arXiv 2504.15827
            },
        },
    },
    # 675 M weights in the paper's layout, whose blocks share one embedder: diffusers' copies are tied.
    "dit-xl-2-256": {
        "task": {
            "label_dropout": 0.1,
            "reduction": "mean",
            "variational_bound": True,
            "guidance": None,
        },
        "run": {
            "train_batch_size": 1,
            "ema_decay": 0.9999,
            "trained_weights": "all",
            "tie_embeddings": True,
            "guidance_for_pictures": 4.0,
        },
        "published": {
            "source": _SOURCE,
            "forget_accuracy": 0.0,
            "fid": 17.44,
            "others": {
                "Selective Amnesia": {"forget_accuracy": 0.0596, "fid": 281.75},
                "SalUn": {"forget_accuracy": 0.5414, "fid": 97.33},
                "SFR-on with dual state": {"forget_accuracy": 0.0, "fid": 15.25},  # arXiv 2504.15827
            },
        },
    },
    # Stable Diffusion 1.4. The replacement is the same image under the other prompt, its latents drawn once more: a
    # forget batch says so with replace_latent_mean and replace_latent_std. gamma is left to the user there.
    "sd-nudity": {
        "task": {"prompt_dropout": 0.0, "reduction": "mean", "guidance": 8.5},
        "run": {
            "train_batch_size": 8,
            "ema_decay": None,
            "trained_weights": "all",  # or cross-attention
        },
        "published": {"source": _SOURCE},  # pictures, and no figure in what was read
    },
}
