"""The command line: get one document, fetch many, serve the sandbox, run the demo.

Rules: knows the door, the sandbox and the demo; a module for each command. Tokens come from the environment, never from
arguments, which any user of the machine can read. Documents go to stdout or `--out`, everything else to stderr. Exit
codes are in `EXIT_CODES`, for scripts; no exception of ours leaves `run`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator

from cyclopts import App, CycloptsError

from .. import ConfigurationError, LayerError, __version__
from ._demo import demo
from ._fetch import fetch
from ._files import OutputError, complain
from ._get import get
from ._sandbox import sandbox

__all__ = ["EXIT_CODES", "app", "run"]

EXIT_CODES = """\
Exit codes:

- 0: complete
- 1: the call failed, the tokens were refused, or the demo found a difference
- 2: wrong usage, configuration or input
- 3: incomplete, some items failed
- 4: the output could not be written, or its file exists already
- 130: interrupted (143 by SIGTERM)
"""

app: App = App(
    name="layer-async",
    help=(
        "Call The Layer's web API. Tokens are read from LAYER_TOKEN1 and LAYER_TOKEN2, or from the files that "
        "LAYER_TOKEN1_FILE and LAYER_TOKEN2_FILE name; the base URL from LAYER_BASE_URL.\n\n" + EXIT_CODES
    ),
    version=__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)

app.command(get)
app.command(fetch)
app.command(sandbox)
app.command(demo)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    return exit_code_of(lambda: app(arguments, exit_on_error=False, print_error=True, result_action="return_value"))


def exit_code_of(command: Callable[[], object]) -> int:
    """Run `command` and return its exit code; what it raises is told on stderr."""
    with terminating() as terminated:
        try:
            code = command()
        except CycloptsError:
            return 2
        except ConfigurationError as exc:
            complain(str(exc))
            return 2
        except LayerError as exc:
            complain(str(exc))
            return 1
        except OutputError as exc:
            if not isinstance(exc.__cause__, BrokenPipeError):  # who reads us has had enough, and knows it
                complain(str(exc))
            return 4
        except OSError as exc:
            complain(f"input or output failed: {exc.strerror or exc}.")
            return 4
        except KeyboardInterrupt:
            complain("interrupted.")
            return 143 if terminated else 130
        return 143 if terminated else code if isinstance(code, int) else 0


@contextlib.contextmanager
def terminating() -> Generator[list[int]]:
    """In here SIGTERM does what Ctrl-C does, and is noted in the list.

    Not where Ctrl-C is ignored, as in a shell's background jobs: there SIGTERM ends the process at once, as ever.
    """
    noted: list[int] = []

    def terminate(number: int, _: object) -> None:
        noted.append(number)
        signal.raise_signal(signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield noted
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
