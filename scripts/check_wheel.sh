#!/usr/bin/env bash
# check_wheel.sh PYTHON: build sdist and wheel, look at what is in the wheel, and run a part of the tests against the installed wheel, away from the checkout.
# PYTHON is the development environment's. A second, empty environment sees its libraries through one path entry; its editable install stays out of sight,
# because .pth files found on such an entry are not read.
set -euo pipefail

python=$(realpath -s -- "$1")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root=$PWD
work=$(mktemp -d "${TMPDIR:-/tmp}/edgeadapt-wheel.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Built from a copy: the build writes beside its sources, and other checks may be reading the checkout just then.
mkdir "$work/source"
cp -R setup.cfg pyproject.toml README.md LICENSE NOTICE edgeadapt exporters runtime devices "$work/source/"
"$python" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheels=("$work"/dist/*.whl)
"$python" scripts/wheel_contents.py "${wheels[0]}" "$root"

"$python" -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m pip --python "$work/venv/bin/python" install --quiet --disable-pip-version-check --no-deps --no-index "${wheels[0]}"
echo "$libraries" >"$site/development.pth"

mkdir "$work/run"
cp -R tests docs benchmarks examples "$work/run/" # the tests, and what they look at
cp setup.cfg "$work/run/setup.cfg"
cd -- "$work/run"
"$work/venv/bin/edgeadapt" --version
where=$("$work/venv/bin/python" -c 'import edgeadapt, edgeadapt.runtime, edgeadapt.devices, edgeadapt.exporters
print(*{p.__file__ for p in (edgeadapt, edgeadapt.runtime, edgeadapt.devices, edgeadapt.exporters)})')
for file in $where; do
  [[ $file == "$site"/* ]] || { echo "imported from $file, not from the wheel in $site"; exit 1; }
done
# What a wheel can break is what it leaves out or cannot find: commands, files beside the code, ways in. All other device tests run in the checkout, and
# with the oldest onnxruntime.
parts=(tests/test_{adapter,bench_cli,bench_record,boards,bundle,cli_export,cli_inspect,cli_run,corruptions,demo,doctor,export,imports,library,packaging}.py)
exec env -u PYTHONPATH "$work/venv/bin/python" -m pytest -q -p no:cacheprovider -m "(device or smoke) and not slow" "${parts[@]}"
