"""The commands of vqav2.py, gqa.py, vizwiz.py and the smaller tasks: predict, score, run (both) and baseline.

Exit code 0: done. 1: done, but some images or requests failed (listed in OUT/run.json) or ids did not correspond (listed in the scores).
2: bad input, one line on stderr. 130: stopped by Ctrl-C; the same command goes on. torch and the engine are imported only where something
is predicted.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from eval_vqa.baselines import ceiling, fit_majority, majority_results
from eval_vqa.json_files import file_sha256, read_json, write_json
from eval_vqa.official_files import OfficialFiles
from eval_vqa.official_records import name_ids
from eval_vqa.ranks import start_ranks, tell, this_rank
from eval_vqa.score_table import table
from eval_vqa.scoring import ScoreOptions, kind_table, score_file, score_results, versions
from eval_vqa.tasks import TASKS, read_questions

__all__ = ["build_parser", "main"]

NEW_TOKENS, THINKING_NEW_TOKENS = 16, 2048


def main(task: str, argv: list[str] | None = None, *, load_engine=None) -> int:
    """Runs one command of `task` (a name in `eval_vqa.tasks.TASKS`) and returns its exit code. load_engine: (args) -> engine, for tests."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(task).parse_args(argv)
    try:
        if args.command == "score":
            return _score(task, args, args.predictions, args.out or args.predictions.parent / "scores.json")
        if args.command == "baseline":
            return _baseline(task, args)
        if args.command == "run" and _locate(task, args).annotations is None:
            raise ValueError("this split has no annotations to score with: use predict, and hand in OUT/submission.json")
        if args.ranks is not None:
            return _start_ranks(task, args, argv)
        code = _predict(task, args, load_engine or _load_engine)
        if args.command == "run" and this_rank().is_first:
            code = max(code, _score(task, args, args.out / "predictions.jsonl", args.out / "scores.json"))
        return code
    except (ValueError, OSError, ImportError) as error:
        tell(f"{task} {args.command}: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        tell(f"{task} {args.command}: stopped; the same command goes on from here")
        return 130


def build_parser(task: str) -> argparse.ArgumentParser:
    """The command line of one task."""
    parser = argparse.ArgumentParser(
        prog=task,
        allow_abbrev=False,
        description=f"{task}: predict with a model and score by the official rules",
        epilog="exit code 0: done; 1: done, but some images or requests failed; 2: bad input; 130: stopped, the same command goes on",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", type=Path, help="folder with the official files")
    data.add_argument("--split", help="split, e.g. val2014, testdev_balanced, val; by default the usual one to measure on")
    data.add_argument("--questions", type=Path, help="question file, instead of the one in --data")
    data.add_argument("--annotations", type=Path, help="annotation file, instead of the one in --data")
    data.add_argument("--images", type=Path, help="image folder, instead of the one in --data")
    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument("--model", required=True, help="checkpoint folder")
    asking.add_argument("--out", type=Path, required=True, help="folder for predictions.jsonl, submission.json and run.json; a run goes on")
    asking.add_argument("--grey", action="store_true", help="replace every image by a grey one: the blind baseline")
    asking.add_argument("--limit", type=int, help="only the first so many questions")
    asking.add_argument("--batch", type=int, help="most questions answered together, where memory allows (default: the engine's 128)")
    asking.add_argument("--thinking", action="store_true", help="let a reasoning checkpoint think before it answers (default: it does not)")
    asking.add_argument("--max-new-tokens", type=int,
                        help=f"longest answer with its thoughts (default {NEW_TOKENS}, with --thinking {THINKING_NEW_TOKENS})")  # fmt: skip
    missing = argparse.ArgumentParser(add_help=False)
    missing.add_argument("--on-missing", choices=("fail", "skip", "blank"), default="fail",
                         help="unreadable image or unanswered question: stop, leave it out, or count it as answered with nothing; "
                         "each is listed (default %(default)s)")  # fmt: skip
    asking.add_argument("--ranks", type=int, help="answer with so many processes of this machine; torchrun and deepspeed work too")
    asking.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    asking.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, of its rank)")
    asking.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default the checkpoint's")
    asking.add_argument("--quantize", choices=("int8",), help="weight-only quantised decoder; compare.py tells what it costs in score")
    asking.add_argument("--on-drift", choices=("refuse", "warn", "ignore"), default="refuse",
                        help="when tiles, ids or logits are not those of the checkpoint's golden pack (default %(default)s)")  # fmt: skip
    scoring = argparse.ArgumentParser(add_help=False)
    scoring.add_argument("--subset", action="store_true", help="score only the answered questions (no official score)")
    if task == "vqav2":
        scoring.add_argument("--version", choices=("2021", "2017"), default="2021", help="official program (default %(default)s)")
    if task == "gqa":
        scoring.add_argument("--consistency", action="store_true", help="needs answers to all questions, balanced or not")
        scoring.add_argument("--grounding", action="store_true", help="needs --attentions and the scene graphs")
        scoring.add_argument("--attentions", type=Path, help="attention file in the official form")
        scoring.add_argument("--map-size", type=int, default=7, help="size of the attention maps (default %(default)s)")
    if task == "vizwiz":
        scoring.add_argument("--answerability", type=Path, help="results file of the answerability task")
    commands.add_parser(allow_abbrev=False, name="predict", parents=[data, asking, missing], help="ask the model every question")
    score = commands.add_parser(
        allow_abbrev=False, name="score", parents=[data, scoring, missing], help="score predictions.jsonl or an official results file"
    )
    score.add_argument("--predictions", type=Path, required=True, help="predictions.jsonl, submission.json or any official results list")
    score.add_argument("--out", type=Path, help="result file (default: scores.json beside the predictions)")
    commands.add_parser(allow_abbrev=False, name="run", parents=[data, asking, scoring, missing], help="predict, then score")
    if not TASKS[task].baselines:
        return parser
    baseline = commands.add_parser(
        allow_abbrev=False, name="baseline", parents=[data, scoring], help="majority answer per question type, and the ceiling"
    )
    baseline.add_argument("--train", type=Path, required=True,
                          help="training answers: VQAv2 annotations, GQA questions or a VizWiz list")  # fmt: skip
    baseline.add_argument("--out", type=Path, help="result file")
    return parser


def _locate(task: str, args) -> OfficialFiles:
    """The files of --data, with what was named one by one in their place."""
    if args.data is not None:
        found = TASKS[task].locate(args.data, args.split)
    elif args.questions is not None:
        kinds = args.questions.parent / "kinds.json"
        kinds = kinds if kinds.is_file() else None
        found = OfficialFiles(args.split or args.questions.stem, args.questions, images=args.questions.parent, kinds=kinds)
    else:
        raise ValueError("say where the questions are: --data FOLDER, or --questions FILE")
    if args.questions is not None:
        beside = found.annotations if TASKS[task].apart else args.questions
        found = replace(found, questions=args.questions, annotations=beside)
    return replace(found, annotations=args.annotations or found.annotations, images=args.images or found.images)


def _predict(task: str, args, load_engine) -> int:
    from eval_vqa.model_identity import model_fingerprint, preprocessing
    from eval_vqa.predicting import PredictSettings, predict

    usual = THINKING_NEW_TOKENS if args.thinking else NEW_TOKENS
    most = usual if args.max_new_tokens is None else args.max_new_tokens
    for option in ("limit", "batch"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, found {value}")
    at_a_time = max(PredictSettings.at_a_time, 4 * (args.batch or 0))  # so that the engine's batch stays full
    settings = PredictSettings(at_a_time, most, args.grey, args.thinking, args.on_missing)
    rank = this_rank()
    files = _locate(task, args)
    questions = read_questions(task, files)[: args.limit]
    identity = {
        "model": str(args.model),
        "model_fingerprint": model_fingerprint(args.model),
        "preprocessing": preprocessing(args.model),
        "split": files.split,
        "files": {name: str(path) for name, path in vars(files).items() if isinstance(path, Path)},
        "questions_sha256": file_sha256(files.questions),
        "dtype": args.dtype,
        "quantize": args.quantize,
        "device": args.device or rank.device(None).partition(":")[0],
        "versions": versions(),
    }
    outcome = predict(task, questions, lambda: load_engine(args), args.out, settings, identity=identity, rank=rank)
    if not rank.is_first:
        return 0
    answered = sum(not row.get("problem") for row in outcome.rows)
    print(f"{answered} of {len(questions)} questions answered: {args.out / 'submission.json'}")
    if outcome.problems:
        tell(
            f"{task} {args.command}: {len(outcome.problems)} questions had a problem, the first: {outcome.problems[0]['problem']}; "
            f"all are listed in {args.out / 'run.json'}"
        )
    return 1 if outcome.problems else 0


def _start_ranks(task: str, args, argv: list[str]) -> int:
    if args.ranks < 1:
        raise ValueError(f"--ranks must be at least 1, found {args.ranks}")
    names = [word.partition("=")[0] for word in argv]
    place = names.index("--ranks")
    rest = argv[:place] + argv[place + (1 if "=" in argv[place] else 2) :]
    return start_ranks(args.ranks, [str(Path(__file__).with_name(f"{task}.py")), *rest])


def _score(task: str, args, predictions: Path, out: Path) -> int:
    record = score_file(task, _locate(task, args), predictions, _score_options(args))
    write_json(out, record, indent=1)
    print(table(record))
    print(f"\nwritten: {out}")
    for name, ids in (("without answer", record["missing_ids"]), ("that are not in this split", record["unknown_ids"])):
        if ids:
            tell(f"{task} {args.command}: questions {name}, {name_ids(ids)}; all are listed in {out}")
    return 1 if record["missing_ids"] or record["unknown_ids"] else 0


def _baseline(task: str, args) -> int:
    files = _locate(task, args)
    questions = read_json(files.questions)
    annotations = read_json(files.annotations) if files.annotations else None
    majority = fit_majority(read_json(args.train))
    results = majority_results(majority, questions, annotations if task == "vqav2" else None)
    scores, per_question, _ = score_results(task, files, results, _score_options(args))
    record = {
        "task": task,
        "split": files.split,
        "majority": {"scores": scores, "kinds": kind_table(files, per_question), "answers": majority},
        "ceiling": None if task == "gqa" else round(ceiling(annotations, questions if task == "vqav2" else None), 2),
    }
    if args.out:
        write_json(args.out, record, indent=1)
    print(f"{task} {files.split}, majority answer per question type: {scores['accuracy']:.2f}%")
    for kind, entry in record["majority"]["kinds"].items():
        print(f"  {kind}: {entry['accuracy']:.2f}% ({entry['count']} questions)")
    if record["ceiling"] is not None:
        print(f"best constant answer per question (ceiling): {record['ceiling']:.2f}%")
    return 0


def _score_options(args) -> ScoreOptions:
    given = {name: value for name, value in vars(args).items() if name in ScoreOptions.__dataclass_fields__}
    if args.command == "run" and (args.limit is not None or args.on_missing == "skip"):
        given["subset"] = True
    return ScoreOptions(**given)


def _load_engine(args):
    import torch

    from vlm.engine import Engine

    dtype = getattr(torch, args.dtype) if args.dtype else None
    given = {"quantize": args.quantize, "max_batch": args.batch}
    more = {name: value for name, value in given.items() if value is not None}
    device = this_rank().device(args.device)
    engine = Engine.from_pretrained(args.model, device=device, dtype=dtype, on_drift=args.on_drift, **more)
    if this_rank().is_first:
        tell(engine.golden_note)
    return engine
