"""Draw call-path.svg, the picture in architecture.md: `python docs/call_path.py`.

The picture is 360 units wide, a phone's width, with text of 14 units and more. It has its
own background, so that it can be read on a page of either colour scheme.
"""

from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).with_name("call-path.svg")
STEPS = [
    ("your program", "service.complete(messages, model)", ""),
    ("service", "check · compose · place", "_check_call _compose _place"),
    ("service", "find the key · load media", "_find_key _prepare_media"),
    ("cache, if there is one", "an earlier answer ends the call here", "answer"),
    ("service: the retry loop", "attempts and waits, up to the deadline", "_retry"),
    ("adapter, in a provider's file", "the request, for this model", "prepare"),
    ("LiteLLM", "translates it; holds a placeholder key", "_translate"),
    ("client: the fence", "checks the address, adds the key, sends", "send"),
    ("the provider", "status, headers, body", ""),
    (
        "adapter, in a provider's file",
        "checks and reads; makes the result",
        "_make_result",
    ),
    ("service", "parses structured output", "_finish"),
    ("one record of the call", "log · usage · telemetry · on_call", ""),
]
"""Who does it; what is done; the methods, which architecture.md's table names."""
FOREIGN = {"your program", "LiteLLM", "the provider"}
LOOP = (4, 9)
"""The first and last of the steps that an attempt repeats."""
STYLE = """
  .page { fill: #ffffff } .box { fill: #eef3fb; stroke: #2457a6 }
  .foreign { fill: #f4f4f4; stroke: #767676 } .line { stroke: #4a4a4a; fill: none }
  .head { fill: #4a4a4a } text { fill: #1a1a1a; font-family: system-ui, sans-serif }
  .who { font-size: 15px; font-weight: 600 } .what { font-size: 14px }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16191d } .box { fill: #1d2a3f; stroke: #7fa8ea }
    .foreign { fill: #26292e; stroke: #9a9a9a } .line { stroke: #c0c0c0 }
    .head { fill: #c0c0c0 } text { fill: #f0f0f0 }
  }"""
BOX, GAP, LEFT, WIDTH = 50, 20, 12, 306


def draw() -> str:
    """Return the picture."""
    tops = [12 + i * (BOX + GAP) for i in range(len(STEPS))]
    height = tops[-1] + BOX + 12
    parts = []
    for (who, what, _), top in zip(STEPS, tops, strict=True):
        kind = "foreign" if who in FOREIGN else "box"
        parts += [
            f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{WIDTH}" height="{BOX}" rx="6"/>',
            f'<text class="who" x="{LEFT + 12}" y="{top + 20}">{escape(who)}</text>',
            f'<text class="what" x="{LEFT + 12}" y="{top + 40}">{escape(what)}</text>',
        ]
    middle = LEFT + WIDTH // 2
    parts += [
        arrow(f"M{middle} {top + BOX} V{top + BOX + GAP - 3}") for top in tops[:-1]
    ]
    first, last = (tops[i] + BOX // 2 for i in LOOP)
    right = LEFT + WIDTH
    parts.append(arrow(f"M{right} {last} H{right + 16} V{first} H{right + 3}"))
    y = (first + last) // 2
    parts.append(
        f'<text class="what" text-anchor="middle" transform="translate({right + 33} {y})'
        ' rotate(-90)">a failure that is worth another attempt</text>'
    )
    body = "\n".join(parts)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 {height}" width="480" role="img">
<title>The path of a call</title>
<style>{STYLE}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path class="head" d="M0 0 L8 4 L0 8 Z"/></marker></defs>
<rect class="page" width="360" height="{height}" rx="8"/>
{body}
</svg>
"""


def arrow(path: str) -> str:
    """Return a line with a tip at its end."""
    return f'<path class="line" d="{path}" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    TARGET.write_text(draw(), "utf-8")
