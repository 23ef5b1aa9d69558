"""One question as a row of GQA: types, groups, functional program, full answer, object ids of its words, and choices."""

from train_vlm.scenes.forms import Ref, article, plural
from train_vlm.scenes.questions import Question
from train_vlm.scenes.scene import COLORS, NUMBERS, SHAPES, SIZES, WORDS, Scene

__all__ = ["describe"]

# form: structural type, semantic type, detailed type, global group (None: no distribution is taken over it)
TYPES = {
    "exist": ("verify", "obj", "exist", None),
    "is_color": ("verify", "attr", "verifyColor", None),
    "color": ("query", "attr", "color", "color"),
    "shape": ("query", "cat", "shape", "shape"),
    "size": ("choose", "attr", "chooseSize", None),
    "count": ("query", "obj", "count", "count"),
    "count_all": ("query", "global", "countAll", "count"),
    "left_right": ("choose", "rel", "chooseHorizontal", None),
    "above_below": ("choose", "rel", "chooseVertical", None),
    "larger": ("compare", "attr", "chooseLarger", None),
    "smaller": ("compare", "attr", "chooseSmaller", None),
    "is_larger": ("compare", "attr", "verifyLarger", None),
    "more": ("compare", "obj", "verifyMore", None),
    "same_color": ("compare", "attr", "sameColor", None),
    "number": ("query", "attr", "number", "number"),
    "word": ("query", "attr", "word", "word"),
    "and": ("logical", "obj", "existAnd", None),
    "or": ("logical", "obj", "existOr", None),
    "but_no": ("logical", "obj", "existAndNot", None),
    "region_shape": ("query", "cat", "shapeAt", "shape"),
    "region_color": ("query", "rel", "colorAt", "color"),
}
CHOICES = {
    "color": COLORS,
    "region_color": COLORS,
    "shape": SHAPES,
    "region_shape": SHAPES,
    "size": SIZES,
    "left_right": ("left", "right"),
    "above_below": ("above", "below"),
    "number": NUMBERS,
    "word": WORDS,
}


def describe(question: Question, scene: Scene, number: int) -> tuple[dict, dict]:
    """The row of a question file (without isBalanced, entailed, equivalent) and its row of the choices file.
    Object ids are those of `scene_graph`: the picture's number and two digits."""
    structural, semantic, detailed, group = TYPES[question.form]
    if question.form == "size" and question.text.startswith("What"):
        structural, detailed, group = "query", "size", "size"
    steps = _program(question, scene, number)
    full = _full_answer(question)
    about = "_".join(str(part).replace(" ", "_") for part in (question.a, question.b, question.c, question.p) if part is not None)
    row = {
        "question": question.text,
        "imageId": str(number),
        "answer": question.answer,
        "fullAnswer": full,
        "groups": {"global": group, "local": f"{question.form}-{about}"},
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
        "semantic": steps,
        "semanticStr": "->".join(f"{step['operation']}: {step['argument']} {step['dependencies']}" for step in steps),
        "annotations": {
            "question": _spans(question.text, question, scene, number),
            "answer": _spans(question.answer, question, scene, number),
            "fullAnswer": _spans(full, question, scene, number),
        },
    }
    if question.answer in ("yes", "no"):
        valid = plausible = ["yes", "no"]
    elif question.form in ("larger", "smaller"):
        valid, plausible = list(SHAPES), [str(question.a), str(question.b)]
    elif question.form.startswith("count"):
        valid, plausible = [str(n) for n in range(10)], [str(n) for n in range(7)]
    else:
        valid = plausible = list(CHOICES[question.form])
    return row, {"valid": valid, "plausible": plausible}


def _matches(ref: Ref, scene: Scene, number: int) -> list[str]:
    """Ids of what a description fits; numbers and words come after the objects."""
    if ref.shape in ("number", "word"):
        printed = [name for name, there in (("number", scene.number), ("word", scene.word)) if there]
        return [f"{number}{len(scene.objects) + printed.index(ref.shape):02d}"] if ref.shape in printed else []
    return [
        f"{number}{index:02d}"
        for index, thing in enumerate(scene.objects)
        if ref.shape in (None, thing.shape) and ref.color in (None, thing.color) and ref.size in (None, thing.size)
    ]


