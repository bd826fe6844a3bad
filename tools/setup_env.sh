#!/usr/bin/env bash
# Creates .venv and installs the pinned requirements and this package into it. `make` calls this whenever the
# requirements have changed since the last time; PYTHON=/path/to/python3 chooses another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=$1

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python of at least 3.10 found (tried ${PYTHON:-python3, python3.13 ... python3.10, python});" \
        "install one, or name it: make PYTHON=/path/to/python3 ..." >&2
    return 1
}

if ! usable .venv/bin/python; then
    python=$(find_python)
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        echo "setup: $python cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
    echo "setup: creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
echo "setup: installing the requirements into .venv (a few minutes and about 6 GB the first time)"
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet)
"${pip[@]}" -r requirements-dev.txt
"${pip[@]}" --no-deps -e .
rm -f .venv/.installed-*
touch "$stamp"
