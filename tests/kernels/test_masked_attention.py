"""mask_bits and masked_attention: what a query may see, and that it sees only that."""

import pytest
import torch

from kernels import mask_bits, mask_logits, masked_attention
from kernels.mask_bits import pack_bits, unpack_bits


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_keys", [1, 7, 8, 31, 32, 33, 100])
def test_bits_round_trip_and_fill_whole_words(num_keys):
    mask = random(2, 3, num_keys) > 0
    bits = pack_bits(mask)
    assert bits.shape == (2, 3, 4 * -(-num_keys // 32))
    assert torch.equal(unpack_bits(bits, num_keys), mask)
    words = bits.view(torch.int32)
    assert torch.equal(words[0, 0, 0] & 1 == 1, mask[0, 0, 0])


def test_a_key_is_visible_where_the_logit_is_not_negative():
    query, features = random(1, 4, 8), random(1, 8, 50, seed=1)
    query[0, 3] = 0  # logits of exactly zero count as visible
    bits, seen = mask_bits(query, features)
    assert torch.equal(unpack_bits(bits, 50), query @ features >= 0)
    assert seen.all()


def test_a_query_that_sees_nothing_is_flagged_and_attends_to_everything():
    query = torch.tensor([[[1.0], [-1.0]]])
    bits, seen = mask_bits(query, torch.full((1, 1, 40), 2.0))
    assert seen.tolist() == [[True, False]]
    q, k, v = random(1, 2, 2, 4), random(1, 2, 40, 4, seed=1), random(1, 2, 40, 4, seed=2)
    plain = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    torch.testing.assert_close(masked_attention(q, k, v, bits, seen), plain)


def test_attention_equals_a_softmax_over_the_visible_keys():
    q, k, v = random(2, 3, 5, 4), random(2, 3, 70, 4, seed=1), random(2, 3, 70, 4, seed=2)
    mask = random(2, 5, 70, seed=3) > 0.5
    logits = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask[:, None], float("-inf"))
    got = masked_attention(q, k, v, pack_bits(mask), mask.any(-1))
    torch.testing.assert_close(got, logits.softmax(-1) @ v)


def test_masking_in_bfloat16_agrees_with_single_precision_but_for_logits_near_zero():
    query, features = random(1, 30, 64), random(1, 64, 500, seed=1)
    exact = query @ features
    bits, _ = mask_bits(query.bfloat16(), features.bfloat16())
    wrong = unpack_bits(bits, 500) != (exact >= 0)
    assert wrong.float().mean() < 5e-3
    assert exact[wrong].abs().max() < 0.2


def test_the_mask_has_no_gradient_and_attention_has():
    query, features = random(1, 4, 8).requires_grad_(), random(1, 8, 50, seed=1).requires_grad_()
    bits, seen = mask_bits(query, features)
    assert not bits.requires_grad
    q, k, v = (random(1, 2, n, 4, seed=n).requires_grad_() for n in (4, 50, 50))
    masked_attention(q, k, v, bits, seen).sum().backward()
    assert q.grad.abs().sum() > 0
    assert v.grad.abs().sum() > 0


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected \[B, Q, C\] and \[B, C, N\]"):
        mask_bits(random(1, 4, 8), random(1, 9, 50))
    q, k, seen = random(1, 2, 4, 4), random(1, 2, 50, 4), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected 8 bytes a query for 50 keys, got 4"):
        masked_attention(q, k, k, torch.zeros(1, 4, 4, dtype=torch.uint8), seen)


def test_mask_logits_are_dot_products_whatever_the_memory_layout():
    query, features = random(2, 3, 8), random(2, 4, 8, 5, 6, seed=1)
    expected = torch.einsum("bqc,btchw->bqthw", query, features)
    torch.testing.assert_close(mask_logits(query, features), expected)
    channels_last = features.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 4))
    torch.testing.assert_close(mask_logits(query, channels_last), expected)
    with pytest.raises(ValueError, match=r"expected \[B, Q, C\] and \[B, T, C, H, W\]"):
        mask_logits(query, features[:, 0])
