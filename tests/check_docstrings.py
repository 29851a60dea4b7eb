"""Check the docstrings of the packages' public names. `make lint` runs it.

The public names are those in `__all__` of the three packages, and the public methods of the classes among them. Their files
are read and not imported. The rules are in CONTRIBUTING.md. Ruff and pydoclint know the sections, but neither shapes and
dtypes nor sources, and neither can be limited to public names.
"""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGES = ("patches", "unsloth_ext", "trl_ext")

# Classes made at run time, and the class whose docstring they take
MADE = {"HRPOConfig": ("hrpo.config", "HRPOArguments"), "HRPOTrainer": ("hrpo.trainer", "HRPOMixin")}
# Overridden methods that TRL and transformers document
INHERITED = {
    "add_callback",
    "compute_loss",
    "create_optimizer",
    "evaluation_loop",
    "get_batch_samples",
    "training_step",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^()]*\))?: ")  # "name: ", "name, name (B, T): "
DIMENSION = r"(?:\.\.\.|\w+'?(?: ?[-+*/] ?\w+)*)"
SHAPE = re.compile(rf"\(\.\.\.\)|\({DIMENSION},\)|\({DIMENSION}(?:, {DIMENSION})+\)|\b[Ss]calars?\b")
DTYPE = re.compile(r"\b(long|u?int\d+|bool|float\d*|fp\d+|bf16|bfloat16|floating point|dtypes?)\b")
TENSOR = re.compile(r"\b(Tensor|KVQ)\b")
SOURCE = re.compile(r"arXiv \d{4}\.\d{4,5}|\b[Oo]urs\b|official code|MiniMind")


def parse(doc: str) -> tuple[str, dict[str, list[str]]]:
    """The text of a docstring outside its sections, and the entries of each section, one string each."""
    text: list[str] = []
    sections: dict[str, list[str]] = {}
    entries: list[str] | None = None
    for line in doc.splitlines():
        if line.removesuffix(":") in SECTIONS and line.endswith(":"):
            entries = sections.setdefault(line[:-1], [])
        elif line and not line.startswith(" "):
            entries = None
            text.append(line)
        elif entries is None:
            text.append(line)
        elif line.startswith("     ") and entries:
            entries[-1] += " " + line.strip()
        elif line:
            entries.append(line.strip())
    return "\n".join(text), sections


def described(entries: list[str]) -> dict[str, str]:
    """The names that entries describe, without asterisks, and their entries."""
    matches = [(ENTRY.match(entry + " "), entry) for entry in entries]
    return {name.strip("* "): entry for match, entry in matches if match for name in match[1].split(",")}


def raised(body: list[ast.stmt]) -> set[str]:
    """The exceptions that a body raises by name, not in functions inside it."""
    found: set[str] = set()
    rest: list[ast.AST] = list(body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            exc = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(exc, ast.Name | ast.Attribute):
                name = ast.unparse(exc).split(".")[-1]
                found |= {name} if name[0].isupper() and name != "NotImplementedError" else set()
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            rest += ast.iter_child_nodes(node)
    return found


def parameters(node: Function) -> dict[str, str]:
    """Named parameters and their annotations; not `self`, `*args` and `**kwargs`."""
    args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in args if a.arg not in ("self", "cls", "_")}


def result(node: Function) -> str:
    """The annotation of what a function returns; empty for nothing."""
    found = ast.unparse(node.returns) if node.returns else ""
    return "" if found in ("None", "NoReturn", "Iterator[None]") else found


def decorators(node: Function | ast.ClassDef) -> set[str]:
    return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}


def lacks(entry: str) -> str:
    """What the entry of a tensor does not say."""
    return " and ".join(what for what, pattern in (("shape", SHAPE), ("dtype", DTYPE)) if not pattern.search(entry))


def undescribed(names: dict[str, str], sections: dict[str, list[str]], *where: str) -> Iterator[str]:
    """Problems with the entries of `names`, which have these annotations."""
    entries = described([entry for section in where for entry in sections.get(section, [])])
    for name, annotation in names.items():
        if name not in entries:
            yield f"{where[0]}: has no entry `{name}: ...`"
        elif TENSOR.search(annotation) and (missing := lacks(entries[name])):
            yield f"{where[0]}: does not state the {missing} of {name}"


