"""Accuracies, divergences to a retrained model, and the average gap.

Everything is computed in float64 on the CPU, whatever the dtype and device of the logits: these are the
numbers that get printed, and they are cheap.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.streams import check_iterable, no_batches
from ..distributed.modes import evaluating
from ..distributed.weights import check_loaded
from ..errors import InputError
from ..tasks import Classification
from ..tasks.batches import refusing
from ..utils.arguments import check_device, check_model, describe
from .checks import checked_labels, checked_logits, checked_value

GAP_KEYS = ("FA", "RA", "TA", "MIA_entropy")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose largest logit stands at the label: mean over i of [argmax_k logits_ik = y_i].

    Args:
        logits: ``[N, K]``, any floating dtype and device, finite.
        labels: ``[N]``, any integer dtype, values in ``[0, K)``.

    Returns:
        A fraction in ``[0, 1]``. Among equal largest logits the first class counts as predicted.

    Raises:
        InputError: on empty input, wrong shapes, non-finite logits, or labels out of range.
    """
    return _accuracy(logits, labels, "logits", "labels")


def kl_divergence(retrained_logits: Tensor, unlearned_logits: Tensor) -> float:
    """Mean over samples of KL(p ‖ q) = Σ_k p_k (ln p_k − ln q_k), in nats.

    ``p`` is the softmax of the retrained model's logits and ``q`` that of the unlearned model's, on the same
    samples in the same order; usually the forget set (SFR-on, arXiv 2409.19732). It is 0 where they agree.

    Args:
        retrained_logits, unlearned_logits: ``[N, K]`` each, any floating dtypes and devices, finite.

    Raises:
        InputError: on empty input, wrong or different shapes, or non-finite logits.
    """
    log_p, log_q = _paired_log_softmax(retrained_logits, unlearned_logits)
    return _mean_kl(log_p, log_q)


def js_divergence(retrained_logits: Tensor, unlearned_logits: Tensor) -> float:
    """Mean over samples of JS(p, q) = (KL(p ‖ m) + KL(q ‖ m)) / 2 with m = (p + q) / 2, in nats.

    Symmetric and bounded by ln 2, so that a few confident samples cannot dominate it as they dominate
    :func:`kl_divergence`. Arguments and errors are those of :func:`kl_divergence`.
    """
    log_p, log_q = _paired_log_softmax(retrained_logits, unlearned_logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return (_mean_kl(log_p, log_m) + _mean_kl(log_q, log_m)) / 2


def average_gap(metrics: Mapping[str, float], reference: Mapping[str, float], keys: Sequence[str] = GAP_KEYS) -> float:
    """Distance of a model from the retrained one: mean over ``keys`` of abs(metrics[key] − reference[key]).

    Args:
        metrics: the judged model's metrics, as fractions.
        reference: the same metrics of the model retrained without the forget set.
        keys: which metrics count; the default is SFR-on's protocol (arXiv 2409.19732).

    Raises:
        InputError: when ``keys`` is empty, or a metric is missing or not a finite number.
    """
    if isinstance(keys, str) or not isinstance(keys, Sequence) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"keys: expected a list of metrics, got {keys!r}")
    if not keys:
        raise InputError("keys: expected at least one metric to average over, got none")
    pairs = [(checked_value(metrics, "metrics", key), checked_value(reference, "reference", key)) for key in keys]
    return sum(abs(own - other) for own, other in pairs) / len(keys)


def predict(
    model: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str | None = None,
    *,
    label_key: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``model`` over ``batches`` in eval mode and collect its logits.

    Within ``torch.autocast`` the model runs in its precision, as it does when it is called there.

    Args:
        model: returns logits ``[B, K]``, or an object or dict that has them as ``logits``.
        batches: an iterable of ``(inputs, labels)``, or of dicts of the model's keyword arguments with ``labels`` or
            ``label``, as :class:`~unlearn_ext.tasks.Classification` takes them.
        device: where the inputs are sent; by default where the model's first parameter is.
        label_key: where dicts have their labels, if under another name.

    Returns:
        ``(logits, labels)``: float32 ``[N, K]`` and int64 ``[N]``, both on the CPU, in the order of the
        batches. Every module's training flag is as it was before, also after an error.

    Raises:
        InputError: when there are no batches, or a batch or the model's output has not the form above.
    """
    check_model(model)
    check_iterable("evaluated", batches)
    check_loaded(model)
    if device is None:
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    else:
        device = check_device(device)
    task = Classification(label_key=label_key)
    logits, labels = [], []
    torch.clear_autocast_cache()  # an autocast around several calls keeps half copies of what the weights once were
    with evaluating(model), torch.no_grad():
        for batch in batches:
            inputs, targets = task.prepare(batch, device)
            with refusing(model, inputs):
                output = task.logits(model, inputs)
            if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(targets):
                raise InputError(
                    f"model: expected logits of shape [{len(targets)}, classes], one row for each label, "
                    f"got {describe(output)}"
                )
            if logits and output.shape[1] != logits[0].shape[1]:
                raise InputError(
                    f"model: expected logits of {logits[0].shape[1]} classes, as for the batches before, got "
                    f"{describe(output)}"
                )
            # Copying to the host waits for the device, but logits of a large set need not pile up there. Loaders and
            # models may fill the same tensors anew for each batch.
            logits.append(output.to("cpu", torch.float32, copy=True))
            labels.append(targets.to("cpu", torch.int64, copy=True))
    if not logits:
        raise InputError("batches: expected at least one batch, got none" + no_batches(batches))
    return torch.cat(logits), torch.cat(labels)


def named_accuracy(logits: Tensor, labels: Tensor, part: str) -> float:
    """:func:`accuracy` of one part of the data, which errors name."""
    return _accuracy(logits, labels, f"logits.{part}", f"labels.{part}")


def _accuracy(logits: Tensor, labels: Tensor, logits_name: str, labels_name: str) -> float:
    logits = checked_logits(logits, logits_name)
    labels = checked_labels(labels, labels_name, *logits.shape, "row of logits")
    return (logits.argmax(dim=1) == labels).double().mean().item()


def _paired_log_softmax(retrained_logits: Tensor, unlearned_logits: Tensor) -> tuple[Tensor, Tensor]:
    p = checked_logits(retrained_logits, "retrained_logits")
    q = checked_logits(unlearned_logits, "unlearned_logits")
    if p.shape != q.shape:
        raise InputError(
            f"unlearned_logits: expected shape {list(p.shape)} as retrained_logits has, got {list(q.shape)}"
        )
    return p.log_softmax(dim=1), q.log_softmax(dim=1)


def _mean_kl(log_p: Tensor, log_q: Tensor) -> float:
    p = log_p.exp()
    # A probability that underflowed to 0 contributes 0, its limit, even where its logarithm is −inf.
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    # A divergence is never negative; rounding alone can leave −1e-17 where p equals q.
    return terms.sum(dim=1).clamp_min(0.0).mean().item()
