#!/bin/sh
# Makes .env for docker-compose.yml: cluster/example.env with random secrets, readable by its owner only.
set -eu
cd "$(dirname "$0")/.."
target=${1:-.env}
umask 077
set -C # a file that exists is not written over
while IFS= read -r line; do
    case $line in
        [A-Z]*=) line=$line$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') ;;
    esac
    printf '%s\n' "$line"
done < cluster/example.env > "$target"
echo "$target has random secrets; to change them, see docs/cluster.md"
