#!/usr/bin/env bash
# Passes the tests: lint, import rules, pytest. Makes its own environment; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
ruff check .
lint-imports
exec python -m pytest "$@"
