"""One library behind two pipes: `python -m contestants.serve MODULE THREADS`.

A line of JSON comes in for each request, {"do": method of the module's Service, ...its arguments}; a line goes out,
{"ok": answer} or {"error": why}. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module


def main() -> None:
    module, threads = sys.argv[1], int(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: object) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        service = import_module(f"contestants.{module}").Service(threads)
    except Exception as error:  # noqa: BLE001 - the library is not here, or not for this machine
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"ok": service.versions()})
    for line in sys.stdin:
        request = json.loads(line)
        method = getattr(service, request.pop("do"))
        try:
            say({"ok": method(**request)})
        except Exception as error:  # noqa: BLE001 - a peer may fail in its own way; the others go on
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
