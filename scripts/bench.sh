#!/bin/bash
# scripts/bench.sh [CASE...]: measures Pageferry beside CRIU, side by side. Needs root. Prints Markdown.
#
# Cases (all by default): full tls link precopy small growth; docs/benchmarks.md says what each is. Writes
# results.md, results.json and plots to $OUT (target/bench).
#
# Environment: RUNS (5), MIB (1024 4096 8192: processes of `full`), GROWTH_GIB (16: the largest of
# `growth`), TMPFS (/dev/shm), TMPDIR (/tmp: images on disk).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case "${1-}" in
    -*) usage; exit 2 ;;
esac
[ "$(id -u)" -eq 0 ] || die "run as root"
cd "${repo:?}"
scripts/setup
need crit iperf3 ip tc nsenter java redis-server
PAGEFERRY_CRIU=$(scripts/install-criu)
export PAGEFERRY_CRIU
cargo build --quiet --release --workspace --bins
processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p)
memory=$(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo)
disk=$(df --output=fstype "${TMPDIR:-/tmp}" | tail -n 1)
MACHINE="${processor:-unknown processor}, $(nproc) processors, $memory, Linux $(uname -r), disk: $disk"
export MACHINE
exec target/release/bench "$@"
