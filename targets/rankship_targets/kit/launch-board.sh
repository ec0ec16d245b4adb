#!/bin/sh
# The board's own Python, with this kit's packages first on its path.
kit=$(cd "$(dirname "$0")/.." && pwd) || exit 126
export PYTHONPATH="$kit/site" PYTHONNOUSERSITE=1
[ -x "$kit/executorch/rankship-executorch" ] && export RANKSHIP_EXECUTORCH_RUNNER="$kit/executorch/rankship-executorch"
exec @INTERPRETER@ "$@"
