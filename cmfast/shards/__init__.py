# SPDX-License-Identifier: MIT
"""Many samples as a folder of shards: .npz files, each of a range of samples, drawn here or on a Ray cluster.

    samples_00000000_00001024.npz    arr_0 images or samples, arr_1 labels, settings (JSON): what they were drawn with

A shard is written atomically, so the same command continues where another was stopped. `files` knows what a shard is,
`drawing` which ones are missing, `on_ray` how workers of a cluster draw them.
"""
