"""Write into README.md and the pages what is made of data, so that it is there to read on GitHub too.

python docs/make_tables.py

What stands between `<!-- include: NAME -->` and `<!-- /include -->` is written anew. NAME is one of `MADE` or
a file and a part of it, which stands there between `<!-- PART -->` and `<!-- /PART -->`.
"""

from __future__ import annotations

import functools
import io
import re

import hooks
import xcam_fn as xf

PAGES = [hooks.ROOT / "README.md", *sorted(hooks.DOCS.rglob("*.md"))]


def main() -> None:
    """Write all pages anew."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if text != filled(text):
            print(page.relative_to(hooks.ROOT))
            page.write_text(filled(text), encoding="utf-8")


def filled(text: str) -> str:
    """The text, with what it includes as it is now."""
    return re.sub(
        r"(<!-- include: (.+?) -->\n).*?(<!-- /include -->)",
        lambda found: f"{found[1]}{part(found[2]).strip()}\n{found[3]}",
        text,
        flags=re.S,
    )


def part(name: str) -> str:
    """What is included under a name."""
    if name in MADE:
        return MADE[name]()
    path, _, wanted = name.partition(" ")
    text = (hooks.ROOT / path).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {re.escape(wanted)} -->\n(.*?)<!-- /{re.escape(wanted)} -->", text, re.S)
    if found is None:
        raise ValueError(f"{path} has no part <!-- {wanted} --> … <!-- /{wanted} -->")
    return found[1]


def methods_table() -> str:
    """All methods, as README.md has them."""
    rows = ["| method | `xf.` | what it does | paper |", "| --- | --- | --- | --- |"]
    for name, method in xf.METHODS.items():
        does = method.summary + (f" (needs {method.needs})" if method.needs else "")
        paper = re.sub(r"arXiv:([\d.]+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", method.paper or "–")
        paper = re.sub(r"doi:(\S+)", r"[doi](https://doi.org/\1)", paper)
        rows.append(f"| {method.title} | `{name}` | {does} | {paper} |")
    summary = f"All {len(xf.METHODS)}, in the order of <code>xcam methods</code>"
    table = "\n".join(rows)
    return f"<details>\n<summary>{summary}</summary>\n\n{table}\n\n</details>"


def methods_with_pictures() -> str:
    """All methods with their pictures and what they are for, a table for each family."""
    parts = []
    for family, methods in hooks.families().items():
        rows = [f"## {family.capitalize()} family: {hooks.FAMILIES[family]}\n\n| | |\n| --- | --- |"]
        for method in methods:
            about = hooks.prose()[method.name]
            image = f'<img src="../pictures/methods/{method.name}.webp" width="160" alt="{method.title}">'
            picture = "" if "no_picture" in about else image
            text = " ".join(f"{about['idea']} *When to use it:* {about['use']}".split())
            title = f'<a id="{method.name}"></a>**{method.title}**, `xf.{method.name}`'
            rows.append(f"| {picture} | {title}<br>{text.replace('|', chr(92) + '|')} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


@functools.cache
def command_help() -> str:
    """What `xcam COMMAND --help` prints, a section for each command."""
    from rich.console import Console

    from xcam_fn.cli import app

    sections = []
    for name in (command for command in app if not command.startswith("-")):
        printed = io.StringIO()
        app.help_print([name], console=Console(file=printed, width=88, color_system=None))
        text = "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())
        sections.append(f"## xcam {name}\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


MADE = {"methods": methods_table, "methods with pictures": methods_with_pictures, "commands": command_help}


if __name__ == "__main__":
    main()
