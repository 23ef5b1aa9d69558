"""A checkpoint that is not what it was is not evaluated: one line, exit code 2, and nothing is asked."""

import json
import shutil

from scored_runs import make_data

from eval_vqa.command_line import main


def test_a_drifted_checkpoint_is_refused_before_the_first_question(tiny_folder, tmp_path, capsys):
    """Another standard deviation in the saved processor: scores would be a little lower, and nobody would know why."""
    data, model = make_data(tmp_path / "data"), shutil.copytree(tiny_folder, tmp_path / "model")
    path = next(path for path in (model / "preprocessor_config.json", model / "processor_config.json") if path.is_file())
    content = json.loads(path.read_text())
    (content if "image_std" in content else content["image_processor"])["image_std"] = [0.3, 0.3, 0.3]
    path.write_text(json.dumps(content))
    asked = ["predict", "--model", str(model), "--data", str(data), "--limit", "2", "--max-new-tokens", "1", "--device", "cpu"]
    assert main("vqav2", [*asked, "--out", str(tmp_path / "refused")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is not what it was when it was saved" in said and "image_std is [0.3, 0.3, 0.3]" in said
    assert not (tmp_path / "refused" / "submission.json").exists()
    assert main("vqav2", [*asked, "--out", str(tmp_path / "ignored"), "--on-drift", "ignore"]) == 0
    assert "golden pack: not looked at" in capsys.readouterr().err
