#!/bin/sh
# Runs a compiler command and keeps what it says in <object>.log: "sh keep_log.sh COMPILER ... -o OBJECT ...".
object=
previous=
for argument; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
if [ -z "$object" ]; then exec "$@"; fi
"$@" >"$object.log" 2>&1
status=$?
if [ "$status" -ne 0 ]; then cat "$object.log" >&2; fi
exit "$status"