def function_problems(node: Function) -> Iterator[str]:
    """Problems of a function's or method's docstring."""
    doc = ast.get_docstring(node)
    if not doc:
        yield "has no docstring"
        return
    _, sections = parse(doc)
    names, returned = parameters(node), result(node)
    if len(names) > 1:
        yield from undescribed(names, sections, "Args")
        section = "Yields" if re.match(r"(Iterator|Generator)\b", returned) else "Returns"
        if returned and section not in sections:
            yield f"has no `{section}:`"
        elif TENSOR.search(returned) and (missing := lacks(" ".join(sections[section]))):
            yield f"{section}: does not state the {missing}"
    else:  # may be a sentence that names what comes in and what goes out
        tensors = sum(bool(TENSOR.search(annotation)) for annotation in (*names.values(), returned))
        if len(SHAPE.findall(doc)) < tensors or (tensors and not DTYPE.search(doc)):
            yield "does not state the shape and dtype of each tensor"
    yield from unannounced(node.body, sections)


def unannounced(body: list[ast.stmt], sections: dict[str, list[str]]) -> Iterator[str]:
    announced = described(sections.get("Raises", []))
    yield from (f"Raises: has no entry `{name}: ...`" for name in sorted(raised(body) - announced.keys()))


def class_problems(node: ast.ClassDef) -> Iterator[str]:
    """Problems of a class's docstring, which also describes its constructor."""
    doc = ast.get_docstring(node)
    if not doc:
        yield "has no docstring"
        return
    _, sections = parse(doc)
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name in ("__init__", "__post_init__"):
            names = parameters(function)
            if len(names) > 1 or any(TENSOR.search(annotation) for annotation in names.values()):
                yield from undescribed(names, sections, "Args")
            yield from unannounced(function.body, sections)
    if "dataclass" in decorators(node):
        fields = {
            field.target.id: ast.unparse(field.annotation)
            for field in node.body
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and not field.target.id.startswith("_")
            and not isinstance(field.value, ast.Call)  # `field(metadata={"help": ...})`
        }
        yield from undescribed(fields, sections, "Attributes", "Args")


def has_tensors(node: Function | ast.ClassDef) -> bool:
    if isinstance(node, ast.ClassDef):
        return any(TENSOR.search(ast.unparse(n.annotation)) for n in node.body if isinstance(n, ast.AnnAssign))
    return any(TENSOR.search(annotation) for annotation in (*parameters(node).values(), result(node)))


def problems(node: Function | ast.ClassDef, mathematics: bool, around: str = "") -> Iterator[tuple[str, int, str]]:
    """(name, line, problem) of a public function or class and its public methods.

    `mathematics`: its tensors are a method's, whose source must be stated. `around`: docstrings that may state it.
    """
    name, doc = node.name, f"{around}\n{ast.get_docstring(node) or ''}"
    found = list(class_problems(node) if isinstance(node, ast.ClassDef) else function_problems(node))
    if mathematics and has_tensors(node) and not SOURCE.search(doc):
        found.append('names no source: "arXiv NNNN.NNNNN", "official code" or "ours", here or at the top of the file')
    yield from ((name, node.lineno, problem) for problem in found)
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                inherited = member.name in INHERITED or member.name.startswith("on_") or "setter" in decorators(member)
                if not (inherited and ast.get_docstring(member) is None):
                    inside = problems(member, mathematics, doc)
                    yield from ((f"{name}.{inner}", line, problem) for inner, line, problem in inside)


def public() -> Iterator[tuple[str, Path, Function | ast.ClassDef, ast.Module]]:
    """(qualified name, file, definition, file's syntax tree) of each public function and class."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        where = getattr(module, "_WHERE", None) or dict.fromkeys(module.__all__, "registry")
        for name in module.__all__:
            path, inner = MADE.get(name, (where[name], name))
            file = Path(ROOT, package, *path.split(".")).with_suffix(".py")
            tree = ast.parse(file.read_text())
            for node in tree.body:  # constants, and names that come from another package, have no definition here
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == inner:
                    yield f"{package}.{name}", file, node, tree


def main() -> int:
    found = []
    for _, file, node, tree in public():
        mathematics = file.parent.parent != ROOT and file.parent.name not in ("common", "tasks", "minimind")
        for name, line, problem in problems(node, mathematics, ast.get_docstring(tree) or ""):
            found.append(f"{file.relative_to(ROOT)}:{line}: {name}: {problem}")
    for line in found:
        print(line)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
