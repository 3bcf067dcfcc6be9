#!/bin/sh
# Create .env for docker-compose.yml: cluster/example.env with random secrets, readable only by its owner.
set -eu
cd "$(dirname "$0")/.."
target=${1:-.env}
umask 077
set -C # never overwrite an existing file
while IFS= read -r line; do
    case $line in
        [A-Z]*=) line=$line$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') ;;
    esac
    printf '%s\n' "$line"
done < cluster/example.env > "$target"
echo "$target has random secrets; to change them, see docs/cluster.md"
