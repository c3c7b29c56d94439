"""The commands, in the order in which a newcomer needs them."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gratis.cli import CLAIM_FAILED, arguments, terminal
from gratis.cli.generating import generate
from gratis.cli.merging import merge
from gratis.cli.planning import plan
from gratis.cli.recipes import recipes
from gratis.cli.tuning import tune

if TYPE_CHECKING:
    from gratis.trials.trial import Trial

app = typer.Typer(
    name="gratis",
    help="Get more out of models you already have, without training them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes, name="recipe")
app.command()(plan)
app.command()(generate)
app.command()(merge)
app.command()(tune)

MethodName = Annotated[str, typer.Argument(metavar="NAME", autocompletion=arguments.complete_method)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="What it acts on: smollm2, a folder, a .gguf file, owner/name, chat:NAME, or an endpoint: http://…/v1#MODEL.",
        autocompletion=arguments.complete_model,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the task's data and draws.")]

DEMO_TOKENS, DEMO_RECALL, DEMO_BUDGET = 12000, 3000, 1024
QUICK_TOKENS, QUICK_RECALL, QUICK_BUDGET = 1536, 1024, 256
DEMO_DEPTHS = 4


def _version(wanted: bool) -> None:
    if wanted:
        import gratis

        print(f"gratis {gratis.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose (works anywhere).")] = False,
) -> None:
    """Get more out of models you already have, without training them."""


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    acts_on: Annotated[str | None, typer.Option("--acts-on", help="Only those on this kind of subject.")] = None,
    free_of: Annotated[str | None, typer.Option("--free-of", help="Only those that spare you this.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods: what each acts on, and what it spares you."""
    from gratis.contract.catalogue import catalogue
    from gratis.contract.errors import UnknownNameError

    wanted = {k: v for k, v in {"family": family, "acts_on": acts_on, "free_of": free_of}.items() if v}
    for key, value in wanted.items():
        known = _values(key)
        if value not in known:
            raise UnknownNameError.among(key.replace("_", " "), value, known)
    entries = catalogue.select(**wanted)
    if as_json:
        terminal.print_json([_method_row(entry) for entry in entries])
        return
    table = terminal.table("method", "family", "acts on", "what you get", "without", "paper")
    for entry in entries:
        card = entry.card
        table.add_row(
            entry.name, entry.family, card.acts_on, card.summary, ", ".join(card.free_of), str(card.year)
        )  # fmt: skip
    terminal.console().print(table)


@app.command()
def show(name: MethodName, as_json: AsJson = False) -> None:
    """Show a method (or task): its paper, parameters, limits, and claims with their last results."""
    from gratis.cli import showing
    from gratis.contract.catalogue import catalogue
    from gratis.tasks.task import task_catalogue

    if name not in catalogue and name in task_catalogue:
        showing.show_task(name, as_json)
    else:
        showing.show_method(catalogue.resolve(name), as_json)


