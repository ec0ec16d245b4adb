#!/system/bin/sh
# The bundled Python, through the bundled loader: the system's /lib and /usr are not used.
kit=$(cd "$(dirname "$0")" && pwd) || exit 126
export PYTHONHOME="$kit/py" PYTHONPATH="$kit/py/library.zip:$kit/py/lib-dynload:$kit/site"
export PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1
[ -x "$kit/executorch.sh" ] && export RANKSHIP_EXECUTORCH_RUNNER="$kit/executorch.sh"
# argv[0] is this file, so that sys.executable starts the bundle again and not the bare loader.
exec "$kit/lib/ld-linux-aarch64.so.1" --argv0 "$kit/py.sh" --library-path "$kit/lib" "$kit/bin/python3" "$@"
