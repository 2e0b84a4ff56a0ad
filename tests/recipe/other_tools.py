"""The rows of the table in docs/other_tools.md: python -m tests.recipe.other_tools"""

from ftkit.recipe.foreign import FOREIGN, Alias


def rows() -> list[str]:
    """Their key, ours, in the order of ours."""
    found: dict[str, list[str]] = {}
    for theirs, entry in FOREIGN.items():
        if isinstance(entry, Alias):
            inside = theirs.startswith("data.train.*.")
            ours = f"data.train.N.{entry.key}" if inside else entry.key
            found.setdefault(ours, []).append(theirs.replace("*", "N"))
    return [
        f"| {', '.join(f'`{name}`' for name in sorted(names))} | `{ours}` |" for ours, names in sorted(found.items())
    ]


if __name__ == "__main__":
    print("\n".join(rows()))
