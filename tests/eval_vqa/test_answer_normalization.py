"""The normaliser's quirks, one by one: each of them decides published scores."""

import pytest

from eval_vqa import vizwiz, vqav2
from eval_vqa.answer_normalization import PUNCTUATION, clean, digits_and_articles, strip_punctuation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt  red"),  # one hyphen beside a space deletes every hyphen
        ("1,000-2,000", "10002000"),  # digit-comma-digit deletes every mark
        ("it's 1,000/day", "it's 1000day"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("(yes)", " yes "),  # the ends of the text are no spaces
        ("1,,000", "1  000"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("a.5", "a.5"),
        ("3.", "3"),
        ("5 . 5", "5  5"),
        ("u.s.a.", "usa"),
        ("1.2.3", "1.2.3"),
        ("..5", ".5"),
        ("it's 5:30 & $3 ~ \u201cok\u201d", "it's 5:30 & $3 ~ \u201cok\u201d"),  # not in the list: these stay
        ("\uff11,\uff10", "\uff11 \uff10"),  # full-width digits are no digits
        ("3.\u0664", "3\u0664"),
    ],
)
def test_punctuation(text, expected):
    assert strip_punctuation(text) == expected


def test_the_list_has_21_marks():
    assert len(PUNCTUATION) == len(set(PUNCTUATION)) == 21


def test_only_the_first_32_periods_go():
    assert strip_punctuation("." * 40) == "." * 8
    assert strip_punctuation("a" + "." * 32) == "a"


def test_a_period_before_a_digit_does_not_count_against_the_32():
    assert strip_punctuation("1.5" + "." * 33) == "1.5."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("None", "0"),
        ("the", ""),
        ("the-cat", "cat"),
        ("a's", "a's"),
        ("Ten elevens", "10 elevens"),
        ("dont.", "don't"),
        ("dont-know", "don't know"),
        ("Im Ive", "im ive"),  # keys with capitals never match
        ("somebody'd", "somebodyd"),
        ("let's", "let's"),
        ("its ill hell", "its ill hell"),
        ("two\u00a0dogs\rone", "2 dogs 1"),
        ("  A\tcat\n", "cat"),
        ("one's", "one's"),
    ],
)
def test_all_three_steps(text, expected):
    assert vqav2.normalize_answer(text) == expected


@pytest.mark.parametrize(("word", "digit"), zip(
    ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twenty", "ones"],
    ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "eleven", "twenty", "ones"], strict=True))  # fmt: skip
def test_number_words_up_to_ten_and_whole_words_only(word, digit):
    assert vqav2.normalize_answer(word) == digit


@pytest.mark.parametrize("mark", list(PUNCTUATION))
def test_each_mark_becomes_a_space_alone_and_nothing_beside_a_space_or_with_thousands(mark):
    assert strip_punctuation(f"a{mark}b") == "a b"
    assert strip_punctuation(f"a{mark} b") == "a b"
    assert strip_punctuation(f"a {mark}b{mark}c") == "a bc"
    assert strip_punctuation(f"a{mark}b 1,0") == "ab 10"


@pytest.mark.parametrize("mark", ["'", ":", "$", "%", "&", "*", "#", "~", "^", "|", "\u2019", "\u201c", "\u2013", "\u2026", "\u00d7"])
def test_marks_that_are_not_in_the_list_stay(mark):
    assert strip_punctuation(f"a{mark} b{mark}c") == f"a{mark} b{mark}c"


def test_only_the_plain_space_counts_as_a_neighbour():
    assert strip_punctuation("a-\u00a0b") == "a \u00a0b"
    assert strip_punctuation("a-\rb") == "a \rb"


def test_the_decision_looks_at_the_text_as_it_came_in():
    """ "; " is deleted first, but whether "-" touches a space is judged before that."""
    assert strip_punctuation("a;-b") == "a  b"
    assert strip_punctuation("a; -b") == "a b"


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "the", "a an the", "...", "?"])
def test_what_is_nothing_but_noise_becomes_the_empty_answer(text):
    assert vqav2.normalize_answer(text) == ""


def test_lower_case_is_todays_python():
    assert vqav2.normalize_answer("\u0130") == "i\u0307"
    assert vqav2.normalize_answer("\u03a3\u03a3") == "\u03c3\u03c2"


def test_articles_go_before_contractions_are_looked_up():
    assert digits_and_articles("the dont an", {"dont": "the"}) == "the"


def test_clean_leaves_carriage_returns_inside():
    assert clean("\ta\nb\rc\u00a0\n") == "a b\rc"


def test_vizwiz_repairs_with_curly_apostrophes():
    assert vizwiz.normalize_answer("dont") == "don\u2019t"
    assert vizwiz.normalize_answer("cant") == "can't"


@pytest.mark.parametrize("answer", [None, 3, ["yes"], True])
def test_an_answer_that_is_no_string_is_refused(answer):
    with pytest.raises(ValueError, match="must be a string"):
        vqav2.normalize_answer(answer)
