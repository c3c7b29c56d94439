"""`gratis merge`: plan, merge, report; or search the numbers of a recipe."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gratis.cli import arguments, terminal


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A merge recipe (YAML), gratis's or mergekit's.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of the merged checkpoint; with --search a recipe file.")
    ],
    models: Annotated[
        list[Path] | None,
        typer.Option("--models", help="A further folder in which the recipe may name checkpoints."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", help="Of different vocabularies: error, base, union or intersect.  [default: the recipe's]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads to use.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="cpu, cuda or cuda:NUMBER; several share the tensors.  [default: cpu]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Share the merge out over processes of a ray cluster (extra scale)."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the merge would take.")] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write OUT.report.html and .json: statistics, conflicts.")
    ] = True,
    search: Annotated[bool, typer.Option("--search", help="Tune the recipe's numbers against --task.")] = False,
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="What to tune for.", autocompletion=arguments.complete_task),
    ] = None,
    task_sets: Annotated[
        list[str] | None, typer.Option("--task-set", metavar="KEY=VALUE", help="A parameter of the task.")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="How many settings to try.")] = 30,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the search and of the task's data.")] = 0,
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Where trials are kept, to go on from.  [default: OUT.journal]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Combine checkpoints as a recipe says, streamed from disk to disk: a plan before, a report after."""
    from dataclasses import replace

    from gratis.subjects.merge_recipe import load_recipe

    read = load_recipe(recipe, models or ())
    if tokenizer is not None:
        read = replace(read, tokenizer=tokenizer)
    if search:
        _search(read, recipe, out, task, task_sets or (), trials, seed, journal, overwrite, as_json)
        return
    computed = {"threads": threads, "device": device or ["cpu"], "workers": workers}
    _merge(read, out, computed, overwrite=overwrite, only_plan=plan, report=report, as_json=as_json)


def _merge(
    recipe: Any, out: Path, computed: dict[str, Any], *, overwrite: bool, only_plan: bool, report: bool, as_json: bool
) -> None:
    from dataclasses import asdict

    from gratis.contract.errors import FileError
    from gratis.trials import merge_report, words

    if out.exists() and not overwrite and not only_plan:
        raise FileError(f"{out} exists already: choose another folder, or say --overwrite.")
    planned = merge_report.plan_merge(recipe, out, **computed)
    if only_plan:
        if as_json:
            terminal.print_json(asdict(planned))
        else:
            _print_plan(planned)
        return
    if not as_json:
        _print_plan(planned)
    with terminal.progress(not as_json) as progress:
        done = recipe.run(out, overwrite=overwrite, progress=progress, **computed)
    files: tuple[Path, ...] = ()
    if report:
        with terminal.progress(not as_json) as progress:
            seen = merge_report.merge_statistics(recipe, out, progress)
        command = shlex.join(["gratis", *sys.argv[1:]])
        files = merge_report.save_report(recipe, seen, out, plan=planned, seconds=done.seconds, command=command)
    if as_json:
        terminal.print_json({**vars(done), "plan": asdict(planned), "report": [str(file) for file in files]})
        return
    amounts = f"{words.number(done.bytes_read, 'bytes')} read, {words.number(done.bytes_written, 'bytes')} written"
    print(f"{done.merged} of {done.tensors} tensors merged, {amounts}, {words.number(done.seconds, 's')}")
    print(done.out)
    for file in files[:1]:
        print(f"report {file}")


def _print_plan(plan: Any) -> None:
    from gratis.trials import words

    table = terminal.table("plan", "")
    table.add_row("tensors", f"{plan.tensors:,} of {plan.experts} experts")
    often = "" if plan.passes == 1 else f", {plan.passes} times"
    table.add_row("read", words.number(plan.bytes_read, "bytes") + often)
    table.add_row(
        "write", f"{words.number(plan.bytes_written, 'bytes')} of {words.number(plan.disk_free, 'bytes')} free"
    )
    table.add_row("memory", f"{words.number(plan.memory, 'bytes')} of scratch")
    speeds = f"disk {words.number(plan.read_speed, 'bytes')}/s in, {words.number(plan.write_speed, 'bytes')}/s out"
    table.add_row("measured", f"{speeds}; {plan.compute_speed / 1e6:.2g} million weights/s and thread")
    table.add_row("time", f"about {words.number(plan.seconds, 's')} with {plan.threads} threads on {plan.device}")
    terminal.console().print(table)


def _search(
    read: Any,
    recipe: Path,
    out: Path,
    task: str | None,
    task_sets: Any,
    trials: int,
    seed: int,
    journal: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from gratis.contract.errors import FileError, ParameterError
    from gratis.tasks.task import task_catalogue
    from gratis.trials.merge_search import search_recipe

    if task is None:
        raise ParameterError("A search needs something to tune for: name it with --task (gratis tasks lists them).")
    if out.suffix not in (".yaml", ".yml"):
        raise ParameterError(f"With --search, OUT is the tuned recipe, a .yaml file, not {out}.")
    if out.exists() and not overwrite:
        raise FileError(f"{out} exists already: choose another file, or say --overwrite.")
    kind = task_catalogue[task]
    chosen = kind(**arguments.parsed(kind, arguments.assignments(task_sets, "--task-set")))
    with terminal.progress(not as_json) as progress:
        found = search_recipe(
            read, chosen, trials=trials, seed=seed, journal=journal or out.with_name(f"{out.name}.journal"),
            progress=progress,
        )  # fmt: skip
    found.recipe_at(recipe, out).save(out)
    if as_json:
        terminal.print_json({"recipe": str(out), **found.summary()})
        return
    table = terminal.table("", "as given", "tuned", numbers=(1, 2))
    for where, before, after in (
        ("on the search's data", found.before, found.score),
        ("on other data", found.before_elsewhere, found.elsewhere),
    ):
        table.add_row(f"{found.metric}, {where}", f"{before:.4f}", f"{after:.4f}")
    terminal.console().print(table)
    if found.same_data:
        print("The task draws the same data for every seed, so the second row is no independent check.")
    print(f"{found.done} trials, {found.failed} failed; " + ", ".join(f"{k}={v:.4g}" for k, v in found.values.items()))
    print(out)
