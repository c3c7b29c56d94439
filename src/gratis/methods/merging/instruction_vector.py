"""Make a model that was pretrained further follow instructions: add (instruct - base).

"The Construction of Instruction-tuned LLMs for Finance without Instruction Data Using Continual Pretraining and Model
Merging", 2024: `theta_base + l_d (theta_domain - theta_base) + l_i (theta_instruct - theta_base)`.
"""

from __future__ import annotations

from torch import Tensor

from gratis.contract.card import Card, Claim
from gratis.contract.errors import InputError
from gratis.contract.method import Merge, MergePart
from gratis.contract.parameters import param


class InstructionVector(Merge):
    """A domain model with the difference that instruction tuning made to their common base.

    Experts are the domain model, then the instruct model. Tokenizer, chat template, generation settings and end tokens
    are the instruct model's. For a live model, `Delta.between(base, instruct)` is the same vector: attach it, and turn
    its strength with the handle's `turn`.
    """

    card = Card(
        title="The Construction of Instruction-tuned LLMs for Finance without Instruction Data",
        authors="",
        year=2024,
        seed=86,
        paper="arXiv:2409.19854",
        acts_on="checkpoints",
        free_of=("training", "data"),
        summary="a domain model that answers instructions, without instruction data",
        unchanged_when={"scale": 0.0},
        examples={"scale": 1.0},
        limits="Instruct and domain model must descend from the same base; averaging them instead halves both.",
        claims=(
            Claim(
                name="added to a first expert, a second expert's change lifts both ways above the base by 0.1",
                task="digits-merging",
                metric="accuracy",
                compare="difference",
                at_least=0.1,
                task_parameters={"ways": 2},
                parameters={},
            ),
        ),
    )
    differences = False
    describes = 1

    scale: float = param(
        1.0, help="factor of the instruction vector (lambda_inst); 0 returns the domain model", search=(0.25, 1.25)
    )
    domain_scale: float = param(1.0, help="factor of the domain's change (lambda_dom)", search=(0.5, 1.25))

    def check_experts(self, count: int) -> None:
        if count != 2:
            raise InputError(
                f"InstructionVector needs two experts, the domain model and the instruct model, not {count}."
            )

    def combine(self, experts: list[Tensor], part: MergePart) -> Tensor:
        domain, instruct = experts
        assert part.base is not None
        if self.domain_scale == 1 and self.scale == 0:
            return domain
        if self.domain_scale == 0 and self.scale == 1:
            return instruct
        # In float64: adding a difference back in float32 can lose the smaller of two numbers.
        base = part.base.double()
        merged = base + self.domain_scale * (domain.double() - base) + self.scale * (instruct.double() - base)
        return merged.float()
