"""The site: `make docs` builds it from docs/, README.md and benchmarks/RESULTS.md with Sphinx, warnings as errors.

Pages are plain Markdown that GitHub shows as it is; what only the site needs is added here. Three things:
navigation (NAVIGATION below), the reference behind the pages of docs/reference (from the docstrings of what each
package exports), and a page for every source file that a page links to.

The root of the sources is the repository's, so that a relative link means the same here and there.
"""

import dataclasses
import importlib
import inspect
import json
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer, TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

# A caption and its pages, in the order of the sidebar.
NAVIGATION = {
    "Start": ["docs/quickstart", "docs/concepts", "benchmarks/RESULTS"],
    "Training": [
        "docs/training",
        "docs/data",
        "docs/finetuning",
        "docs/tuning",
        "docs/optimizers",
        "docs/precision",
        "docs/checkpoints",
        "docs/watching",
        "docs/sharding",
        "docs/planning",
    ],
    "Inference": ["docs/inference", "docs/tasks", "docs/serving", "docs/loading"],
    "Research": ["docs/ablations", "docs/knobs"],
    "How to": [
        "docs/howto/huggingface",
        "docs/howto/hf-flax",
        "docs/howto/megatron-lm",
        "docs/howto/tpu-pod",
        "docs/howto/slurm",
        "docs/howto/colab",
        "docs/porting",
        "docs/converting",
    ],
    "Reference": [f"docs/reference/{package}" for package in ("modelzoo", "parallel", "train", "inference")],
    "Project": ["README", "CONTRIBUTING", "CHANGELOG"],
}
START = "docs/index"
# For the sidebar, where a page's own title is long.
SHORT = {
    "docs/finetuning": "Fine-tuning",
    "docs/tuning": "LoRA and freezing",
    "docs/optimizers": "Optimizers and schedules",
    "docs/planning": "Planning a pod",
    "docs/tasks": "Tasks and evaluation",
    "docs/loading": "Large checkpoints",
    "docs/howto/huggingface": "Hugging Face checkpoints",
    "docs/howto/hf-flax": "From HF Flax",
    "README": "README",
}

project = "flaxtron"
html_title = "flaxtron"
author = "the flaxtron authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = START
include_patterns = ["docs/**.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md"]
nitpicky = False

myst_heading_anchors = 4  # headings have the anchors that GitHub gives them
myst_enable_extensions = ["alert"]

default_role = "literal"  # docstrings write code in single backticks
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
autosummary_generate = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False

html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Sphinx) -> None:
    """Registers what this file adds."""
    app.add_lexer("gin", PythonLexer)
    app.connect("source-read", add_to_page)
    app.connect("autodoc-process-signature", shorten_signature)
    # Before Sphinx collects what is to be downloaded, as these are shown instead.
    app.connect("doctree-read", link_to_sources, priority=100)
    app.connect("html-collect-pages", source_pages)
    app.connect("build-finished", write_entrance)


def add_to_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adds the navigation to the first page, and the reference to those of the packages."""
    folder, _, name = docname.rpartition("/")
    if docname == START:
        trees = [
            "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])
            for caption, names in NAVIGATION.items()
            if (pages := [_entry(page) for page in names if (ROOT / f"{page}.md").is_file()])
        ]
        source[0] += "".join(trees)
    elif folder == "docs/reference":
        source[0] += "\n\n" + "\n".join(reference(name)) + "\n"


def _entry(page: str) -> str:
    return f"{SHORT[page]} </{page}>" if page in SHORT else f"/{page}"


# --- the reference


def reference(package: str) -> Iterator[str]:
    """The public names of a package as directives: a table, and then each by itself."""
    module = importlib.import_module(package)
    names = [name for name in module.__all__ if callable(getattr(module, name))]
    functions = [name for name in names if not inspect.isclass(getattr(module, name))]
    groups: dict[str, list[str]] = {"Functions": functions, "Classes": [], "Configs": [], "Models": []}
    for name in names:
        if name not in functions:
            groups[_group(getattr(module, name))].append(name)
    for title, members in groups.items():
        if not members:
            continue
        members = sorted(members, key=lambda name: (_home(getattr(module, name)), name))
        yield from ["", f"## {title}", "", "```{eval-rst}", ".. autosummary::", "   :nosignatures:", ""]
        yield from [f"   {package}.{name}" for name in members]
        for name in members:
            thing = getattr(module, name)
            directive = "autoclass" if inspect.isclass(thing) else "autofunction"
            yield from ["", f".. {directive}:: {package}.{name}"]
            if inspect.isclass(thing):
                yield from _members(thing)
        yield "```"


def _home(thing: Any) -> str:
    """The package that something is from, so that a family's names stand together."""
    return thing.__module__.rpartition(".")[0]


