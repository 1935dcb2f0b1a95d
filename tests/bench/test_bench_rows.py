"""A row says on which code it was made."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

from reprune_triton.bench import rows


def git(folder, *words):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)


def test_code_that_is_not_committed_is_noted_and_new_rows_are_not(tmp_path):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    shutil.copy(Path(rows.__file__).resolve(), tmp_path / "bench" / "rows.py")
    (tmp_path / "bench" / "results" / "a.jsonl").write_text("")
    spec = importlib.util.spec_from_file_location("copied_rows", tmp_path / "bench" / "rows.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.environment()["dirty"] is None and copied.environment()["commit"] is None, "no checkout"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    found = copied.environment()
    assert found["dirty"] is False and len(found["commit"]) == 40
    for name in ("a", "new"):
        copied.append(tmp_path / "bench" / "results" / f"{name}.jsonl", found)
    assert copied.environment() | {"time": ""} == found | {"time": ""}
    (tmp_path / "module.py").write_text("")
    assert copied.environment()["dirty"] is True
    (tmp_path / "module.py").unlink()
    (tmp_path / "bench" / "rows.py").write_text("changed")
    assert copied.environment()["dirty"] is True


def test_a_draft_is_written_again_and_again(tmp_path):
    path = tmp_path / "new" / "rows"
    rows.Draft(None).write([{"a": 1}])
    draft = rows.Draft(path)
    draft.write([])
    assert not path.exists()
    for some in ([{"a": 1}], [{"a": 2}, {"b": 3}]):
        draft.write(some)
        assert [json.loads(line) for line in path.read_text().splitlines()] == some
    other = rows.Draft(path)
    other.write([{"c": 4}])
    other.write([{"d": 5}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 2}, {"b": 3}, {"d": 5}]
    other.write([])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 2}, {"b": 3}]
    draft.write([])
    assert not path.exists() and not list(path.parent.iterdir())
