#!/usr/bin/env bash
# Builds the source distribution, the wheel from it, and runs the wheel in an environment of its own from an empty folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
environment=$root/build/wheel-environment
rm -rf "$root/build/lib" "$root/build/wheel"
mkdir -p "$root/build/wheel"
(cd "$root" && .venv/bin/python -c "import setuptools.build_meta as s; s.build_sdist('build/wheel')" > "$root/build/sdist.log")
"$root/.venv/bin/pip" wheel -q --no-deps --wheel-dir "$root/build/wheel" "$root"/build/wheel/*.tar.gz
[ -x "$environment/bin/python" ] || "$root/.venv/bin/python" -m venv "$environment"
"$environment/bin/pip" install -q --disable-pip-version-check -c "$root/constraints.txt" "$root"/build/wheel/*.whl
"$environment/bin/pip" install -q --disable-pip-version-check --no-deps --force-reinstall "$root"/build/wheel/*.whl

empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
cd "$empty"
"$environment/bin/gated-llama" --version
"$environment/bin/python" "$root/tests/programs/try_wheel.py"
[ -f "$("$environment/bin/python" -c "import modeling_gated as m; print(m.__path__[0])")/py.typed" ]
