"""An HTML page that shows texts split into the pieces that concepts stand for."""

import html

from unsloth_ext.concept.model import ConceptModel


STYLE = """
body { font: 16px/2.4 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #222; }
h1 { font-size: 1.3em; } p.text { border-top: 1px solid #ddd; padding-top: .6em; }
span.piece { padding: .15em .2em; margin-right: .15em; border-radius: .3em; white-space: pre-wrap; }
span.piece sub { font-size: .65em; color: #444; margin-left: .25em; }
span.tail { border-bottom: 2px dotted #999; white-space: pre-wrap; }
"""


def colour(codes: list[int]) -> str:
    """A colour that is the same for the same concept."""
    value = 0
    for code in codes:
        value = value * 1009 + code
    return f"hsl({value * 137 % 360} 70% 86%)"


def page_of(model: ConceptModel, texts: list[str], title: str) -> str:
    """Return an HTML page without scripts. Each piece has the colour of its concept and its codewords; a tail is dotted.

    If the model is sharded, all processes have to call it.
    """
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"]
    parts.append(
        f"<h1>{html.escape(title)}</h1><p>A piece ends where a token became a concept; its codewords are below it."
    )
    for text in texts:
        shown = []
        for piece, codes in model.segments(text):
            words = html.escape(piece)
            if codes:
                below = " ".join(map(str, codes))
                shown.append(f"<span class='piece' style='background:{colour(codes)}'>{words}<sub>{below}</sub></span>")
            else:
                shown.append(f"<span class='tail'>{words}</span>")
        parts.append(f"<p class='text'>{''.join(shown)}</p>")
    return "\n".join(parts) + "\n"
