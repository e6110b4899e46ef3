#!/bin/sh
# SPDX-License-Identifier: MIT
# Install what tests/cpp compile with, by Debian package, where that is possible; tests that lack a tool are skipped.
missing=
for tool in g++:g++ clang++:clang clang++:libclang-rt-dev cmake:cmake pkg-config:pkg-config; do
  command -v "${tool%%:*}" > /dev/null || missing="$missing ${tool#*:}"
done
if [ -z "$missing" ] || [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# Not quoted: one word a package.
apt-get update -qq && apt-get install -qq -y --no-install-recommends $missing > /dev/null && exit 0
echo "not installed:$missing; tests that need them are skipped"
