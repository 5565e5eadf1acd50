"""Third-party files that the book does not carry: fetched once from npm at fixed versions, verified, cached.

Two groups: what the site serves itself, and tools for its tests, which are never served.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from tools import book


class Package(NamedTuple):
    """An npm package: its folder here, the SHA-256 of its tarball, the files taken, the folder cut from their names."""

    folder: str
    name: str
    version: str
    sha256: str
    wanted: tuple[str, ...]
    cut: str = ""

    @property
    def served(self) -> bool:
        return self.folder.startswith("vendor/")

    @property
    def target(self) -> Path:
        return (CACHE if self.served else TOOLS) / self.folder


CACHE = book.BUILD / "vendor"  # all of it becomes part of the site's static files
TOOLS = book.BUILD / "test-tools"
PACKAGES = (
    Package(
        "vendor/mathjax",
        "mathjax",
        "3.2.2",
        "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
        ("LICENSE", "es5/tex-chtml.js", "es5/output/chtml/fonts/woff-v2/*", "es5/input/tex/extensions/*"),
        cut="es5/",
    ),
    Package(
        "vendor/html-manager",
        "@jupyter-widgets/html-manager",
        "1.0.15",
        "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638",
        # the package names its licence, BSD-3-Clause, in package.json only
        ("package.json", "dist/embed.js", "dist/embed.js.LICENSE.txt", "dist/*.woff2"),
        cut="dist/",
    ),
    Package(
        "axe-core",
        "axe-core",
        "4.14.1",
        "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
        ("LICENSE", "LICENSE-3RD-PARTY.txt", "axe.min.js"),
    ),
    Package(
        "vnu-jar",
        "vnu-jar",
        "26.9.27",
        "5970d3ffca91a627cf0965e5d91bb2e4242307c29292998de0b419d6a901b2b7",
        ("LICENSE", "build/dist/vnu.jar"),
        cut="build/dist/",
    ),
)


def obtain(package: Package) -> Path | None:
    """The folder with the unpacked files; None, with a plain message, where they cannot be had."""
    name, version, target = package.name, package.version, package.target
    if (target / f".{version}").is_file():
        return target
    if not shutil.which("npm"):
        print(f"npm is not installed, so {name} {version} cannot be fetched (Debian, Ubuntu: apt install npm).")
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        got = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if got.returncode:
            print(
                f"npm could not fetch {name} {version}: {(got.stderr.strip().splitlines() or ['no reason given'])[0]}"
            )
            return None
        archive = next(Path(folder).glob("*.tgz"))
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != package.sha256:
            raise SystemExit(f"{name} {version} is not the expected file: SHA-256 {found}, expected {package.sha256}.")
        shutil.rmtree(target, ignore_errors=True)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                inner = member.name.removeprefix("package/")
                if member.isfile() and any(fnmatchcase(inner, want) for want in package.wanted):
                    path = target / inner.removeprefix(package.cut)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    stream = tar.extractfile(member)
                    assert stream is not None
                    path.write_bytes(stream.read())
    (target / f".{version}").touch()
    return target


def fetch() -> Path | None:
    """The folder of the files that the site serves; None where they cannot be had."""
    if not all(obtain(package) for package in PACKAGES if package.served):
        print("The pages will load MathJax and the widget manager from their public CDNs instead of from the site.")
        return None
    return CACHE


def tool(name: str) -> Path | None:
    """The folder of a tool of the tests, ``axe-core`` or ``vnu-jar``; None where it cannot be had."""
    return obtain(next(package for package in PACKAGES if package.folder == name))
