"""Hashes of protected weights."""

from __future__ import annotations

import pytest
import torch
from helpers.layouts import DTYPES, coin, normal

from unlearn_ext import ops
from unlearn_ext.saliency.protection import protected_count, protected_hashes


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hash_sees_every_bit_of_protected_weights(dtype: torch.dtype, channels_last: bool) -> None:
    rng = torch.Generator().manual_seed(3)
    weights = [normal(rng, (2, 3, 2, 2), dtype), normal(rng, (), dtype), torch.zeros(0, dtype=dtype)]
    if channels_last:
        weights[0] = weights[0].to(memory_format=torch.channels_last)
    keep = [coin(rng, weights[0].shape), torch.tensor(False), torch.zeros(0, dtype=torch.bool)]
    laid_out = [torch.empty_like(w, dtype=torch.bool).copy_(k) for w, k in zip(weights, keep, strict=True)]
    bits = ops.pack_bits(laid_out)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[weights[0].element_size()]
    before = protected_hashes(weights, bits)
    assert protected_count(weights, bits) == int((~keep[0]).sum()) + 1
    for place in range(weights[0].numel()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), weights[0].shape))
        word = weights[0].view(integer)
        for bit in range(8 * weights[0].element_size()):
            flip = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(integer)
            word[index] ^= flip
            after = protected_hashes(weights, bits)
            word[index] ^= flip
            assert (after[0] == before[0]) == bool(keep[0][index]), (index, bit)
            assert after[1:] == before[1:]
    weights[1].view(integer).bitwise_xor_(1)
    assert protected_hashes(weights, bits)[1] != before[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changes_of_two_weights_do_not_cancel(dtype: torch.dtype) -> None:
    weight = normal(torch.Generator().manual_seed(3), (12,), dtype)
    bits = ops.pack_bits([torch.zeros(12, dtype=torch.bool)])
    before = protected_hashes([weight], bits)
    for change in (lambda w: -w, lambda w: 2 * w, lambda w: torch.nextafter(w, 2 * w) if dtype.itemsize > 2 else w / 2):
        for a in range(12):
            for b in range(a):
                other = weight.clone()
                other[[a, b]] = change(weight[[a, b]])
                assert not torch.equal(other, weight) and protected_hashes([other], bits) != before, (a, b)


def test_a_hash_knows_places() -> None:
    """Exchanged weights, and those moved into the next piece of a large tensor."""
    weight = torch.arange((1 << 22) + 3, dtype=torch.float32)
    bits = ops.pack_bits([torch.zeros(weight.shape, dtype=torch.bool)])
    before = protected_hashes([weight], bits)
    for a, b in ((0, 1), (5, 1 << 22), ((1 << 22) - 1, (1 << 22) + 2)):
        other = weight.clone()
        other[[a, b]] = weight[[b, a]]
        assert protected_hashes([other], bits) != before
    assert protected_hashes([weight.clone()], bits) == before


def test_a_hash_does_not_depend_on_layout_or_threads() -> None:
    rng = torch.Generator().manual_seed(3)
    weight, keep = normal(rng, (40, 30, 3, 3), torch.float32), coin(rng, (40, 30, 3, 3))
    results = set()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for form in (torch.contiguous_format, torch.channels_last):
                bits = ops.pack_bits([keep.to(memory_format=form)])
                results.add(tuple(protected_hashes([weight.to(memory_format=form)], bits)))
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1
