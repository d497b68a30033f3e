"""The configuration of the site: `nox -s docs` builds it with Sphinx."""

import re
from pathlib import Path
from typing import Annotated, Any, get_origin

import sphinx.util.inspect
import sphinx.util.typing
from docutils import nodes
from pygments.lexers.shell import BashLexer
from sphinx import addnodes
from sphinx.application import Sphinx

import dipeo_llm

ROOT = Path(__file__).parent.parent

project = "dipeo_llm"
copyright = "the authors of dipeo_llm"  # noqa: A001 - Sphinx's name
release = version = dipeo_llm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_heading_anchors = 4  # as on GitHub
default_role = "code"  # a docstring's `name`

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    "exclude-members": "model_config, __init__, __new__",
}
autoclass_content = "class"
python_maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Cancelling", "notes_style")]

nitpicky = True
# These have no page: other packages' names, type variables, private names, and what lies
# behind a public signature.
nitpick_ignore_regex = [
    ("py:.*", r"(?!dipeo_llm\b).*"),
    ("py:.*", r".*\.(T|_\w+)"),
    ("py:.*", r"dipeo_llm\.(adapters|client|pool|progress|reports|settings)\..*"),
    ("py:.*", r"dipeo_llm\.(streaming\.Opened|telemetry\.CallTrace)"),
    ("py:.*", r"dipeo_llm\.testing\.(mock\.SentRequest|cassettes\.Cassette)"),
]

pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = f"dipeo_llm {release}"
html_show_sphinx = False
html_copy_source = False
html_favicon = "static/favicon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
copybutton_prompt_text = "$ "

ROOT_PAGES = {
    "index": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
}
"""Pages of the site, and the file of the repository's root that each begins with."""


write_annotation = sphinx.util.typing.stringify_annotation


def write_type(annotation: Any, *args: Any, **options: Any) -> str:
    """Write `Annotated[float, Ge(0)]` as `float`. Sphinx has no setting for it."""
    if get_origin(annotation) is Annotated:
        annotation = annotation.__origin__
    return write_annotation(annotation, *args, **options)


# autodoc, which is imported after this file, takes it from there.
sphinx.util.typing.stringify_annotation = write_type
sphinx.util.inspect.stringify_annotation = write_type  # type: ignore[attr-defined]


def adapt(app: Sphinx, page: str, text: list[str]) -> None:
    """Put a root file on its page, and lead links to root files to their pages.

    Of such a page's own text only the navigation stays: the rest is for GitHub.
    """
    if file := ROOT_PAGES.get(page):
        app.env.note_dependency(str(ROOT / file))
        body = (ROOT / file).read_text("utf-8")
        body = re.sub(r"\]\((?!https?:|#)", "](../", body).replace("](../docs/", "](")
        text[0] = body + "".join(text[0].partition("```{toctree}")[1:])
    for twin, file in ROOT_PAGES.items():
        text[0] = text[0].replace(f"](../{file}", f"]({twin}.md")


def keep_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep napoleon from taking an attribute's text up to a colon for its type."""
    if lines and what in {"attribute", "data", "property"}:
        lines[0] = f": {lines[0]}"


def unlink_builtin(app: Sphinx, doctree: nodes.document) -> None:
    """Take the builtin in `type[T]` for no attribute that is called `type`."""
    for reference in list(doctree.findall(addnodes.pending_xref)):
        if reference["reftarget"] == "type":
            reference.replace_self(reference.children)


def setup(app: Sphinx) -> None:
    """Connect the hooks."""
    # Its own lexer takes a line without a prompt for output, and shows it in grey.
    app.add_lexer("console", BashLexer)
    app.connect("source-read", adapt)
    app.connect("autodoc-process-docstring", keep_text, priority=400)
    app.connect("doctree-read", unlink_builtin)
