"""Every method's update against a plain float64 transcription with torch.autograd and torch.optim, 20 steps."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.models import ConvNet, batches, make
from helpers.transcriptions import CLOSE, STEPS, distance, rounds, sets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

EPS = 1e-6  # of Adam: a convolution before BatchNorm has a bias without gradient, whose rounding a small eps enlarges


def wrong(forget: list) -> list[dict[str, Tensor]]:
    """With a wrong label for each sample."""
    return [{"pixel_values": x, "labels": y, "replace_labels": (y + 1 + i % 3) % 4} for i, (x, y) in enumerate(forget)]


# --- Transcriptions -------------------------------------------------------------------------------------------


def finetune(net, forget, retain):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for x, y in itertools.islice(rounds(retain), STEPS):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
        yield


def gradient_ascent(net, forget, retain):
    net.norm.eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in itertools.islice(rounds(forget), STEPS):
        optimizer.zero_grad()
        (-2 * cross_entropy(net(x), y)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        yield
    assert net.norm.num_batches_tracked == 0


def negative_gradient_plus(net, forget, retain):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, eps=EPS, weight_decay=0.1)
    for (x, y), (u, v) in itertools.islice(zip(rounds(forget), rounds(retain), strict=False), STEPS):
        optimizer.zero_grad()
        (cross_entropy(net(u), v) - 0.3 * cross_entropy(net(x), y)).backward()
        optimizer.step()
        yield


def projected(net, forget, retain, conflicts: list[bool] | None = None):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for (x, y), (u, v) in itertools.islice(zip(rounds(forget), rounds(retain), strict=False), STEPS):
        parameters = list(net.parameters())
        g_f = torch.autograd.grad(-2 * cross_entropy(net(x), y), parameters)
        g_r = torch.autograd.grad(cross_entropy(net(u), v), parameters)
        norm = sum((g**2).sum() for g in g_f).sqrt()
        g_f = [g * min(1.0, 0.5 / (norm.item() + 1e-6)) for g in g_f]
        product = sum((a * b).sum() for a, b in zip(g_f, g_r, strict=True))
        if conflicts is not None:
            conflicts.append(bool(product < 0))
        if product < 0:
            square = sum((g**2).sum() for g in g_r)
            g_f = [a - product / square * b for a, b in zip(g_f, g_r, strict=True)]
        for p, a, b in zip(parameters, g_f, g_r, strict=True):
            p.grad = a + b
        optimizer.step()
        yield


def random_label(net, forget, retain):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, eps=EPS)
    given = rounds(forget)
    for t, (u, v) in enumerate(itertools.islice(rounds(retain), STEPS)):
        steps = [(u, v)]
        if t % 3 == 0:
            batch = next(given)
            steps.insert(0, (batch["pixel_values"], batch["replace_labels"]))
        for x, y in steps:
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
        yield


def top_fraction(net, forget, fraction: float) -> list[Tensor]:
    """The mask of SalUn: by the size of the sum of the batches' gradients, in eval mode."""
    net.eval()
    net.zero_grad()
    for batch in forget:
        cross_entropy(net(batch["pixel_values"]), batch["labels"]).backward()  # .grad adds up
    sums = torch.cat([p.grad.abs().reshape(-1) for p in net.parameters()])
    kept = torch.zeros_like(sums, dtype=torch.bool)
    kept[sums.argsort(descending=True, stable=True)[: int(fraction * len(sums))]] = True
    net.train()
    sizes = [p.numel() for p in net.parameters()]
    return [k.view_as(p) for k, p in zip(kept.split(sizes), net.parameters(), strict=True)]


