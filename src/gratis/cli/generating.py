"""`gratis generate`: one answer of a model under methods, with the places where a decoding method stepped in."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gratis.cli import INTERRUPTED, arguments, terminal

if TYPE_CHECKING:
    from rich.console import Console

STYLE = "bold yellow"
"""Of tokens at whose place the method stepped in."""
LONG = 2048
"""Tokens from which on the memory that a text takes is said before it is read."""


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The question; - or none: read it.")] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A model or chat, as in `gratis try`.", autocompletion=arguments.complete_model
        ),
    ] = "smollm2",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="A method, or NAME:key=value,…; repeat it to put several on.  [default: greedy]",
            autocompletion=arguments.complete_method,
        ),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="A parameter of the one method.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")] = 256,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text at which the answer ends.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="Where the model is put: cpu, cuda …")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Its numbers: float32, bfloat16, float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Answer one prompt under methods that choose tokens or hold a long text, marking where one stepped in."""
    from gratis.contract.attach import check_together
    from gratis.contract.errors import InputError, ParameterError

    if prompt is None and sys.stdin.isatty():
        raise InputError('There is no prompt: give one, as in gratis generate "What is 7 + 8?", or pipe it in.')
    asked = sys.stdin.read() if prompt in (None, "-") else prompt
    if not asked or not asked.strip():
        raise InputError("The prompt is empty: give at least a word.")
    named = methods or ["greedy"]
    if sets and len(named) > 1:
        raise ParameterError("With several methods, give each its parameters: --method NAME:key=value,….")
    chosen = [arguments.method(text, sets or ()) for text in named]
    for one in chosen:
        _check_writes(one)
    check_together(chosen)
    subject = _opened(model, chosen[0], dtype, device)
    if hasattr(subject, "answer"):
        for option, given in (("--stop", stop), ("--raw", raw)):
            if given:
                raise InputError(f"A chat puts its questions in a form of its own: leave out {option}.")
        subject.seed = seed
        _from_chat(subject, chosen, asked, max_new_tokens, as_json)
        return
    if all(one.kind != "decode" for one in chosen):
        chosen.append(arguments.method("greedy"))
    if _from_model(subject, chosen, asked, max_new_tokens, stop or [], seed, raw, as_json):
        raise SystemExit(INTERRUPTED)


def _check_writes(method: Any) -> None:
    """Refuse methods that have no part in writing a text."""
    from gratis.contract.errors import ParameterError

    if method.kind not in {"attach", "decode", "program"}:
        raise ParameterError(
            f"{method.name} has no part in writing a text: name a method that attaches to a language model "
            "(gratis methods --acts-on 'language model')."
        )
    if method.card.acts_on not in {"language model", "chat"}:
        raise ParameterError(
            f"{method.name} acts on a {method.card.acts_on}, which this command does not write text with: see "
            f"`gratis show {method.name}`."
        )


def _opened(name: str, method: Any, dtype: str | None, device: str | None) -> Any:
    from gratis.subjects import open as open_subject

    if method.card.acts_on == "chat" and not name.startswith(("http", "openai:", "chat:")):
        name = f"chat:{name}"
    with terminal.progress() as progress:
        return open_subject(name, dtype=dtype, device=device, progress=lambda words: progress(0.0, words))


