"""The page of a model's pieces."""

import re

from trl_ext.concept.visualization import colour, page_of


class Cut:
    """A model that cuts before every comma."""

    def segments(self, text):
        *pieces, tail = text.split(",")
        return [*((piece, [len(piece), 7]) for piece in pieces), (tail, [])]


def test_every_piece_has_its_concepts_colour_and_a_tail_none():
    page = page_of(Cut(), ["a<b,abc,xyz,rest", "abc,"], "<what> it cuts")
    pieces = re.findall(r"<span class='piece' style='background:(.*?)'>(.*?)<sub>(.*?)</sub></span>", page)
    same, other = colour([3, 7]), colour([7, 3])
    assert pieces == [(same, "a&lt;b", "3 7"), (same, "abc", "3 7"), (same, "xyz", "3 7"), (same, "abc", "3 7")]
    assert re.findall(r"<span class='tail'>(.*?)</span>", page) == ["rest", ""]
    assert re.fullmatch(r"hsl\(\d+ 70% 86%\)", same) and same != other and "<what>" not in page


def test_neighbouring_concepts_have_colours_far_apart():
    """Of 360 degrees, 137 from each to the next."""
    assert [colour([code]) for code in range(3)] == [f"hsl({hue} 70% 86%)" for hue in (0, 137, 274)]
    assert colour([1, 2]) == f"hsl({(1009 + 2) * 137 % 360} 70% 86%)"