def _program(question: Question, scene: Scene, number: int) -> list[dict]:
    steps: list[dict] = []

    def add(operation: str, argument: str, *dependencies: int) -> int:
        steps.append({"operation": operation, "argument": argument, "dependencies": list(dependencies)})
        return len(steps) - 1

    def select(ref: Ref) -> int:
        ids = _matches(ref, scene, number)
        last = add("select", f"{ref.shape or 'object'} ({','.join(ids) or '-'})")
        for name, value in (("color", ref.color), ("size", ref.size)):
            if value:
                last = add(f"filter {name}", value, last)
        return last

    form, a, b = question.form, question.a, question.b
    if form == "exist":
        add("exist", "?", select(a))
    elif form == "is_color":
        add("verify color", question.c, select(a))
    elif form in ("color", "shape"):
        add("query", form, select(a))
    elif form == "size":
        chosen = select(a)
        add("query", "size", chosen) if question.text.startswith("What") else add("choose size", "small|large", chosen)
    elif form in ("count", "count_all"):
        add("count", "?", select(a or Ref()))
    elif form in ("left_right", "above_below"):
        first, second = select(a), select(b)
        add("choose rel", "to the left of|to the right of" if form == "left_right" else "above|below", first, second)
    elif form in ("larger", "smaller"):
        add(f"choose {form}", "?", *(select(ref) for ref in (a, b)))
    elif form == "is_larger":
        add("verify larger", "?", *(select(ref) for ref in (a, b)))
    elif form == "more":
        add("verify more", "?", *(add("count", "?", select(ref)) for ref in (a, b)))
    elif form == "same_color":
        add("same color", "?", *(select(ref) for ref in (a, b)))
    elif form in ("number", "word"):
        add("query", "text", select(Ref(form)))
    elif form in ("and", "or"):
        add(form, "?", *(add("exist", "?", select(ref)) for ref in (a, b)))
    elif form == "but_no":
        first, second = (add("exist", "?", select(ref)) for ref in (a, b))
        add("and", "?", first, add("not", "?", second))
    else:  # region_shape, region_color
        add("query", form.removeprefix("region_"), add("filter place", question.p, select(Ref())))
    return steps


def _full_answer(question: Question) -> str:
    form, answer, a, b = question.form, question.answer, question.a, question.b
    yes = answer == "yes"
    if form in ("exist", "and", "or", "but_no"):
        what = {
            "exist": lambda: article(a),
            "and": lambda: f"{article(a)} and {article(b)}",
            "or": lambda: f"{article(a)} or {article(b)}",
            "but_no": lambda: f"{article(a)} but no {b}",
        }[form]()
        return f"Yes, there is {what}." if yes else f"No, it is not so that there is {what}."
    if form == "is_color":
        return f"Yes, the {a} is {question.c}." if yes else f"No, the {a} is not {question.c}."
    if form in ("color", "size"):
        return f"The {a} is {answer}."
    if form == "shape":
        return f"The {a} is {article(Ref(answer))}."
    if form == "count_all" or form == "count":
        noun = plural(a or Ref())
        return f"There are {answer} {noun}."
    if form in ("left_right", "above_below"):
        where = {"left": "to the left of", "right": "to the right of"}.get(answer, answer)
        return f"The {a} is {where} the {b}."
    if form in ("larger", "smaller"):
        return f"The {answer} is {form} than the {b if answer == str(a) else a}."
    if form == "is_larger":
        return f"Yes, the {a} is larger than the {b}." if yes else f"No, the {a} is not larger than the {b}."
    if form == "more":
        return f"{'Yes, there are' if yes else 'No, there are not'} more {plural(a)} than {plural(b)}."
    if form == "same_color":
        return f"{'Yes, they have' if yes else 'No, they do not have'} the same color: the {a} and the {b}."
    if form in ("number", "word"):
        return f"The {form} is {answer}."
    return f"The object at the {question.p} is {article(Ref(answer)) if form == 'region_shape' else answer}."


def _spans(text: str, question: Question, scene: Scene, number: int) -> dict[str, str]:
    """{position of a description in the words of `text`: object id}, for descriptions that fit one thing: "4" or "3:5"."""
    words = [word.strip(",.?:").lower() for word in text.split()]
    refs = [ref for ref in (question.a, question.b) if ref is not None]
    refs += [Ref(question.form)] if question.form in ("number", "word") else []
    spans = {}
    for ref in refs:
        ids, phrase = _matches(ref, scene, number), str(ref).split()
        for start in range(len(words) - len(phrase) + 1):
            if len(ids) == 1 and words[start : start + len(phrase)] == phrase:
                end = start + len(phrase)
                spans[str(start) if end == start + 1 else f"{start}:{end}"] = ids[0]
                break
    return spans
