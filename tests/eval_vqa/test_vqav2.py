"""VQAv2's accuracy against hand-made cases and a slow double loop."""

import copy
import random

import pytest

from eval_vqa import vqav2

PROMISED = {"accuracy", "perQuestionType", "perAnswerType", "evalQA", "evalQuesType", "evalAnsType"}


def question_file(ids=(), task_type="Open-Ended", **extra):
    asked = [{"question_id": key, "image_id": key, "question": "what?", **extra} for key in ids]
    return {"info": {}, "task_type": task_type, "data_type": "mscoco", "data_subtype": "val2014", "license": {}, "questions": asked}


def annotation(question_id, answers, question_type="what", answer_type="other", with_ids=True):
    entries = [
        {"answer": answer, "answer_confidence": "yes", **({"answer_id": place} if with_ids else {})}
        for place, answer in enumerate(answers, 1)
    ]
    return {
        "question_id": question_id, "image_id": 7, "question_type": question_type, "answer_type": answer_type, "answers": entries,
        "multiple_choice_answer": str(answers[0]) if answers else "",
    }  # fmt: skip


def score(answers, prediction, **options):
    """Percent for one question."""
    with_ids = options.pop("with_ids", True)
    rows = {"annotations": [annotation(1, answers, with_ids=with_ids)]}
    return vqav2.evaluate(question_file([1]), rows, [{"question_id": 1, "answer": prediction}], **options)["accuracy"]


@pytest.mark.parametrize(("matches", "percent"), [(0, 0.0), (1, 30.0), (2, 60.0), (3, 90.0), (4, 100.0), (9, 100.0)])
def test_ten_answers(matches, percent):
    assert score(["cat"] * matches + ["dog"] * (10 - matches), "cat") == percent


@pytest.mark.parametrize(("prediction", "percent"), [("yes", 100.0), ("yes\n", 100.0), ("Yes", 0.0), ("yes.", 0.0), ("the yes", 0.0)])
def test_unanimous_answers_are_compared_letter_by_letter(prediction, percent):
    assert score(["yes"] * 10, prediction) == percent


@pytest.mark.parametrize("prediction", ["Yes", "yes.", "the yes"])
def test_one_other_answer_switches_normalisation_on(prediction):
    assert score(["yes"] * 9 + ["no"], prediction) == 100.0


def test_unanimity_is_judged_after_cleaning_only():
    assert score(["yes"] * 9 + ["yes\n"], "Yes") == 0.0
    assert score(["yes"] * 9 + ["Yes"], "YES") == 100.0


def test_2017_always_normalises_the_prediction_and_never_the_case_of_answers():
    assert score(["yes"] * 10, "Yes.", version="2017") == 100.0
    assert score(["Yes"] * 9 + ["no"], "yes", version="2017") == 0.0
    assert score(["t-shirt"] * 9 + ["no"], "t-shirt", version="2017") == 100.0
    assert score(["t-shirt"] * 10, "t-shirt", version="2017") == 0.0


def test_2017_normalises_digits_and_articles_of_the_prediction_only():
    assert score(["two"] * 9 + ["3"], "two", version="2017") == 0.0
    assert score(["two"] * 9 + ["3"], "two") == 100.0
    assert score(["the cat"] * 9 + ["dog"], "the cat", version="2017") == 0.0
    assert score(["2"] * 10, "Two", version="2017") == 100.0
    assert score(["2"] * 10, "Two") == 0.0


def test_2017_does_not_clean_the_answers():
    assert score(["yes\n"] * 9 + ["no"], "yes", version="2017") == 0.0
    assert score(["yes\n"] * 9 + ["no"], "yes") == 100.0
    assert score(["cat"] * 9 + ["cat "], "cat", version="2017") == 100.0  # nine others say "cat", one "cat "


def test_more_than_32_periods_and_thousands_in_both_sides():
    dotted = "a" + "." * 40
    assert score([dotted] * 9 + ["b"], dotted) == 100.0
    assert score(["a" + "." * 8] * 9 + ["b"], dotted) == 0.0  # of forty periods eight stay, of eight none
    assert score(["1,000-2,000"] * 9 + ["b"], "10002000") == 100.0


def test_curly_apostrophes_are_no_apostrophes():
    assert score(["don\u2019t"] * 9 + ["no"], "don't") == 0.0
    assert score(["dont"] * 9 + ["no"], "don't") == 100.0


def test_halves_round_to_even_as_in_todays_python():
    """1/32 is 3.125 %: the Python 2 program wrote 3.13."""
    rows = {"annotations": [annotation(key, ["cat"] * 10) for key in range(32)]}
    results = [{"question_id": key, "answer": "cat" if key == 0 else "dog"} for key in range(32)]
    assert vqav2.evaluate(question_file(range(32)), rows, results)["accuracy"] == 3.12


def test_ids_compare_by_equality():
    """1.0 == 1 and has its hash, so JSON that writes ids as floats is fine; "1" is another id."""
    rows = {"annotations": [annotation(1, ["cat"] * 10)]}
    assert vqav2.evaluate(question_file([1]), rows, [{"question_id": 1.0, "answer": "cat"}])["evalQA"] == {1: 100.0}


