# Shared by the scripts in this folder; sourced, not run.
# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is used there

# The folder that holds the workspace.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A rustup installation may be there without being in PATH (cron, sudo, CI).
command -v cargo > /dev/null || PATH=$PATH:$HOME/.cargo/bin
cache_home=${XDG_CACHE_HOME:-$HOME/.cache}

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 1; }

# Prints the calling script's header comment, its help.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# need COMMAND...: stop unless all of them are there.
need() {
    local command
    for command; do
        command -v "$command" > /dev/null || die "'$command' is missing: run scripts/setup"
    done
}

# Prints the path of cargo-deny: the one in PATH, else the one that scripts/setup has installed.
cargo_deny() {
    command -v cargo-deny || printf '%s\n' "$cache_home/pageferry-cargo-deny/bin/cargo-deny"
}

# The Debian archive that this machine already uses, whichever file names it.
debian_mirror() {
    local uri
    # shellcheck disable=SC2016  # apt expands it, not the shell
    uri=$(apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sed -n 1p)
    [ -n "$uri" ] || die "apt knows no Debian archive: run apt-get update (and see /etc/apt if that does not help)"
    printf '%s\n' "$uri"
}

# debian_extract SUITE FOLDER PACKAGES: unpacks packages and what they depend on into a new FOLDER.
# Signatures are checked, maintainer scripts never run, nothing is installed on this machine.
debian_extract() {
    local suite=$1 folder=$2 packages=$3 mirror
    mirror=$(debian_mirror)
    rm -rf "$folder"
    mkdir -p "$folder"
    # A mirror that stands still is as good as any other: its age is no reason to refuse it.
    if ! mmdebstrap --variant=extract --include="$packages" --aptopt='Acquire::Check-Valid-Until "false"' \
        "$suite" "$folder" "deb $mirror $suite main" > "$folder.log" 2>&1; then
        tail -n 15 "$folder.log" >&2
        die "cannot unpack $packages of Debian $suite (log: $folder.log); does $mirror carry $suite?"
    fi
    rm -rf "$folder.log" "$folder"/usr/share/{doc,man,locale,info,lintian,bash-completion} \
        "$folder"/var/{lib,cache}/{apt,dpkg}
}

# replace_folder OLD NEW: puts NEW where OLD is, if OLD is one of ours (they have a stamp), empty or absent.
replace_folder() {
    [ -z "$(ls -A "$1" 2> /dev/null)" ] || [ -e "$1/stamp" ] ||
        die "$1 has other things in it: name another folder, or empty it"
    rm -rf "$1"
    mv "$2" "$1"
}
