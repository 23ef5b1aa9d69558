"""OUT/run.json: what was asked of what, and what came of it.

It is written before the first question, so that a run is never continued as another one, and completed at the end with everything one
wants to know of a score later: hashes, versions, stop reasons, tiles, problems.
"""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

from eval_vqa.json_files import read_json, write_json
from eval_vqa.postprocessing import POSTPROCESSING
from eval_vqa.predictions_file import RESULT_KEYS
from eval_vqa.prompts import PROMPTS, prompt_sha256

__all__ = ["complete", "open_record"]

# What may differ between two starts of one run: places, and what does not change an answer.
MAY_DIFFER = frozenset(("on_missing", "model", "versions", "split", "files", "device", "counts", "problems"))

STARTED_WITH = ("versions", "device")


def open_record(out: Path, task: str, settings, identity: dict) -> dict:
    """The record of this run; writes OUT/run.json where there is none.

    settings: a PredictSettings. Raises ValueError when the folder holds another run, and names what differs.
    """
    record = {
        "task": task,
        "prompt": PROMPTS[task],
        "prompt_sha256": prompt_sha256(PROMPTS[task]),
        "postprocessing": POSTPROCESSING[task][1],
        "decoding": {"temperature": 0.0, "seed": None},  # greedy: nothing is drawn
        "stop_rule": {"end_of_turn": True, "texts": [], "max_new_tokens": settings.max_new_tokens},
        "grey": settings.grey,
        "thinking": settings.thinking,
        "on_missing": settings.on_missing,
        **identity,
    }
    record = json.loads(json.dumps(record))
    path = out / "run.json"
    if not path.exists():
        if (out / "predictions.jsonl").exists():
            raise ValueError(f"{out} holds a predictions.jsonl without run.json; choose another --out or remove it")
        write_json(path, record, indent=1)
        return record
    earlier = read_json(path)
    if different := sorted(key for key in record.keys() - MAY_DIFFER if earlier.get(key) != record[key]):
        found = "; ".join(f"{key} is {earlier.get(key)!r} there and {record[key]!r} now" for key in different)
        raise ValueError(f"{out} holds another run: {found}. Choose another --out, or remove that folder to start over")
    # A run that goes on with another torch, or elsewhere, has answers of both: none of them is forgotten.
    starts = earlier.get("earlier_starts", [])
    last = {name: earlier.get(name) for name in STARTED_WITH}
    if last != {name: record.get(name) for name in STARTED_WITH}:
        starts = [*starts, last]
    if starts:
        record["earlier_starts"] = starts
        write_json(path, {**earlier, **record}, indent=1)
    return record


def complete(out: Path, task: str, record: dict, rows: list[dict], *, asked: int, seconds: float, ranks: int) -> list[dict]:
    """Writes OUT/run.json with what became of all questions; returns the problems.

    rows: one a question, in official order. asked, seconds: answers of all processes since this one started, and for how long.
    """
    id_key, answer_key = RESULT_KEYS[task]
    problems = [{id_key: row[id_key], "problem": row["problem"]} for row in rows if row.get("problem")]
    pictures = sorted({(row["image_file"], row["image_sha256"]) for row in rows if row.get("image_sha256")})
    counts = {
        "questions": len(rows),
        "answered": sum(answer_key in row and not row.get("problem") for row in rows),
        "images": len(pictures),
        "stop_reasons": dict(Counter(row["stop_reason"] for row in rows if row.get("stop_reason"))),
        "tiles": {str(tiles): count for tiles, count in sorted(Counter(row["tiles"] for row in rows if row.get("tiles")).items())},
        "tiles_reduced": sum(bool(row.get("tiles_wanted")) for row in rows),
        "visual_tokens": sum(row.get("visual_tokens") or 0 for row in rows),
        "generated_tokens": sum(row.get("generated_tokens") or 0 for row in rows),
        "asked_in_this_start": asked,
        "seconds_of_this_start": round(seconds, 2),
        "questions_per_second": round(asked / seconds, 2) if asked and seconds > 0 else None,
        "ranks": ranks,
    }
    images_sha256 = sha256(json.dumps(pictures).encode()).hexdigest() if pictures else None
    write_json(out / "run.json", {**record, "images_sha256": images_sha256, "counts": counts, "problems": problems}, indent=1)
    return problems
