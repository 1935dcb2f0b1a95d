"""The run of everything that needs a GPU: that one part's failure hides no other, and a rehearsal of the whole."""

import io
import json
import os
import signal
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
from reprune_triton.kernels.clustering import launch
from reprune_triton.kernels.step import masked_conv, norm_act

ROOT = Path(__file__).resolve().parents[2]


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
    assert log.index("Summary") > log.index("fine red"), "the table comes last"
    assert lines(tmp_path / "parts.jsonl") == found
    assert [row["limit"] for row in found[:2]] == [20, 1] and all(row["rows"] == 0 for row in found)
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


def summary(log: str) -> list[list[str]]:
    """The cells of the table that is printed last."""
    table = log[log.rindex("Summary") :].splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]


def test_rehearsal(tmp_path, capfd, monkeypatch):
    """All parts in their order, by the code of a real run; only what a CPU cannot do is left out, and why is said."""
    monkeypatch.chdir(tmp_path)
    assert main(["gpu", "--tiny", "--out", "new", "--commit", "abc", "--minutes", "60"]) == 0
    out, printed = tmp_path / "new", capfd.readouterr().out
    parts, log = lines(out / "parts.jsonl"), (out / "log.txt").read_text()
    wanted = [part.name for part in gpu.parts(tmp_path, gpu.REAL)]
    assert [row["part"] for row in parts] == wanted[: len(parts)] and wanted[len(parts)].startswith("step, other")
    assert [(row["part"], row["rows"]) for row in parts if row["result"] == "passed"] == [
        ("smoke", 7), ("step", 6), ("event", 5), ("dispatch", 1), ("scaling", 6), ("hours", 2), ("tests", 0),
        ("same bits", 0),
    ]  # fmt: skip
    assert {row["why"] for row in parts if row["result"] != "passed"} == {
        "the interpreter compiles nothing", gpu.NO_GRAPH, "torch.compile on a CPU takes minutes",
        "nothing to check in the interpreter",
    }  # fmt: skip
    files = {path.name for path in out.iterdir()}
    assert len(files) <= 8 and files == {"log.txt", *(f"{name}.jsonl" for name in (
        "parts", "smoke", "event", "scaling", "step", "hours", "dispatch"))}  # fmt: skip
    table = summary(log)
    assert table == summary(printed) and [row[0] for row in table] == [row["part"] for row in parts]
    assert " skipped" in dict((row[0], row[3]) for row in table)["tests"], "what pytest says in the end"
    found = {name: lines(out / f"{name}.jsonl") for name in ("smoke", "event", "scaling", "step", "hours", "dispatch")}
    assert all(row["commit"] for some in found.values() for row in some)
    assert all(row["result"] == "right" for row in found["smoke"])
    assert all(row["checked"] and row["extrapolated"] for row in found["event"])
    assert "stage_apply_s" in found["event"][-1], "of a pruner"
    assert {row["algorithm"] for row in found["scaling"]} == {"auto", "chain", "reciprocal"}
    assert {row["variant"] for row in found["step"]} == {"dense", "dense-fused", "narrow", "narrow-fused"}
    assert [row["measured_on_cpu"] for row in found["hours"]] == [True, True]


def test_rehearsal_of_the_first_minute(tmp_path, capfd):
    """What decides what to build next, the most important first."""
    assert main(["gpu", "--tiny", "--first", "--out", str(tmp_path), "--minutes", "60"]) == 0
    parts = lines(tmp_path / "parts.jsonl")
    assert [row["part"] for row in parts] == [part.name for part in gpu.first(tmp_path, gpu.REAL)]
    assert [(row["part"], row["rows"]) for row in parts if row["result"] == "passed"] == [
        ("smoke", 7), ("event", 1), ("step", 3), ("dispatch", 1),
    ]  # fmt: skip
    assert [row[0] for row in summary(capfd.readouterr().out)] == [row["part"] for row in parts]


