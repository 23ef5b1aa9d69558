"""Prompts word for word, and what happens to generated text: a change of either changes scores and must be seen here first."""

import pytest

from eval_vqa.postprocessing import POSTPROCESSING, without_thinking
from eval_vqa.predictions_file import RESULT_KEYS
from eval_vqa.prompts import PROMPTS, prompt_sha256, render_prompt
from eval_vqa.tasks import TASKS

SNAPSHOT = {
    "vqav2": "{question}\nAnswer the question using a single word or phrase.",
    "gqa": "{question}\nAnswer the question using a single word or phrase.",
    "vizwiz": "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    "textvqa": "{question}\nAnswer the question using a single word or phrase.",
    "docvqa": "{question}\nAnswer the question using a single word or phrase.",
    "chartqa": "{question}\nAnswer the question using a single word or phrase.",
    "exact_match": "{question}\nAnswer the question using a single word or phrase.",
}


def test_prompts_are_the_pinned_ones():
    assert PROMPTS == SNAPSHOT
    assert {task: prompt_sha256(template)[:16] for task, template in PROMPTS.items()} == {
        "vqav2": "40f71b4847119aeb", "gqa": "40f71b4847119aeb", "vizwiz": "c6bc4e4119c92315", "textvqa": "40f71b4847119aeb",
        "docvqa": "40f71b4847119aeb", "chartqa": "40f71b4847119aeb", "exact_match": "40f71b4847119aeb",
    }  # fmt: skip


def test_every_task_has_a_prompt_and_a_rule_for_its_answers():
    assert PROMPTS.keys() == POSTPROCESSING.keys() == RESULT_KEYS.keys() == TASKS.keys()


def test_braces_in_a_question_stay_as_they_are():
    assert render_prompt("{question}\nShort.", "what is {0} {question}?") == "what is {0} {question}?\nShort."


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("vqav2", " Yes.\n", "yes"), ("vqav2", "T-Shirt", "t-shirt"), ("vqav2", "the cat .", "the cat"), ("gqa", " Left. ", "left"),
        ("vizwiz", " Unanswerable.\n", "Unanswerable."), ("vqav2", "", ""), ("docvqa", " No. 5. ", "No. 5"), ("textvqa", "A.", "A."),
    ],
)  # fmt: skip
def test_generated_text_becomes_an_answer(task, text, answer):
    postprocess, description = POSTPROCESSING[task]
    assert postprocess(text) == answer
    assert description


def test_thoughts_are_no_part_of_an_answer():
    assert without_thinking("<think>It is red. No.</think>\nBlue") == "Blue"
    assert without_thinking("plain < text") == "plain < text"
