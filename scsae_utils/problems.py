"""The messages of the errors that this package raises, read from its source: for the page "What can go wrong"."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent


def text_of(node: ast.expr) -> str:
    """A string expression as text; what is only known when it is raised becomes an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "…"


def messages(module: str) -> list[str]:
    """Messages of the errors raised by a module, such as ``"cells"``, in the order of its source.

    Raises
    ------
    ValueError
        If there is no such module.
    """
    path = PACKAGE / f"{module}.py"
    if not path.is_file():
        raise ValueError(f"there is no module {module!r}")
    raised = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise) and n.exc is not None]
    raised = sorted((n for n in raised if isinstance(n.exc, ast.Call) and n.exc.args), key=lambda n: n.lineno)
    texts = [text for n in raised for text in map(text_of, n.exc.args)]  # an OSError has a number before its text
    texts = [re.sub("…+", "…", " ".join(text.split())) for text in texts]
    return list(dict.fromkeys(t for t in texts if re.search(r"\w", t)))


def message(module: str, part: str) -> str:
    """The one message of a module that is ``part``, or contains it.

    Raises
    ------
    ValueError
        If none or several do.
    """
    known = messages(module)
    found = [part] if part in known else [text for text in known if part in text]
    if len(found) != 1:
        raise ValueError(f"{len(found)} errors of {module}.py contain {part!r}, not one")
    return found[0]


def fill_messages(text: str) -> str:
    """Put a message where a page says ``<!-- error: MODULE: a part of it -->``, and all for ``<!-- errors -->``."""

    def code(message: str) -> str:
        return f"`` {message} ``".replace("|", "\\|")  # a bar would end the cell of a table

    def every(_) -> str:
        lines = []
        for path in sorted(PACKAGE.glob("*.py")):
            if texts := messages(path.stem):
                lines += [f"**{path.stem}**", "", *(f"- {code(t)}" for t in texts), ""]
        return "\n".join(lines)

    text = re.sub(r"<!-- error: (\w+): (.+?) -->", lambda found: code(message(found[1], found[2])), text)
    return re.sub(r"^<!-- errors -->$", every, text, flags=re.M)
