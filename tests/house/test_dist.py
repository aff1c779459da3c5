"""What is published: an sdist that can be built from, and a wheel that needs nothing but the system's own libraries.

`make dist` has these tests look at dist/, by TORCHLAMB_DIST; otherwise they build for themselves.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from loading import HANGS, ROOT

import torchlamb

SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    if "TORCHLAMB_DIST" in os.environ:
        return Path(os.environ["TORCHLAMB_DIST"])
    built, repaired = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("dist")
    run = {"check": True, "timeout": HANGS, "capture_output": True}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", "build", "--outdir", built, ROOT], **run)
    subprocess.run(
        [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, *built.glob("*.whl")], env=environment, **run
    )
    for sdist in built.glob("*.tar.gz"):
        sdist.rename(repaired / sdist.name)
    return repaired


def only(dist: Path, pattern: str) -> Path:
    (path,) = dist.glob(pattern)
    return path


def test_names(dist):
    assert only(dist, "*.tar.gz").name == f"torchlamb-{torchlamb.__version__}.tar.gz"
    name = only(dist, "*.whl").name
    assert re.fullmatch(
        rf"torchlamb-{re.escape(torchlamb.__version__)}-py3-none-manylinux_2_\d+_{platform.machine()}\.whl", name
    ), name


def test_the_sdist_has_what_is_needed_and_no_more(dist):
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO", "src/torchlamb/lamb.py", "src/torchlamb/py.typed"}
    csrc = ROOT / "src" / "torchlamb" / "backends" / "csrc"
    wanted |= {str(path.relative_to(ROOT)) for path in csrc.iterdir() if path.is_file()}
    assert wanted <= names
    assert not [name for name in names if re.search(r"__pycache__|^(out|build|dist|\.venv)/|\.(so|pyc)$", name)]


def test_the_wheel_has_the_library_and_its_kernels(dist):
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        names = set(wheel.namelist())
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    info = f"torchlamb-{torchlamb.__version__}.dist-info"
    more = {"torchlamb/py.typed", "torchlamb/backends/libtorchlamb_cpu.so"}
    more |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert {name for name in names if not name.endswith("/")} == sources | more  # nothing is grafted in, and no sources in C++


def test_the_kernels_need_the_system_only(dist):
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(only(dist, "*.whl")) as wheel, wheel.open("torchlamb/backends/libtorchlamb_cpu.so") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}
        paths = [tag for tag in dynamic.iter_tags() if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    assert needed <= SYSTEM
    assert not paths
