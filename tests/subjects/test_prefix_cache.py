"""A model that is run from the first changed layer on answers as the whole model does."""

from __future__ import annotations

import pytest
import torch

from gratis.contract.errors import InputError, SubjectError
from gratis.subjects.prefix_cache import PrefixCache
from tests import tiny_language as tiny


def changed(state, layer, by=0.1):
    """The state with the weights of one layer moved: other tensors are the same objects."""
    return {name: t + by if f"layers.{layer}." in name else t for name, t in state.items()}


def language():
    model = tiny.tiny_language_model()
    ids = [tiny.prompt(2, seed) for seed in (1, 2)]
    return model, ids, lambda ids: model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_answers_are_those_of_the_whole_model_bit_for_bit_and_layers_before_the_change_are_skipped():
    model, batches, run = language()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trials = [state, changed(state, 3), changed(state, 1), changed(changed(state, 1), 2), state, changed(state, 0)]
    plain = []
    for trial in trials:
        model.load_state_dict(trial)
        plain.append([run(ids) for ids in batches])
    model.load_state_dict(state)
    # For each trial the layers that its weights share from the start with an earlier trial; the last layer always runs.
    skipped = [0, 3, 1, 2, 3, 0]
    with PrefixCache(model) as cache:
        for trial, expected, count in zip(trials, plain, skipped, strict=True):
            before = cache.layers_skipped, cache.layers_run
            cache.load({name: tensor.clone() for name, tensor in trial.items()})
            for ids, one in zip(batches, expected, strict=True):
                assert torch.equal(run(ids), one)
            assert (cache.layers_skipped - before[0]) == 2 * count
            assert (cache.layers_run - before[1]) == 2 * (tiny.LAYERS - count)
    assert "forward" not in vars(model.model.layers[0])


@torch.no_grad()
def test_a_segmenter_s_vision_encoder_is_cut_short_also_where_its_decoder_changes():
    from gratis import zoo
    from gratis.zoo.sprites_segmenter import boxed, segment

    model = zoo.load("sprites-segmenter")
    pictures = boxed("clean", 0, 2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: t * 1.1 if name.startswith("mask_decoder") else t for name, t in changed(state, 4, 0.01).items()}
    model.load_state_dict(other)
    expected = segment(model, pictures.images, pictures.boxes)
    model.load_state_dict(state)
    with PrefixCache(model, every=2) as cache:
        assert cache.name == "vision_encoder.layers"
        segment(model, pictures.images, pictures.boxes)
        cache.load(other)
        assert torch.equal(segment(model, pictures.images, pictures.boxes), expected)
        assert (cache.layers_skipped, cache.layers_run) == (4, 8)
        # What comes in before the layers changes: nothing may be taken from the cache.
        moved = {name: t + 0.1 if "patch_embed" in name else t for name, t in other.items()}
        cache.load(moved)
        segment(model, pictures.images, pictures.boxes)
        assert cache.layers_skipped == 4


@torch.no_grad()
def test_memory_is_bounded_and_the_oldest_goes_first():
    model, batches, run = language()
    one = 2 * tiny.PROMPT * 32 * 4
    with PrefixCache(model, every=2, most_bytes=one) as cache:
        for ids in (*batches, batches[0]):
            run(ids)
        assert cache.layers_skipped == 0, "the second batch took the place of the first"
        run(batches[0])
        assert cache.layers_skipped == 2
        assert sum(t.nbytes for t in cache._kept.values()) == one


def test_what_it_refuses():
    model, batches, run = language()
    with PrefixCache(model), pytest.raises(InputError, match="no_grad"):
        run(batches[0])
    with pytest.raises(SubjectError, match="no stack of layers"):
        PrefixCache(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="at least 1"):
        PrefixCache(model, every=0)
