#!/bin/sh
# SPDX-License-Identifier: MIT
# Get what tests/web run on, where that is possible: Chromium by Debian package, onnxruntime-web by npm, into build/web.
# Tests that lack a tool are skipped.
if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  (apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium) > /dev/null ||
    echo "not installed: chromium; tests that need it are skipped"
fi
wanted=onnxruntime-web@1.30.0 # cmfast_export.targets.web.runtime.TESTED, by a test
if [ ! -d build/web/onnxruntime-web/dist ] && command -v npm > /dev/null; then
  mkdir -p build/web
  if (cd build/web && npm pack --silent "$wanted" && tar -xzf ./*.tgz && mv package onnxruntime-web) > /dev/null; then
    rm -f build/web/*.tgz
  else
    echo "not fetched: $wanted; tests that need it are skipped"
  fi
fi
exit 0