@app.command("try")
def try_(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A method, or NAME:key=value,…", autocompletion=arguments.complete_method),
    ],
    model: Model = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="What to measure.", autocompletion=arguments.complete_task)
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="A parameter of the method.")
    ] = None,
    task_sets: Annotated[
        list[str] | None, typer.Option("--task-set", metavar="KEY=VALUE", help="A parameter of the task.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", help="A further method to measure beside it.", autocompletion=arguments.complete_method
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="How often each arm is measured.  [default: up to 3]")
    ] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option("--device", help="Where the model is put: cpu, cuda …")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Its numbers: float32, bfloat16, float16.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the trial file and the page.")] = Path("trials"),
    as_json: AsJson = False,
) -> None:
    """Measure a method before and after, on your machine: a table, a trial file and a page."""
    chosen = arguments.method(name, sets or ())
    trial = _measure(
        chosen,
        model,
        arguments.task(task, task_sets or (), chosen),
        [arguments.rival(text) for text in against or ()],
        rounds,
        seed,
        show=not as_json,
        device=device,
        dtype=dtype,
    )
    _present(trial, out, as_json)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A short text, a few minutes.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the trial file and the page.")] = Path("trials"),
    as_json: AsJson = False,
) -> None:
    """What memory methods do for a real language model: full cache, sliding window, LaCache and InfLLM."""
    tokens, recall, budget = (
        (QUICK_TOKENS, QUICK_RECALL, QUICK_BUDGET) if quick else (DEMO_TOKENS, DEMO_RECALL, DEMO_BUDGET)
    )
    half, sinks, block = budget // 2, 32, 32
    settings = {"window": half, "sinks": sinks, "block": block, "blocks": (half - sinks) // block, "lookup": 128}
    chosen = arguments.method("infllm", [f"{key}={value}" for key, value in settings.items()])
    given = {"tokens": tokens, "recall": recall, "depths": DEMO_DEPTHS}
    task = arguments.task("long-reading", [f"{key}={value}" for key, value in given.items()], chosen)
    rivals = [f"sliding-window:budget={budget}", f"lacache:budget={budget}"]
    command = shlex.join(
        [
            "gratis", "try", "infllm", "--model", "smollm2", "--task", "long-reading", "--rounds", "1",
            *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
            *(word for key, value in given.items() for word in ("--task-set", f"{key}={value}")),
            *(word for rival in rivals for word in ("--against", rival)),
        ]
    )  # fmt: skip
    against = [arguments.rival(rival) for rival in rivals]
    trial = _measure(chosen, "smollm2", task, against, 1, 0, show=not as_json, command=command)
    _present(trial, out, as_json)
    if not as_json:
        terminal.print_purposes(trial, ("recall", "tail_loss", "cache_bytes"))


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", autocompletion=arguments.complete_method)
    ] = None,
    seed: Seed = 0,
    save: Annotated[bool, typer.Option("--save", help="Store the results, for `gratis show` and the docs.")] = False,
    results: Annotated[
        Path | None, typer.Option("--results", help="Where to store them.  [default: the package]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the claims of methods (default: all). A claim that fails makes the command fail."""
    from gratis.trials import claims

    out = terminal.console()
    with terminal.progress(not as_json) as progress:
        found = claims.verify(names or None, seed=seed, progress=progress)
    if save or results is not None:
        path = claims.store(found, results or claims.RESULTS)
        print(f"stored: {path}", file=sys.stderr)
    if as_json:
        terminal.print_json([_finite(result.model_dump(mode="json")) for result in found])
    else:
        for result in found:
            terminal.print_claim(result, out)
        failed = sum(not result.passed for result in found)
        out.print(f"\n{len(found) - failed} of {len(found)} claims hold." if found else "No claims to run.")
    if not all(result.passed for result in found):
        raise typer.Exit(CLAIM_FAILED)


@app.command("tasks")
def list_tasks(as_json: AsJson = False) -> None:
    """List the tasks: what "better" can mean."""
    from gratis.tasks.task import task_catalogue

    entries = task_catalogue.entries.values()
    if as_json:
        terminal.print_json(
            [
                {
                    "name": entry.name,
                    "title": entry.card.title,
                    "acts_on": entry.card.acts_on,
                    "metrics": [vars(metric) for metric in entry.card.metrics],
                    "data": entry.card.data,
                    "subject": entry.card.subject,
                    "module": entry.module,
                }
                for entry in entries
            ]
        )
        return
    table = terminal.table("task", "acts on", "measures", "data")
    for entry in entries:
        measures = ", ".join(metric.name.replace("_", " ") for metric in entry.card.metrics)
        table.add_row(entry.name, entry.card.acts_on, measures, entry.card.data)
    terminal.console().print(table)


def _measure(
    method: Any,
    model: str | None,
    task: Any,
    against: list[Any],
    rounds: int | None,
    seed: int,
    *,
    show: bool,
    command: str = "",
    device: str | None = None,
    dtype: str | None = None,
) -> Trial:
    from gratis.trials.measuring import try_method

    with terminal.progress(show) as progress:
        return try_method(
            method,
            model,
            task,
            against=against,
            rounds=rounds,
            seed=seed,
            device=device,
            dtype=dtype,
            progress=progress,
            command=command or shlex.join(["gratis", *sys.argv[1:]]),
        )


def _present(trial: Trial, folder: Path, as_json: bool) -> None:
    """Save the trial and its page, and print what it saw."""
    from gratis.trials.page import save_page

    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    stem = f"{trial.method.name}-{trial.task.name}-{stamp}"
    file = trial.save(folder / f"{stem}.json")
    page = save_page(trial, folder / f"{stem}.html")
    if as_json:
        content = _finite(trial.model_dump(mode="json", exclude={"arms": {"__all__": {"items", "series"}}}))
        terminal.print_json({"file": str(file), "page": str(page), **content})
        return
    terminal.print_trial(trial)
    print(f"\ntrial  {file}\npage   {page.resolve()}")


def _method_row(entry: Any) -> dict[str, Any]:
    card = entry.card
    return {
        "name": entry.name,
        "seed": card.seed,
        "family": entry.family,
        "kind": entry.kind,
        "acts_on": card.acts_on,
        "free_of": list(card.free_of),
        "title": card.title,
        "year": card.year,
        "module": entry.module,
        "class": entry.class_name,
        "summary": card.summary,
        "claims": len(card.claims),
    }


def _values(key: str) -> set[str]:
    """What a field of the catalogue's entries can be."""
    from gratis.contract.catalogue import catalogue

    found: set[str] = set()
    for entry in catalogue.entries.values():
        value = entry.family if key == "family" else getattr(entry.card, key)
        found.update(value if isinstance(value, tuple) else [value])
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinity and no not-a-number: those become null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
