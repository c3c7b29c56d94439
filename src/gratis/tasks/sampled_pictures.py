"""Pictures written as tokens, with guidance: do they keep the distribution of plain sampling, and in how many passes?"""

from __future__ import annotations

from typing import Any

from gratis.contract.attach import Attachment
from gratis.contract.errors import SubjectError
from gratis.contract.parameters import param
from gratis.tasks.sampled_tokens import homogeneity, reported_passes
from gratis.tasks.task import Measurement, Metric, Progress, Task, TaskCard, silent


class SampledPictures(Task):
    """Draw pictures of the sprite world, half of them to one prompt and half to a prompt each.

    Those to one prompt are compared, place by place and pair by pair, with as many that were drawn the plain way
    (chi-square test of homogeneity, rare tokens pooled, Bonferroni's correction); in those to a prompt each a classifier
    looks for the colour and shape that were asked for.
    """

    card = TaskCard(
        title="Pictures as tokens",
        acts_on="language model",
        subject="zoo:sprites-prior",
        data="pictures of one sprite, 64 tokens each, by prompts of six words and classifier-free guidance",
        metrics=(
            Metric(name="passes_per_token", help="forward passes per token, both sides in one", higher_is_better=False),
            Metric(
                name="p_value", help="smallest p-value over places and pairs, corrected: below 0.01 is a difference"
            ),
            Metric(name="agreement", help="share of asked colours and shapes that a classifier sees in the pictures"),
        ),
        untouched="plain sampling",
        warm_up={"pictures": 2},
    )

    pictures: int = param(200, at_least=2, help="pictures, half of them to one prompt")
    guidance: float = param(3.0, at_least=1, help="strength of classifier-free guidance; 1: none")

    def check(self, subject: Any) -> None:
        from gratis.subjects import tokenizer_of

        if not hasattr(subject, "generate") or "<image>" not in tokenizer_of(subject).get_vocab():
            raise SubjectError("sampled-pictures draws with zoo:sprites-prior, or a model trained alike.")

    def measure(self, subject: Any, *, seed: int, progress: Progress = silent) -> Measurement:
        import torch

        from gratis.subjects import tokenizer_of
        from gratis.zoo import load
        from gratis.zoo.sprites_classifier import classify
        from gratis.zoo.sprites_tokens import TOKENS, WORLD, decode, prompts, said, sample

        model = subject.subject if isinstance(subject, Attachment) else subject
        tokenizer = tokenizer_of(model)
        half = self.pictures // 2
        scenes = WORLD.scenes(2_000_000 + 1000 * seed, 2_000_000 + 1000 * seed + self.pictures - half)
        asked = prompts(tokenizer, [said(scene) for scene in scenes]).to(model.device)
        before = reported_passes(model)
        torch.manual_seed(seed)
        drawn = []
        for number in range(self.pictures):
            prompt = asked[:1] if number < half else asked[number - half : number - half + 1]
            drawn.append(picture(model, tokenizer, prompt, self.guidance))
            progress((number + 1) / self.pictures, f"picture {number + 1}")
        tokens = torch.cat(drawn)
        passes = reported_passes(model) - before
        plain = sample(model, asked[:1].expand(half, -1), self.guidance, 1.0, seed + 1, tokenizer)
        seen = classify(load("sprites-classifier"), torch.from_numpy(decode(load("sprites-vq"), tokens[half:].cpu())))
        right = [
            (found.cpu() == torch.from_numpy(truth[:, 0])).double()
            for found, truth in ((seen.colour, scenes.colour), (seen.shape, scenes.shape))
        ]
        total = self.pictures * TOKENS
        return Measurement(
            metrics={
                "passes_per_token": (passes or total) / total,
                "p_value": homogeneity(tokens[:half].cpu().numpy(), plain.cpu().numpy()) if half > 1 else 1.0,
                "agreement": float(torch.stack(right).mean()),
            },
            items={"agreement": torch.stack(right).mean(0).tolist()},
            tokens=total,
        )


def picture(model: Any, tokenizer: Any, prompt: Any, guidance: float) -> Any:
    """Image tokens (1, 64) that the model's own `generate` draws after a prompt (1, 8), of image tokens only."""
    import torch

    from gratis.zoo.sprites_tokens import CODES, FIRST_CODE, TOKENS, unconditional

    size = model.get_input_embeddings().num_embeddings
    others = [token for token in range(size) if not FIRST_CODE <= token < FIRST_CODE + CODES]
    guided = {}
    if guidance != 1:
        nothing = unconditional(tokenizer, 1).to(prompt.device)
        guided = {"guidance_scale": guidance, "negative_prompt_ids": nothing}
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, suppress_tokens=others, **guided,
    )  # fmt: skip
    return out[:, prompt.shape[1] :]