def _is_model(thing: type) -> bool:
    return any(base.__module__.startswith("flax.linen") for base in thing.__mro__)


def _group(thing: type) -> str:
    if _is_model(thing):
        return "Models"
    return "Configs" if thing.__name__.endswith("Config") and hasattr(thing, "to_hf") else "Classes"


def _members(thing: type) -> Iterator[str]:
    """Methods and properties that a class itself documents; of a model how it is called."""
    if _is_model(thing):
        shown = ["__call__", "init_cache"]
    else:
        shown = [
            name for name in vars(thing) if not name.startswith("_") and name not in ("setup", "replace")
        ]
        if issubclass(thing, tuple) or _group(thing) == "Configs":
            shown = []
    shown = [name for name in shown if callable(getattr(thing, name, None)) and _documents(thing, name)]
    if shown:
        yield f"   :members: {', '.join(shown)}"


def _documents(thing: type, name: str) -> bool:
    return name in vars(thing) and bool(getattr(vars(thing)[name], "__doc__", None))


def shorten_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """A dataclass is called with its fields: Attributes in its docstring say more than a line of fifty arguments."""
    if what != "class" or not dataclasses.is_dataclass(thing):
        return None
    fields = [
        field.name
        for field in dataclasses.fields(thing)
        if field.init and field.name not in ("parent", "name")
    ]
    if _is_model(thing):
        return f"({', '.join(fields)})", None
    if len(fields) <= 6:
        return None
    return f"({', '.join(fields[:5])}, ...)", None


# --- pages of source files


def link_to_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Turns links to files and folders of the repository into links to pages that show them."""
    docname = app.env.current_document.docname
    shown = app.env.__dict__.setdefault("flaxtron_sources", {})
    shown[docname] = set()
    links = [*doctree.findall(download_reference), *doctree.findall(pending_xref)]
    for link in links:
        path = (ROOT / posixpath.dirname(docname) / link["reftarget"]).resolve()
        if isinstance(link, download_reference) or (link["reftype"] == "myst" and path.is_dir()):
            shown[docname].add(path)
            target = posixpath.relpath(f"{_page_of(path)}.html", posixpath.dirname(docname))
            link.replace_self(nodes.reference("", "", *link.children, refuri=target, internal=True))


def _page_of(path: Path) -> str:
    return (path / "files" if path.is_dir() else path).relative_to(ROOT).as_posix()


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file and folder that something links to, and for the files of such folders."""
    linked = set().union(*app.env.__dict__.get("flaxtron_sources", {}).values())
    files = {path for path in linked if path.is_file()}
    for folder in sorted(linked - files):
        inside = sorted(path for path in folder.iterdir() if path.is_file())
        files.update(inside)
        items = "".join(f'<li><a href="{path.name}.html">{path.name}</a></li>' for path in inside)
        yield _page_of(folder), _source_page(folder, f"<ul>{items}</ul>"), "page.html"
    for file in sorted(files):
        shown = (
            _notebook(file)
            if file.suffix == ".ipynb"
            else _highlighted(file.read_text(encoding="utf-8"), file)
        )
        yield _page_of(file), _source_page(file, shown), "page.html"


def _highlighted(text: str, file: Path) -> str:
    try:
        lexer = PythonLexer() if file.suffix in (".gin", ".ipynb") else get_lexer_for_filename(file.name)
    except ClassNotFound:
        lexer = TextLexer()
    return f'<div class="source">{highlight(text, lexer, HtmlFormatter())}</div>'


def _notebook(file: Path) -> str:
    """Its prose and code; notebooks are committed without outputs."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "".join(
        MarkdownIt().render(text) if kind == "markdown" else _highlighted(text, file) for kind, text in texts
    )


def _source_page(path: Path, body: str) -> dict[str, Any]:
    name = path.relative_to(ROOT).as_posix()
    return {"title": name, "body": f"<h1>{name}</h1>\n{body}"}


def write_entrance(app: Sphinx, error: Exception | None) -> None:
    """The site's address leads to its first page."""
    if error is None:
        text = (
            f'<!doctype html><meta http-equiv="refresh" content="0; url={START}.html"><title>flaxtron</title>'
        )
        Path(app.outdir, "index.html").write_text(f'{text}<a href="{START}.html">flaxtron</a>\n')


os.environ.setdefault("JAX_PLATFORMS", "cpu")
