"""From text to batches of token rows, and from images to batches of images.

`sources/` gives documents, `tokenizers` turns them into ids, `token_file` stores those
once in flat files, `packing` defines row n of a split, and `pipeline` joins them:
`prepare(config)` gives a `TextData`, of one source or a mixture of several, whose
batches depend only on the config, the text and the step, never on the number of hosts.
`baselines` compresses the same text with gzip and an order-2 byte model. Nothing here
needs TensorFlow but TFDS datasets that were prepared as tfrecord.

`images/` does the same for images. `order` says which rows are in which batch, and
`prepared` keeps the folders of both.
"""