@pytest.mark.parametrize("key", ["info", "task_type", "data_type", "data_subtype", "license", "questions"])
def test_the_loader_reads_every_head_of_the_question_file(key):
    questions, annotations, results = base()
    del questions[key]
    with pytest.raises(ValueError, match=f"no '{key}'"):
        vqav2.evaluate(questions, annotations, results)


def test_repeats_in_the_subset_count_again_and_keep_one_line():
    rows = {"annotations": [annotation(1, ["cat"] * 10), annotation(2, ["dog"] * 10)]}
    results = [{"question_id": key, "answer": "cat"} for key in (1, 2)]
    scores = vqav2.evaluate(question_file([1, 2]), rows, results, question_ids=[1, 1, 2])
    assert (scores["accuracy"], scores["evalQA"]) == (66.67, {1: 100.0, 2: 0.0})


def test_equal_entries_leave_together():
    assert score(["cat"] * 10, "cat", with_ids=False) == 0.0
    assert score(["Cat"] * 5 + ["cat"] * 5, "cat", with_ids=False) == 0.0  # equal after normalisation is equal
    assert score(["Cat"] * 5 + ["cat"] * 5, "cat") == 100.0


@pytest.mark.parametrize(("count", "matches", "expected"), [(1, 1, 0.0), (2, 2, 33.33), (3, 1, 22.22), (20, 1, 31.67)])
def test_another_number_of_answers(count, matches, expected):
    assert score(["cat"] * matches + ["dog"] * (count - matches), "cat") == expected


def test_tables_are_means_of_unrounded_accuracies():
    rows = [
        annotation(1, ["a1"] * 1 + ["x"] * 2, "what", "other"), annotation(2, ["a1"] * 1 + ["x"] * 2, "what", "number"),
        annotation(3, ["a1"] * 10, "is", "number"),
    ]  # fmt: skip
    results = [{"question_id": key, "answer": "a1"} for key in (1, 2, 3)]
    scores = vqav2.evaluate(question_file([1, 2, 3]), {"annotations": rows}, results)
    assert scores == {
        "accuracy": 48.15, "perQuestionType": {"what": 22.22, "is": 100.0}, "perAnswerType": {"other": 22.22, "number": 61.11},
        "evalQA": {1: 22.22, 2: 22.22, 3: 100.0}, "evalQuesType": {"what": {1: 22.22, 2: 22.22}, "is": {3: 100.0}},
        "evalAnsType": {"other": {1: 22.22}, "number": {2: 22.22, 3: 100.0}},
    }  # fmt: skip
    assert set(scores) == PROMISED


def test_decimals():
    assert score(["cat"] + ["x"] * 2, "cat", decimals=4) == 22.2222


def test_the_last_of_several_results_counts_even_if_an_earlier_one_is_broken():
    rows = {"annotations": [annotation(1, ["cat"] * 10)]}
    results = [{"question_id": 1, "answer": None}, {"question_id": 1, "answer": "cat"}]
    assert vqav2.evaluate(question_file([1]), rows, results)["accuracy"] == 100.0


def test_an_id_annotated_twice_counts_twice_with_the_last_annotation():
    rows = {"annotations": [annotation(1, ["dog"] * 10), annotation(2, ["dog"] * 10), annotation(1, ["cat"] * 10)]}
    results = [{"question_id": 1, "answer": "cat"}, {"question_id": 2, "answer": "cat"}]
    assert vqav2.evaluate(question_file([1, 2]), rows, results)["accuracy"] == 66.67


def test_a_question_that_comes_again_meets_answers_that_were_normalised_already():
    """Officially the answers are rewritten in place: the second time they are unanimous and the prediction is no longer normalised."""
    rows = {"annotations": [annotation(1, ["Yes"] * 5 + ["yes"] * 5)]}
    scores = vqav2.evaluate(question_file([1]), rows, [{"question_id": 1, "answer": "Yes"}], question_ids=[1, 1])
    assert (scores["accuracy"], scores["evalQA"]) == (50.0, {1: 0.0})


def test_a_subset_is_scored_in_the_given_order():
    rows = {"annotations": [annotation(key, ["cat"] * 10) for key in (1, 2, 3)]}
    results = [{"question_id": 1, "answer": "cat"}, {"question_id": 2, "answer": 5}, {"question_id": 3, "answer": "dog"}]
    scores = vqav2.evaluate(question_file([1, 2, 3]), rows, results, question_ids=[3, 1])  # 2 is broken, but not asked for
    assert list(scores["evalQA"].items()) == [(3, 0.0), (1, 100.0)]


def test_nothing_that_was_given_is_changed():
    rows = {"annotations": [annotation(1, ["The Cat\n"] * 5 + ["cat."] * 5)]}
    given = (question_file([1]), rows, [{"question_id": 1, "answer": " A cat "}])
    before = copy.deepcopy(given)
    vqav2.evaluate(*given, question_ids=[1, 1])
    assert given == before


