"""Drawn embeddings: the Gram matrix that any order and rotation must keep, the same spots on every token, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from gratis.contract.errors import FileError, InputError
from gratis.zoo import glyphs
from gratis.zoo.glyphs import frequent_grams, glyph_embeddings, polar_order, unicode_tokenizer, unicode_vocabulary

LETTERS = [chr(number) for number in range(33, 127)]


@pytest.fixture(scope="module")
def drawn():
    return glyph_embeddings([*LETTERS, "the", "<pad>"])


def cosines(bitmaps):
    """What inner products of rows must be, from the bitmaps alone."""
    flat = bitmaps.reshape(len(bitmaps), -1).astype(np.float64)
    flat -= flat.mean(0)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return torch.from_numpy(flat @ flat.T)


def test_order_and_rotation_change_no_inner_product(drawn):
    assert drawn.embeddings.shape == (96, 1024)
    assert drawn.embeddings.dtype == torch.float32
    rows = drawn.embeddings.double()
    torch.testing.assert_close(rows @ rows.T, cosines(drawn.bitmaps), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(96, dtype=torch.float64))


def test_more_tokens_than_pixels_take_the_other_way_to_the_same_axes():
    pixels = np.random.default_rng(0).random((60, 40)) < 0.3
    tall, wide = glyphs.principal_rows(pixels), glyphs.principal_rows(np.concatenate([pixels, pixels], 1))
    torch.testing.assert_close(tall @ tall.T, cosines(pixels).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(tall, wide[:, :40], rtol=0, atol=1e-4)
    # The largest entry of each axis is positive: the axes are read back from rows before they were scaled.
    centred = torch.from_numpy(pixels - pixels.mean(0))
    axes = torch.linalg.lstsq(centred, tall.double() * centred.norm(dim=1, keepdim=True)).solution
    assert bool((axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all())


def test_pixels_are_in_polar_order():
    order = polar_order(32)
    assert sorted(order.tolist()) == list(range(1024))
    y, x = np.divmod(order, 32)
    radius, angle = np.hypot(x - 16, y - 16), np.arctan2(y - 16, x - 16)
    keys = list(zip((radius**2).round(), angle, x, y, strict=True))
    assert keys == sorted(keys)
    assert (x[0], y[0]) == (16, 16)


def test_every_token_has_the_same_spots_and_the_same_turn(drawn):
    blank = glyph_embeddings([" ", "a", "b"]).bitmaps
    spots = blank[0]
    assert 3 <= spots.sum() <= 20
    kept = glyph_embeddings(LETTERS).bitmaps
    assert np.array_equal(kept, drawn.bitmaps[: len(LETTERS)])
    # Blurred with the drawing, a spot far from any ink is in every picture.
    alone = spots.copy()
    alone[4:28, 4:28] = False
    assert alone.any()
    assert kept[:, alone].all()


def test_text_in_other_letters_is_not_turned_and_hardly_spotted():
    picture = glyph_embeddings(["\u4e2d", "a"], covered=0.0)
    assert picture.missing == ("\u4e2d",)
    font = ImageFont.load_default(32)
    left, top, right, bottom = font.getbbox("\u4e2d")
    plain = Image.new("L", (32, 32), 255)
    ImageDraw.Draw(plain).text(((32 - right - left) // 2, (32 - bottom - top) // 2), "\u4e2d", fill=0, font=font)
    differing = (np.asarray(plain) < 128) != picture.bitmaps[0]
    assert differing.sum() <= 4


def test_long_tokens_are_squeezed_into_one_cell(drawn):
    assert drawn.bitmaps.shape == (96, 32, 32)
    the = drawn.bitmaps[LETTERS.index("z") + 5]
    columns = the.any(0)
    assert columns[:8].any()
    assert columns[24:].any()
    assert 40 < the.sum() < 400


def test_larger_cells():
    table = glyph_embeddings(["a", "b", "c"], cell=64)
    assert table.embeddings.shape == (3, 4096)
    with pytest.raises(InputError, match="32 or 64 pixels, not 48"):
        glyph_embeddings(["a", "b"], cell=48)


def test_tokens_drawn_alike_are_counted():
    table = glyph_embeddings([" ", "\n", "a", "b"], written={"\n": " "})
    assert table.duplicates == ((" ", "\n"),)
    assert torch.equal(table.embeddings[0], table.embeddings[1])
    assert glyph_embeddings([" ", "\n", "a"], written={"\n": "\\n"}).duplicates == ()


def test_width_keeps_everything_or_refuses(drawn):
    narrow = glyph_embeddings([*LETTERS, "the", "<pad>"], width=128)
    assert narrow.embeddings.shape == (96, 128)
    torch.testing.assert_close(narrow.embeddings, drawn.embeddings[:, :128])
    with pytest.raises(InputError, match="differ along 95 axes, which a width of 64 cannot hold"):
        glyph_embeddings([*LETTERS, "the", "<pad>"], width=64)


def test_fonts_that_lack_too_much_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"lacks 2 of 3 tokens, the first of them '\u4e2d', '\u6587'"):
        glyph_embeddings(["a", "\u4e2d", "\u6587"])
    (tmp_path / "font.ttf").write_text("no font")
    with pytest.raises(FileError, match="cannot be read as a font"):
        glyph_embeddings(["a", "b"], tmp_path / "font.ttf")
    with pytest.raises(InputError, match="at least two tokens"):
        glyph_embeddings(["a"])
    with pytest.raises(InputError, match="all tokens are drawn alike"):
        glyph_embeddings([" ", " "])


def test_characters_are_their_code_points():
    assert frequent_grams(["ababab", "xyz"], lengths=(2,), top=1) == {"ab", "xy"}
    assert frequent_grams(["ababab"], top=2) == {"ab", "ba", "aba", "bab"}
    grams = ["th", "the", "er", "her"]
    vocabulary = unicode_vocabulary([*grams])
    assert len(vocabulary) == 65_536
    assert all(vocabulary[ord(letter)] == letter for letter in "az\u00e9\u4e2d\uff21")
    ordered = [vocabulary[0xD800 + place] for place in range(len(grams))]
    assert ordered == sorted(grams, key=lambda gram: (-len(gram), gram))
    assert vocabulary[0xE000:0xE004] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert vocabulary[0xFFFF] == "<unused_65535>"
    tokenizer = unicode_tokenizer(vocabulary)
    ids = tokenizer("the \u00e9t\u00e9", add_special_tokens=False).input_ids
    assert vocabulary[ids[0]] == "the"
    assert [vocabulary[one] for one in tokenizer("her", add_special_tokens=False).input_ids] == ["her"]
    assert ids[-3:] == [0xE9, ord("t"), 0xE9]
    assert tokenizer.decode(ids) == "the \u00e9t\u00e9"
    larger = unicode_vocabulary(grams, shared=["there", "<code>"])
    assert len(larger) == 131_072
    assert larger[0x10000] == "there"
    with pytest.raises(InputError, match="places for 8,192 n-grams, and there are 9,000"):
        unicode_vocabulary(chr(a) + chr(b) for a in range(300, 400) for b in range(300, 390))
    with pytest.raises(InputError, match="'a' twice"):
        unicode_vocabulary(["a"])
