"""Text in and out: prompt files, chat templates, and pieces of text that are never taken back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import OfframpError, UsageError
from offramp.text import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    Detokenizer,
    Prompt,
    check_stops,
    encode,
    read_prompts,
)

LAW = settings(max_examples=150, deadline=None)


class Decoder(Protocol):
    """What a detokeniser needs of a tokenizer."""

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """Return the text of these tokens."""


class Bytes:
    """A byte-level tokenizer without merges: every token is one byte."""

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """Return the text; broken bytes become U+FFFD."""
        assert (skip_special_tokens, clean_up_tokenization_spaces) == (True, False)
        return bytes(ids).decode("utf-8", "replace")


class Pieces:
    """A tokenizer of given pieces; those in angle brackets are special."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """Return the ordinary pieces, joined."""
        assert (skip_special_tokens, clean_up_tokenization_spaces) == (True, False)
        return "".join(self.pieces[i] for i in ids if not self.pieces[i].startswith("<"))


class Sentences(Pieces):
    """Like SentencePiece (Llama 2, Mistral): words bring their space, a text's first loses it."""

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """Return the ordinary pieces, joined, without a first space."""
        text = super().decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        return text.removeprefix(" ")


class Chat:
    """A tokenizer of characters, perhaps with a chat template."""

    def __init__(self, *, template: bool) -> None:
        self.chat_template = "{{ messages }}" if template else None

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the characters' code points, after a token that begins a text."""
        return {"input_ids": [0, *map(ord, text)]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool
    ) -> dict[str, list[int]]:
        """Return the messages behind their roles, and the role that answers."""
        assert self.chat_template is not None
        said = "".join(f"[{message['role']}]{message['content']}" for message in messages)
        return {"input_ids": list(map(ord, said + "[assistant]" * add_generation_prompt))}


def whole(tokenizer: Decoder, ids: Sequence[int]) -> str:
    """The text of all tokens, decoded at once."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def released(
    tokenizer: Decoder, ids: Sequence[int], sizes: Sequence[int] = (), stops: Sequence[str] = ()
) -> list[str]:
    """What is shown when tokens come in chunks of these sizes, then singly; the last is final."""
    detokenizer, shown, end = Detokenizer(tokenizer, stops), [], 0
    for size in [*sizes, *[1] * len(ids)]:
        end = min(end + size, len(ids))
        detokenizer(list(ids[:end]))
        shown.append(detokenizer.release())
    return [*shown, detokenizer.release(final=True)]


# -- prompt files


def prompts_in(path: Path, content: str | bytes, limit: int | None = None) -> list[Prompt]:
    """What is read from a file with this content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(path, limit)


MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "Hé\n€"}]


def test_a_text_file_holds_a_prompt_per_line(tmp_path: Path) -> None:
    """Lines end in any way, lose the space around them, and count only when something is left."""
    content = 'one\r\n\n  two 2 \n \t\n{"prompt": "é€😀"}\nlast'
    expected = ["one", "two 2", '{"prompt": "é€😀"}', "last"]
    assert expected == prompts_in(tmp_path / "prompts.txt", content)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hé\n€"}, "Hé\n€"),
        ({"prompt": "a", "id": 7, "instruction": "b"}, "a"),
        ({"instruction": "Add."}, "Add."),
        ({"instruction": "Add.", "input": ""}, "Add."),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2"),
        ({"messages": MESSAGES}, MESSAGES),
        ({"messages": MESSAGES, "prompt": "a"}, MESSAGES),
    ],
)
def test_a_json_line_holds_a_prompt_in_every_documented_form(
    tmp_path: Path, row: dict[str, Any], expected: Prompt
) -> None:
    """Prompts, instructions and messages are read, escaped or not, among other keys."""
    lines = [json.dumps(row), "", "  " + json.dumps(row, ensure_ascii=False)]
    assert [expected, expected] == prompts_in(tmp_path / "p.jsonl", "\r\n".join(lines))


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_limit_counts_prompts_and_reads_no_further(tmp_path: Path, limit: int) -> None:
    """The first prompts are returned; what comes after them may even be broken."""
    content = b"one\n\ntwo\nthree" + (b"\n\xff" if limit < 4 else b"")
    expected = ["one", "two", "three"][:limit]
    assert expected == prompts_in(tmp_path / "p.txt", content, limit)


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("p.txt", b"caf\xe9", "UTF-8"),
        ("p.jsonl", b'{"prompt": "caf\xe9"}', "UTF-8"),
        ("p.jsonl", b"{'prompt': 'a'}", "JSON"),
        ("p.jsonl", b'{"prompt": "a"', "JSON"),
        ("p.jsonl", b'{"prompt": "a"} {"prompt": "b"}', "JSON"),
        ("p.jsonl", b"[" * 100_000, "JSON"),
        ("p.jsonl", b"{}", "prompt"),
        ("p.jsonl", b'{"text": "a"}', "prompt"),
        ("p.jsonl", b'{"prompt": ""}', "prompt"),
        ("p.jsonl", b'{"prompt": null}', "prompt"),
        ("p.jsonl", b'{"prompt": ["a"]}', "prompt"),
        ("p.jsonl", b'{"input": "a"}', "instruction"),
        ("p.jsonl", b'{"instruction": "", "input": "a"}', "instruction"),
        ("p.jsonl", b'{"messages": []}', "messages"),
        ("p.jsonl", b'{"messages": "a"}', "messages"),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', "messages"),
        ("p.jsonl", b'{"messages": [{"role": "user", "content": [1]}]}', "messages"),
        ("p.jsonl", b'{"messages": [{"content": "a"}, "b"]}', "messages"),
        ("p.jsonl", b'["prompt"]', "prompt"),
        ("p.jsonl", b'"prompt"', "prompt"),
        ("p.jsonl", b"null", "prompt"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, name: str, line: bytes, complaint: str) -> None:
    """The message names the file, the line as an editor counts it, and what is wrong with it."""
    path = tmp_path / name
    with pytest.raises(OfframpError, match=re.escape(complaint)) as refusal:
        prompts_in(path, b'{"prompt": "a"}\n\n' + line + b"\n")
    assert f"{path}, line 3: " in str(refusal.value)


