"""`ftkit doctor`: what this machine has and can do."""

import json as json_module
import sys

from ftkit.console import Console


def doctor(*, json: bool = False, offline: bool = False) -> None:
    """Print a line for each thing that a run depends on; takes about five seconds.

    Args:
        json: print one object instead.
        offline: do not ask the hub.
    """
    from ftkit import machine
    from ftkit.models.quiet import quiet_transformers

    quiet_transformers()
    console = Console(quiet=json)
    found = machine.look(offline=offline, seconds=machine.MEASURED_SECONDS)
    if json:
        sys.stdout.write(json_module.dumps(found) + "\n")
        return
    width = max(map(len, found))
    for name, text in found.items():
        console.line(f"{name:<{width}}  {text}")
