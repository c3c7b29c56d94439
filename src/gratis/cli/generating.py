"""`gratis generate`: one answer of a model under a decoding method, with the places where the method stepped in."""

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


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The question; - or none: read it.")] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A model or chat, as in `gratis try`.", autocompletion=arguments.complete_model
        ),
    ] = "smollm2",
    method: Annotated[
        str,
        typer.Option(
            "--method", help="A decoding method, or NAME:key=value,…", autocompletion=arguments.complete_method
        ),
    ] = "greedy",
    sets: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="A parameter of the method.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")] = 256,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text at which the answer ends.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="Where the model is put: cpu, cuda …")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Its numbers: float32, bfloat16, float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Answer one prompt with a decoding method, marking where the method stepped in."""
    from gratis.contract.errors import InputError

    if prompt is None and sys.stdin.isatty():
        raise InputError('There is no prompt: give one, as in gratis generate "What is 7 + 8?", or pipe it in.')
    asked = sys.stdin.read() if prompt in (None, "-") else prompt
    if not asked or not asked.strip():
        raise InputError("The prompt is empty: give at least a word.")
    chosen = arguments.method(method, sets or ())
    _check_decodes(chosen)
    subject = _opened(model, chosen, dtype, device)
    if hasattr(subject, "answer"):
        _from_chat(subject, chosen, asked, max_new_tokens, as_json)
    elif _from_model(subject, chosen, asked, max_new_tokens, stop or [], seed, raw, as_json):
        raise typer.Exit(INTERRUPTED)


def _check_decodes(method: Any) -> None:
    """Refuse methods that do not choose tokens of a text."""
    from gratis.contract.errors import ParameterError

    if method.kind not in {"decode", "program"}:
        raise ParameterError(
            f"{method.name} does not choose tokens: name a decoding method (gratis methods --family decoding)."
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
    model: Any, method: Any, prompt: str, limit: int, stops: list[str], seed: int, raw: bool, as_json: bool
) -> bool:
    """Generate, show and sum up. Returns whether it was interrupted; what was committed is shown all the same."""
    import torch

    from gratis.contract.attach import attach
    from gratis.contract.errors import InputError
    from gratis.subjects import tokenizer_of
    from gratis.subjects.language import window_of

    tokenizer = tokenizer_of(model)
    text = prompt
    templated = bool(tokenizer.chat_template) and not raw
    if templated:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not templated, verbose=False)["input_ids"].to(
        model.device
    )
    window = window_of(model)
    if window is not None and ids.shape[1] >= window:
        raise InputError(
            f"The prompt of {ids.shape[1]} tokens leaves no room in the model's window of {window}: shorten it."
        )
    limit = limit if window is None else min(limit, window - ids.shape[1])
    options: dict[str, Any] = {"stop_strings": stops, "tokenizer": tokenizer} if stops else {}
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = tokenizer.eos_token_id
    out = terminal.console()
    writer = _Writer(tokenizer, out, show=not as_json)
    if getattr(method, "samples", 1) == 1:
        options["streamer"] = writer
    torch.manual_seed(seed)
    begin = time.perf_counter()
    interrupted = False
    with attach(model, method) as handle:
        try:
            done = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **options)
            tokens = done[0, ids.shape[1] :].tolist()
        except KeyboardInterrupt:
            interrupted, tokens = True, list(writer.tokens)
        report = handle.report().get(method.name, {})
    seconds = time.perf_counter() - begin
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    places = report.get("places") or [[]]
    if as_json:
        terminal.print_json(
            {
                "text": answer, "tokens": tokens, "seconds": round(seconds, 3), "interrupted": interrupted,
                "method": repr(method), "places": places[0], "report": report,
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
    terminal.console(stderr=True).print(
        f"{'interrupted; ' if interrupted else ''}{method.name}: {', '.join(said)}", style="dim", markup=False
    )
    return interrupted


def _from_chat(chat: Any, method: Any, prompt: str, limit: int, as_json: bool) -> None:
    from gratis.contract.attach import attach

    with attach(chat, method) as handle:
        answer = chat.answer(prompt, max_tokens=limit)
        report = handle.report().get(method.name, {})
    if as_json:
        terminal.print_json({"text": answer.response, "method": repr(method), "report": report})
        return
    terminal.console().print(answer.response, markup=False)
    terminal.console(stderr=True).print(
        f"{method.name}: {answer.usage.input} tokens read, {answer.usage.output} written", style="dim", markup=False
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
        if self._show and not text.endswith("�"):
            self._out.print(text[len(self._shown) :], end="", style=STYLE if self._note else None, markup=False)
            self._shown = text
        self._note = ""

    def end(self) -> None:
        """Nothing is held back."""
