"""`gratis plan`: what to spend an inference budget on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gratis.cli import arguments, terminal

if TYPE_CHECKING:
    from gratis.planning import Attention, Hardware, Plan, Shape

ZOO = "zoo:"
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL…",
        help="Models by configuration: smollm2, a folder, owner/name; NAME:parameters=8e9,as=NAME-IN-TRACES (and, for layers "
        "without a cache of keys, layer_flop=…,layer_bytes=… per token).",
        autocompletion=arguments.complete_model,
    ),
]


def plan(
    models: Models,
    traces: Annotated[
        Path | None, typer.Option("--traces", help="Recorded generations, one JSON object a line.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", help="Record generations of the models on small problems into this file.")
    ] = None,
    hardware: Annotated[
        str, typer.Option("--hardware", help="h100, b200, rtx4090 …, 'measure' this machine, or TFLOP/s:TB/s.")
    ] = "h100",
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="Time per question that may be spent.")
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=0, help="Tokens of a prompt, without traces.")] = 200,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of a generation, without traces.")] = 16384,
    trials: Annotated[
        list[int] | None, typer.Option("--trials", min=1, help="Samples per question.  [default: 1, 2, 4 …]")
    ] = None,
    sparse: Annotated[
        list[int] | None, typer.Option("--sparse", min=16, help="Tokens that sparse attention attends to.")
    ] = None,
    batch: Annotated[
        float | None, typer.Option("--batch", help="Questions at a time that share reads of the weights.")
    ] = None,
    element_bytes: Annotated[float, typer.Option("--element-bytes", help="Bytes per number of the cache.")] = 2.0,
    generations: Annotated[int, typer.Option("--generations", min=1, help="To record per question.")] = 16,
    out: Annotated[Path, typer.Option("--out", help="Folder of the page.")] = Path("trials"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Say which model, how many samples, how long, dense or sparse, for a budget. Without traces: what each costs."""
    from gratis.planning import Attention, Hardware

    shapes = dict(_shape(text) for text in models)
    machine = Hardware.named(hardware)
    kinds = [Attention.of_study(budget) for budget in sparse or ()]
    if record is not None:
        _record(models, record, generations, not as_json)
        traces = traces or record
    if traces is None:
        _print_costs(shapes, machine, kinds, prompt, length, trials or [1], batch, element_bytes, seconds, as_json)
        return
    _print_plan(shapes, machine, kinds, traces, trials, batch, element_bytes, seconds, out, as_json)


def _print_costs(
    shapes: dict[str, Shape],
    machine: Hardware,
    sparse: list[Attention],
    prompt: int,
    length: int,
    trials: list[int],
    batch: float | None,
    element_bytes: float,
    seconds: float | None,
    as_json: bool,
) -> None:
    from gratis.planning import Attention, generation_cost
    from gratis.trials.words import number

    rows: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        for kind in [Attention(), *sparse]:
            for n in trials:
                cost = generation_cost(shape, prompt, length, n, kind, element_bytes=element_bytes, batch=batch)
                total = cost.total(machine.intensity)
                rows.append(
                    {
                        "model": name, "attention": str(kind), "samples": n, "compute_flop": cost.compute,
                        "traffic_bytes": cost.traffic, "total_eflop": total, "seconds": machine.seconds(total),
                        "memory_share": machine.intensity * cost.traffic / total,
                    }
                )  # fmt: skip
    if as_json:
        terminal.print_json({"hardware": vars(machine), "prompt": prompt, "length": length, "costs": rows})
        return
    table = terminal.table(
        "model", "attention", "samples", "compute", "memory read", "share of memory", "eFLOP", "time",
        numbers=(2, 3, 4, 5, 6, 7),
    )  # fmt: skip
    within = [one for one in rows if seconds is not None and one["seconds"] <= seconds]
    for one in rows:
        table.add_row(
            str(one["model"]), str(one["attention"]), str(one["samples"]), f"{one['compute_flop'] / 1e12:,.4g} TFLOP",
            number(one["traffic_bytes"], "bytes"), f"{one['memory_share']:.1%}", f"{one['total_eflop'] / 1e12:,.4g} T",
            number(one["seconds"], "s"), style="bold" if one in within else "",
        )  # fmt: skip
    out = terminal.console()
    out.print(f"{machine.name}: {machine.intensity:.4g} FLOP per byte; {prompt} tokens of prompt, {length} generated")
    out.print(table)
    if seconds is not None:
        out.print(
            f"{len(within)} of {len(rows)} take at most {seconds:g} s; which is right most often only traces say."
        )


