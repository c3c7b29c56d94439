"""The command line: parses, calls, prints.

Exit codes: 0 done, 1 a claim failed, 2 refused (usage, parameters, files), 3 an error that gratis did not foresee,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

CLAIM_FAILED, REFUSED, UNFORESEEN, INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code. Errors are one sentence; `--debug` shows where they arose."""
    import typer

    from gratis.cli.commands import app
    from gratis.contract.errors import GratisError, GratisWarning

    debug = "--debug" in arguments
    if not debug:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", GratisWarning)
        warnings.showwarning = _show
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    usage_error = typer.BadParameter.__mro__[1]
    try:
        done = typer.main.get_command(app)(
            args=[a for a in arguments if a != "--debug"] or ["--help"], prog_name="gratis", standalone_mode=False
        )
        if done == INTERRUPTED:
            raise KeyboardInterrupt
        return done if isinstance(done, int) else 0
    except SystemExit as done:
        # From a command that has said why.
        return int(done.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted; what was being written was left out.", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if _follows_interrupt(error):
            return _say("interrupted; what was being written was left out.", INTERRUPTED)
        if debug:
            import traceback

            traceback.print_exc()
            return REFUSED if isinstance(error, (GratisError, usage_error, OSError)) else UNFORESEEN
        if isinstance(error, usage_error):
            return _usage(error)
        if isinstance(error, GratisError):
            return _say(_line(error), REFUSED)
        if isinstance(error, OSError):
            return _say(f"{error.filename or 'the system'}: {(error.strerror or str(error)).lower()}.", REFUSED)
        return _say(f"{type(error).__name__}: {_line(error)} (--debug shows where)", UNFORESEEN)


def _follows_interrupt(error: BaseException | None) -> bool:
    """Whether an error came of Ctrl-C: libraries turn an interrupted import or callback into errors of their own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return REFUSED
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "gratis"
    return _say(f"{error.format_message()} (`{command} --help` lists what there is)", REFUSED)


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"gratis: {message}", file=sys.stderr)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).replace("?.", "?")


def _say(text: str, code: int) -> int:
    print(f"gratis: {text}", file=sys.stderr)
    return code
