"""Draw the page of each family from its docstrings and its param tree: ``python docs/draw.py``.

``docs/families/X.md`` has the text of the spec's module, the published variants, every field of the
config, the formats, and an example for each framework; ``X.svg`` is the data flow of the first
variant: its modules in the order in which they run, with what each gives for one image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import get_type_hints
from xml.sax.saxutils import escape

import msgspec

from isovit.spec.config import Config
from isovit.spec.families import FAMILIES, config_class, family_module, param_tree, published
from isovit.spec.param import ParamTree

PAGES = Path(__file__).parent / "families"
LINE, INDENT, WIDTH, MARGIN = 22, 14, 560, 8
DEEPEST = 4
"""How many levels of modules are drawn; what lies deeper is counted with its parent."""


@dataclass(frozen=True)
class Box:
    """A module as it is drawn: its name, or that of several alike, and the boxes in it."""

    name: str
    tree: ParamTree
    inside: tuple[Box, ...] = ()

    @property
    def lines(self) -> int:
        """Height, in lines."""
        return 1 + sum(box.lines for box in self.inside)


def main() -> None:
    """Write every page and every figure."""
    PAGES.mkdir(exist_ok=True)
    for family in FAMILIES:
        for name, text in files(family).items():
            (PAGES / name).write_text(text, encoding="utf-8")


def files(family: str) -> dict[str, str]:
    """What belongs to a family in the folder of the pages, by name of the file."""
    first = next(iter(family_module(family).VARIANTS.items()))
    return {f"{family}.md": page(family), f"{family}.svg": figure(*first)}


def page(family: str) -> str:
    """The page of a family, in Markdown."""
    module, cls = family_module(family), config_class(family)
    title, _, about = (module.__doc__ or "").partition("\n")
    first = next(iter(module.VARIANTS))
    formats = import_module(f"isovit.weight_convert.families.{family}").TABLES
    return "\n".join(
        [
            f"# {title.rstrip('.')}",
            "",
            "<!-- drawn by docs/draw.py from the docstrings and the param tree -->",
            about.rstrip().replace("``", "`"),
            "",
            f"![Modules of {first} in order, with their shapes]({family}.svg)",
            "",
            "## Variants",
            "",
            *variants_table(family),
            "",
            "## Fields",
            "",
            *fields_table(cls),
            "",
            "`isovit show` has the fields of every family (`image_size`, `num_classes` …) as well;",
            "`--set FIELD=VALUE` changes one.",
            "",
            "## Checkpoints",
            "",
            f"Read and written in the formats {', '.join(f'`{name}`' for name in formats)};"
            " [Formats](../formats.md) has the errors.",
            "",
            "## In each framework",
            "",
            *(f"```python\n{text}```\n" for text in examples(first).values()),
        ]
    ).rstrip() + "\n"  # fmt: skip


def variants_table(family: str) -> list[str]:
    """Sizes, as computed here, and accuracy, as published."""
    lines = ["| variant | image | parameters | multiply-adds | top-1 | source |"]
    lines.append("|---|---|---|---|---|---|")
    for name, config in family_module(family).VARIANTS.items():
        tree, said = param_tree(config), published(name)
        accuracy = f"{said.top1} % at {said.image_size}" if said and said.top1 else ""
        size = " × ".join(map(str, config.image_size))
        macs = f"{tree.multiply_adds() / 1e9:.2f} G"
        source = said.source if said else ""
        lines.append(f"| `{name}` | {size} | {tree.count():,} | {macs} | {accuracy} | {source} |")
    return lines


def fields_table(cls: type[Config]) -> list[str]:
    """The family's own fields with their defaults and meaning."""
    own = get_type_hints(cls).keys() - get_type_hints(cls.__base__).keys()
    meaning = attributes(getdoc(cls) or "")
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(cls):
        if field.name in own:
            default = msgspec.json.encode(field.default).decode()
            lines.append(f"| `{field.name}` | `{default}` | {meaning[field.name]} |")
    return lines


def attributes(docstring: str) -> dict[str, str]:
    """The entries of the section ``Attributes`` of a docstring, each on one line."""
    _, _, section = docstring.partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {
        name: " ".join(text.split()).replace("``", "`").replace("|", "\\|")
        for name, text in entries
    }


