"""Writes the generated pages of the documentation: methods and their index, public names, tables of results, README's table.

Run ``python docs/generate.py`` after adding a method or changing a docstring; a test compares the pages with the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import torchmto
from torchmto import Method, lab, method_class, metrics, solvers, structure
from torchmto.cli.methods import markdown as table

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
sys.path.insert(0, str(DOCS))

import released  # noqa: E402  scripts beside this one
from docstrings import roles  # noqa: E402
from evidence import filled, leaderboard  # noqa: E402

MODULES = (torchmto, structure, metrics, solvers, lab)
FAMILIES = {
    "loss weighting": "Loss weightings: one forward, one backward",
    "gramian": "Gramian methods: weights from the K x K inner products of the task gradients",
    "combiner": "Combiners: rules that need the rows of the gradient matrix",
    "procedure": "Procedures: several forwards, backwards or optimizer steps per batch",
}

ABSENT = """## Not here

Methods whose formula could be confirmed neither in the paper nor in released code (last tried in November 2026):

- **ConicGrad** (Hassanpour et al., 2025, arXiv 2502.00217). The update maximises the smallest product with a task's gradient
  within a cone around the mean gradient; which length it gets, and how the weights are found from step to step, isn't known.
- **GradOPS** (Zhu et al., WSDM 2025, arXiv 2503.03438). Each gradient is projected off the span of the others; which ones are,
  and the weights of its trade-offs, aren't known.

What changes the model is no method, and goes with any: RotoGrad's rotations between trunk and heads are
`torchmto.lab.models.rotograd.RotoGrad`, a cross-stitch network is the lab's model `cross_stitch`, and Recon's task-specific
layers are chosen by [`structure.conflict_scores`](../api/structure.md).
"""


def markdown(docstring: str) -> str:
    """A Google-style docstring as Markdown: maths, code, sections and examples."""
    text = roles(docstring)
    lines: list[str] = []
    code = ""
    for line in text.splitlines():
        section = re.fullmatch(r"(Args|Returns|Raises|Example|Attributes|Yields):", line)
        argument = re.fullmatch(r"    (\*{0,2}\w+): (.*)", line)
        if line.lstrip().startswith(">>>") and not code:
            lines.append("```python")
            code = line[: len(line) - len(line.lstrip())]
            code = code or " "
        if code and not line.strip():
            lines += ["", "```"]  # the empty line ends the expected output for doctest
            code = ""
        if section:
            lines += [f"**{section[1]}**", ""]
        elif argument and not code:
            lines.append(f"- `{argument[1]}`: {argument[2]}")
        elif code:
            lines.append(line.removeprefix("    "))
        elif line.startswith(".. math::"):
            lines.append(f"$${line.removeprefix('.. math::').strip()}$$")
        else:
            lines.append(line.strip() if line.startswith("     ") else line.removeprefix("    "))
    if code:
        lines += ["", "```"]
    return "\n".join(lines).strip()


def degree(value: float | None) -> str:
    """A homogeneity degree in words."""
    return "not homogeneous" if value is None else f"degree {value:.3g}"


def counts(cls: type[Method]) -> str:
    """The cost of one step with K = 2, 3 and 4 tasks, as a formula where one fits."""
    method = make(cls)
    if method is None:
        return (
            "1 forward, 1 backward, 1 optimizer step"
            if cls.family == "loss weighting"
            else "1 forward, K backwards, 1 optimizer step"
        )
    costs = [method.cost(k) for k in (2, 3, 4)]
    parts = []
    for name in ("num_forward", "num_backward", "num_optimizer_steps"):
        values = [getattr(cost, name) for cost in costs]
        slope = values[1] - values[0]
        base = values[0] - 2 * slope
        linear = values[2] - values[1] == slope
        number = f"{values[0]}" if slope == 0 else ("K" if slope == 1 else f"{slope}K") + (f" + {base}" if base else "")
        parts.append(number if linear else " / ".join(map(str, values)) + " (K = 2, 3, 4)")
    words = ("forward", "backward", "optimizer step")
    return ", ".join(f"{n} {w}{'' if n == '1' else 's'}" for n, w in zip(parts, words, strict=True))


def make(cls: type[Method]) -> Method | None:
    """The method with its defaults; None for the two that need an argument."""
    try:
        return torchmto.make_method(cls.name)
    except TypeError:
        return None


def page(name: str) -> str:
    """The page of one method."""
    cls = method_class(name)
    properties = cls.properties
    signature = str(inspect.signature(cls)).replace("'", "").replace("collections.abc.", "")
    promises = [
        f"homogeneity: {degree(properties.homogeneity)}",
        f"permutation equivariant: {'yes' if properties.equivariant else 'no'}",
        "one task: " + ("its gradient, bit for bit" if properties.identity else "rescaled"),
        f"reaches the Pareto set on convex problems: {'yes' if properties.pareto else 'not promised'}",
        f"never conflicts with a task: {'yes' if properties.nonconflicting else 'not promised'}",
    ]
    domain = cls.domain
    refused = "; a step with others is refused before anything changes" if domain.above else ""
    takes = f"{domain.losses}{refused}; any finite gradients, any number of tasks. {domain.corners}".strip()
    return "\n".join(
        [
            f"# {name}",
            "",
            "<!-- Generated by docs/generate.py from the docstring; don't edit. -->",
            "",
            markdown(inspect.getdoc(cls) or ""),
            "",
            "## At a glance",
            "",
            f"- **Family**: {cls.family}",
            f"- **When to use it**: {cls.use}",
            f"- **Cost per batch of K tasks**: {counts(cls)}",
            f"- **Hyper-parameters**: `{name}{re.sub(r'torchmto[.][a-z_.]+[.]', '', signature).removesuffix(' -> None')}`",
            f"- **Domain** (tested): {takes}",
            "- **Declared properties** (tested): " + "; ".join(promises),
            "",
        ]
    )


def index() -> str:
    """The table of all methods."""
    lines = ["# Methods", "", "<!-- Generated by docs/generate.py; don't edit. -->", ""]
    for family, title in FAMILIES.items():
        lines += [f"## {title}", "", "| name | cost per batch | when to use it | source |", "|---|---|---|---|"]
        for name in torchmto.methods():
            cls = method_class(name)
            if cls.family == family:
                lines.append(f"| [{name}]({name}.md) | {counts(cls)} | {cls.use} | {cls.source} |")
        lines.append("")
    return "\n".join([*lines, ABSENT])


def reference(module: ModuleType) -> str:
    """The page of a module's public names; their signatures and docstrings are put in when the site is built."""
    summary = roles(inspect.getdoc(module) or "")
    lines = [f"# {module.__name__}", "", "<!-- Generated by docs/generate.py; don't edit. -->", "", summary, ""]
    for name in public(module):
        place = f"{module.__name__}.{name}"
        if place in sys.modules:  # `torchmto.methods` is a function and a package
            place += f".{name}"
        lines += [f"::: {place}", ""]
    return "\n".join(lines)


