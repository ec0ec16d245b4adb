#!/system/bin/sh
# The ExecuTorch runner, through the bundled loader.
kit=$(cd "$(dirname "$0")" && pwd) || exit 126
exec "$kit/lib/ld-linux-aarch64.so.1" --library-path "$kit/lib:$kit/executorch" "$kit/executorch/rankship-executorch" "$@"
