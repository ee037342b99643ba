"""The Typer application, and the way from an exception to one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from steerwell.data.errors import InputError, nearest

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
VERBS = ("demo", "import", "export", "sample", "judge", "plan", "train", "eval", "explain")
AGAIN = "interrupted; run the same command again to resume"

app = typer.Typer(
    name="steerwell",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True, epilog="Example: steerwell demo")
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
) -> None:
    """Preference tuning for language models: from annotations to an aligned model, with a report."""
    if version:
        from importlib.metadata import version as installed

        print(f"steerwell {installed('steerwell')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; never raises what a user can cause."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    interrupted: list[int] = []

    def on_interrupt(number: int, frame: Any) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not in the main thread: leave the signal to whoever runs us
        before = None
    try:
        _load_verbs()
        status = app(words, prog_name="steerwell", standalone_mode=False)
        if status == INTERRUPTED:
            _say(AGAIN)
        return status if isinstance(status, int) else DONE
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except BaseException as error:  # noqa: BLE001 (this is the one place where errors become exit statuses)
        # Libraries may turn a Ctrl-C that hits them while they are loaded into an error of their own.
        if interrupted or isinstance(error, KeyboardInterrupt | typer.Abort):
            _say(AGAIN)
            return INTERRUPTED
        if debug:
            traceback.print_exc()
        line, status = explain_error(error)
        if not getattr(error, "_steerwell_told", False):  # of several processes the one that failed speaks
            _say(f"error{' (process ' + os.environ['RANK'] + ')' if silent() else ''}: {line}")
        return status
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _load_verbs() -> None:
    """Importing a file of verbs enters them into the application; then they are put into the order of work."""
    for verbs in ("demo_verb", "store_verbs", "plan_verb", "model_verbs", "eval_verbs"):
        import_module(f"steerwell.cli.{verbs}")
    app.registered_commands.sort(key=lambda command: VERBS.index(_verb(command)))


def _verb(command: Any) -> str:
    return command.name or command.callback.__name__


def explain_error(error: BaseException) -> tuple[str, int]:
    """One line (what is wrong, how to mend it) and the exit status for an exception."""
    if isinstance(error, InputError) or _is(error, "steerwell.objectives.table", "ObjectiveError"):
        return _line(error), BAD_INPUT
    if hasattr(error, "format_message"):  # usage errors of Typer, and of Click under older versions of it
        return _usage(error), BAD_INPUT
    if _is(error, "steerwell.train.rundir", "TrainingError"):
        return _line(error), FAILED
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or _line(error)}. Check the path, its rights and the disk.", BAD_INPUT
    if _is(error, "sqlalchemy.exc", "SQLAlchemyError"):
        return f"the store cannot be used: {_line(error)[:200]}. Is it locked, or no store?", BAD_INPUT
    what = f"{type(error).__name__}: {_line(error)}" if str(error) else type(error).__name__
    return f"this should not have happened: {what[:300]} (run again with --debug to see where)", FAILED


def _is(error: BaseException, module: str, name: str) -> bool:
    """Whether the error is of a class of a module that need not be loaded."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _usage(error: Any) -> str:
    """A usage error in one line, with the nearest known name where a name was wrong."""
    context = getattr(error, "ctx", None)
    line = " ".join(error.format_message().split())
    commands = getattr(getattr(context, "command", None), "commands", None)
    option = getattr(error, "option_name", None) if "No such option" in line else None
    if option and context is not None:
        known = [name for param in context.command.params for name in [*param.opts, *param.secondary_opts]]
        line = f"No such option {option}. {nearest(option, [n for n in known if n.startswith('-')])}"
    elif commands and "No such command" in line:
        word = next((w for w in line.split("'")[1:2]), "")
        line = f"No such command {word!r}. {nearest(word, commands)}"
    where = context.command_path if context is not None else "steerwell"
    return f"{line.rstrip('.?')}{'?' if line.endswith('?') else '.'} See {where} --help."


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def silent() -> bool:
    """Whether this is one of several processes that ``torchrun`` started, and not the first: that one speaks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def threads() -> int:
    """How many threads torch may use: ``STEERWELL_THREADS``, 1 by default (more are often slower)."""
    text = os.environ.get("STEERWELL_THREADS", "1")
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"STEERWELL_THREADS is {text!r}", mend="Give a whole number from 1 on.")
    return int(text)


__all__ = ["app", "explain_error", "main", "silent", "threads"]
