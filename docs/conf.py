"""The documentation site: the pages of this folder, and the public names of the packages."""

import dataclasses
import importlib
import shutil
from importlib import metadata
from pathlib import Path

from sphinx.util import logging

from trl_ext.common.method import index_table


project = "Latent reasoning on TRL and Unsloth"
copyright = "the latent-reasoning-trl contributors"
release = metadata.version("latent-reasoning-trl")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = project
exclude_patterns = ["_build", "models/*", "notebooks/*"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_fence_as_directive = ["math"]  # as GitHub shows ```math

default_role = "code"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
add_module_names = False

PACKAGES = ("patches", "unsloth_ext", "trl_ext")


def settings_of(obj):
    """The fields with a help text that a configuration adds to its parents'."""
    if not dataclasses.is_dataclass(obj):
        return []
    own = [cls for cls in obj.__mro__ if cls.__module__.split(".")[0] in PACKAGES]
    names = {name for cls in own for name in vars(cls).get("__annotations__", ())}
    return [field for field in dataclasses.fields(obj) if field.name in names and "help" in field.metadata]


def hide_signature(app, what, name, obj, options, signature, returns):
    """A configuration's constructor takes all fields of TRL's too, which would fill a page."""
    return ("", None) if settings_of(obj) else None


def add_settings(app, what, name, obj, options, lines):
    """Append a configuration's own settings, with their defaults and the help that its recipe shows."""
    settings = settings_of(obj)
    if settings:
        lines += ["", ".. rubric:: Settings", ""]
    for field in settings:
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        lines += [f"``{field.name}{default}``", f"    {field.metadata['help']}", ""]


RESULTS = "../benchmarks/results/"


def copy_results(app):
    """Put the benchmarks' results, which are written outside this folder, into the site."""
    shutil.copytree(Path(app.srcdir, RESULTS), Path(app.srcdir, "results"), dirs_exist_ok=True)


def link_results(app, docname, source):
    """Let links to the benchmarks' results lead to their pages on the site."""
    source[0] = source[0].replace(f"({RESULTS}", "(results/")


def check_names(app, env):
    """Warn of a public name that no page documents. `make docs` makes an error of every warning."""
    documented = env.domains.python_domain.objects.keys()
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            if not {f"{package}.{name}", f"unsloth_ext.{name}"} & documented:
                logging.getLogger(__name__).warning(f"{package}.{name} is on no page")


def list_methods(app, docname, source):
    """Put the methods' records where the index asks for them."""
    source[0] = source[0].replace("<!-- methods -->", index_table())


def setup(app):
    """Connect the functions above to Sphinx."""
    app.connect("source-read", list_methods)
    app.connect("builder-inited", copy_results)
    app.connect("source-read", link_results)
    app.connect("autodoc-process-signature", hide_signature)
    app.connect("autodoc-process-docstring", add_settings, priority=900)  # after Napoleon
    app.connect("env-check-consistency", check_names)