def salun(net, forget, retain):
    masks = top_fraction(net, forget, 0.4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    for batch, (u, v) in itertools.islice(zip(rounds(forget), rounds(retain), strict=False), STEPS):
        for x, y in ((batch["pixel_values"], batch["replace_labels"]), (u, v)):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            before = [p.detach().clone() for p in net.parameters()]
            for p, mask in zip(net.parameters(), masks, strict=True):
                p.grad = p.grad * mask
            optimizer.step()
            with torch.no_grad():  # neither decay nor momentum moves the others
                for p, old, mask in zip(net.parameters(), before, masks, strict=True):
                    p.copy_(torch.where(mask, p, old))
                    optimizer.state[p]["momentum_buffer"].mul_(mask)
        yield


def away(z: Tensor, z0: Tensor, temperature: float) -> Tensor:
    """T² KL(original ‖ network), the mean over the batch."""
    p, q = (z0 / temperature).softmax(1), (z / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def frozen(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).eval().requires_grad_(False)


def scrub(net, forget, retain):
    """Two epochs of three begin with a pass over the forget set."""
    original = frozen(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        for x, _ in forget if epoch < 2 else ():
            optimizer.zero_grad()
            (-away(net(x), original(x), 2.0)).backward()
            optimizer.step()
            yield
        for x, y in retain:
            optimizer.zero_grad()
            z = net(x)
            (0.9 * cross_entropy(z, y) + 0.3 * away(z, original(x), 2.0)).backward()
            optimizer.step()
            yield


def drawn_anew(net: nn.Module, seed: int) -> nn.Module:
    """The construction of ConvNet after its seed draws the same numbers as its parts do when asked again."""
    torch.manual_seed(seed)
    drawn = copy.deepcopy(net)
    for part in (drawn.conv, drawn.norm, drawn.head):
        part.reset_parameters()
    return frozen(drawn)


def bad_teacher(net, forget, retain):
    original, random = frozen(net), drawn_anew(net, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for (x, _), (u, _) in itertools.islice(zip(rounds(forget), rounds(retain), strict=False), STEPS):
        optimizer.zero_grad()
        (1.5 * away(net(x), random(x), 1.0) + away(net(u), original(u), 1.0)).backward()
        optimizer.step()
        yield


UNSEEN = batches(2, 7, seed=9, dtype=torch.float64)


def nabla_tau(net, forget, retain, reached: list[bool] | None = None):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, eps=EPS, weight_decay=0.1)
    samples = [sum(len(y) for _, y in data) for data in (forget, retain)]
    start = 5 / 3 * samples[0] / sum(samples)
    for t, ((x, y), (u, v)) in enumerate(itertools.islice(zip(rounds(forget), rounds(retain), strict=False), STEPS)):
        if t % 5 == 0:
            net.eval()
            with torch.no_grad():
                losses = [cross_entropy(net(a), b, reduction="none") for a, b in UNSEEN]
            tau = torch.cat(losses).mean()
            net.train()
        alpha = start * (1 - t / STEPS)
        gap = tau - cross_entropy(net(x), y)
        if reached is not None:
            reached.append(bool(gap <= 0))
        optimizer.zero_grad()
        (alpha * torch.relu(gap) ** 2 + (1 - alpha) * cross_entropy(net(u), v)).backward()
        optimizer.step()
        yield


LEARN = batches(4, 6, seed=11, dtype=torch.float64)


def ug_clu(net, forget, retain):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    given = rounds(forget)
    for t, ((u, v), (a, b)) in enumerate(itertools.islice(zip(rounds(retain), rounds(LEARN), strict=False), STEPS)):
        if t % 2 == 0:
            x, y = next(given)
            optimizer.zero_grad()
            losses = cross_entropy(net(x), y, reduction="none")
            c = 1 / (losses.detach() ** 0.5 + 1e-15)
            (-0.3 * (c * losses).sum() / c.sum()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.2)
            optimizer.step()
        optimizer.zero_grad()
        (0.7 * cross_entropy(net(u), v) + 0.4 * cross_entropy(net(a), b)).backward()
        optimizer.step()
        yield


# --- The updates ----------------------------------------------------------------------------------------------

CASES = {
    "finetune": ("finetune:rule=momentum,lr=0.1,momentum=0.9,weight_decay=0.01", finetune),
    "gradient_ascent": ("gradient_ascent:rule=momentum,lr=0.1,momentum=0.9,forget_alpha=2", gradient_ascent),
    "negative_gradient_plus": (
        "negative_gradient_plus:rule=adamw,lr=0.01,eps=1e-6,weight_decay=0.1,forget_alpha=0.3",
        negative_gradient_plus,
    ),
    "projected": ("projected:rule=momentum,lr=0.1,momentum=0.9,forget_alpha=2,max_norm=0.5", projected),
    "random_label": ("random_label:rule=adam,lr=0.01,eps=1e-6,forget_freq=3", random_label),
    "scrub": (
        "scrub:rule=momentum,lr=0.05,momentum=0.9,epochs=3,msteps=2,retain_loss_weight=0.9,distance_weight=0.3",
        scrub,
        {"steps": 2 * 3 + 3 * 5},
    ),
    "bad_teacher": ("bad_teacher:rule=momentum,lr=0.1,momentum=0.9,forget_alpha=1.5,seed=5", bad_teacher),
    "nabla_tau": ("nabla_tau:lr=0.02,eps=1e-6,weight_decay=0.1", nabla_tau, {"unseen": UNSEEN}),
    "ug_clu": (
        "ug_clu:rule=momentum,lr=0.05,momentum=0.9,forget_freq=2,forget_alpha=0.3,max_norm=0.2,gamma=none,"
        "forget_schedule=constant,retain_share=0.7,learn_share=0.4",
        ug_clu,
        {"learn": LEARN},
    ),
    "salun": ("salun:rule=momentum,lr=0.1,momentum=0.9,weight_decay=0.05,mask_fraction=0.4", salun),
}
REPLACING = ("random_label", "salun")


@pytest.mark.parametrize("name", CASES)
def test_update_is_the_transcriptions(name) -> None:
    method, transcription, *more = CASES[name]
    forget, retain = sets()
    arguments = more[0] if more else {}
    given = wrong(forget) if name in REPLACING else forget
    assert distance(method, transcription, given, retain, **arguments) <= CLOSE


def test_projection_meets_both_cases() -> None:
    """Else the test above would say little."""
    conflicts: list[bool] = []
    list(projected(make(ConvNet).double(), *sets(), conflicts))
    assert {True, False} == set(conflicts)


def test_the_forget_loss_reaches_tau_and_does_not_at_first() -> None:
    reached: list[bool] = []
    list(nabla_tau(make(ConvNet).double().train(), *sets(), reached))
    assert {True, False} == set(reached)
