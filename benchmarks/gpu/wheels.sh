#!/usr/bin/env bash
# Collects, into a folder, the wheels that these scripts need beside PyTorch, for Python 3.12 on
# x86-64 Linux. Where there is a network: wheels.sh runs/wheels, then take the folder along.
set -euo pipefail
[ $# = 1 ] || { echo "usage: [PYTHON=python3] $0 FOLDER"; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$1"

version() { sed -n "s/^$1==//p" "$root/requirements.txt"; }
packages=("ogbench==$(version ogbench)" "gymnasium==$(version gymnasium)"
  "mujoco==$(version mujoco)" "mujoco-core==$(version mujoco)" dm_control==1.0.50 dm-env dm-tree
  labmaze glfw pyopengl farama-notifications tyro docstring-parser typeguard)
platforms=(--platform manylinux2014_x86_64)
for n in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" --dest "$1" "${packages[@]}"

# The largest by far holds models and textures that OGBench never reads.
"$python" - "$1" <<'EOP'
import pathlib
import sys
import zipfile

wheel = next(pathlib.Path(sys.argv[1]).glob("dm_control-*.whl"))
slim = wheel.with_suffix(".slim")
with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as target:
    for entry in source.infolist():
        if not entry.filename.startswith(("dm_control/locomotion/", "dm_control/suite/")):
            target.writestr(entry, source.read(entry))
slim.replace(wheel)
EOP
du -sh "$1"
