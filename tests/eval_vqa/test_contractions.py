"""The contraction tables are data: counted, and checked for the apostrophes by which they differ."""

from eval_vqa.contractions import VIZWIZ_CONTRACTIONS, VQAV2_CONTRACTIONS

CURLY = "\u2019"


def test_each_table_has_the_official_120_entries():
    assert (len(VQAV2_CONTRACTIONS), len(VIZWIZ_CONTRACTIONS)) == (120, 120)


def test_vqav2_is_ascii_throughout():
    assert all((key + value).isascii() for key, value in VQAV2_CONTRACTIONS.items())


def test_vizwiz_is_the_vqav2_table_with_curly_apostrophes_but_for_eight_values_and_two_keys():
    ascii_values = {"aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"}
    ascii_keys = {"couldn'tve", "hadn'tve"}
    expected = {}
    for key, value in VQAV2_CONTRACTIONS.items():
        curly_value = value if key in ascii_values else value.replace("'", CURLY)
        expected[key if key in ascii_keys else key.replace("'", CURLY)] = curly_value
    assert expected == VIZWIZ_CONTRACTIONS


def test_no_other_kind_of_quotation_mark_slipped_in():
    characters = {c for table in (VQAV2_CONTRACTIONS, VIZWIZ_CONTRACTIONS) for pair in table.items() for word in pair for c in word}
    assert {c for c in characters if not c.isalpha()} == {"'", CURLY}


def test_the_official_misprints_are_kept():
    assert VQAV2_CONTRACTIONS["somebody'd"] == VIZWIZ_CONTRACTIONS[f"somebody{CURLY}d"] == "somebodyd"
