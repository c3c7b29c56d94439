"""`gratis show`: everything about one method or task."""

from __future__ import annotations

import inspect
from typing import Any

from gratis.cli import terminal


def show_method(entry: Any, as_json: bool) -> None:
    """Card, parameters, and claims with their last results."""
    from gratis.trials import claims

    kind, card = entry.load(), entry.card
    last = [claims.last_result(entry.name, claim) for claim in card.claims]
    if as_json:
        content = {
            "name": entry.name, "class": entry.class_name, "seed": card.seed, "family": entry.family,
            "kind": entry.kind, "acts_on": card.acts_on, "free_of": list(card.free_of), "title": card.title,
            "authors": card.authors, "year": card.year, "paper": card.paper, "summary": card.summary,
            "limits": card.limits, "differs": card.differs, "holds": list(card.holds),
            "unchanged_when": dict(card.unchanged_when) if card.unchanged_when is not None else None,
            "module": entry.module, "parameters": [parameter_row(p) for p in kind.declared().values()],
            "claims": [
                {
                    "name": claim.name, "task": claim.task, "metric": claim.metric, "compare": claim.compare,
                    "bound": claim.bound, "against": claim.against, "parameters": dict(claim.parameters),
                    "task_parameters": dict(claim.task_parameters),
                    "last": result.model_dump(mode="json") if result is not None else None,
                }
                for claim, result in zip(card.claims, last, strict=True)
            ],
        }  # fmt: skip
        terminal.print_json(content)
        return
    from rich.markup import escape

    out = terminal.console()
    out.print(f"[bold]{entry.name}[/]  {escape(card.summary)}\n")
    out.print(escape(inspect.getdoc(kind) or ""))
    cited = ", ".join(part for part in (card.authors, f'"{card.title}"', str(card.year), card.paper) if part)
    lines = {
        "paper": cited,
        "acts on": card.acts_on,
        "spares you": ", ".join(card.free_of),
        "use": usage(entry),
        "changes nothing at": ", ".join(f"{k}={v}" for k, v in (card.unchanged_when or {}).items()),
        "not for": card.limits,
        "differs": card.differs,
    }
    out.print()
    facts = terminal.table("", "")
    facts.show_header = False
    facts.box = None
    for key, value in lines.items():
        if value:
            facts.add_row(f"[dim]{key}[/]", escape(value))
    out.print(facts)
    _print_parameters(kind, out)
    if card.claims:
        out.print("\n[bold]claims[/]")
    for claim, result in zip(card.claims, last, strict=True):
        if result is None:
            bound = claim.bound.replace("<=", "≤").replace(">=", "≥")
            out.print(f"  –   {escape(claim.name)}\n      {claim.metric} {bound} on {claim.task}; not run yet")
            continue
        terminal.print_claim(result, out)
        out.print(f"      [dim]{result.measured[:10]}, {escape(result.repeat)}[/]")


def show_task(name: str, as_json: bool) -> None:
    """What a task measures, on what, and its parameters."""
    from rich.markup import escape

    from gratis.tasks.task import task_catalogue

    entry = task_catalogue.resolve(name)
    kind, card = entry.load(), entry.card
    if as_json:
        terminal.print_json(
            {
                "name": entry.name,
                "title": card.title,
                "acts_on": card.acts_on,
                "data": card.data,
                "subject": card.subject,
                "metrics": [vars(metric) for metric in card.metrics],
                "module": entry.module,
                "parameters": [parameter_row(p) for p in kind.declared().values()],
            }
        )
        return
    out = terminal.console()
    out.print(f"[bold]{entry.name}[/]  {escape(inspect.getdoc(kind) or '')}\n\non: {escape(card.data)}")
    metrics = terminal.table("metric", "meaning", "unit", "better")
    for metric in card.metrics:
        better = "higher" if metric.higher_is_better else "lower"
        metrics.add_row(metric.name, escape(metric.help), escape(metric.unit), better)
    out.print(metrics)
    _print_parameters(kind, out)


def usage(entry: Any) -> str:
    """The line that uses a method, by its kind."""
    call = f"gratis.{entry.class_name}()"
    return {
        "attach": f"gratis.attach(model, {call})",
        "decode": f"gratis.attach(model, {call})",
        "program": f"gratis.attach(chat, {call})",
        "edit": f"delta = {call}.edit(model, …); gratis.attach(model, delta)",
        "merge": f"gratis.merge({call}, …), or gratis merge recipe.yaml out/",
        "estimator": f"{call}.fit(…).predict(…)",
    }.get(entry.kind, call)


def parameter_row(parameter: Any) -> dict[str, Any]:
    """A parameter as plain values."""
    return {
        "name": parameter.name,
        "type": parameter.type_name,
        "default": None if parameter.required else parameter.default,
        "required": parameter.required,
        "bounds": parameter.bounds,
        "unit": parameter.unit,
        "help": parameter.help,
    }


def _print_parameters(kind: Any, out: Any) -> None:
    from rich.markup import escape

    declared = kind.declared()
    if not declared:
        return
    table = terminal.table("--set", "default", "valid", "meaning")
    for parameter in declared.values():
        default = "required" if parameter.required else str(parameter.default)
        unit = f" ({parameter.unit})" if parameter.unit else ""
        table.add_row(parameter.name, escape(default), escape(parameter.valid), escape(parameter.help + unit))
    out.print(table)