def _from_model(
    model: Any, methods: list[Any], prompt: str, limit: int, stops: list[str], seed: int, raw: bool, as_json: bool
) -> bool:
    """Generate, show and sum up. Returns whether it was interrupted; what was committed is shown all the same."""
    import torch

    from gratis.contract.attach import attach
    from gratis.subjects import tokenizer_of
    from gratis.subjects.text_limits import room_for

    tokenizer = tokenizer_of(model)
    text = prompt
    templated = bool(tokenizer.chat_template) and not raw
    if templated:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not templated, verbose=False)["input_ids"].to(
        model.device
    )
    limit = min(limit, room_for(model, ids.shape[1], methods))
    samples = max(getattr(method, "samples", 1) for method in methods)
    memory = _memory(model, methods, ids.shape[1] + limit, samples, show=not as_json)
    options: dict[str, Any] = {"stop_strings": stops, "tokenizer": tokenizer} if stops else {}
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = tokenizer.eos_token_id
    out = terminal.console()
    writer = _Writer(tokenizer, out, show=not as_json)
    if samples == 1:
        options["streamer"] = writer
    torch.manual_seed(seed)
    begin = time.perf_counter()
    interrupted = False
    with attach(model, *methods) as handle:
        try:
            done = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **options)
            tokens = done[0, ids.shape[1] :].tolist()
        except KeyboardInterrupt:
            interrupted, tokens = True, list(writer.tokens)
        reports = handle.report()
    seconds = time.perf_counter() - begin
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    chooses = next(method for method in methods if method.kind == "decode")
    report = reports.get(chooses.name, {})
    places = report.get("places") or [[]]
    if as_json:
        terminal.print_json(
            {
                "text": answer, "tokens": tokens, "prompt_tokens": ids.shape[1], "seconds": round(seconds, 3),
                "interrupted": interrupted, "methods": [repr(method) for method in methods], "places": places[0],
                "memory": memory, "reports": reports,
            }
        )  # fmt: skip
        return interrupted
    if "streamer" not in options:
        out.print(answer, markup=False)
    elif writer.tokens:
        out.print()
    said = [f"{len(tokens)} tokens", f"{seconds:.1f} s"]
    for key, words in (("generated_tokens", "drawn in all"), ("forward_passes", "forward passes")):
        if key in report:
            said.append(f"{report[key]} {words}")
    if places[0]:
        said.append(f"{len(places[0])} places marked")
    if report.get("target_share"):
        said.append(f"{100 * report['target_share'][0]:.0f} % by the target")
    names = " + ".join(method.name for method in methods)
    terminal.console(stderr=True).print(
        f"{'interrupted; ' if interrupted else ''}{names}: {', '.join(said)}", style="dim", markup=False
    )
    return interrupted


def _memory(model: Any, methods: list[Any], tokens: int, rows: int, show: bool) -> dict[str, int] | None:
    """Bytes that the text takes at most, by place; said before a long one is read. Raises MemoryShortError."""
    from dataclasses import asdict

    from gratis.subjects.language import input_device
    from gratis.subjects.memory_need import free_bytes
    from gratis.subjects.text_limits import footprint, free_in_words, in_words

    if tokens < LONG:
        return None
    need = footprint(model, methods, tokens, rows)
    if need is None:
        return None
    if show:
        free = free_in_words(free_bytes(input_device(model)), input_device(model))
        terminal.console(stderr=True).print(
            f"{tokens:,} tokens take at most {in_words(need)}; free: {free}", style="dim", markup=False
        )
    return asdict(need)


def _from_chat(chat: Any, methods: list[Any], prompt: str, limit: int, as_json: bool) -> None:
    from gratis.contract.attach import attach

    with attach(chat, *methods) as handle:
        answer = chat.answer(prompt, max_tokens=limit)
        reports = handle.report()
    if as_json:
        terminal.print_json(
            {"text": answer.response, "methods": [repr(method) for method in methods], "reports": reports}
        )
        return
    terminal.console().print(answer.response, markup=False)
    names = " + ".join(method.name for method in methods)
    terminal.console(stderr=True).print(
        f"{names}: {answer.usage.input} tokens read, {answer.usage.output} written", style="dim", markup=False
    )


class _Writer:
    """A streamer that prints what is committed, in another style where the method says that it stepped in."""

    def __init__(self, tokenizer: Any, out: Console, show: bool) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._out, self._show = tokenizer, out, show
        self._prompt_seen, self._shown, self._note = False, "", ""

    def note(self, words: str) -> None:
        """What the tokens that come next are."""
        self._note = words

    def put(self, value: Any) -> None:
        """The prompt first, then tokens as they are committed."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.tokens += value.flatten().tolist()
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        # Half a character is shown when its other half is there.
        if not text.endswith("�"):
            self._print(text)
        self._note = ""

    def end(self) -> None:
        """What was held back is shown as it is."""
        self._print(self._tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _print(self, text: str) -> None:
        if self._show and len(text) > len(self._shown):
            self._out.print(text[len(self._shown) :], end="", style=STYLE if self._note else None, markup=False)
            self._shown = text
