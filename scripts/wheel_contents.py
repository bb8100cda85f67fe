"""wheel_contents.py WHEEL CHECKOUT: the wheel holds every file of our folders, under its installed name, and nothing else."""

from __future__ import annotations

import configparser
import os
import sys
import zipfile
from pathlib import Path

NOT_SHIPPED = {".md", ".pyc"}


def expected(root: Path) -> set[str]:
    """Installed names of all files in the mapped folders: package_dir in setup.cfg says which folder becomes which package."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    mapping = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    names = set()
    for package, folder in mapping.items():
        for path, _, files in os.walk(root / folder):
            inside = Path(path).relative_to(root / folder)
            names |= {(Path(package.replace(".", "/")) / inside / file).as_posix() for file in files if Path(file).suffix not in NOT_SHIPPED}
    return names


def main(wheel: str, checkout: str) -> int:
    """Prints what is missing or too much; 1 if anything is."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = {name.rsplit("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name} & {"LICENSE", "NOTICE"}
    wanted = expected(Path(checkout))
    problems = [f"missing in the wheel: {name}" for name in sorted(wanted - names)]
    problems += [f"not wanted in the wheel: {name}" for name in sorted(names - wanted)]
    if "edgeadapt/py.typed" not in names:
        problems.append("missing in the wheel: edgeadapt/py.typed")
    if len(licences) != 2:
        problems.append("LICENSE and NOTICE are not both in the wheel")
    print("\n".join(problems) or f"{Path(wheel).name}: {len(names)} files, {Path(wheel).stat().st_size // 1024} KiB")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
