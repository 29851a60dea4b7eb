"""docs/dropin.md, from the tables that the tests hold the trainers to and from what `run_trl_tests` measured.

python -m tests.drop_in.page > docs/dropin.md
"""

import json

from .features import FEATURES, LIGER, REFUSED
from .run_trl_tests import FILES, RESULTS
from .trainers import CASES, Case


HEAD = """# In place of TRL's trainers

This page is generated (`python -m tests.drop_in.page`) from tables that `tests/drop_in` holds the trainers to.

## Two lines

A trainer takes the place of its parent in TRL by its import. `trl.SFTConfig` and `trl.GRPOConfig` become the configuration
of the method, which has all of their fields.
"""
OFF = """
## Turned off, it is its parent

With the method turned off, four steps give the same losses, the same other figures and the same weights as the parent in
TRL, bit for bit on a CPU: the whole model and LoRA, with gradient accumulation, evaluation, and for GRPO two iterations
with a KL term ([test](../tests/drop_in/test_off.py)).

"""
FEATURE = """
## Features of TRL's trainers

"works" is shown by a test: two steps with the feature are compared with two steps without it, or with rows that were
prepared by hand ([test](../tests/drop_in/test_features.py)). "refused" is a ValueError before training that names the
field.

"""
NOT_MEASURED = "not refused; its kernels need a GPU and were not run"
NEEDS = {
    "LatentGRPOTrainer": "a model with latent tokens, which CODI, PCCoT, KaVa, LOTUS or Coconut has trained",
    "CODITrainer": "rows with `question`, `steps`, `answer`",
    "PCCoTTrainer": "rows with `question`, `steps`, `answer`",
    "KAVATrainer": "rows with `question`, `steps`, `answer`",
    "LOTUSTrainer": "rows with `question`, `steps`, `answer`",
    "CoconutTrainer": "rows with `question`, `steps`, `answer`",
    "KVDistillTrainer": "`teacher_model=...`",
    "LogitsDistillTrainer": "`teacher_model=...`",
    "PlannerExecutorTrainer": "`types=[...]`, the types of concepts; rows with `prompt` and `completion`",
    "ReasoningDistillTrainer": "completions with `<think>` and `<answer>`",
}


def lines_of(case: Case) -> str:
    """The import that takes the place of TRL's."""
    config = case.parent.replace("Trainer", "Config")
    return f"from trl_ext import {case.config} as {config}\nfrom trl_ext import {case.name} as {case.parent}"


def shown(value: object) -> str:
    return ", ".join(f"`{name}={item}`" for name, item in value.items()) if isinstance(value, dict) else str(value)


def page() -> str:
    """The page."""
    parts = [HEAD]
    for case in CASES:
        needs = f" It also needs {NEEDS[case.name]}." if case.name in NEEDS else ""
        parts.append(f"\n`{case.name}` in place of `{case.parent}`.{needs}\n\n```python\n{lines_of(case)}\n```\n")
    parts.append(f"{OFF}| trainer | parent | turned off by |\n|---|---|---|\n")
    for case in CASES:
        off = "cannot be turned off: take the parent" if case.off is None else shown(case.off)
        parts.append(f"| `{case.name}` | `{case.parent}` | {off} |\n")
    parts.append(FEATURE)
    for parent in FILES:
        cases = [case for case in CASES if case.parent == parent]
        parts.append(
            f"| in place of `{parent}` | {' | '.join(case.name.removesuffix('Trainer') for case in cases)} |\n"
        )
        parts.append(f"|---{'|---' * len(cases)}|\n")
        reasons: dict[str, str] = {}
        for feature in FEATURES:
            if parent not in feature.parents:
                continue
            cells = []
            for case in cases:
                why = REFUSED[case.name].get(feature.name)
                if why is not None:
                    mark = reasons.setdefault(why, chr(ord("a") + len(reasons)))
                    cells.append(f"refused ({mark})")
                else:
                    cells.append("not run" if feature.name == LIGER else "works")
            parts.append(f"| {feature.name} | {' | '.join(cells)} |\n")
        parts.append("\n")
        parts += [f"- ({mark}) `{why}`\n" for why, mark in reasons.items()]
        parts.append("\n")
    parts.append('What "works" means:\n\n')
    parts += [f"- {feature.name}: {feature.shown}\n" for feature in FEATURES if feature.name != LIGER]
    parts.append(f'- {LIGER}: "not run" is {NOT_MEASURED}\n')
    found = json.loads(RESULTS.read_text())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts.append(f"""
## TRL's own tests

`python -m tests.drop_in.run_trl_tests PATH_TO_A_TRL_CHECKOUT` runs TRL's test files with the class rebound: `HRPOTrainer`
with thinking on, the others turned off. It ran with {versions}. The test files are of TRL {found["tests"]}, the newest that
were available. Tiny models in folders stand in for the hub's. What fails on stock TRL too needs vision models, remote code
or other models that have no stand-in, or tests something that the installed TRL does differently. `ReasoningDistillTrainer`
was left out: it refuses rows without its tags, also when it is turned off.

| class | passed | failed | skipped | passes on stock only | passes with ours only |
|---|---|---|---|---|---|
""")
    for name, counts in found["classes"].items():
        failed = counts["failed"] + counts["error"]
        more = [len(counts["only_ours"]), len(counts["only_stock"])]
        label = f"stock `{name}`" if name == counts["parent"] else f"`{name}` in place of `{counts['parent']}`"
        parts.append(f"| {label} | {counts['passed']} | {failed} | {counts['skipped']} | {more[0]} | {more[1]} |\n")
    worse = [(name, test) for name, counts in found["classes"].items() for test in counts["only_ours"]]
    if worse:
        parts.append(
            "\nThese pass on stock TRL only; they look for the tag `sft`, and each trainer has a tag of its own:\n\n"
        )
        parts += [f"- `{name}`: `{test.partition('::')[2]}`\n" for name, test in worse]
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
