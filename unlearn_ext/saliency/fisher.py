"""FisherDiagonal: the diagonal of the empirical Fisher information, streamed over batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..data.streams import check_iterable, empty_set, in_step
from ..distributed.batches import cut, map_tensors, own_part, without_inference
from ..distributed.modes import measuring, without_float16
from ..distributed.ranks import ALONE, Ranks
from ..distributed.shards import all_local, is_sharded, local, shard_groups, sum_over
from ..distributed.weights import check_weights
from ..distributed.wrappers import trainable, unwrapped
from ..errors import InputError, NonFiniteError
from ..ops.clipping import clip_factor
from ..tasks import check_per_sample, check_task
from ..utils.arguments import check_count, check_model, check_number
from ..utils.grad_hooks import arriving, consuming, keeping_graphs, passing_twice
from ..utils.gradients import check_gradient, check_layers, check_parameters, no_gradient
from ..utils.process import recording
from ._parts import in_parts

if TYPE_CHECKING:
    from ..tasks import Task

__all__ = ["FisherDiagonal"]


class FisherDiagonal:
    r"""Means of squared gradients of the loss, one number per trainable weight.

    As released with SFR-on, :math:`F = \frac{1}{B} \sum_b (\nabla \bar l_b)^2` over B batches, with
    :math:`\bar l_b` the batch-mean loss; with ``per_sample=True`` the exact diagonal
    :math:`F = \frac{1}{N} \sum_i (\nabla l_i)^2` over samples, through ``torch.func``. The model is in eval mode
    while it is measured, loralib's adapters beside the weights; what takes no part there (adapters that another class's
    ``train()`` merges) counts 0.

    Args:
        model: whose trainable parameters are measured.
        task: how a batch becomes per-sample losses.
        per_sample: exact per-sample gradients; B/chunk times the work of one batch gradient.
        batches: use at most this many batches of each data set.
        chunk: samples differentiated at once with ``per_sample``; memory grows with chunk × weights. 1: a backward pass
            for each sample, without ``torch.func``, of the model as it is given: compiled, or checkpointing gradients.
            On several ranks always through ``torch.func``.
        max_norm: each gradient is scaled to this norm over all weights before it is squared, if it is longer.
        split_batches: as in :class:`~unlearn_ext.Unlearner`. Gradients are averaged over the ranks before they are
            squared, so that the diagonal is that of one process on the whole batches.
        in_backward: square each gradient within the backward pass and free it: about one layer's are alive at a time.
            With ``max_norm`` a backward pass before it measures the norm.

    Attributes:
        sums: name -> float32 (float64 for float64 weights) sum of squares, in the parameter's memory order, and sharded
            as it is.
        count: how many batches or samples were summed.
        seen: names of parameters that received a gradient.

    Source: arXiv 2409.19732 and its released code.
    """

    _NAME, _NUMBER = "Fisher", "a squared gradient"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        per_sample: bool = False,
        batches: int | None = None,
        chunk: int = 8,
        max_norm: float | None = None,
        split_batches: bool = True,
        in_backward: bool = False,
    ):
        check_model(model)
        check_task(task)
        check_weights(model)
        if in_backward and per_sample:
            raise InputError("in_backward is for batch gradients, and per_sample has no backward pass: leave one out")
        if batches is not None:
            batches = check_count("Fisher batches", batches)
        chunk = check_count("chunk", chunk)
        if max_norm is not None:
            expected = "more than 0, or None for no clipping"
            max_norm = check_number("Fisher max_norm", max_norm, expected, lambda x: x > 0.0)
        self.model, self.task, self.per_sample, self.batches, self.chunk = model, task, per_sample, batches, chunk
        self.max_norm, self.in_backward = max_norm, in_backward
        self.split_batches, self.ranks = split_batches, Ranks.of(model)
        self._parameters = trainable(model)
        if not self._parameters:
            raise InputError("the model has no trainable weights: set requires_grad on those that may be moved")
        check_parameters(self._parameters.items())
        with recording():  # tensors made in inference mode could not be added to afterwards
            self.sums = {
                name: torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
                for name, p in self._parameters.items()
            }
        self._groups = {name: shard_groups(p) for name, p in self._parameters.items()}
        if per_sample and any(map(is_sharded, self._parameters.values())):
            raise InputError("per_sample=True differentiates through whole weights: use DistributedDataParallel for it")
        self.count = 0
        self.seen: set[str] = set()

    def means(self) -> dict[str, Tensor]:
        """F by parameter name."""
        return {name: total / max(self.count, 1) for name, total in self.sums.items()}

    def measure(
        self, data: Iterable[Any], *, name: str = "data", watch: Callable[[Any], None] | None = None
    ) -> FisherDiagonal:
        """Adds one pass over ``data``, in its own order, and leaves ``.grad`` empty.

        Forward passes follow ``torch.autocast`` in bfloat16; in float16 unscaled gradients underflow, so there it is
        off.

        ``watch`` is called with every batch first, also with those that ``batches`` leaves out.

        Raises:
            InputError: no batches, or no parameter received a gradient, or one received it in parts, sparse or complex.
            NonFiniteError: a loss or an accumulated square is not finite; says at which batch.
        """
        check_iterable(name, data)
        check_weights(self.model)
        before, empty = self.count, True
        if self.per_sample and not self.ranks.first:  # what was measured before is added up with the rest, once
            for total in self.sums.values():
                total.zero_()
            self.count = 0
        graphs = keeping_graphs(self.in_backward and self.max_norm is not None)
        with recording(), measuring(self.model), graphs, without_float16(self._device.type):
            limit = self.batches if watch is None else None
            alike = self.ranks if self.split_batches else ALONE
            for number, batch in enumerate(itertools.islice(in_step(data, alike), limit)):
                empty = False
                if number == 0:
                    self.task.begin(self.model, batch)
                if watch is not None:
                    watch(batch)
                if self.batches is None or number < self.batches:
                    try:
                        self._update(batch, f"batch {number} of the {name} set")
                    except (AssertionError, IndexError, RuntimeError):
                        if self.ranks.size == 1:
                            self.task.begin(self.model, batch)  # says so where the model does not take the batch
                        raise
        if self.per_sample:
            self._add_up()
            # torch.func gives zeros where autograd gives None.
            self.seen |= {name for name, total in self.sums.items() if bool((total > 0).any())}
        if self.count == before:
            raise empty_set(name, data) if empty else no_gradient(name)
        if not self.seen:
            raise no_gradient(name)
        if self._products(self.sums)[1] > 0:
            raise NonFiniteError(
                f"{self._NAME} of the {name} set: {self._NUMBER} is not finite; check loss and precision"
            )
        return self

    def _update(self, batch: Any, where: str) -> None:
        prepared = without_inference(self.task.prepare(batch, self._device))
        count = size = self.task.size(batch)
        batch = prepared
        if self.split_batches:
            batch, count = own_part(batch, size, self.ranks)
        if not self.per_sample:
            self._add_batch(batch, count, where)
        elif self.chunk == 1 and self.ranks.size == 1:  # several ranks would average what their samples give
            for i in range(count):
                self._add_batch(cut(batch, slice(i, i + 1)), 1, where)
        else:
            self._add_per_sample(batch, count, where)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _add_batch(self, batch: Any, count: int, where: str) -> None:
        for p in self._parameters.values():
            p.grad = None
        losses = self.task.fisher_losses(self.model, batch)
        check_per_sample(losses, max(count, 1))  # a rank without samples takes one
        loss = losses.mean()
        torch.clear_autocast_cache()  # an autocast around the whole pass would keep half copies of all weights
        mean = loss.detach()
        if self.ranks.size > 1:
            weight = mean.new_full((), count, dtype=torch.float64)
            sums = self.ranks.gather(torch.stack([mean.double() * weight if count else weight, weight])).sum(0)
            mean = sums[0] / sums[1]
            loss = loss * (count * self.ranks.size / sums[1]).to(loss.dtype)  # ranks are averaged alike
        _check_finite(mean, self._NAME, where)
        if not loss.requires_grad:
            return
        try:
            with torch.autocast(self._device.type, enabled=False):  # of the forward pass alone, as torch advises
                if self.in_backward:
                    seen = self._square_in_backward(loss)
                else:
                    loss.backward()
                    gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
                    for name, gradient in gradients.items():
                        check_gradient(self._NAME, name, gradient)
                    with torch.no_grad():
                        self._accumulate(gradients)
                    seen = set(gradients)
        finally:
            for p in self._parameters.values():
                p.grad = None
        self.seen |= seen
        self.count += 1

    def _square_in_backward(self, loss: Tensor) -> set[str]:
        """Adds the squares as gradients appear; the names of the parameters that had one."""
        names, parameters = list(self._parameters), list(self._parameters.values())
        weight = 1.0
        if self.max_norm is not None:
            squares: dict[int, float] = {}

            def measure(i: int, gradient: Tensor) -> None:
                check_gradient(self._NAME, names[i], gradient)
                squares[i] = float(ops.gradient_products([gradient])[0])

            with passing_twice(), consuming(parameters, names.__getitem__, measure):
                loss.backward(retain_graph=True)
            weight = self._weight(sum(squares[i] for i in sorted(squares)))

        seen: set[str] = set()

        def take(gradients: dict[int, Tensor]) -> None:
            for i, gradient in gradients.items():
                check_gradient(self._NAME, names[i], gradient)
            arrived = [names[i] for i in gradients]
            seen.update(arrived)
            self._add([self.sums[name] for name in arrived], list(gradients.values()), weight)

        with arriving(parameters, names.__getitem__, take):
            loss.backward()
        return seen

    def _add_per_sample(self, batch: Any, count: int, where: str) -> None:
        network = unwrapped(self.model)  # functional_call refuses some wrappers
        check_layers(self._NAME, network)
        values = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}

        def loss_of(parameters: dict[str, Tensor], sample: Any) -> tuple[Tensor, Tensor]:
            def model(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(network, parameters, args, kwargs)

            losses = self.task.fisher_losses(model, map_tensors(sample, lambda t: t.unsqueeze(0)))
            check_per_sample(losses, 1)
            return losses[0], losses[0]

        gradients_of = torch.func.vmap(torch.func.grad(loss_of, has_aux=True), (None, 0), randomness="different")
        for start in range(0, count, self.chunk):
            try:
                gradients, losses = gradients_of(values, cut(batch, slice(start, start + self.chunk)))
            except RuntimeError as error:
                if not str(error).startswith("vmap:"):
                    raise
                raise InputError(
                    "per_sample=True: torch.func cannot run this model on several samples at once, since it looks at "
                    "values: set chunk=1 in one process, which makes a backward pass for each sample, or "
                    "per_sample=False"
                ) from error
            _check_finite(losses.mean(), self._NAME, where)
            samples = [{name: g[i].detach() for name, g in gradients.items()} for i in range(losses.shape[0])]
            weights = [self._weight_of(sample) for sample in samples]
            sums, rows = list(self.sums.values()), [list(sample.values()) for sample in samples]
            for part in in_parts(sums):  # all samples, while the sums of this part are in the cache
                for row, weight in zip(rows, weights, strict=True):
                    ops.accumulate_fisher_(sums[part], row[part], weight)
        self.count += count

    def _add_up(self) -> None:
        """What the ranks have each measured on their own samples."""
        if self.ranks.size == 1:
            return
        for total in self.sums.values():
            self.ranks.sum(total)
        self.count = int(self.ranks.sum(torch.tensor(self.count, dtype=torch.int64, device=self._device)))

    def _accumulate(self, gradients: dict[str, Tensor]) -> None:
        sums = [self.sums[name] for name in gradients]
        self._add(all_local(sums), all_local(list(gradients.values())), self._weight_of(gradients))

    @staticmethod
    def _add(sums: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
        ops.accumulate_fisher_(sums, gradients, weight)

    def _weight_of(self, gradients: dict[str, Tensor]) -> float:
        return 1.0 if self.max_norm is None else self._weight(self._products(gradients)[0])

    def _products(self, tensors: dict[str, Tensor]) -> tuple[float, float]:
        """The sum of squares and the number of entries that are not finite, over all weights of all ranks."""
        square, non_finite = 0.0, 0.0
        for groups in dict.fromkeys(self._groups[name] for name in tensors):
            parts = [local(tensor) for name, tensor in tensors.items() if self._groups[name] == groups]
            products = sum_over(groups, ops.gradient_products(parts).to(parts[0].device))
            square, non_finite = square + float(products[0]), non_finite + float(products[3])
        return square, non_finite

    def _weight(self, square: float) -> float:
        """Of a gradient's squares, by that of its norm; one that is not finite is found at the end."""
        return clip_factor(self.max_norm, square) ** 2 if math.isfinite(square) else 1.0


def _check_finite(loss: Tensor, name: str, where: str) -> None:
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"{name}: the loss of {where} is {loss.item()}; check the data and the precision")
