"""Tokenizers of the zoo: closed vocabularies, each word or character one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def word_tokenizer(vocabulary: Sequence[str], length: int) -> Any:
    """Words split at spaces, as `<bos> words <eos>`; `length` is the model's longest input. A PreTrainedTokenizerFast.

    Special tokens: `<pad>`, `<bos>`, `<eos>`, `<unk>` with ids 0 to 3.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*special, *vocabulary])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_max_length=length, padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def character_tokenizer(characters: str, length: int, mask: bool = False, pieces: Sequence[str] = ()) -> Any:
    """Every character a token, and every string of `pieces` one token too. A PreTrainedTokenizerFast without prefix.

    Special tokens: `<pad>`, `<bos>`, `<eos>`, `<unk>` with ids 0 to 3, then `<mask>` with id 4 where `mask` is set.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>", *(["<mask>"] if mask else [])]
    vocabulary = {piece: index for index, piece in enumerate([*special, *pieces, *sorted(set(characters))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    alternatives = [_literal(piece) for piece in sorted(pieces, key=len, reverse=True)]
    pattern = "|".join([*alternatives, r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        **({"mask_token": "<mask>"} if mask else {}), model_max_length=length, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _literal(text: str) -> str:
    return "".join("\\" + letter if not letter.isalnum() and not letter.isspace() else letter for letter in text)
