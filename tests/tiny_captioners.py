"""Tiny random captioners of the standard classes."""

from __future__ import annotations

import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

VOCABULARY, BOS, EOS, IMAGE = 50, 1, 2, 49
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "initializer_range": 0.6,
}  # fmt: skip


def pictures(count: int = 2, seed: int = 0) -> torch.Tensor:
    """Pixel values (count, 3, 8, 8)."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2


def with_biases(model):
    """`model` with biases that are not zero, so that features of zeros are not the same as no features."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") and "att" in name:
                weight.normal_(0, 0.4)
    return model


def encoder_decoder() -> VisionEncoderDecoderModel:
    """ViT and GPT-2, whose configuration says that it was trained with zeros for pictures."""
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(**VISION))
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, add_cross_attention=True,
            initializer_range=0.6, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0,
        )
    )  # fmt: skip
    model = with_biases(VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)).eval()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.bos_token_id = BOS
        config.eos_token_id, config.pad_token_id = EOS, 0
    model.config.null_image = "zeros"
    return model


def blip() -> BlipForConditionalGeneration:
    """A text decoder of its own that looks at the picture's features."""
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": BOS, "eos_token_id": EOS, "sep_token_id": EOS,
        "pad_token_id": 0, "max_position_embeddings": 64, "initializer_range": 0.6, "projection_dim": 16,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=VISION)
    config.image_text_hidden_size = 16
    return with_biases(BlipForConditionalGeneration(config)).eval()


def llava() -> LlavaForConditionalGeneration:
    """Picture tokens stand in the prompt: four per picture."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.6, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE, image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, EOS
    return model


def git() -> GitForCausalLM:
    """Picture features go before the text, without tokens of their own."""
    torch.manual_seed(0)
    config = GitConfig(
        vision_config=VISION, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0,
        initializer_range=0.6, num_image_with_embedding=None,
    )  # fmt: skip
    return with_biases(GitForCausalLM(config)).eval()


def prompt(kind: str, count: int = 2) -> dict[str, torch.Tensor]:
    """What generate is given for `count` pictures."""
    given = {"pixel_values": pictures(count)}
    if kind == "llava":
        ids = torch.tensor([[BOS, 7, *[IMAGE] * 4, 8, 9]] * count)
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "git":
        ids = torch.tensor([[BOS]] * count)
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "blip":
        ids = torch.tensor([[BOS, 5, EOS]] * count)
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given


BUILD = {"encoder-decoder": encoder_decoder, "blip": blip, "llava": llava, "git": git}
