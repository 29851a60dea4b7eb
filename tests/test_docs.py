"""README and the pages of the documentation: their links lead somewhere, and they say what the code says."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from trl_ext.common.method import commands, index_table, training_methods
from unsloth_ext.common.method import all_methods


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "benchmarks/results").glob("*.md")])
METHODS = sorted({*training_methods(), *all_methods()})
SECTIONS = ["Equations", "When to use it", "Minimal example", "Settings", "What was measured", "Known limits"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_nowhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    there = (page.parent / path).resolve() if path else page
    return not there.exists() or bool(anchor and anchor not in anchors(there))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|mailto:", link)]
    assert [link for link in links if leads_nowhere(page, link)] == []


@pytest.mark.parametrize("link", ["no_such_page.md", "hrpo.md#no-such-section", "#no-such-section"])
def test_a_link_that_leads_nowhere_is_found(link):
    assert leads_nowhere(DOCS / "hrpo.md", link) and not leads_nowhere(DOCS / "hrpo.md", "latent.md#known-limits")


@cache
def defined(file: Path) -> set[str]:
    nodes = ast.parse(file.read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}


@pytest.mark.parametrize("page", [DOCS / f"{name}.md" for name in METHODS], ids=name_of)
def test_a_method_page_leads_from_the_equation_to_the_code(page):
    text = page.read_text()
    headings = [heading for heading in re.findall(r"^## (.+)$", text, re.MULTILINE) if heading in SECTIONS]
    assert headings == SECTIONS
    assert text.index("## Equations") < 1500
    equations = text.partition("## Equations")[2].partition("\n## ")[0]
    named = re.findall(r"\]\(\.\./([\w/]+\.py)\)((?: `\w+`)*)", equations)
    assert len(named) > 3 and any(names for _, names in named)
    for file, names in named:
        assert set(re.findall(r"\w+", names)) <= defined(ROOT / file), file


TODAY = [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")]  # these tell of what was
FOLDERS = "tests|recipes|benchmarks|unsloth_ext|trl_ext|patches|docs|requirements"


@pytest.mark.parametrize("page", TODAY, ids=name_of)
def test_paths_and_targets_that_a_page_names_are_there(page):
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {*commands()}
    assert set(re.findall(r"`make ([a-z][\w-]+)", text)) <= targets
    for path, test in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)(?:::(\w+))?`", text):
        if "NAME" in path or path.startswith(("docs/_build", "docs/results", "docs/api")):
            continue
        file = ROOT / ("tests" if test else "") / path
        assert file.exists(), path
        assert not test or f"def {test}(" in file.read_text(), test


def files_in_git() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return [ROOT / name for name in listed.split() if name.endswith((".py", ".yaml", ".toml")) or name == "Makefile"]


def test_pages_named_in_code_are_there():
    missing = []
    for file in (file for file in files_in_git() if file.exists()):
        for page, section in re.findall(r"\b(docs/\w+\.md)(#[\w-]+)?", file.read_text()):
            if leads_nowhere(ROOT / "README.md", page + section):
                missing.append(f"{name_of(file)}: {page}{section}")
    assert missing == []


def test_readme_is_short_and_its_table_leads_to_pages_and_targets():
    """A new method need not be in it before there is evidence."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) > 10
    for row in rows:
        (name,) = re.findall(r"^\| \[[^]]+\]\(docs/(\w+)\.md\)", row)
        assert name in training_methods() or name in all_methods(), row
        assert set(re.findall(r"`make ([\w-]+)`", row)) <= commands().keys(), row


@pytest.mark.parametrize("name", METHODS)
def test_the_index_has_every_method(name):
    assert f"]({name}.md) |" in index_table() and "<!-- methods -->" in (DOCS / "index.md").read_text()


GPU_CONFIGS = sorted(path.stem.removesuffix("_gsm8k") for path in (ROOT / "recipes/configs").glob("*_gsm8k.yaml"))


@pytest.mark.parametrize("prefix", GPU_CONFIGS)
def test_the_model_for_a_gpu_is_the_one_of_the_configuration(prefix):
    """The recipe's `make` line, the record's line for `make help`, and the YAML name the same model."""
    (command,) = (
        command
        for method in training_methods().values()
        for command in method.commands
        if command.configs == prefix and command.name == f"train-{prefix.replace('_', '-')}"
    )
    docstring = ast.get_docstring(ast.parse((ROOT / command.scripts[0]).read_text()))
    (line,) = (line for line in docstring.splitlines() if line.split("#")[0].strip() == f"make {command.name}")
    config = yaml.safe_load((ROOT / f"recipes/configs/{prefix}_gsm8k.yaml").read_text())
    full = [config["model_name"], config.get("teacher_model_name_or_path", "")]
    models = [name.split("/")[-1].removesuffix("-Instruct").lower() for name in full if name]
    family = models[-1].rpartition("-")[0]
    for said in (line.lower(), command.about.lower()):
        assert "gpu" in said
        for model in models:  # "Qwen2.5-7B to 1.5B" names the family once, "GPT-2" is gpt2
            size = model.rpartition("-")[2]
            assert model in said or model in said.replace("-", "") or (family and f"{family}-" in said and size in said)


def messages() -> list[str]:
    text = (DOCS / "troubleshooting.md").read_text()
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"^\| `([^`]+)`", row)]


@cache
def texts_in_code() -> str:
    """All string constants of the packages, of an f-string those between its values."""
    files = [*(ROOT / "requirements").glob("*.py")]
    files += [file for package in ("patches", "unsloth_ext", "trl_ext") for file in (ROOT / package).rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize("message", [message for message in messages() if not message.startswith("update/")])
def test_a_message_of_the_troubleshooting_page_is_one_of_the_code(message):
    makefile = (ROOT / "Makefile").read_text()
    for part in message.split("..."):
        assert part.strip() in texts_in_code() or part in makefile, message


def test_the_troubleshooting_page_has_messages():
    assert len(messages()) > 20
