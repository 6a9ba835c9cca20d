from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import example, given

from server.detokenizer import Detokenizer, StopMatcher

letters = st.text(alphabet="ab", max_size=20)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str], keep_match: bool = False) -> tuple[str, str | None]:
    """The slow and obvious way: try every end, and at each the longest stop string."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return (text[:end] if keep_match else text[: end - len(stop)]), stop
    return text, None


def could_become_a_stop(text: str, stops: list[str]) -> bool:
    return any(text == stop[: len(text)] and text != stop for stop in stops)


def push_all(matcher: StopMatcher, pieces: list[str]) -> str:
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.match is not None:
            return shown
    return shown + matcher.release()


@given(st.lists(letters), stop_lists, st.booleans())
@example(["xab", "c"], ["ab", "xabc"], False)
@example(["aab", "aa", "aab"], ["aaa", "abaab"], False)
def test_stop_matcher_cuts_where_the_naive_search_cuts(
    pieces: list[str], stops: list[str], keep_match: bool
) -> None:
    matcher = StopMatcher(stops, keep_match=keep_match)

    shown = push_all(matcher, pieces)

    assert (shown, matcher.match) == cut("".join(pieces), stops, keep_match)


@given(st.lists(letters), stop_lists)
def test_stop_matcher_holds_back_what_could_become_a_stop_and_no_more(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    seen = shown = ""
    for piece in pieces:
        seen += piece
        shown += matcher.push(piece)
        if matcher.match is not None:
            return
        longest = max((n for n in range(len(seen) + 1) if could_become_a_stop(seen[-n:], stops)
                       and n), default=0)  # fmt: skip

        assert shown == seen[: len(seen) - longest]


@given(st.lists(st.binary(max_size=6)))
def test_text_does_not_depend_on_how_bytes_were_cut(pieces: list[bytes]) -> None:
    detokenizer = Detokenizer()

    text = "".join(detokenizer.push(piece) for piece in pieces) + detokenizer.finish()

    assert text == b"".join(pieces).decode(errors="replace")
    assert detokenizer.num_characters == len(text)


@given(st.text(max_size=20), st.data())
def test_every_piece_is_whole_characters(text: str, data: st.DataObject) -> None:
    encoded = text.encode(errors="replace")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=8)))
    edges = [0, *cuts, len(encoded)]
    detokenizer = Detokenizer()

    shown = [detokenizer.push(encoded[a:b]) for a, b in pairwise(edges)]

    assert "".join(shown) == encoded.decode()
    assert detokenizer.finish() == ""


@given(
    st.text(alphabet="aé€", max_size=12),
    st.lists(st.text(alphabet="aé€", min_size=1, max_size=3), max_size=4),
    st.data(),
)
def test_stops_are_found_whatever_the_tokens(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    encoded = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=8)))
    edges = [0, *cuts, len(encoded)]
    detokenizer = Detokenizer(stops)

    shown = ""
    for a, b in pairwise(edges):
        shown += detokenizer.push(encoded[a:b])
        if detokenizer.stop is not None:
            break
    else:
        shown += detokenizer.finish()

    assert (shown, detokenizer.stop) == cut(text, stops)


def test_text_that_may_not_stop_passes_and_takes_no_part_in_a_match() -> None:
    detokenizer = Detokenizer(["ab"])

    shown = [detokenizer.push(b"ab", may_stop=False), detokenizer.push(b"a", may_stop=False),
             detokenizer.push(b"b"), detokenizer.push(b"ab")]  # fmt: skip

    assert shown == ["ab", "a", "b", ""]
    assert detokenizer.stop == "ab"


def test_half_a_character_at_the_end_shows_as_a_replacement() -> None:
    detokenizer = Detokenizer(["x\ufffd"])

    assert detokenizer.push(b"ax\xe2\x82") == "a"
    assert detokenizer.finish() == ""
    assert detokenizer.stop == "x\ufffd"