def test_rows_of_a_part_that_is_cut_off_are_counted(tmp_path, monkeypatch):
    """Also those of one that is killed while it writes."""
    row = json.dumps({"benchmark": "step", "dirty": None, "commit": None})
    bad = json.dumps({"benchmark": "step", "dirty": None, "commit": "known", "result": "failed"})
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    path = tmp_path / "step.jsonl"
    program = f"""
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
open({str(path)!r} + ".123", "a").close()
open({str(path)!r}, "a").write({row!r} + chr(10) + {bad!r} + chr(10) + '{{"cut')
time.sleep(60)
"""
    path.write_text(row + "\n")
    (found,) = gpu.run_parts([python("stubborn", program, 2)], tmp_path, minutes=1, commit="abc")
    assert (found["result"], found["rows"]) == ("failed", 2)
    assert found["why"] == "out of time after 2 s, 1 of 2 rows without a result"
    assert [row["commit"] for row in lines(path)] == ["abc", "abc", "known"]
    assert {other.name for other in tmp_path.iterdir()} == {"log.txt", "parts.jsonl", "step.jsonl"}


def test_a_benchmark_waits_for_its_turn(tmp_path, monkeypatch):
    """It starts while another part runs, and has imported what it needs by its turn."""
    order, make, finish = [], gpu.Process.__init__, gpu.Process.finish

    def made(self, part, limit):
        order.append(f"{part.name} starts")
        self.name = part.name
        make(self, part, limit)

    def begun(self, *given):
        order.append(f"{self.name} begins")
        return finish(self, *given)

    monkeypatch.setattr(gpu.Process, "__init__", made)
    monkeypatch.setattr(gpu.Process, "finish", begun)
    hours = gpu.Part("hours", (*gpu.WAITING, "hours", "--from", "nothing"), 60)
    late = hours._replace(name="late", needs=1000)
    found = gpu.run_parts([python("one", ""), python("no", "", skip="why not"), hours, late], tmp_path, minutes=2)
    assert order == ["one starts", "hours starts", "one begins", "late starts", "hours begins"]
    assert [(row["part"], row["why"]) for row in found[2:]] == [("hours", "exit code 1"), ("late", "no time left")]
    assert "nothing cannot be read" in (tmp_path / "log.txt").read_text()


def test_one_that_waits_ends_with_who_asked_for_it(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["--wait", "hours", "--from", "nothing"]) == 1


def test_the_log_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "HEAD", 1000)
    monkeypatch.setattr(gpu, "TAIL", 500)
    program = "print('begin'); [print('x' * 100) for _ in range(2000)]; print('z' * 100000); print('the end')"
    (found,) = gpu.run_parts([python("talks", program)], tmp_path, minutes=1)
    log = (tmp_path / "log.txt").read_text()
    assert found["result"] == "passed" and len(log) < 5000 and "begin" in log and "the end" in log
    assert "lines left out" in log
    parts = gpu.parts(tmp_path, gpu.REAL)
    monkeypatch.undo()
    assert len(parts) * (gpu.HEAD + gpu.TAIL) < 16 << 20


