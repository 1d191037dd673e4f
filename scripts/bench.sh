#!/bin/bash
# Measures how fast memory is sent over loopback and kept, in the clear and with certificates, side by
# side, with images on tmpfs and on disk. Prints Markdown.
#
# Environment: MIB (1024), RUNS (5).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -eq 0 ] || { usage; exit 2; }
cd "${repo:?}"
cargo build --quiet --release --workspace --bins
processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p)
printf '%s, %s processors, Linux %s\n' "${processor:-unknown processor}" "$(nproc)" "$(uname -r)"
printf '\nImages on tmpfs:\n\n'
TMPDIR=/dev/shm target/release/bench
printf '\nImages on disk (%s):\n\n' "${TMPDIR:-/tmp}"
target/release/bench
