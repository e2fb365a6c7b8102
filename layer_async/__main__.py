"""`python -m layer_async`, and the command `layer-async`.

Rules: says what is missing where the command line's extra is; leaves nothing for the interpreter to stumble over at its
end, when it would report and not say why.
"""

from __future__ import annotations

import os
import sys

HOW_TO_ADD = "pip install 'layer-async[cli]' (in a checkout: pip install '.[cli]')"


def main() -> None:
    """Run the command line and exit with its code; without its extra, say how to get it and exit with 2."""
    try:
        from .cli import run

        code = run(sys.argv[1:])
    except ModuleNotFoundError as exc:
        sys.stderr.write(f"layer-async: {exc.name} is missing, which the extra `cli` brings: {HOW_TO_ADD}\n")
        code = 2
    except KeyboardInterrupt:  # while it was still being imported
        code = 130
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            # What could not be written is still in the buffer, and would be tried again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = code or 4
    sys.exit(code)


if __name__ == "__main__":
    main()
