"""Examples of every kind."""

from eval_vqa.spread import spread


def test_kinds_take_turns():
    items = [("a", number) for number in range(90)] + [("b", number) for number in range(3)] + [("c", 0)]
    chosen = spread(items, 9, lambda item: item[0])
    assert [sum(kind == name for kind, _ in chosen) for name in "abc"] == [5, 3, 1]
    assert len(set(chosen)) == 9


def test_few_items_are_all_taken_and_the_choice_is_repeatable():
    assert sorted(spread([3, 1, 2], 20, lambda item: None)) == [1, 2, 3]
    many = list(range(100))
    assert spread(many, 5, lambda item: item % 3) == spread(many, 5, lambda item: item % 3)
    assert spread([], 5, str) == []
