"""The command line, ``zsq``. Exit codes: 0 fine, 1 a gate failed, 2 wrong use or unusable input, 3 a defect of this program."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

_RESUMABLE = frozenset({"deploy", "run", "synth", "quantize"})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; errors that a user can mend are told without a traceback.

    Args:
        arguments: Without the program's name; ``None``: those of the process, which then ends with the exit code.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = _guarded(given)
    except KeyboardInterrupt:  # while an error was being told
        code = 130
    if arguments is None:
        sys.exit(code)
    return code


def _guarded(arguments: list[str]) -> int:
    from zsq_deploy.errors import InterruptedRunError, ZsqError

    try:
        from zsq_deploy.cli.app import run

        code = run(arguments)
        sys.stdout.flush()
        return code
    except InterruptedRunError as error:
        _say(str(error), "yellow")
        return error.exit_code
    except ZsqError as error:
        _say(f"error: {error}", "red")
        return error.exit_code
    except KeyboardInterrupt:
        text = "interrupted"
        if _RESUMABLE.intersection(arguments[:1]):
            text += "; what was finished is kept\n  to do: run the same command with --resume to go on, or with --force to start over"
        elif "demo" in arguments[:1]:
            text += "\n  to do: run the same command with --force to start over"
        _say(text, "yellow")
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough (`zsq inspect ... | head`); nothing more may be written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        _say(
            "error: out of memory\n  to do: use fewer images or a smaller network, or a machine with more memory", "red"
        )
        return 2
    except OSError as error:
        from zsq_deploy.artifact import explain_os_error

        explained = explain_os_error(error)
        if explained is None:
            return _defect(error)
        _say(f"error: {explained}", "red")
        return explained.exit_code
    except Exception as error:
        return _defect(error)


def _defect(error: Exception) -> int:
    """Tell what no user can mend; with ``ZSQ_DEBUG`` set, by its traceback."""
    if os.environ.get("ZSQ_DEBUG"):
        raise error
    _say(
        f"this is a defect of zsq-deploy, not of your input: {type(error).__name__}: {error}\n"
        "  to do: run the command again with ZSQ_DEBUG=1 in the environment and report the traceback",
        "red",
    )
    return 3


def _say(text: str, style: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False, style=style)
