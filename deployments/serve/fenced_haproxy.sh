#!/bin/sh
# Runs HAProxy closed to other machines and users: Serve lets its metrics (9101) and statistics (8404) listen on all
# interfaces, any user write to its admin socket, and whoever sends half of a header hold a connection for an hour.
# Serve writes the config file before each start, then calls this.
set -eu
for argument in "$@"; do
  case "$argument" in
    *.cfg*)
      sed -i -e 's/^\( *bind \)\*\{0,1\}:/\1127.0.0.1:/' -e 's/ mode 666 level admin/ mode 600 level admin/' \
        -e '/^ *timeout http-request 30s$/d' -e '/^defaults/a\    timeout http-request 30s' "$argument" ;;
  esac
done
exec "${STAGEMESH_HAPROXY:?the HAProxy to run}" "$@"