def _print_plan(
    shapes: dict[str, Shape],
    machine: Hardware,
    sparse: list[Attention],
    traces: Path,
    trials: list[int] | None,
    batch: float | None,
    element_bytes: float,
    seconds: float | None,
    folder: Path,
    as_json: bool,
) -> None:
    from gratis.planning import plan as planned
    from gratis.planning import read_traces
    from gratis.planning.page import HEADS, row, save_page

    made = planned(
        read_traces(traces), shapes, machine, trials=trials, sparse=sparse, element_bytes=element_bytes, batch=batch
    )
    chosen = made.best(seconds * machine.flops) if seconds is not None else None
    page = save_page(made, folder / f"plan-{traces.stem}.html", shlex.join(["gratis", *sys.argv[1:]]))
    if as_json:
        terminal.print_json(_values(made, chosen, page))
        return
    out = terminal.console()
    out.print(f"{machine.name}: {machine.intensity:.4g} FLOP per byte. From the cheapest option on, what is better:")
    table = terminal.table(*HEADS, numbers=(1, 2, 4, 6, 7, 8, 9))
    for choice in made.choices:
        table.add_row(*row(choice.option, made), style="bold" if choice.option is chosen else "")
    out.print(table)
    if any(choice.option.assumed for choice in made.choices):
        out.print("* with the accuracy of dense attention: measure it before relying on it")
    if made.skipped:
        out.print(f"Without traces, or not named: {', '.join(made.skipped)}")
    if chosen is not None:
        out.print(f"Within {seconds:g} s: {', '.join(row(chosen, made)[:4])}; {chosen.generation()}")
    print(f"page   {page.resolve()}")


def _values(made: Plan, chosen: Any, page: Path) -> dict[str, Any]:
    def plain(option: Any) -> dict[str, Any]:
        total = option.cost.total(made.hardware.intensity)
        return {
            "model": option.model, "samples": option.trials, "limit": option.limit, "attention": str(option.attention),
            "assumed": option.assumed, "accuracy": option.accuracy, "interval": option.interval,
            "compute_flop": option.cost.compute, "traffic_bytes": option.cost.traffic, "total_eflop": total,
            "seconds": made.hardware.seconds(total), "generate": option.generation(),
        }  # fmt: skip

    return {
        "hardware": vars(made.hardware),
        "choices": [plain(choice.option) for choice in made.choices],
        "chosen": plain(chosen) if chosen is not None else None,
        "skipped": list(made.skipped),
        "page": str(page),
    }


def _shape(text: str) -> tuple[str, Shape]:
    """The shape of a model by name, and the name that its traces have."""
    from gratis.contract.errors import ParameterError
    from gratis.planning import Shape

    name, given = _specification(text)
    unknown = set(given) - {"parameters", "as", "layer_flop", "layer_bytes"}
    if unknown:
        raise ParameterError(
            f"{name}: a model takes parameters=…, as=…, layer_flop=… and layer_bytes=…, not {', '.join(sorted(unknown))}."
        )
    numbers: dict[str, float] = {}
    for key in sorted({"parameters", "layer_flop", "layer_bytes"} & set(given)):
        try:
            numbers[key] = float(given[key])
        except ValueError:
            raise ParameterError(f"{name}: {key} must be a number such as 8e9, not {given[key]!r}.") from None
    other = None
    if {"layer_flop", "layer_bytes"} & set(numbers):
        other = numbers.get("layer_flop", 0.0), numbers.get("layer_bytes", 0.0)
    called = given.get("as", name)
    return called, Shape.of(_configuration(name), called, numbers.get("parameters"), other)


def _specification(text: str) -> tuple[str, dict[str, str]]:
    """NAME or zoo:NAME, and what is said about it."""
    kind = ZOO if text.startswith(ZOO) else ""
    name, given = arguments.specification(text.removeprefix(kind))
    return kind + name, given


def _configuration(name: str) -> Any:
    from transformers import AutoConfig

    from gratis import zoo
    from gratis.contract.errors import UnknownNameError
    from gratis.subjects.embedded import EMBEDDED, embedded_folder

    if name.startswith(ZOO):
        source = str(zoo.folder_of(name.removeprefix(ZOO)))
    else:
        source = str(embedded_folder(name)) if name in EMBEDDED else str(Path(name).expanduser())
    if not Path(source).is_dir() and "/" not in name:
        raise UnknownNameError(
            f"There is no configuration of {name!r}: name a folder, owner/name, zoo:NAME or {', '.join(EMBEDDED)}."
        )
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        raise UnknownNameError(f"There is no configuration of {name!r}: {said}.") from error


def _record(models: list[str], path: Path, generations: int, show: bool) -> None:
    from gratis.planning.traces import record, write_traces
    from gratis.subjects import open as open_subject

    made = []
    for text in models:
        name, given = _specification(text)
        with terminal.progress(show) as progress:
            made += record(
                open_subject(name),
                given.get("as", name),
                generations=generations,
                limits=(8, 16, 32),
                progress=progress,
            )
    write_traces(made, path)