@pytest.mark.parametrize("content", ["", "\n", " \r\n\t\n"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    """A file without prompts is named."""
    with pytest.raises(OfframpError, match=re.escape(str(tmp_path / name))):
        prompts_in(tmp_path / name, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A missing file and a folder are named, with the reason."""
    for path, reason in [(tmp_path / "p.txt", "No such file"), (tmp_path, "directory")]:
        with pytest.raises(OfframpError, match=f"{re.escape(str(path))}: .*{reason}"):
            read_prompts(path)


# -- prompts to ids


def test_a_text_goes_through_the_chat_template() -> None:
    """A plain text is what the user says; the template leaves the answer open."""
    expected = list(map(ord, "[user]hello[assistant]"))
    assert expected == encode(Chat(template=True), "hello")


def test_messages_go_through_the_chat_template() -> None:
    """Messages keep their roles and order."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    expected = list(map(ord, "[system]Be brief.[user]hello[assistant]"))
    assert expected == encode(Chat(template=True), messages)


@pytest.mark.parametrize(("template", "raw"), [(True, True), (False, True), (False, False)])
def test_a_raw_text_is_only_tokenised(template: bool, raw: bool) -> None:
    """With --raw, or without a template, the text stands alone, as the tokenizer begins a text."""
    expected = [0, *map(ord, " hello\n")]
    assert expected == encode(Chat(template=template), " hello\n", raw=raw)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("prompt", ["", " \n\t", []])
def test_an_empty_prompt_is_refused(prompt: Prompt, template: bool, raw: bool) -> None:
    """Nothing to read is a wrong request, template or not."""
    with pytest.raises(UsageError, match="empty"):
        encode(Chat(template=template), prompt, raw=raw)


@pytest.mark.parametrize(("template", "raw"), [(True, True), (False, True), (False, False)])
def test_messages_without_a_template_are_refused(template: bool, raw: bool) -> None:
    """Messages cannot be read raw."""
    with pytest.raises(UsageError, match="template"):
        encode(Chat(template=template), MESSAGES, raw=raw)


# -- stop strings


@pytest.mark.parametrize(
    "stops", [[], ["a"], ["a"] * MAX_STOPS, ["a" * MAX_STOP_LENGTH], ["\n", " "]]
)
def test_stop_strings_within_bounds_are_watched_for(stops: list[str]) -> None:
    """The bounds themselves are allowed."""
    check_stops(stops)
    assert stops == Detokenizer(Bytes(), stops).stops


@pytest.mark.parametrize(
    "stops", [[""], ["a", ""], ["a"] * (MAX_STOPS + 1), ["a" * (MAX_STOP_LENGTH + 1)]]
)
@pytest.mark.parametrize("refuse", [check_stops, lambda stops: Detokenizer(Bytes(), stops)])
def test_stop_strings_out_of_bounds_are_refused(
    refuse: Callable[[list[str]], object], stops: list[str]
) -> None:
    """Empty, too many and too long ones are refused, and the message holds the bounds."""
    with pytest.raises(UsageError, match=f"{MAX_STOPS} .* {MAX_STOP_LENGTH} "):
        refuse(stops)


# -- ids to text

chunks = st.lists(st.integers(1, 5), max_size=10)
letters = st.text("aé€😀 \n", max_size=12)
encoded = letters.map(lambda text: list(text.encode()))


@LAW
@given(st.lists(st.integers(0, 255), max_size=20) | encoded, chunks)
def test_pieces_join_to_the_text(ids: list[int], sizes: list[int]) -> None:
    """However tokens come, and however broken, what was shown is the whole text decoded at once."""
    assert whole(Bytes(), ids) == "".join(released(Bytes(), ids, sizes))


@LAW
@given(st.lists(st.integers(0, 5), max_size=12), chunks)
def test_pieces_of_special_tokens_join_to_the_text(ids: list[int], sizes: list[int]) -> None:
    """Special tokens, too, are shown as the whole text has them: not at all."""
    tokenizer = Pieces("a", " b", "<s>", "", "</s>", "\n")
    assert whole(tokenizer, ids) == "".join(released(tokenizer, ids, sizes))


@LAW
@given(st.lists(st.integers(0, 2), max_size=12), chunks)
def test_words_keep_their_spaces(ids: list[int], sizes: list[int]) -> None:
    """Only the text's first word loses its space, not the first one of each piece."""
    tokenizer = Sentences(" a", "b", " ")
    assert whole(tokenizer, ids) == "".join(released(tokenizer, ids, sizes))


@LAW
@given(st.lists(st.integers(0, 2), max_size=12), chunks)
def test_words_keep_their_spaces_after_special_tokens(ids: list[int], sizes: list[int]) -> None:
    """A token without text does not make the next word the first one."""
    tokenizer = Sentences(" a", "b", "<tool>")
    assert whole(tokenizer, ids) == "".join(released(tokenizer, ids, sizes))


@LAW
@given(letters)
def test_a_character_is_shown_when_its_last_byte_came(text: str) -> None:
    """Not earlier, as U+FFFD, nor later: nothing waits without need."""
    expected = [part for c in text for part in [*[""] * (len(c.encode()) - 1), c]]
    assert [*expected, ""] == released(Bytes(), list(text.encode()))


@LAW
@given(letters, st.sampled_from("é€😀"), st.data())
def test_a_character_cut_off_is_shown_broken_at_the_end_only(
    text: str, last: str, data: st.DataObject
) -> None:
    """U+FFFD stands for bytes that never became a character, once it is certain that none comes."""
    broken = last.encode()[: data.draw(st.integers(1, len(last.encode()) - 1))]
    *shown, final = released(Bytes(), [*text.encode(), *broken])
    assert (text, "\ufffd") == ("".join(shown), final)


def expected_pieces(parts: Sequence[str], stops: Sequence[str]) -> list[str]:
    """What is shown after each part: all but an end that may begin a stop string."""
    text, shown = "", [""]
    for part in parts:
        text += part
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return [*shown, text[: min(found)]]
        ends = [size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])]
        shown.append(text[: len(text) - max(ends, default=0)])
    return [*shown, text]


@LAW
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=10),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_nothing_of_a_stop_string_is_ever_shown(parts: list[str], stops: list[str]) -> None:
    """Text ends before the first stop string; what may begin one waits, and nothing else does."""
    expected = expected_pieces(parts, stops)
    pieces = released(Pieces(*parts), range(len(parts)), stops=stops)
    shown = ["".join(pieces[:count]) for count in range(len(pieces) + 1)]
    assert expected == [*shown[: len(expected) - 1], shown[-1]]
    assert not any(stop in text for stop in stops for text in shown)


