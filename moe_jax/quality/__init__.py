"""How good a model of images is, in figures and in pictures.

Knows nothing of training: functions of arrays, and of a denoiser. `denoising` is the
held-out loss by noise time. `classifier` learns the data's classes; in its features
`frechet`, `kid` and `nearest` compare samples with real images, and `samples` joins
them. `expert_use` says what experts are used for, `heat_maps` draws it, and `pictures`
makes PNG files.
"""