def examples(variant: str) -> dict[str, str]:
    """The same few lines in each framework, by its name; a test runs them."""
    head = f'import isovit\n\nconfig = isovit.config("{variant}", num_classes=10)\n'
    height, width = family_image(variant)
    images = f"(2, {height}, {width}, 3)"
    return {
        "torch": f'import torch\n{head}'
        'model = isovit.build(config, "torch", isovit.init(config, seed=0))  # a torch.nn.Module\n'
        f"logits = model(torch.zeros{images})\n",
        "flax": f"import jax.numpy as jnp\nfrom flax import nnx\n{head}"
        'model = isovit.build(config, "flax", isovit.init(config, seed=0))  # an nnx.Module\n'
        f"logits = nnx.jit(lambda model, x: model(x))(model, jnp.zeros({images}))\n",
        "keras": f"import numpy as np\n{head}"
        'model = isovit.build(config, "keras", isovit.init(config, seed=0))  # a keras.Model\n'
        f'logits = model.predict(np.zeros({images}, "float32"))\n',
    }  # fmt: skip


def family_image(variant: str) -> tuple[int, int]:
    """Height and width of a variant's images."""
    from isovit.spec.families import config

    return config(variant).image_size


def boxes(trees: tuple[ParamTree, ...], depth: int = 1) -> tuple[Box, ...]:
    """Modules as boxes; runs of modules that differ in their names alone become one."""
    drawn: list[Box] = []
    i = 0
    while i < len(trees):
        same = 1
        while i + same < len(trees) and shape(trees[i + same]) == shape(trees[i]):
            same += 1
        tree, last = trees[i], trees[i + same - 1]
        name = tree.name if same == 1 else f"{tree.name} … {last.name}  ({same} alike)"
        inside = boxes(tree.children, depth + 1) if depth < DEEPEST else ()
        drawn.append(Box(name, tree, inside))
        i += same
    return tuple(drawn)


def shape(tree: ParamTree) -> ParamTree:
    """A module without its name."""
    return replace(tree, name="")


def figure(variant: str, config: Config) -> str:
    """The data flow of a model as SVG."""
    tree = param_tree(config)
    inside = boxes(tree.children)
    height = (3 + sum(box.lines for box in inside)) * LINE + 2 * MARGIN
    size = " × ".join(map(str, (*config.image_size, config.in_channels)))
    rows = [label(MARGIN, 0, "module", "output of one image", "parameters")]
    rows.append(label(MARGIN, 1, "images", size))
    top = 2
    for box in inside:
        rows += draw(box, top, 0)
        top += box.lines
    rows.append(label(MARGIN, top, variant, shown(tree), f"{tree.count():,}"))
    body = "\n".join(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="ui-monospace, monospace" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>\n{body}\n</svg>\n'
    )


def draw(box: Box, top: float, level: int) -> list[str]:
    """A box, and the boxes in it."""
    x, y = MARGIN + level * INDENT, MARGIN + top * LINE + 2
    shade = ("#eef3fb", "#dfe9f7", "#f6f9fd", "#fff")[level % 4]
    width, height = WIDTH - MARGIN - 3 * level - x, box.lines * LINE - 4
    rows = [
        f'<rect x="{x}" y="{y:.0f}" width="{width}" height="{height}" rx="3" fill="{shade}" '
        f'stroke="#9db4d3"/>'
    ]
    rows.append(label(x + 6, top, box.name, shown(box.tree), f"{box.tree.count():,}"))
    for inner in box.inside:
        top_inner = top + 1 + sum(b.lines for b in box.inside[: box.inside.index(inner)])
        rows += draw(inner, top_inner, level + 1)
    return rows


def shown(tree: ParamTree) -> str:
    """What a module gives for one image; nothing for a list of modules."""
    return " × ".join(map(str, tree.output or ()))


def label(x: float, top: float, name: str, output: str, counted: str = "") -> str:
    """A line of text: name, shape of the output, parameters."""
    y, right = MARGIN + top * LINE + 16, WIDTH - MARGIN - 18
    return (
        f'<text x="{x}" y="{y:.0f}" fill="#1b2a41">{escape(name)}</text>'
        f'<text x="410" y="{y:.0f}" text-anchor="end" fill="#35507a">{escape(output)}</text>'
        f'<text x="{right}" y="{y:.0f}" text-anchor="end" fill="#5d6f8c">{counted}</text>'
    )


if __name__ == "__main__":
    main()
