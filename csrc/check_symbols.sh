#!/bin/sh
# check_symbols.sh NM OBJECT...: fails if an object defines a symbol that the linker may merge with
# another object's (a weak or unique one).
nm=$1
shift
for object in "$@"; do
    shared=$("$nm" -C "$object" | grep -E ' [WVu] ')
    if [ -n "$shared" ]; then
        echo "$object shares code with other instruction sets:" >&2
        echo "$shared" >&2
        exit 1
    fi
done
