"""From images, or latents of them, to batches.

`sources/` gives examples, `pixels` makes them arrays of one kind, `array_file` stores
those once in flat files, `augment` mirrors and shifts, and `pipeline` joins them:
`prepare(data)` gives an `ImageData`, whose batches depend only on the config, the
images and the step, never on the number of hosts.
"""
