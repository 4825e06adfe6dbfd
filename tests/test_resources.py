"""Shipped files are found by name from any folder: from a checkout, an editable install, and an installed wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from asr_train import resources

ROOT = Path(__file__).resolve().parent.parent


def test_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resources.find("recipes", "minds14") == ROOT / "recipes" / "minds14.yaml"
    assert resources.find("recipes", "minds14.yaml") == ROOT / "recipes" / "minds14.yaml"
    assert set(resources.shipped("accelerate_configs")) == {"cpu", "one_gpu", "ddp", "fsdp2", "zero2", "zero3"}


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("minds14.yaml").write_text("mine")
    assert resources.find("recipes", "minds14.yaml").read_text() == "mine"
    assert resources.find("recipes", "minds14") == ROOT / "recipes" / "minds14.yaml"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"'nothing'.*recipes: commonvoice_xlsr, demo"):
        resources.find("recipes", "nothing")


def test_the_name_of_a_recipe_of_ones_own_wants_its_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("name: mine")
    with pytest.raises(FileNotFoundError, match=r"did you mean mine\.yaml\?"):
        resources.find("recipes", "mine")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, capture_output=True, check=True)
    (path,) = folder.glob("wavefleet-*.whl")
    return path


def test_the_wheel_holds_the_packages_recipes_configs_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert {name.removeprefix("asr_train/share/recipes/") for name in names if "share/recipes/" in name} == tracked
    assert "asr_train/share/accelerate_configs/fsdp2.yaml" in names
    assert "asr_train/share/slurm/clusters/generic.yaml" in names
    assert {"launch/cli.py", "asr_train/train.py", "asr_train/data/plan.py", "wavefleet/api.py"} <= names
    assert {f"{package}/py.typed" for package in ("asr_train", "launch", "wavefleet")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_an_installed_wheel_finds_its_recipes_from_another_folder(wheel, tmp_path):
    """Installed beside the libraries of this environment, but without this checkout, which is hidden by `-S`."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *libraries])}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments):
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(command, env=environ, cwd=elsewhere, capture_output=True, text=True, check=True).stdout

    where = run("-c", "import asr_train, launch; print(asr_train.__file__, launch.__file__)")
    assert where.split() == [str(site / "asr_train" / "__init__.py"), str(site / "launch" / "__init__.py")]
    assert "* name: demo" in run("-m", "launch.cli", "show", "demo")
    assert f"run directory: {elsewhere}" in run(str(site / "bin" / "wavefleet"), "show", "minds14")
    code = "from launch.site.cluster import load_cluster; print(load_cluster('test').nodes)"
    assert run("-c", code).strip() == "2"
    code = "from asr_train import resources; print(resources.find('accelerate_configs', 'cpu'))"
    assert run("-c", code).strip() == str(site / "asr_train" / "share" / "accelerate_configs" / "cpu.yaml")