def base():
    return question_file([1, 2]), {"annotations": [annotation(1, ["a"] * 10), annotation(2, ["a", "b"])]}, [
        {"question_id": 1, "answer": "a"}, {"question_id": 2, "answer": "b"}]  # fmt: skip


def drop(mapping, key):
    del mapping[key]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda q, a, r: r.pop(), r"annotated but not answered 1: 2"),
        (lambda q, a, r: r.append({"question_id": 9, "answer": "a"}), r"not annotated 1: 9"),
        (lambda q, a, r: r[0].update(question_id="1"), r"not answered 1: 1; answered but not annotated 1: '1'"),
        (lambda q, a, r: r[1].update(answer=4), r"question 2: an answer must be a string, found 4"),
        (lambda q, a, r: r[1].update(answer=None), r"question 2"),
        (lambda q, a, r: drop(r[1], "answer"), r"question 2: the result has no 'answer'"),
        (lambda q, a, r: drop(r[0], "question_id"), r"entry 0 of results has no 'question_id'"),
        (lambda q, a, r: r.append(3), r"entry 2 of results must be a JSON object"),
        (lambda q, a, r: r[0].update(question_id=[1]), r"entry 0 of results: question_id must be"),
        (lambda q, a, r: a["annotations"][1].update(answers=[]), r"question 2: expected a list of human answers"),
        (lambda q, a, r: a["annotations"][1]["answers"][0].update(answer=4), r"question 2: an answer must be a string"),
        (lambda q, a, r: drop(a["annotations"][1], "question_type"), r"question 2 has no 'question_type'"),
        (lambda q, a, r: drop(a["annotations"][0], "image_id"), r"no 'image_id'"),
        (lambda q, a, r: drop(a, "annotations"), r"no 'annotations'"),
        (lambda q, a, r: drop(q, "license"), r"no 'license'"),
        (lambda q, a, r: q.update(task_type="Multiple Choice"), r"question 1 has no 'multiple_choices'"),
        (lambda q, a, r: (a["annotations"].clear(), r.clear()), r"no question to score"),
    ],
)
def test_what_the_official_program_fails_on_is_an_error_that_names_it(damage, message):
    questions, annotations, results = base()
    damage(questions, annotations, results)
    with pytest.raises(ValueError, match=message):
        vqav2.evaluate(questions, annotations, results)


def test_results_must_be_a_list():
    questions, annotations, results = base()
    with pytest.raises(ValueError, match="results must be a JSON list"):
        vqav2.evaluate(questions, annotations, {"results": results})


@pytest.mark.parametrize("question_ids", [[1, 5], [[1]], ["1"]])
def test_an_unknown_id_in_the_subset_is_named(question_ids):
    with pytest.raises(ValueError, match="without annotation"):
        vqav2.evaluate(*base(), question_ids=question_ids)


def test_an_empty_subset_is_an_error():
    with pytest.raises(ValueError, match="no question to score"):
        vqav2.evaluate(*base(), question_ids=[])


def test_an_unknown_version_lists_the_known_ones():
    with pytest.raises(ValueError, match="2017, 2021"):
        vqav2.evaluate(*base(), version="2016")


def test_multiple_choice_answers_must_be_among_the_choices():
    questions = question_file([1, 2], "Multiple Choice", multiple_choices=["a", "b"])
    _, annotations, results = base()
    assert vqav2.evaluate(questions, annotations, results)["evalQA"][1] == 100.0
    results.insert(0, {"question_id": 1, "answer": "c"})  # even one that a later result replaces
    with pytest.raises(ValueError, match="question 1: the answer 'c' is none of its multiple_choices"):
        vqav2.evaluate(questions, annotations, results)


def slow_accuracy(entries, prediction):
    """The definition, word for word: leave one entry out, compare the prediction with all entries unlike it."""
    total = 0.0
    for left_out in entries:
        matches = 0
        for other in entries:
            if other != left_out and other["answer"] == prediction:
                matches += 1
        total += min(1.0, matches / 3)
    return total / len(entries)


def test_accuracy_equals_the_slow_double_loop():
    rng = random.Random(0)
    for _ in range(300):
        count = rng.choice((1, 2, 3, 7, 10, 13))
        entries = [{"answer": rng.choice("abc"), "answer_confidence": rng.choice(("yes", "no"))} for _ in range(count)]
        if rng.random() < 0.5:
            entries = [{**entry, "answer_id": place} for place, entry in enumerate(entries)]
        truth = {**annotation(1, []), "answers": entries}
        got = vqav2.evaluate(question_file([1]), {"annotations": [truth]}, [{"question_id": 1, "answer": "b"}], decimals=9)
        expected = [{**entry, "answer": vqav2.normalize_answer(entry["answer"])} for entry in entries]
        if len({entry["answer"] for entry in entries}) == 1:
            expected = entries
        assert got["accuracy"] == round(100 * slow_accuracy(expected, "b"), 9)
