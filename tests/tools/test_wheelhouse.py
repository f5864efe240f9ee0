import hashlib
import json
import sys
import zipfile

import pytest

from tests.tools.scripts import TOOLS, loaded


@pytest.fixture(scope="module")
def wheelhouse():
    yield from loaded("wheelhouse")


@pytest.fixture
def folder(tmp_path):
    """A wheelhouse with one small package in it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    name, info = "omegaconf-9.0-py3-none-any.whl", "omegaconf-9.0.dist-info"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("omegaconf.py", "value = 1\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: omegaconf\nVersion: 9.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()}
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    (folder / "wheelhouse.json").write_text(json.dumps({"python": here, "files": files}))
    return folder


def test_what_is_left_out_takes_along_what_only_it_needs(wheelhouse):
    everything = wheelhouse.needed("3.11", set())
    assert {"torch", "boto3", "botocore", "megatron-core", "deepspeed", "wandb"} <= everything.keys()
    small = wheelhouse.needed("3.11", {"torch", "boto3"})
    assert not {"torch", "boto3", "botocore"} & small.keys()
    assert {"megatron-core", "mosaicml-streaming", "omegaconf"} <= small.keys()
    assert wheelhouse.needed("3.12", {"torch"})["megatron-core"] == "0.19.2"


def test_a_freeze_is_read(wheelhouse, tmp_path):
    file = tmp_path / "host.txt"
    file.write_text("torch==2.11.0+cu130\nPyYAML==6.0\nlocal_thing @ file:///somewhere\n# comment\n")
    assert wheelhouse.frozen(file) == {"torch", "pyyaml", "local-thing"}


def test_install_puts_the_packages_there_and_tries_them(wheelhouse, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheelhouse, "IMPORTS", ("omegaconf",))
    assert wheelhouse.main(["install", str(folder), "--target", str(tmp_path / "site")]) == 0
    assert (tmp_path / "site" / "omegaconf.py").read_text() == "value = 1\n"
    assert f"export PYTHONPATH={TOOLS.parent}:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda facts: facts.update(python="3.4"), "is for Python 3.4"),
        (lambda facts: facts["files"].update({"omegaconf-9.0-py3-none-any.whl": "0"}), "is missing or damaged"),
        (lambda facts: facts["files"].update({"absent.whl": "0"}), "is missing or damaged"),
    ],
)
def test_a_wrong_wheelhouse_is_refused(damage, sentence, wheelhouse, folder, tmp_path, capsys):
    facts = json.loads((folder / "wheelhouse.json").read_text())
    damage(facts)
    (folder / "wheelhouse.json").write_text(json.dumps(facts))
    assert wheelhouse.main(["install", str(folder), "--target", str(tmp_path / "site")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_a_package_that_does_not_import_is_named(wheelhouse, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheelhouse, "IMPORTS", ("omegaconf", "no_such_package"))
    assert wheelhouse.main(["install", str(folder), "--target", str(tmp_path / "site")]) == 2
    assert "import no_such_package fails" in capsys.readouterr().err


def test_a_folder_that_is_none(wheelhouse, tmp_path, capsys):
    assert wheelhouse.main(["install", str(tmp_path), "--target", str(tmp_path / "site")]) == 2
    assert "is not a wheelhouse" in capsys.readouterr().err
