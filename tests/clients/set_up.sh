#!/bin/sh
# Sets up the clients that tests/clients drives in .clients, once: needs Python, Node with npm, Java 17 or newer, and registries.
set -e
cd "$(dirname "$0")/../.."
for name in agents instructor evaluation; do
    if ! cmp -s "tests/clients/requirements/$name.txt" ".clients/$name/made-from"; then
        rm -rf ".clients/$name"
        "${PYTHON:-python3}" -m venv ".clients/$name"
        ".clients/$name/bin/python" -m pip install --quiet --upgrade pip
        ".clients/$name/bin/python" -m pip install --quiet -r "tests/clients/requirements/$name.txt"
        cp "tests/clients/requirements/$name.txt" ".clients/$name/made-from"
    fi
done
mkdir -p .clients/js
cp tests/clients/package.json .clients/js
npm install --prefix .clients/js --no-audit --no-fund --silent
