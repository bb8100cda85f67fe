#!/usr/bin/env bash
# test-arm64.sh PYTHON FOLDER [4|5] [pytest arguments | --run SCRIPT ARGUMENTS]: the device tests on aarch64 Python 3.11 with the aarch64 wheels, under qemu's user emulation.
# For an x86-64 Debian host; nothing is installed on it and no root is needed. FOLDER keeps what was fetched. 4 or 5 is the Raspberry Pi whose CPU is emulated.
# Function and byte counts mean something there; times and resident sizes do not, and memory limits are not enforced, so tests marked `native` are left out.
set -euo pipefail

python=$(realpath -s -- "$1")
folder=$(realpath -m -- "$2")
shift 2
board=5
if [[ ${1:-} == [45] ]]; then
  board=$1
  shift
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root=$PWD
for tool in apt-get dpkg-deb unshare; do
  command -v "$tool" >/dev/null || { echo "test-arm64: $tool is not here; this needs an x86-64 Debian"; exit 1; }
done

# The versions that the development environment has, so that both sides compare alike.
wheels=$("$python" - <<'EOF'
import importlib.metadata as m
names = "onnxruntime numpy onnx ml_dtypes flatbuffers packaging protobuf typing_extensions pyserial pillow pytest pluggy iniconfig pygments hypothesis sortedcontainers"
print(*(f"{name}=={m.version(name)}" for name in names.split()))
EOF
)
key=$(echo "$wheels" | sha256sum)
if [[ $(cat "$folder/ready" 2>/dev/null) != "$key" ]]; then
  rm -rf "$folder"
  mkdir -p "$folder"/{root/proc,qemu,site,apt/lists/partial,deb/partial}
  : >"$folder/apt/status"
  apt=(-qq -o Dir::State="$folder/apt" -o Dir::State::lists="$folder/apt/lists" -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt"
    -o Dir::Cache::archives="$folder/deb" -o Dir::Etc::sourcelist="${APT_SOURCES:-/etc/apt/sources.list.d/debian.sources}" -o Dir::Etc::sourceparts=-
    -o APT::Architecture=arm64 -o APT::Architectures= -o APT::Architectures::=arm64 -o APT::Architectures::=amd64
    -o Debug::NoLocking=1 -o APT::Update::Post-Invoke= -o DPkg::Post-Invoke=)
  apt-get "${apt[@]}" update
  (cd "$folder/apt" && apt-get "${apt[@]}" download qemu-user-static:amd64)
  dpkg-deb --fsys-tarfile "$folder"/apt/qemu-user-static_*.deb | tar -x -C "$folder/qemu" ./usr/bin/qemu-aarch64-static
  apt-get "${apt[@]}" -y --no-install-recommends --download-only install python3 libstdc++6
  for package in "$folder"/deb/*.deb; do dpkg-deb -x "$package" "$folder/root"; done
  # shellcheck disable=SC2086
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 --platform any \
    -d "$folder/wheels" $wheels
  for wheel in "$folder"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$folder/site"; done
  rm -rf "$folder"/{apt,deb,wheels}
  echo "$key" >"$folder/ready"
fi

# /proc/cpuinfo must agree with QEMU_CPU: without the file onnxruntime's import crashes, with another board's its int8 kernels meet an illegal instruction.
case $board in
4) cpu=cortex-a72 part=0xd08 variant=0x0 revision=3 features='fp asimd evtstrm crc32 cpuid' ;;
5) cpu=cortex-a76 part=0xd0b variant=0x4 revision=1 features='fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp' ;;
esac
for core in 0 1 2 3; do
  printf 'processor\t: %d\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$core" "$features"
  printf 'CPU variant\t: %s\nCPU part\t: %s\nCPU revision\t: %s\n\n' "$variant" "$part" "$revision"
done >"$folder/root/proc/cpuinfo"

export PYTHONHOME=$folder/root/usr PYTHONPATH=$folder/site:$root PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1 OPENBLAS_NUM_THREADS=1
export QEMU_CPU=$cpu QEMU_LD_PREFIX=$folder/root QEMU=$folder/qemu/usr/bin/qemu-aarch64-static GUEST=$folder/root/usr/bin/python3.11
unset LD_LIBRARY_PATH
# Children started with sys.executable need the kernel to know the format: registered in a user namespace of our own (Linux 6.7 or later), not on the host.
# shellcheck disable=SC2016
exec unshare --user --map-root-user --mount sh -ec '
  mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  magic="\\x7fELF\\x02\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\xb7\\x00"
  mask="\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff"
  printf "%s" ":edgeadapt-arm64:M::$magic:$mask:$QEMU:F" >/proc/sys/fs/binfmt_misc/register
  if [ "${1:-}" = --run ]; then
    shift
    exec "$GUEST" "$@"
  fi
  exec "$GUEST" -m pytest -p no:cacheprovider -m "device and not native and not slow" "$@"' sh "$@"
