"""The command line, ``zsq``. Exit codes: 0 fine, 1 a gate failed, 2 wrong use or unusable input, 3 a defect of this program."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; errors that a user can mend are told without a traceback."""
    from rich.console import Console

    from zsq_deploy.errors import InterruptedRunError, ZsqError

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        from zsq_deploy.cli.app import run

        code = run(arguments)
    except InterruptedRunError as error:
        console.print(f"interrupted: {error}", markup=False, style="yellow")
        code = error.exit_code
    except ZsqError as error:
        console.print(f"error: {error}", markup=False, style="red")
        code = error.exit_code
    except KeyboardInterrupt:
        console.print(
            "interrupted; what was finished is kept. Go on with --resume, or start over with --force", style="yellow"
        )
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except MemoryError:
        console.print(
            "error: out of memory\n  to do: use fewer images or a smaller network, or a machine with more memory",
            style="red",
        )
        code = 2
    except Exception as error:
        if os.environ.get("ZSQ_DEBUG"):
            raise
        console.print(
            f"this is a defect of zsq-deploy, not of your input: {type(error).__name__}: {error}\n"
            "  to do: run the command again with ZSQ_DEBUG=1 in the environment and report the traceback",
            markup=False,
            style="red",
        )
        code = 3
    if arguments is None:
        sys.exit(code)
    return code
