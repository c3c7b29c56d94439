from __future__ import annotations

import copy

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from gratis.contract.attach import Scope
from gratis.subjects.growing_cache import GrowingLayer, grow_in_place
from tests import tiny_language as tiny


def states(length, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, length, 4, generator=generator), torch.randn(batch, 2, length, 4, generator=generator)


def test_it_holds_what_a_dynamic_layer_holds_through_every_change():
    plain, growing = DynamicLayer(), GrowingLayer()
    changes = [
        lambda layer: None,
        lambda layer: layer.crop(-3),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.crop(-70),
    ]
    for seed, change in enumerate(changes):
        for length in (1, 80, 1, 1):
            new = states(length, seed)
            for one, other in zip(plain.update(*new), growing.update(*new), strict=True):
                assert torch.equal(one, other)
        change(plain)
        change(growing)
        assert torch.equal(plain.keys, growing.keys)
        assert torch.equal(plain.values, growing.values)
        if plain.keys.shape[0] != 2:
            for layer in (plain, growing):
                layer.batch_select_indices(torch.tensor([0, 1]))


def test_a_token_takes_no_new_memory_and_a_copy_goes_its_own_way():
    layer = GrowingLayer()
    layer.update(*states(10, 0))
    at = layer.keys.data_ptr()
    other = copy.deepcopy(layer)
    layer.update(*states(1, 1))
    other.update(*states(1, 2))
    assert layer.keys.data_ptr() == at
    assert not torch.equal(layer.keys, other.keys)
    assert torch.equal(layer.keys[..., :10, :], other.keys[..., :10, :])


def test_plain_caches_of_a_model_grow_in_place_until_the_scope_closes():
    model, scope = tiny.tiny_language_model(), Scope()
    ids = tiny.prompt()
    with torch.no_grad():
        expected = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        grow_in_place(model, scope)
        cache = DynamicCache(config=model.config)
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)
        assert all(type(layer) is GrowingLayer for layer in cache.layers)
        scope.close()
        after = DynamicCache(config=model.config)
        model(ids, past_key_values=after)
    assert all(type(layer) is DynamicLayer for layer in after.layers)


def test_gradients_are_carried():
    layer = GrowingLayer()
    keys, values = states(3, 0)
    keys.requires_grad_()
    layer.update(keys, values)
    found, _ = layer.update(*states(1, 1))
    found.sum().backward()
    assert keys.grad is not None
