"""`gratis recipe`: make, check and run recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gratis.cli import arguments, terminal

recipes = typer.Typer(
    help="Make, check and run recipes: files that name a subject, methods and the trials behind them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")]


@recipes.command()
def make(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME[:key=value,…]…", help="Methods, in order.", autocompletion=arguments.complete_method
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="The subject that the recipe names.")] = "",
    trial: Annotated[
        list[Path] | None, typer.Option("--trial", help="A trial file behind it; checked to be of these methods.")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="A line for whoever reads it.")] = "",
) -> None:
    """Write a recipe of methods with their parameters."""
    from gratis.contract.recipe import Recipe

    methods = [arguments.method(name) for name in names]
    lines = [_trial_line(path, out, methods) for path in trial or ()]
    Recipe(methods, subject=model, trials=lines, note=note).save(out)
    print(out)


@recipes.command()
def check(
    file: RecipeFile,
    opened: Annotated[bool, typer.Option("--open", help="Open the subject, attach and detach as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Check a recipe: names, parameters, and whether its methods can be on one subject together."""
    from gratis.contract.attach import check_together
    from gratis.contract.recipe import Recipe

    recipe = Recipe.load(file)
    check_together(recipe.methods)
    if opened:
        recipe.attach().detach()
    if as_json:
        rows = [{"name": method.name, "parameters": method.parameters()} for method in recipe.methods]
        terminal.print_json(
            {"file": str(file), "subject": recipe.subject, "methods": rows, "trials": len(recipe.trials)}
        )
        return
    print(f"{file}: {', '.join(repr(m) for m in recipe.methods)} on {recipe.subject or 'any subject'}: valid.")


@recipes.command()
def run(
    file: RecipeFile,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another subject than the recipe's.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Generate from this text with the methods on.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="New tokens after --prompt.")] = 128,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of trial files and pages.")] = Path("trials"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Attach a recipe to its subject: measure the trials behind it again, or generate from a prompt."""
    from gratis.contract.recipe import Recipe

    recipe = Recipe.load(file)
    if prompt is not None:
        print(_generated(recipe, model, prompt, tokens))
        return
    from gratis.cli.commands import _measure, _present
    from gratis.tasks.task import task_catalogue

    lines = recipe.trials
    chosen = [(task_catalogue[line.task](**line.task_parameters), line.seed) for line in lines]
    for task, seed in chosen or [(arguments.task(None, (), recipe.methods[-1]), 0)]:
        trial = _measure(recipe.methods, model or recipe.subject or None, task, [], None, seed, show=not as_json)
        _present(trial, out, as_json)


def _generated(recipe: Any, model: str | None, prompt: str, tokens: int) -> str:
    from gratis.contract.errors import ParameterError, SubjectError
    from gratis.subjects import open as open_subject
    from gratis.subjects import tokenizer_of

    name = model or recipe.subject
    if not name:
        raise ParameterError("This recipe names no subject: name one with --model.")
    subject = open_subject(name)
    if not hasattr(subject, "generate"):
        raise SubjectError(f"--prompt needs a language model; {name} is a {type(subject).__name__}.")
    tokenizer = tokenizer_of(subject)
    if getattr(tokenizer, "chat_template", None):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    with recipe.attach(subject):
        ids = subject.generate(**inputs.to(subject.device), max_new_tokens=tokens)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _trial_line(path: Path, out: Path, methods: list[Any]) -> Any:
    """What a recipe keeps of a trial file. Raises FileError if the trial is of other methods."""
    import os

    from gratis.contract.errors import FileError
    from gratis.contract.recipe import Figure, TrialLine
    from gratis.trials.trial import Trial

    trial = Trial.load(path)
    if [m.name for m in trial.arms[-1].methods] != [m.name for m in methods]:
        measured = ", ".join(m.name for m in trial.arms[-1].methods)
        raise FileError(f"{path} is a trial of {measured}, not of this recipe's methods.")
    figures = {
        name: Figure(before=comparison.baseline, after=comparison.value)
        for name, comparison in trial.compare(trial.arms[-1].label, trial.arms[0].label).items()
    }
    return TrialLine(
        task=trial.task.name,
        task_parameters=trial.task.parameters,
        seed=trial.seed,
        figures=figures,
        measured=trial.started,
        file=os.path.relpath(path, out.parent),
    )
