#!/bin/bash
# A supervisor in about 30 lines: the six steps, one program each, meeting in a directory.
#
#   scripts/v2v-by-hand.sh -i disk GUEST.img [DISK…] -o local -os DIR [virt-v2v's other options]
#
# It does what virt-v2v-async does, without watching the servers or showing progress. V2V_BIN is
# where the helper-v2v-* programs are (default: .venv/bin beside this folder).
set -euo pipefail
bin=${V2V_BIN:-$(cd "$(dirname "$0")/.." && pwd)/.venv/bin}
input=disk output=local
for ((n = 1; n < $#; n++)); do
    m=$((n + 1))
    case ${!n} in
        -i) input=${!m} ;;
        -o) output=${!m} ;;
    esac
done
[ "$input" != local ] || input=disk
[ "$output" != disk ] || output=local

dir=$(mktemp -d "${TMPDIR:-/var/tmp}/v2v.XXXXXX")
finish() {
    status=$?
    [ "$status" -eq 0 ] || tail -n 5 "$dir"/log/*.log >&2 || true
    "$bin/v2v-async" clean -q "$dir" || status=1
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

"$bin/helper-v2v-input-$input" --v2vdir "$dir" "$@"
"$bin/helper-v2v-convert" --v2vdir "$dir" "$@"
"$bin/helper-v2v-output-$output" --v2vdir "$dir" setup "$@"
"$bin/helper-v2v-copy" --v2vdir "$dir" "$@"
"$bin/helper-v2v-output-$output" --v2vdir "$dir" final "$@"
