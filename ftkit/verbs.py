"""The group of verbs on the command line."""

from difflib import get_close_matches
from typing import Any

from typer.core import TyperGroup

from ftkit.errors import UserError
from ftkit.failures import LATER_VERBS


class Verbs(TyperGroup):
    """The group of verbs; knows those of later versions and suggests for misspelt ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that `args` starts with.

        Raises:
            UserError: there is no such verb.
        """
        name = args[0]
        if name in LATER_VERBS:
            raise UserError(f"the verb {name} is not in this version", how=LATER_VERBS[name])
        if name not in self.commands and not name.startswith("-"):
            close = get_close_matches(name, self.commands, n=1)
            how = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(self.commands)}"
            raise UserError(f"there is no verb {name}", how=how)
        return super().resolve_command(ctx, args)