def test_stopped(tmp_path):
    """By a signal: the part that runs keeps what it has, the summary is printed, and no other part is begun."""
    child = """
import time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("last words")
"""
    program = f"""
import sys
from reprune_triton.bench import gpu
from reprune_triton.bench.__main__ import main

gpu.parts = lambda out, sizes: [gpu.Part(name, (sys.executable, "-c", {child!r}), 60) for name in ("one", "two")]
sys.exit(main(["gpu", "--tiny", "--out", {str(tmp_path)!r}]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    printed = ""
    while not printed.endswith("\nbegun\n"):
        line = process.stdout.readline()
        assert line, printed
        printed += line
    process.send_signal(signal.SIGTERM)
    printed += process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "last words" in printed, printed
    assert [row[0] + ": " + row[3] for row in summary(printed)] == ["one: interrupted", "two: skipped: interrupted"]
    assert [row["result"] for row in lines(tmp_path / "parts.jsonl")] == ["interrupted", "skipped"]


def test_exit_code_names_what_failed(tmp_path, capsys, monkeypatch):
    parts = [python("bad", "raise SystemExit(1)"), python("good", "")]
    monkeypatch.setattr(gpu, "parts", lambda out, sizes: parts)
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


def test_what_is_launched_has_been_compiled(tmp_path):
    """A training step of ResNet-50, in bfloat16, whole and narrow, and an event: nothing is left to be compiled."""
    program = Path(__file__).with_name("compiled_first.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *missing = done.stdout.splitlines()
    known, launched = map(int, first.split())
    assert not missing and known >= launched > 30


def test_every_kernel_is_compiled_once(monkeypatch):
    bench, everything = gpu.jobs("bench"), gpu.jobs("all")
    assert everything[: len(bench)] == bench and len(set(everything)) == len(everything)
    assert {job[1] for job in everything if len(job) > 1} == {torch.bfloat16, torch.float32, torch.float64}
    kernels = {config for config, *_ in bench}
    assert {*masked_conv.configurations(), *norm_act.configurations(), *launch.configurations()} < kernels
    warmed = []
    monkeypatch.setattr("reprune_triton.kernels.compiled.warm", lambda *job: warmed.append(job))
    gpu.compile_one("all", 3)
    assert warmed == [everything[3]]


@pytest.mark.parametrize("make", [gpu.parts, gpu.first])
def test_parts_of_a_real_run(tmp_path, make):
    """Their commands are ones that the programs take, and the files that come back are few."""
    made = make(tmp_path, gpu.REAL)
    assert len({part.name for part in made}) == len(made)
    assert [part.name for part in make(tmp_path, gpu.TINY)] == [part.name for part in made][: len(made)][
        : len(make(tmp_path, gpu.TINY))
    ], "the rehearsal has the same order"
    for part in made:
        words = list(part.command)
        assert part.skip == "compute-sanitizer not found" or Path(words[0]).exists()
        assert len([word for word in words if word.endswith("-graph")]) == 0 or part.name.startswith("graph ")
        if "reprune_triton.bench" in words:
            command = words[words.index("reprune_triton.bench") + 1 :]
            with pytest.raises(SystemExit) as done:
                main([*(word.replace("{seconds}", "60") for word in command), "--help"])
            assert done.value.code == 0, part.name
    files = {word for part in made for word in part.command if str(tmp_path) in word}
    assert len(files) + 2 <= 8, "with the log and the parts"


def test_what_must_be_had_fits(tmp_path):
    made = gpu.parts(tmp_path, gpu.REAL)
    must = made[: [part.name for part in made].index("same bits") + 1]
    assert sum(part.limit for part in must) <= 60 * gpu.MINUTES
    assert [part.name.split()[0] for part in must] == [
        "compile", "smoke", "step", "event", "graph", "graph", "graph", "graph", "step", "dispatch", "scaling",
        "hours", "tests", "same",
    ]  # fmt: skip
    commands = [part.command for part in must if part.name.startswith(("step", "graph "))]
    variants = {word for words in commands for word in words}
    assert {"narrow-graph", "narrow-fused-graph", "dense-graph"} < variants
    for words in (part.command for part in made if "step" in part.command and "narrow" in part.command):
        shares = words[words.index("--sparsity") + 1 : words.index("--device")]
        assert "0" in shares, "what pruning gains is measured against narrow at 0"


def test_tests_run_without_xdist(monkeypatch):
    found = {}
    for name, spec in (("with", object()), ("without", None)):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda package, spec=spec: spec)
        found[name] = gpu.testing(gpu.REAL, 1).command
    assert found["with"][-2:] == ("-n", "8") and found["without"] == found["with"][:-2]


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
