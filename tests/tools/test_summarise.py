"""Test mean and spread over the results of several seeds."""

import json
import sys

from tests.launching import launch


def result_file(path, figure, **changes):
    result = {
        "task": "retrieval",
        "protocol": "finetuned",
        "precision": "fp32",
        "metrics": {"t2i_R@1": figure},
        "data": {"files": {"m": "1"}},
        **changes,
    }
    path.write_text(json.dumps(result))
    return path


def test_results_of_seeds_are_averaged(tmp_path):
    command = (sys.executable, "tools/summarise.py")
    paths = [
        result_file(tmp_path / f"{i}.json", figure) for i, figure in enumerate((40.0, 43.0, 46.0))
    ]
    code, out, err = launch(*command, *paths, "--output", tmp_path / "table.json")
    assert code == 0, err
    row = json.loads((tmp_path / "table.json").read_text())["figures"]["t2i_R@1"]
    assert row == {"mean": 43.0, "spread": 3.0, "least": 40.0, "most": 46.0}
    assert "43.00" in out

    for change, words in (
        ({"protocol": "zero-shot"}, "protocol is zero-shot, the first has finetuned"),
        ({"precision": "bf16"}, "precision is bf16, the first has fp32"),
        ({"data": {"files": {"m": "2"}}}, "evaluated on other data"),
        ({"configuration": {"max_regions": 9}}, "or with other limits"),
        ({"metrics": {}}, "not a result"),
    ):
        code, _, err = launch(
            *command, paths[0], result_file(tmp_path / "other.json", 1.0, **change)
        )
        assert (code, words in err) == (2, True), err
