"""Third-party scripts that the site serves itself: fetched once from npm at fixed versions, verified, cached."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tools import book

# package, version, SHA-256 of the tarball, what is taken from it
PACKAGES = (
    (
        "mathjax",
        "3.2.2",
        "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
        ("es5/tex-chtml.js", "es5/output/chtml/fonts/woff-v2/", "es5/input/tex/extensions/"),
    ),
)
CACHE = book.BUILD / "vendor"


def fetch() -> Path | None:
    """The folder with the unpacked files; None, with a plain message, where they cannot be had."""
    for name, version, sha256, wanted in PACKAGES:
        target = CACHE / "vendor" / name
        if (target / f".{version}").is_file():
            continue
        if not shutil.which("npm"):
            print(f"npm is not installed: the pages will load {name} from its public CDN instead of from the site.")
            return None
        with tempfile.TemporaryDirectory() as folder:
            got = subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=folder, capture_output=True, text=True)
            if got.returncode:
                print(f"npm could not fetch {name} {version}: the pages will load it from its public CDN.")
                return None
            archive = next(Path(folder).glob("*.tgz"))
            if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != sha256:
                raise SystemExit(f"{name} {version} is not the expected file: SHA-256 {found}, expected {sha256}.")
            shutil.rmtree(target, ignore_errors=True)
            with tarfile.open(archive) as tar:
                for member in tar.getmembers():
                    inner = member.name.removeprefix("package/")
                    if member.isfile() and (inner == "LICENSE" or inner.startswith(wanted)):
                        path = target / inner.removeprefix("es5/")
                        path.parent.mkdir(parents=True, exist_ok=True)
                        stream = tar.extractfile(member)
                        assert stream is not None
                        path.write_bytes(stream.read())
        (target / f".{version}").touch()
    return CACHE
