"""The arrangement: the top-level folders kernels/ and bench/ are reprune_triton.kernels and .bench however the
package is used: from a bare checkout, an editable install, or a wheel built from the sdist."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import reprune_triton

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("kernels", "bench")


def run(command, cwd, **env):
    """Run without the PYTHONPATH of this process; the output, which must be of a success."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**clean, **env}, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(part):
    """All but bench/suites/, which `make bench` runs from a checkout."""
    found = (ROOT / part).rglob("*.py")
    return sorted(str(path.relative_to(ROOT)) for path in found if "suites" not in path.parts)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree with its symlinks, so that building leaves nothing behind here."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name in ("reprune_triton", *PARTS):
            shutil.copytree(path, copy / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def dist(checkout, tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout], out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees the packages installed here, but not their editable installs."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python, *what):
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--ignore-installed", *what], python.parent)


def check(python, cwd, inside, **env):
    """Both parts can be imported from `cwd`, and come from the folder `inside`."""
    code = (
        "import importlib.util as u, reprune_triton.kernels.clustering.launch as k, reprune_triton.bench\n"
        "print(k.__file__, u.find_spec('reprune_triton.bench.__main__').origin, sep='\\n')"
    )
    cwd.mkdir(exist_ok=True)
    kernels, bench = run([python, "-c", code], cwd, **env).splitlines()
    for found in (kernels, bench):
        assert Path(found).resolve().is_relative_to(inside.resolve()), found
    assert "reprune_triton.bench" in run([python, "-m", "reprune_triton.bench", "--help"], cwd, **env)
    assert "--sparsity" in run([python, "-m", "reprune_triton.train", "--help"], cwd, **env)


def test_the_parts_are_relative_links_and_no_packages():
    for part in PARTS:
        assert os.readlink(ROOT / "reprune_triton" / part) == f"../{part}"
        # With an __init__.py the folder would hide Hugging Face's `kernels` wherever the root is on the path.
        assert not (ROOT / part / "__init__.py").exists()


def test_bare_checkout(tmp_path):
    check(sys.executable, tmp_path / "elsewhere", ROOT, PYTHONPATH=str(ROOT))


def test_editable_install(environment, checkout, tmp_path):
    install(environment, "--no-build-isolation", "--editable", checkout)
    check(environment, tmp_path / "elsewhere", checkout)


def test_wheel_from_sdist(environment, dist, tmp_path):
    install(environment, dist[1])
    check(environment, tmp_path / "elsewhere", tmp_path / "venv")


def test_every_file_is_in_the_archives_once(dist):
    sdist, wheel = dist
    with tarfile.open(sdist) as archive:
        packed = [name.partition("/")[2] for name in archive.getnames()]
    with zipfile.ZipFile(wheel) as archive:
        installed = archive.namelist()
    for part in PARTS:
        assert sorted(n for n in packed if n.endswith(".py") and part in n.split("/")) == sources(part)
        wanted = [f"reprune_triton/{name}" for name in sources(part)]
        assert sorted(n for n in installed if n.endswith(".py") and part in n.split("/")) == wanted
    info = f"reprune_triton-{reprune_triton.__version__}.dist-info"
    assert {name.split("/")[0] for name in installed} == {"reprune_triton", info}
    assert {f"reprune_triton/{name}" for name in ("__init__.py", "train.py", "py.typed")} <= set(installed)
    assert f"{info}/licenses/LICENSE" in installed and {"LICENSE", "CITATION.cff", "CHANGELOG.md"} <= set(packed)


def test_the_metadata_are_those_of_a_package(dist):
    with zipfile.ZipFile(dist[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name))
    assert (found["Name"], found["Version"]) == ("reprune-triton", reprune_triton.__version__)
    assert found["License-Expression"] == "Apache-2.0" and found["Author"] == "reprune_triton contributors"
    assert found["Description-Content-Type"] == "text/markdown" and found["Keywords"]
    assert "Typing :: Typed" in found.get_all("Classifier")
    assert any(line.startswith("torch-pruning") for line in found.get_all("Requires-Dist"))


def test_the_version_is_in_one_place(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    code = "import reprune_triton; print(reprune_triton.__version__)"
    found = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(ROOT))  # a bare checkout: nothing is installed
    assert found.strip() == reprune_triton.__version__


def test_the_licence_and_the_citation():
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence and len(licence) > 11000
    yaml = pytest.importorskip("yaml", reason="comes with timm")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = citation["references"]
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0" and citation["authors"]
    assert paper["authors"][0]["family-names"] == "Park" and paper["year"] == 2024
    assert "2402.17862" in str(paper["identifiers"])


def test_a_package_called_kernels_wins_over_our_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'someone else'\n")
    code = "import kernels; print(kernels.owner)"
    # -c puts the folder it runs in, here the root of the repository, first on the path.
    assert run([sys.executable, "-c", code], ROOT, PYTHONPATH=str(tmp_path)) == "someone else\n"
    assert run([sys.executable, "-c", code], ROOT, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}") == "someone else\n"