@LAW
@given(letters, st.lists(st.text("aé€😀", min_size=1, max_size=2), min_size=1, max_size=3), chunks)
def test_a_stop_string_is_found_in_any_tokens(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    """Split inside characters and chunked at will, the text ends where the first one begins."""
    pieces = released(Bytes(), list(text.encode()), sizes, stops)
    assert expected_pieces(list(text), stops)[-1] == "".join(pieces)


@LAW
@given(st.text("ab", max_size=8), st.text("ab", min_size=1, max_size=3), st.text("ab", max_size=8))
def test_a_text_that_stopped_stays_as_it_is(before: str, stop: str, after: str) -> None:
    """A detokeniser says at which token a stop string is complete, and takes no more text."""
    text = before + stop + after
    ids, detokenizer = list(text.encode()), Detokenizer(Bytes(), [stop])
    stopped = [detokenizer(ids[: count + 1]) for count in range(len(ids))]
    at = text.index(stop)
    assert [count >= at + len(stop) for count in range(1, len(ids) + 1)] == stopped
    assert text[:at] == detokenizer.release()
    assert ("", text[:at], True) == (
        detokenizer.release(final=True),
        detokenizer.text,
        detokenizer.stopped,
    )


def test_without_a_final_release_an_incomplete_character_waits() -> None:
    """Asking again changes nothing, and being told of the same tokens again neither."""
    detokenizer, ids = Detokenizer(Bytes()), list("a€".encode())
    told = [detokenizer(ids[:3]), detokenizer(ids[:3])]
    shown = [detokenizer.release(), detokenizer.release()]
    told.append(detokenizer(ids))
    shown += [detokenizer.release(), detokenizer.release(final=True)]
    assert (told, shown) == ([False] * 3, ["a", "", "€", ""])