def public(module: ModuleType) -> list[str]:
    """The names of a module that the reference explains: what is no module and no text."""
    names = (name for name in sorted(module.__all__) if not name.startswith("__"))
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def readme() -> str:
    """The project's README with the table of methods as it is now."""
    before, begin, rest = README.read_text(encoding="utf-8").partition("<!-- methods -->\n")
    _, end, after = rest.partition("<!-- /methods -->\n")
    if not (begin and end):
        raise ValueError("README.md should have the lines <!-- methods --> and <!-- /methods -->.")
    return "".join([before, begin, table("docs/methods"), "\n", end, after])


def pages() -> dict[Path, str]:
    """Every generated page: path -> text."""
    made = {DOCS / "methods" / f"{name}.md": page(name) for name in torchmto.methods()}
    made[DOCS / "methods" / "README.md"] = index()
    for module in MODULES:
        made[DOCS / "api" / f"{module.__name__.removeprefix('torchmto.')}.md"] = reference(module)
    made[DOCS / "leaderboard.md"] = leaderboard()
    made[DOCS / "results.md"] = filled((DOCS / "results.md").read_text(encoding="utf-8"))
    made[DOCS / "recipes.md"] = released.page()
    made[README] = readme()
    return made


def main() -> int:
    """Write the pages, removing those of methods that are gone."""
    made = pages()
    for old in [*(DOCS / "methods").glob("*.md"), *(DOCS / "api").glob("*.md")]:
        if old not in made:
            old.unlink()
    for path, text in made.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"Wrote {len(made)} pages to {DOCS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
