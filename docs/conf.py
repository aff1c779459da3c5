"""The documentation as a site: `make docs` builds it into build/docs, with warnings as errors and without a network."""

from __future__ import annotations

import re
from importlib.metadata import version as installed

from docutils import nodes
from latex2mathml.converter import convert

project = "torchlamb"
author = "the authors of torchlamb"
release = version = installed("torchlamb")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of torch and Python: their pages are on the network

html_theme = "furo"
pygments_style = "default"  # diffs in red and green
html_title = f"torchlamb {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature would be longer than what it says; Args says it in words
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "code"
python_maximum_signature_line_length = 88


def mathml(latex: str, display: bool) -> str:
    """Return a formula as MathML, which browsers show by themselves: a script would have to be fetched."""
    if "&" in latex or r"\\" in latex:
        latex = rf"\begin{{align*}}{latex}\end{{align*}}"
    return convert(latex, display="block" if display else "inline")


def visit_math(self, node):
    """Write a formula of a line."""
    self.body.append(mathml(node.astext(), display=False))
    raise nodes.SkipNode


def visit_math_block(self, node):
    """Write a formula of its own."""
    self.body.append(f'<div class="formula">{mathml(node.astext().strip(), display=True)}</div>')
    raise nodes.SkipNode


PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def local(target: str) -> str:
    """Return where a link of a page in the folder above leads from here."""
    return PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}")


def read_above(app, path, parent, content):
    """Let links of the README and its neighbours start from this folder."""
    content[0] = re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda found: f"]({local(found[1])})", content[0])


def read(app, docname, source):
    """Let links to the README and its neighbours lead to their pages."""
    for file, page in PAGES.items():
        source[0] = source[0].replace(f"](../{file}", f"]({page}")


def escape_bars(app, what, name, obj, options, lines):
    """Keep the bars of norms: outside of backticks, reStructuredText takes them for substitutions."""
    for i, line in enumerate(lines):
        if not line.startswith(("    ", ">>>")):
            parts = line.split("`")
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            lines[i] = "`".join(parts)


def setup(app):
    """Tell Sphinx of the above."""
    app.connect("source-read", read)
    app.connect("include-read", read_above)
    app.connect("autodoc-process-docstring", escape_bars)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))


html_math_renderer = "mathml"
