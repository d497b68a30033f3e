"""Reads the page of a conversation as a browser would, without one."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Self

VOID = frozenset({"meta"})


@dataclass
class Node:
    """An element: its attributes, its text with that of its children, its children."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    text: str = ""
    children: list[Self] = field(default_factory=list)

    def all(self, tag: str, kind: str | None = None) -> list[Self]:
        """Return the elements below, in order, with a tag and a class."""
        found = [
            child
            for child in self.children
            if child.tag == tag and kind in (None, child.attributes.get("class"))
        ]
        return found + [n for c in self.children for n in c.all(tag, kind)]

    def one(self, tag: str, kind: str | None = None) -> str:
        """Return the text of the only such element; nothing if there is none."""
        found = self.all(tag, kind)
        assert len(found) < 2
        return found[0].text if found else ""


class Page(HTMLParser):
    """A page, whose tags must all be closed in the order in which they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Node("")
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        node = Node(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Add an element of SVG that has no content."""
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close an element."""
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        """Add text to the elements that are open."""
        for node in self._open:
            node.text += data

    @property
    def turns(self) -> list[tuple[str, str, str]]:
        """Who, what was said, what went wrong."""
        return [
            (a.one("h3"), a.one("div", "said"), a.one("p", "failure"))
            for a in self.root.all("article")
        ]

    @property
    def totals(self) -> dict[str, str]:
        """The totals by name."""
        terms = self.root.all("dl")[0].children
        return {term.one("dt"): term.one("dd") for term in terms}

    @property
    def bars(self) -> list[Node]:
        """The drawings of the calls, in order."""
        return [n for n in self.root.all("svg") if n.attributes.get("role") == "img"]

    @property
    def nodes(self) -> list[Node]:
        """All elements of the page, in no order."""
        found, waiting = [], [*self.root.children]
        while waiting:
            node = waiting.pop()
            found.append(node)
            waiting += node.children
        return found

    @property
    def tags(self) -> set[str]:
        """All tags of the page."""
        return {node.tag for node in self.nodes}


def numbers_of(turn: Node) -> list[str]:
    """Return the exact values that a turn holds for programs."""
    return [data.attributes["value"] for data in turn.all("data")]


def kinds_of(bar: Node) -> list[str]:
    """Return the kinds of the parts of a bar, in order."""
    return [rect.attributes["class"] for rect in bar.all("rect")]
