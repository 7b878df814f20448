#!/bin/sh
# Finds a Python that fits and hands over to setup.py. Environment: PYTHON (an interpreter), DEVICE (cpu or gpu).
set -eu
cd "$(dirname "$0")/.."

fits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    if ! command -v "$PYTHON" >/dev/null 2>&1; then
        echo "setup: there is no '$PYTHON' here (PYTHON=$PYTHON)" >&2
        exit 1
    fi
    if ! fits "$PYTHON"; then
        echo "setup: mrlhf needs Python 3.11 or newer; $PYTHON is $("$PYTHON" -V 2>&1 | head -n 1)" >&2
        echo "  fix: PYTHON=python3.11 make setup" >&2
        exit 1
    fi
    exec "$PYTHON" scripts/setup.py
fi

for candidate in .venv/bin/python python3 python3.13 python3.12 python3.11 python3.14; do
    if fits "$candidate"; then
        exec "$candidate" scripts/setup.py
    fi
done
if command -v python3 >/dev/null 2>&1; then
    echo "setup: mrlhf needs Python 3.11 or newer; python3 is $(python3 -V 2>&1 | head -n 1), and no python3.11 to python3.14 is on PATH" >&2
else
    echo "setup: mrlhf needs Python 3.11 or newer, and there is no python3 on PATH" >&2
fi
echo "  fix: install Python 3.11+, then 'make setup', or 'PYTHON=/path/to/python3.11 make setup'" >&2
exit 1
