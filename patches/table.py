"""The table of all patches for `docs/patches.md`: `python -m patches.table`."""

import re

from . import registry


HEAD = "| patch | changes | effect | needed by | upstream | can go |\n|---|---|---|---|---|---|\n"
LINK = re.compile(r"https://github\.com/[\w-]+/([\w-]+)/(?:issues|pull)/(\d+)")


def table(scoped: bool) -> str:
    """Return a Markdown table of the records that are applied inside blocks (`scoped`), or of those applied
    permanently.
    """
    return HEAD + "".join(_row(patch) for patch in map(registry.get, registry.NAMES) if patch.scoped is scoped)


def _row(patch: registry.Record) -> str:
    upstream = LINK.sub(lambda found: f"[{found[1]}#{found[2]}]({found[0]})", patch.upstream)
    cells = (
        f"`{patch.name}`",
        f"{patch.package}: {patch.target}",
        patch.effect,
        patch.reason,
        upstream,
        patch.removable,
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    print(f"{table(scoped=False)}\n{table(scoped=True)}", end="")
