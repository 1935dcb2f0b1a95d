"""The run of everything that needs a GPU: that one part's failure hides no other, and a rehearsal of the whole."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reprune_triton import ops
from reprune_triton.bench import gpu
from reprune_triton.bench.__main__ import main
from reprune_triton.errors import RepruneError
from reprune_triton.kernels import masked_conv

ROOT = Path(__file__).resolve().parents[1]


def python(name: str, program: str, limit: float = 20, **more) -> gpu.Part:
    return gpu.Part(name, (sys.executable, "-c", program), limit, **more)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_failing_part_does_not_hide_the_others(tmp_path, capfd):
    marker = tmp_path / "grandchild"
    nested = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    some = [
        python("bad", "print('about to fail'); raise SystemExit(3)"),
        python(
            "slow", f"import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', {nested!r}])", 1
        ),
        python("left behind", "import subprocess; subprocess.Popen(['sleep', '60'])"),
        gpu.Part("missing", ("no-such-program",), 5),
        python("impossible", "", skip="no such thing"),
        python("good", "import os; print('fine', os.environ['COLOUR'])", environment=(("COLOUR", "red"),)),
        python("large", "", needs=1000),
    ]
    started = time.monotonic()
    found = gpu.run_parts(some, tmp_path, minutes=1)
    assert time.monotonic() - started < 20
    assert [(row["part"], row["result"]) for row in found] == [
        ("bad", "failed"), ("slow", "failed"), ("left behind", "passed"), ("missing", "failed"),
        ("impossible", "skipped"), ("good", "passed"), ("large", "skipped"),
    ]  # fmt: skip
    whys = [row["why"] for row in found]
    assert whys[:3] == ["exit code 3", "out of time after 1 s", ""] and "no-such-program" in whys[3]
    assert whys[4:] == ["no such thing", "", "no time left"]
    log, printed = (tmp_path / "log.txt").read_text(), capfd.readouterr().out
    for text in ("about to fail", "begun", "fine red", "==== bad: failed, exit code 3", "no time left"):
        assert text in log and text in printed
    assert log.index("Parts") > log.index("fine red"), "the table comes last"
    assert lines(tmp_path / "parts.jsonl") == found
    time.sleep(max(0.0, started + 6 - time.monotonic()))
    assert not marker.exists(), "what a part started is ended with it"


def test_the_time_is_shared(tmp_path):
    some = [python("slow", "import time; time.sleep(60)"), python("late", "print('never')")]
    started = time.monotonic()
    found = gpu.run_parts(some, tmp_path, minutes=6 / 60)
    assert time.monotonic() - started < 9
    assert [(row["result"], row["why"]) for row in found] == [
        ("failed", "out of time after 6 s"), ("skipped", "no time left"),
    ]  # fmt: skip


def test_a_part_is_told_its_time(tmp_path, capfd):
    gpu.run_parts([python("told", "print('it has {seconds} s')", limit=gpu.MARGIN + 7)], tmp_path, minutes=1)
    assert "it has 7 s" in capfd.readouterr().out


def test_rehearsal(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["gpu", "--tiny", "--out", "new", "--commit", "abc"]) == 0
    out, printed = tmp_path / "new", capfd.readouterr().out
    parts = lines(out / "parts.jsonl")
    assert [row["part"] for row in parts if row["result"] == "passed"] == [
        "tests", "same bits", "event resnet8", "scaling", "event resnet8 average",
        "event resnet8 prunable", "step resnet8", "hours",
    ]  # fmt: skip
    assert [row["part"] for row in parts if row["result"] == "skipped"] == ["memcheck"]
    assert {path.name for path in out.iterdir()} == {"log.txt"} | {
        f"{name}.jsonl" for name in ("parts", "event", "scaling", "step", "hours")
    }
    assert "the same bits" in printed and "Parts" in (out / "log.txt").read_text()
    events, scaling = lines(out / "event.jsonl"), lines(out / "scaling.jsonl")
    assert {(row["linkage"], row["impl"], row["checked"]) for row in events} == {
        ("ward", "triton", True), ("average", "triton", True), ("ward", "reference", True),
    }  # fmt: skip
    totals = [row for row in events if row["row"] == "total"]
    assert ["stage_apply_s" in row for row in totals] == [False, False, True], "the last one is of a pruner"
    assert {row["algorithm"] for row in scaling} == {"auto", "chain", "reciprocal"}
    steps, hours = lines(out / "step.jsonl"), lines(out / "hours.jsonl")
    assert {row["variant"] for row in steps} == {"dense", "dense-fused", "narrow", "narrow-fused", "compact"}
    assert [row["measured_on_cpu"] for row in hours] == [True, True]
    assert all(row["commit"] for row in events + scaling + steps + hours)


def test_exit_code_names_what_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "tiny_parts", lambda out: [python("bad", "raise SystemExit(1)"), python("good", "")])
    assert main(["gpu", "--tiny", "--out", str(tmp_path)]) == 1
    assert "1 of 2 parts failed: bad" in capsys.readouterr().err


def test_commit_is_filled_in_only_where_unknown(tmp_path):
    (tmp_path / "event.jsonl").write_text('{"commit": null}\n{"commit": "known"}\n')
    gpu.fill_in_commit(tmp_path, "abc")
    assert [row["commit"] for row in lines(tmp_path / "event.jsonl")] == ["abc", "known"]


def test_other_bits_are_noticed(monkeypatch):
    def fake(program: str) -> None:
        monkeypatch.setattr(gpu, "BENCH", (sys.executable, "-c", program))

    fake("import os; print('ward:', os.getpid())")
    with pytest.raises(RepruneError, match="other bits: ward: .* and ward:"):
        gpu.same_bits("tiny")
    fake("raise SystemExit(1)")
    with pytest.raises(RepruneError, match="failed"):
        gpu.same_bits("tiny")


def test_every_kernel_of_training_is_compiled_once(monkeypatch):
    jobs = []
    monkeypatch.setattr("reprune_triton.kernels.compiled.warm", lambda *job: jobs.append(job))
    assert sum(gpu.compile_each(3, first) for first in range(3)) == len(jobs) == len(set(jobs))
    known = {(config, torch.bfloat16, 16) for config in masked_conv.configurations()}
    assert known < set(jobs) and {dtype for _, dtype, _ in jobs} == {torch.bfloat16, torch.float32, torch.float64}


def test_parts_of_a_real_run(tmp_path):
    """Their commands are ones that the programs take, and the files that come back are few."""
    made = gpu.parts(tmp_path)
    assert [part.name for part in made[:2]] == ["compile", "tests"] and len({part.name for part in made}) == len(made)
    for part in made:
        words = list(part.command)
        assert part.skip == "compute-sanitizer not found" or Path(words[0]).exists()
        if "reprune_triton.bench" in words:
            command = words[words.index("reprune_triton.bench") + 1 :]
            with pytest.raises(SystemExit) as done:
                main([*(word.replace("{seconds}", "60") for word in command), "--help"])
            assert done.value.code == 0, part.name
    for words in (part.command for part in made if "step" in part.command):
        shares = words[words.index("--sparsity") + 1 : words.index("--device")]
        assert ("narrow" in words) == ("0" in shares), "what pruning gains is measured against narrow at 0"
    files = {word for part in made for word in part.command if str(tmp_path) in word}
    assert len(files) <= 4


def test_a_pruner_needs_torch_pruning(tmp_path, monkeypatch):
    for found, why in ((object(), ""), (None, "torch-pruning is not installed")):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name, found=found: found)
        for made in (gpu.parts(tmp_path), gpu.tiny_parts(tmp_path)):
            (part,) = (part for part in made if "prunable" in part.name)
            assert part.skip == why


def test_bits_are_also_of_the_kept_filters(capsys, monkeypatch):
    gpu.print_bits("tiny")
    before, cover = capsys.readouterr().out.splitlines(), ops.cover
    monkeypatch.setattr(ops, "cover", lambda labels, keep, **named: cover(labels.flip(1), keep, **named))
    gpu.print_bits("tiny")
    after = capsys.readouterr().out.splitlines()
    assert len(before) == len(after) == 2 and all(a != b for a, b in zip(before, after, strict=True))


def test_refusals(capsys, monkeypatch):
    assert main(["gpu"]) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", "somewhere"]) == 1
    assert "--tiny" in capsys.readouterr().err
    done = subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "usage: make gpu OUT=DIR" in done.stdout
