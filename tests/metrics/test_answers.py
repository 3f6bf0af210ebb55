"""The official answer normalisation, quirks included."""

import pytest

from routingvl.metrics.answers import (
    CONTRACTIONS,
    PUNCTUATION,
    normalize_answer,
    process_digit_article,
    process_punctuation,
)


def test_table_sizes():
    assert len(CONTRACTIONS) == 120
    assert len(set(PUNCTUATION)) == 21
    assert not set(PUNCTUATION) & set(":'.$%&#*")
    assert sum(key != key.lower() for key in CONTRACTIONS) == 4


@pytest.mark.parametrize(
    ("raw", "normalised"),
    [
        ("Yes.", "yes"),
        ("a dog", "dog"),
        ("1,000", "1000"),
        ("red/white", "red white"),
        ("red, white", "red white"),
        ("dont know", "don't know"),
        ("2.5 ft.", "2.5 ft"),
        ("U.S.A.", "usa"),
        ("t-shirt", "t shirt"),
        ("12:30", "12:30"),
        ("none", "0"),
        ("the", ""),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the table's key has a capital, so it never matches
    ],
)
def test_worked_examples(raw, normalised):
    assert normalize_answer(raw) == normalised


def test_symbol_is_deleted_everywhere_when_it_touches_a_space_somewhere():
    assert process_punctuation("a-b") == "a b"
    assert process_punctuation("a-b -c") == "ab c"


def test_digit_comma_digit_deletes_every_symbol():
    assert process_punctuation("1,000-2") == "10002"


def test_only_32_periods_go():
    assert process_punctuation("." * 40) == "." * 8
    assert process_punctuation("3.5.") == "3.5"


def test_order_is_digits_articles_contractions():
    assert process_digit_article("  The Ten  cats dont ") == "10 cats don't"
